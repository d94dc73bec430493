"""Webhooks over HTTP: the secret is shown once, the URL to its owner, and other keys' webhooks do not exist."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_kit import MARKER, Api, assert_problem, running, server_logs
from databases import migrated_database
from sqlalchemy import select
from webhook_kit import Received, receiving, sender, sent_long_ago

from app.tables import AuditEntry

URL = "https://example.com/hook/Quillfeather"
NOBODY = "whk_" + "0" * 28
NOTHING = "dlv_" + "0" * 28


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running(migrated_database(tmp_path / "letheon.db"), tmp_path) as api:
        yield api


def test_from_creation_to_the_log(database_url: str, tmp_path: Path) -> None:
    def fails_first(_: Received) -> tuple[int, dict[str, str]]:
        return (500 if len(receiver.received) == 1 else 200), {}

    with running(database_url, tmp_path, webhook_private=True) as api, receiving(fails_first) as receiver:
        headers = api.key("requests")
        body = {"url": receiver.url(), "states": ["cancelled"]}
        made = api.client.post("/webhooks", json=body, headers=headers)
        assert made.status_code == 201, made.text
        hook = made.json()
        assert hook["secret"].startswith("whsec_") and hook["states"] == ["cancelled"] and hook["url"] == body["url"]
        address = f"/webhooks/{hook['id']}"
        seen = api.client.get(address, headers=headers).json()
        assert seen == {name: value for name, value in hook.items() if name != "secret"}
        assert api.client.get("/webhooks", headers=headers).json() == {"items": [seen], "next_cursor": None}

        request_id = api.submit(headers)["id"]
        assert api.client.post(f"/unlearn-requests/{request_id}/cancel", headers=headers).status_code == 200
        log = f"{address}/deliveries"
        [waiting] = api.client.get(log, headers=headers).json()["items"]
        assert (waiting["state"], waiting["request_id"], waiting["attempts"]) == ("pending", request_id, 0)
        worker = sender(api.service.sessions, api.service.vault)
        worker.work()
        [failed] = api.client.get(log, headers=headers).json()["items"]
        assert (failed["state"], failed["last_status"], failed["last_error"]) == ("pending", 500, "status")
        assert failed["payload"] == waiting["payload"] and failed["payload"]["data"]["state"] == "cancelled"
        at_once = api.client.post(f"{log}/{failed['id']}/redeliver", headers=headers)
        assert_problem(at_once, 409, "conflict")
        assert 1 <= int(at_once.headers["Retry-After"]) <= 5
        sent_long_ago(api.service.sessions)
        again = api.client.post(f"{log}/{failed['id']}/redeliver", headers=headers)
        assert (again.status_code, again.json()["state"]) == (202, "pending")
        ping = api.client.post(f"{address}/test", headers=headers)
        assert (ping.status_code, ping.json()["request_id"]) == (202, None)
        assert_problem(api.client.post(f"{address}/test", headers=headers), 409, "conflict")
        worker.work()
        items = api.client.get(log, params={"state": "delivered"}, headers=headers).json()["items"]
        assert [(item["payload"]["type"], item["attempts"]) for item in items] == [
            ("ping", 1),
            ("request.cancelled", 2),
        ]
        page = api.client.get(log, params={"limit": 1}, headers=headers).json()
        assert page["items"] == items[:1]
        assert api.client.get(log, params={"cursor": page["next_cursor"]}, headers=headers).json()["items"] == items[1:]

        for _ in range(2):
            ended = api.client.delete(address, headers=headers)
            assert ended.status_code == 200 and ended.json()["disabled_at"]
        assert_problem(api.client.post(f"{address}/test", headers=headers), 409, "conflict")
        assert api.client.get(log, headers=headers).json()["items"] == items
    assert MARKER.encode() not in b"".join(got.body for got in receiver.received)


def test_others_webhooks_do_not_exist_and_an_admin_sees_no_url(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    mine, other = api.key("requests"), api.key("requests", "auditor")
    admin = api.key("admin")
    hook = api.client.post("/webhooks", json={"url": URL}, headers=mine).json()["id"]
    api.submit(mine)
    [sent] = api.client.get(f"/webhooks/{hook}/deliveries", headers=mine).json()["items"]
    routes = [
        ("GET", "/webhooks/{}"),
        ("DELETE", "/webhooks/{}"),
        ("GET", "/webhooks/{}/deliveries"),
        ("POST", "/webhooks/{}/deliveries/" + sent["id"] + "/redeliver"),
        ("POST", "/webhooks/{}/test"),
    ]
    for method, path in routes:
        foreign = api.client.request(method, path.format(hook), headers=other)
        unknown = api.client.request(method, path.format(NOBODY), headers=other)
        assert_problem(foreign, 404, "not-found")
        assert foreign.json()["detail"] == unknown.json()["detail"]
        assert_problem(api.client.request(method, path.format("whk_x"), headers=other), 404, "not-found")
        assert_problem(api.client.request(method, path.format(hook), headers=api.key("classify")), 403, "forbidden")
        assert api.client.request(method, path.format(hook)).status_code == 401
    missing = api.client.post(f"/webhooks/{hook}/deliveries/{NOTHING}/redeliver", headers=mine)
    assert_problem(missing, 404, "not-found")
    assert api.client.get("/webhooks", headers=other).json()["items"] == []
    [listed] = api.client.get("/webhooks", headers=admin).json()["items"]
    assert (listed["id"], listed["url"]) == (hook, None)
    assert api.client.get(f"/webhooks/{hook}", headers=admin).json()["url"] is None
    assert api.client.get(f"/webhooks/{hook}", headers=mine).json()["url"] == URL
    assert len(api.client.get(f"/webhooks/{hook}/deliveries", headers=admin).json()["items"]) == 1
    ended = api.client.delete(f"/webhooks/{hook}", headers=admin).json()
    assert ended["disabled_at"] and ended["url"] is None
    with api.service.sessions() as session:
        entries = select(AuditEntry.actor).where(AuditEntry.subject == hook, AuditEntry.action == "webhook.disabled")
        assert session.scalars(entries).all() == ["key_" + admin["Authorization"].split("_")[1]]
    assert not [record for record in server_logs(caplog) if "Quillfeather" in record.getMessage()]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"),
        ({"url": 7}, "url"),
        ({"url": "https://Quillfeather@example.com/"}, "url"),
        ({"url": "http://example.com/Quillfeather"}, "url"),
        ({"url": "https://127.0.0.1/Quillfeather"}, "url"),
        ({"url": "https://example.com/Quillfeather".ljust(2001, "x")}, "url"),
        ({"url": URL, "states": ["Quillfeather"]}, "states[0]"),
        ({"url": URL, "states": "active"}, "states"),
        ({"url": URL, "states": ["active"] * 100}, "states"),
        ({"url": URL, "all_requests": 1}, "all_requests"),
        ({"url": URL, "secret": "whsec_Quillfeather"}, "secret"),
    ],
)
def test_bad_bodies(body: dict[str, object], field: str, api: Api) -> None:
    assert_problem(api.client.post("/webhooks", json=body, headers=api.key()), 422, "invalid-input", field=field)


def test_everybodys_requests_need_a_scope_and_a_key_has_ten(api: Api) -> None:
    body = {"url": URL, "all_requests": True}
    assert_problem(api.client.post("/webhooks", json=body, headers=api.key("requests")), 403, "forbidden")
    auditor = api.key("requests", "auditor")
    for _ in range(10):
        assert api.client.post("/webhooks", json=body, headers=auditor).status_code == 201
    problem = assert_problem(api.client.post("/webhooks", json=body, headers=auditor), 409, "conflict")
    assert problem["limit"] == 10
    page = api.client.get("/webhooks", params={"limit": 6}, headers=auditor).json()
    rest = api.client.get("/webhooks", params={"cursor": page["next_cursor"]}, headers=auditor).json()
    assert (len(page["items"]), len(rest["items"]), rest["next_cursor"]) == (6, 4, None)
    bad = api.client.get("/webhooks", params={"cursor": "dlv_" + "0" * 28}, headers=auditor)
    assert_problem(bad, 422, "invalid-input", field="query.cursor")
