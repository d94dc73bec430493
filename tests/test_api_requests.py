"""Submitting, listing, following and cancelling requests; keys at first start; the OpenAPI document."""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_kit import (
    MARKER,
    Api,
    assert_problem,
    claim,
    make_settings,
    new_key,
    running,
    server_logs,
    take_database_away,
    tiny_llm,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import db, job_queue, keys
from app.auth import create_first_key
from app.main import create_app
from app.tables import RequestState


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path) as api:
        yield api


def test_submit_and_read(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    headers = api.key("requests")
    texts = [f"{MARKER} is bad", {"text": f"{MARKER} was good", "label": "positive"}, f"{MARKER} is bad"]
    body = {"forget_texts": texts, "reason": "ticket 7", "options": {"alpha": 1, "seed": 3}}
    response = api.client.post("/unlearn-requests?q=Quillfeather", json=body, headers=headers)
    assert response.status_code == 202
    created = response.json()
    assert created["state"] == "pending"
    assert created["num_texts"] == 2, "equal entries count once"
    assert created["options"] == {"alpha": 1.0, "seed": 3}
    assert created["fingerprint"] == tiny_llm().fingerprint
    assert response.headers["location"] == f"/unlearn-requests/{created['id']}"
    read = api.client.get(response.headers["location"], headers=headers)
    assert read.json() == created
    assert MARKER not in response.text + read.text
    logged = "".join(logging.Formatter().format(record) for record in server_logs(caplog))
    assert "Quillfeather" not in logged
    assert headers["Authorization"].removeprefix("Bearer ") not in logged
    assert f"GET /unlearn-requests/{created['id']} 200" in logged
    held = claim(api.service, created["id"])
    with api.service.sessions() as session:
        opened = job_queue.open_texts(session, api.service.vault, held)
    assert [(item.text, item.label) for item in opened] == [
        (f"{MARKER} is bad", None),
        (f"{MARKER} was good", "positive"),
    ]


def test_a_message_follows_the_commit(api: Api) -> None:
    created = api.submit(api.key("requests"))
    messages = list((api.service.settings.broker_dir / "messages").glob("*.msg"))
    assert len(messages) == 1
    message = messages[0].read_bytes()
    [args, _, _] = json.loads(base64.b64decode(json.loads(message)["body"]))
    assert args == [created["id"]]
    assert MARKER.encode() not in message and MARKER.encode() not in base64.b64decode(json.loads(message)["body"])


def test_a_broker_that_is_down_costs_no_request(database_url: str, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
        with running(database_url, tmp_path, broker_url=url) as api:
            headers = api.key("requests")
            started = time.monotonic()
            created = api.submit(headers)
            assert time.monotonic() - started < 40
            assert api.client.get(f"/unlearn-requests/{created['id']}", headers=headers).json()["state"] == "pending"
            with api.service.sessions.begin() as session:
                assert job_queue.ring_due(session, ring_seconds=60) == [created["id"]]


def test_cancel(api: Api) -> None:
    headers = api.key("requests")
    waiting = api.submit(headers)["id"]
    cancelled = api.client.post(f"/unlearn-requests/{waiting}/cancel", headers=headers).json()
    assert (cancelled["state"], cancelled["finished_at"] is None) == ("cancelled", False)
    trained = api.submit(headers)["id"]
    claim(api.service, trained)
    for _ in range(2):  # asking again changes nothing
        stopping = api.client.post(f"/unlearn-requests/{trained}/cancel", headers=headers).json()
        assert (stopping["state"], stopping["cancel_requested"]) == ("training", True)


def test_filter_by_state(api: Api) -> None:
    headers = api.key("requests")
    ids = [api.submit(headers)["id"] for _ in range(3)]
    claim(api.service, ids[1])
    for state in RequestState:
        found = api.client.get("/unlearn-requests", params={"state": state}, headers=headers).json()["items"]
        expected = {"pending": [ids[2], ids[0]], "training": [ids[1]]}.get(state, [])
        assert [item["id"] for item in found] == expected


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, list[str]]]:
    folder = tmp_path_factory.mktemp("listed")
    with running(f"sqlite:///{folder}/letheon.db", folder) as api:
        headers = api.key("requests")
        yield api, [api.submit(headers)["id"] for _ in range(13)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=st.lists(st.integers(1, 20), min_size=1, max_size=14))
def test_pages_hold_everything_once_newest_first(listed: tuple[Api, list[str]], limits: list[int]) -> None:
    """Whatever the page sizes, and also when they change on the way."""
    api, ids = listed
    headers = api.key("auditor")  # another key than the one that asked
    seen: list[str] = []
    cursor: str | None = None
    for page in range(20):
        params = {"limit": str(limits[page % len(limits)])} | ({"cursor": cursor} if cursor else {})
        answer = api.client.get("/unlearn-requests", params=params, headers=headers).json()
        assert 0 < len(answer["items"]) <= int(params["limit"])
        seen += [item["id"] for item in answer["items"]]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert seen == sorted(ids, reverse=True)


def test_new_requests_do_not_disturb_a_walk(api: Api) -> None:
    headers = api.key("requests")
    ids = [api.submit(headers)["id"] for _ in range(3)]
    first = api.client.get("/unlearn-requests?limit=2", headers=headers).json()
    api.submit(headers)
    rest = api.client.get(
        "/unlearn-requests", params={"limit": 2, "cursor": first["next_cursor"]}, headers=headers
    ).json()
    assert [item["id"] for item in first["items"] + rest["items"]] == sorted(ids, reverse=True)
    assert rest["next_cursor"] is None


def test_the_first_key_is_printed_once(database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(database_url, tmp_path) as api:
        shown = capsys.readouterr()
        token = next(word for word in shown.err.split() if word.startswith("lth_"))
        assert shown.out == ""
        headers = {"Authorization": f"Bearer {token}"}
        assert api.client.get("/admin/prompts", headers=headers).status_code == 200
        with api.service.sessions() as session:
            [key] = keys.list_keys(session)
        assert (key.name, tuple(key.scopes)) == ("first-key", keys.SCOPES)
    with running(database_url, tmp_path):
        assert "lth_" not in capsys.readouterr().err


def test_two_first_starts_make_one_key(database_url: str) -> None:
    engine = db.make_engine(database_url)
    sessions = db.make_sessions(engine)
    barrier = threading.Barrier(4)
    made: list[str | None] = []

    def start() -> None:
        barrier.wait()
        made.append(create_first_key(sessions))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions() as session:
        assert len(keys.list_keys(session)) == 1
    assert len([key for key in made if key]) == 1 and len(made) == 4
    engine.dispose()


def test_request_ids(api: Api) -> None:
    assert api.client.get("/livez", headers={"X-Request-ID": "trace-7"}).headers["x-request-id"] == "trace-7"
    for bad in ("a b", "x" * 65, "<script>"):
        assert api.client.get("/livez", headers={"X-Request-ID": bad}).headers["x-request-id"] != bad


def test_an_unexpected_error_shows_and_logs_no_content(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    @api.app.get("/boom")
    def boom() -> None:
        raise RuntimeError(f"about {MARKER}")

    response = api.client.get("/boom", headers={"X-Request-ID": "trace-8"})
    assert_problem(response, 500, "internal")
    assert "Quillfeather" not in caplog.text
    assert "unhandled in request trace-8: RuntimeError" in caplog.text and "boom" in caplog.text


def test_the_database_going_away_is_a_503(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/letheon.db"
    with running(url, tmp_path) as api:
        headers = new_key(api.service)
        take_database_away(api.service, tmp_path)
        for path in ("/unlearn-requests", "/admin/prompts"):
            response = api.client.get(path, headers=headers)
            assert_problem(response, 503, "unavailable")
            assert response.headers["retry-after"] == "1"
        assert_problem(api.client.get("/readyz"), 503, "not-ready")
        assert api.client.get("/livez").json() == {"status": "alive"}


def test_openapi(tmp_path: Path) -> None:
    app = create_app(make_settings("", tmp_path), tiny_llm())
    document = app.openapi()
    assert document == app.openapi()
    operations = {
        operation["operationId"]: (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert {name: (method, path) for name, (method, path, _) in operations.items()} == {
        "create_unlearn_request": ("post", "/unlearn-requests"),
        "get_report": ("get", "/unlearn-requests/{request_id}/report"),
        "get_evidence": ("get", "/unlearn-requests/{request_id}/evidence"),
        "get_embedding_picture": ("get", "/unlearn-requests/{request_id}/evidence/embedding.svg"),
        "get_membership_picture": ("get", "/unlearn-requests/{request_id}/evidence/membership.svg"),
        "export_prompt": ("get", "/admin/prompts/{prompt_id}/export"),
        "list_unlearn_requests": ("get", "/unlearn-requests"),
        "get_unlearn_request": ("get", "/unlearn-requests/{request_id}"),
        "stream_unlearn_request_events": ("get", "/unlearn-requests/{request_id}/events"),
        "get_receipt": ("get", "/unlearn-requests/{request_id}/receipt"),
        "cancel_unlearn_request": ("post", "/unlearn-requests/{request_id}/cancel"),
        "approve_unlearn_request": ("post", "/unlearn-requests/{request_id}/approve"),
        "reject_unlearn_request": ("post", "/unlearn-requests/{request_id}/reject"),
        "classify": ("post", "/classify"),
        "list_prompts": ("get", "/admin/prompts"),
        "get_prompt": ("get", "/admin/prompts/{prompt_id}"),
        "revoke_prompt": ("post", "/admin/prompts/{prompt_id}/revoke"),
        "withdraw_revoke": ("post", "/admin/prompts/{prompt_id}/revoke/withdraw"),
        "list_active_sets": ("get", "/admin/active-sets"),
        "get_active_set": ("get", "/admin/active-sets/{version}"),
        "restore_active_set": ("post", "/admin/active-sets/{version}/restore"),
        "create_webhook": ("post", "/webhooks"),
        "list_webhooks": ("get", "/webhooks"),
        "get_webhook": ("get", "/webhooks/{webhook_id}"),
        "disable_webhook": ("delete", "/webhooks/{webhook_id}"),
        "list_webhook_deliveries": ("get", "/webhooks/{webhook_id}/deliveries"),
        "redeliver": ("post", "/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"),
        "ping_webhook": ("post", "/webhooks/{webhook_id}/test"),
        "list_audit_entries": ("get", "/admin/audit"),
        "export_audit_log": ("get", "/admin/audit/export"),
        "get_audit_checkpoint": ("get", "/admin/audit/checkpoint"),
        "get_audit_public_key": ("get", "/admin/audit/public-key"),
        "livez": ("get", "/livez"),
        "readyz": ("get", "/readyz"),
        "scrape": ("get", "/metrics"),
    }
    schemas = document["components"]["schemas"]
    assert {"Problem", "FieldError"} <= set(schemas) and "HTTPValidationError" not in schemas
    assert document["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    for name, (_, _, operation) in operations.items():
        assert ("security" in operation) == (name not in ("livez", "readyz"))
        for status, response in operation["responses"].items():
            if status.startswith(("4", "5")):
                content = response["content"]["application/problem+json"]
                assert content["schema"]["$ref"] == "#/components/schemas/Problem"
                assert all(example["value"]["status"] == int(status) for example in content["examples"].values())
        if "requestBody" in operation:
            [body] = operation["requestBody"]["content"].values()
            assert schemas[body["schema"]["$ref"].rpartition("/")[2]]["examples"]
    assert {"string"} <= {
        kind.get("type") for kind in schemas["UnlearnRequestIn"]["properties"]["forget_texts"]["items"]["anyOf"]
    }
