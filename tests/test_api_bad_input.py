"""Every bad input gets a problem that says what and where, and never holds what was sent."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, Api, add_prompt, assert_problem, claim, running, server_logs, soft_prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import keys, lifecycle
from app.problems import field_path
from app.settings import Mode

GOOD = f"{MARKER} is a good film"
LONG = f"{MARKER} " + "good film " * 80
JSON = {"Content-Type": "application/json"}
UNKNOWN = "req_" + "0" * 28
MANY_NAMES = {f"a{i}": 1 for i in range(33)}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder: Path = tmp_path_factory.mktemp("api")
    with running(f"sqlite:///{folder}/letheon.db", folder, mode=Mode.CONCATENATE) as api:
        yield api


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One of its own: some of what is made up is valid, and leaves requests behind."""
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    with running(f"sqlite:///{folder}/letheon.db", folder) as api:
        yield api


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One that takes bodies of the default size."""
    folder: Path = tmp_path_factory.mktemp("roomy")
    with running(f"sqlite:///{folder}/letheon.db", folder, max_body_bytes=4 * 2**20) as api:
        yield api


@pytest.fixture(autouse=True)
def no_text_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    logged = [logging.Formatter().format(record) for record in server_logs(caplog)]
    assert any("ms " in line for line in logged) or not logged, "the access log is there"
    assert "Quillfeather" not in "".join(logged)


@pytest.mark.parametrize(
    ("body", "field", "limit"),
    [
        ({"forget_texts": []}, "forget_texts", 1),
        ({"forget_texts": [GOOD, ""]}, "forget_texts[1].text", None),
        ({"forget_texts": [GOOD, {"text": " \n\t\u3000"}]}, "forget_texts[1].text", None),
        ({"forget_texts": [GOOD, GOOD, GOOD, LONG]}, "forget_texts[3].text", 64),
        ({"forget_texts": [MARKER * 500]}, "forget_texts[0].text", 64),
        ({"forget_texts": [GOOD] * 6}, "forget_texts", 5),
        ({"forget_texts": GOOD}, "forget_texts", None),
        ({"forget_texts": {GOOD: "positive"}}, "forget_texts", None),
        ({"forget_texts": [GOOD, 7]}, "forget_texts[1]", None),
        ({"forget_texts": [GOOD, None]}, "forget_texts[1]", None),
        ({"forget_texts": [[GOOD]]}, "forget_texts[0]", None),
        ({"forget_texts": [{"text": 7, "label": "positive"}]}, "forget_texts[0].text", None),
        ({"forget_texts": [{"label": "positive"}]}, "forget_texts[0].text", None),
        ({"forget_texts": [{"text": GOOD, "label": "Quillfeather"}]}, "forget_texts[0].label", None),
        ({"forget_texts": [{"text": GOOD, "label": 1}]}, "forget_texts[0].label", None),
        ({"forget_texts": [{"text": GOOD, "lable": "positive"}]}, "forget_texts[0].lable", None),
        ({"forget_texts": [{"text": GOOD, GOOD: 1}]}, "forget_texts[0].(unnamed)", None),
        ({"forget_texts": ["\ud800 " + MARKER]}, "forget_texts[0].text", None),
        ({}, "forget_texts", None),
        ({"forget_text": GOOD}, "forget_text", None),
        ({"forget_texts": [GOOD], "priority": MARKER}, "priority", None),
        ({"forget_texts": [GOOD], "reason": MARKER * 30}, "reason", 500),
        ({"forget_texts": [GOOD], "reason": MARKER + "\0"}, "reason", None),
        ({"forget_texts": [GOOD], "reason": MARKER + "\udfff"}, "reason", None),
        ({"forget_texts": [GOOD], "options": {"alpha": MARKER}}, "options.alpha", None),
        ({"forget_texts": [GOOD], "options": {"alpha": True}}, "options.alpha", None),
        ({"forget_texts": [GOOD], "options": {"alpha": float("nan")}}, "options.alpha", None),
        ({"forget_texts": [GOOD], "options": {"num_virtual_tokens": 0}}, "options.num_virtual_tokens", 1),
        ({"forget_texts": [GOOD], "options": {"num_virtual_tokens": 257}}, "options.num_virtual_tokens", 256),
        ({"forget_texts": [GOOD], "options": {"learning_rate": 0}}, "options.learning_rate", 0),
        ({"forget_texts": [GOOD], "options": {"max_steps": 1.5}}, "options.max_steps", None),
        ({"forget_texts": [GOOD], "options": {"max_steps": 0}}, "options.max_steps", 1),
        ({"forget_texts": [GOOD], "options": {"max_steps": 100_001}}, "options.max_steps", 100_000),
        ({"forget_texts": [GOOD], "options": {"seed": -1}}, "options.seed", 0),
        ({"forget_texts": [GOOD], "options": {"epochs": 3}}, "options.epochs", None),
        ([GOOD], "body", None),
        (GOOD, "body", None),
        (None, "body", None),
    ],
)
def test_invalid_request_bodies(api: Api, body: Any, field: str, limit: float | None) -> None:
    content = json.dumps(body).encode()
    response = api.client.post("/unlearn-requests", content=content, headers=JSON | api.key("requests"))
    problem = assert_problem(response, 422, "invalid-input", field=field, limit=limit)
    assert field in problem["detail"] or len(problem["errors"]) > 1
    assert api.client.get("/unlearn-requests", headers=api.key("auditor")).json()["items"] == []


@pytest.mark.parametrize(
    ("body", "field", "limit"),
    [
        ({}, "body", None),
        ({"text": GOOD, "texts": [GOOD]}, "body", None),
        ({"text": None}, "body", None),
        ({"text": "  "}, "text", None),
        ({"text": LONG}, "text", 64),
        ({"text": 7}, "text", None),
        ({"texts": []}, "texts", 1),
        ({"texts": [GOOD, ""]}, "texts[1]", None),
        ({"texts": [GOOD, LONG]}, "texts[1]", 64),
        ({"texts": [GOOD] * 5}, "texts", 4),
        ({"texts": GOOD}, "texts", None),
        ({"texts": [{"text": GOOD}]}, "texts[0]", None),
        ({"text": GOOD, "scores": "yes"}, "scores", None),
        ({"text": GOOD, "prompts": []}, "prompts", None),
    ],
)
def test_invalid_classify_bodies(api: Api, body: Any, field: str, limit: float | None) -> None:
    response = api.client.post("/classify", json=body, headers=api.key())
    assert_problem(response, 422, "invalid-input", field=field, limit=limit)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([GOOD, LONG, "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.just(GOOD), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["forget_texts", "reason", "options", "text", "texts", "scores", "alpha", "seed", "label"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/unlearn-requests", "/classify"]), known=st.dictionaries(st.sampled_from(NAMES), JSON_VALUES)
)
def test_no_json_whatever_is_more_than_a_client_error(fuzzed: Api, path: str, known: dict[str, Any]) -> None:
    response = fuzzed.client.post(path, content=json.dumps(known).encode(), headers=JSON | fuzzed.key())
    if response.status_code not in (200, 202):
        assert_problem(response, 422, "invalid-input")


def test_the_token_limit_names_the_count(api: Api) -> None:
    count = api.service.serving.llm.count_tokens(LONG)
    response = api.client.post("/unlearn-requests", json={"forget_texts": [LONG]}, headers=api.key("requests"))
    problem = assert_problem(response, 422, "invalid-input")
    assert problem["detail"] == f"forget_texts[0].text: has {count} tokens, the limit is 64"
    exact = next(text for n in range(200) if api.service.serving.llm.count_tokens(text := "good" + " film" * n) == 64)
    assert api.client.post("/classify", json={"text": exact}, headers=api.key("classify")).status_code == 200
    response = api.client.post("/classify", json={"text": exact + " film"}, headers=api.key("classify"))
    assert_problem(response, 422, "invalid-input", field="text", limit=64)


def test_many_errors_are_cut_and_counted(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_forget_texts=100) as api:
        for items in ([""] * 90, [LONG] * 20):
            body = {"forget_texts": [*items, *[{"text": GOOD, "label": "Quillfeather"}] * 5]}
            response = api.client.post("/unlearn-requests", json=body, headers=api.key("requests"))
            problem = assert_problem(response, 422, "invalid-input", field="forget_texts[19].text")
            assert len(problem["errors"]) == 20
            assert problem["errors_omitted"] == (70 if items[0] == "" else 5)


@pytest.mark.parametrize("path", ["/unlearn-requests", "/classify", "/admin/prompts/prm_" + "0" * 28 + "/revoke"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"forget_texts": ["Quillfeather \xff\xfe"]}',
        b'{"forget_texts": ["Quillfeather \xed\xa0\x80"]}',  # a surrogate, which json.loads would let pass
        b'{"forget_texts": ["Quillfeather',
        b"Quillfeather",
        b'{"forget_texts": ["Quillfeather\x01"]}',
        b'{"text": ' + b"9" * 5000 + b"}",
        b"[" * 15000,
    ],
)
def test_malformed_bodies(api: Api, path: str, content: bytes) -> None:
    response = api.client.post(path, content=content, headers=JSON | api.key())
    problem = assert_problem(response, 400, "malformed-body")
    assert "errors" not in problem or problem["errors"][0]["field"] == "body"


def test_a_body_that_is_not_declared_as_json(api: Api) -> None:
    content = json.dumps({"text": GOOD}).encode()
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = api.client.post("/classify", content=content, headers=headers | api.key())
        assert_problem(response, 415, "unsupported-media-type")


def test_a_body_over_the_limit(api: Api) -> None:
    """Declared, undeclared (chunked) and falsely declared."""
    content = json.dumps({"forget_texts": ["Quillfeather " * 2000]}).encode()
    assert len(content) > 20_000

    def chunks() -> Iterator[bytes]:
        yield from (content[i : i + 1000] for i in range(0, len(content), 1000))

    headers = JSON | api.key("requests")
    declared = api.client.post("/unlearn-requests", content=content, headers=headers)
    chunked = api.client.post("/unlearn-requests", content=chunks(), headers=headers)
    lied = api.client.post("/unlearn-requests", content=content, headers=headers | {"Content-Length": "10"})
    for response in (declared, chunked, lied):
        assert_problem(response, 413, "body-too-large", field="body", limit=20_000)
        assert response.headers["connection"] == "close"


def test_unknown_ids(api: Api) -> None:
    headers = api.key()
    for shape in (UNKNOWN, "nothing", "%00", "req_" + "0" * 27 + "%00", "x" * 5000):
        prompt = shape.replace("req_", "prm_")
        for response in (
            api.client.get(f"/unlearn-requests/{shape}", headers=headers),
            api.client.get(f"/unlearn-requests/{shape}/events", headers=headers),
            api.client.post(f"/unlearn-requests/{shape}/cancel", headers=headers),
            api.client.get(f"/admin/prompts/{prompt}", headers=headers),
            api.client.post(f"/admin/prompts/{prompt}/revoke", json={"reason": "r"}, headers=headers),
        ):
            assert_problem(response, 404, "not-found")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "query.limit"),
        ("limit=201", "query.limit"),
        ("limit=x", "query.limit"),
        ("state=Quillfeather", "query.state"),
        ("cursor=" + "x" * 41, "query.cursor"),
        ("cursor=x", "query.cursor"),
    ],
)
def test_bad_queries(api: Api, query: str, field: str) -> None:
    for path in ("/unlearn-requests", "/admin/prompts"):
        assert_problem(api.client.get(f"{path}?{query}", headers=api.key()), 422, "invalid-input", field=field)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id_prefix", "req_%"),
        ("id_prefix", "req_\x00"),
        ("api_key_id", "Quillfeather"),
        ("received_from", "2026-11-01"),
        ("received_before", "2026-11-01T00:00:00"),
        ("due_before", "0001-01-01T00:00:00+14:00"),
    ],
)
def test_bad_filters(api: Api, name: str, value: str) -> None:
    answer = api.client.get("/unlearn-requests", params={name: value}, headers=api.key())
    assert_problem(answer, 422, "invalid-input", field=f"query.{name}")


def test_unknown_paths_and_methods(api: Api) -> None:
    assert_problem(api.client.get("/nothing/here?q=Quillfeather"), 404, "not-found")
    assert_problem(api.client.post("/classify/", json={"text": GOOD}), 404, "not-found")
    response = api.client.put("/classify", json={"text": GOOD})
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


READERS = ("requests", "admin", "auditor", "approve")
OPERATIONS: list[tuple[str, str, tuple[str, ...], Any]] = [
    ("POST", "/unlearn-requests", ("requests",), {"forget_texts": [GOOD]}),
    ("GET", "/unlearn-requests", READERS, None),
    ("GET", f"/unlearn-requests/{UNKNOWN}", READERS, None),
    ("GET", f"/unlearn-requests/{UNKNOWN}/events", READERS, None),
    ("POST", f"/unlearn-requests/{UNKNOWN}/cancel", ("requests", "admin"), None),
    ("POST", "/classify", ("classify",), {"text": GOOD}),
    ("GET", "/admin/prompts", ("auditor", "admin"), None),
    ("GET", "/admin/prompts/prm_" + "0" * 28, ("auditor", "admin"), None),
    ("POST", "/admin/prompts/prm_" + "0" * 28 + "/revoke", ("admin",), {"reason": MARKER}),
    ("GET", "/metrics", ("metrics",), None),
]


@pytest.mark.parametrize(("method", "path", "scopes", "body"), OPERATIONS)
def test_missing_wrong_revoked_and_under_scoped_keys(
    api: Api, method: str, path: str, scopes: tuple[str, ...], body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = api.key(*scopes)
    token = good["Authorization"].removeprefix("Bearer ")
    revoked = api.key()
    with api.service.sessions.begin() as session:
        keys.revoke_key(session, "key_" + revoked["Authorization"].split("_")[1], actor="test")
    wrong = token[:-2] + ("AA" if token[-2:] != "AA" else "BB")
    refused: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {token}"},
        {"Authorization": f"Bearer {wrong}"},
        {"Authorization": "Bearer lth_" + "0" * 16 + "_" + "A" * 43},
        {"Authorization": "Bearer " + "x" * 5000},
        revoked,
    ]
    for headers in refused:
        # The body is as bad as can be: without a key nothing is said about it.
        bad = None if body is None else {"Quillfeather": 1}
        response = api.client.request(method, path, json=bad, headers=headers)
        problem = assert_problem(response, 401, "unauthenticated")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "errors" not in problem
    others = api.key(*(other for other in keys.SCOPES if other not in scopes))
    problem = assert_problem(api.client.request(method, path, json=body, headers=others), 403, "forbidden")
    assert (problem["scope"], problem["scopes"]) == (scopes[0], list(scopes))
    assert token not in caplog.text and wrong not in caplog.text


def test_scores_need_their_scope(api: Api) -> None:
    body = {"text": GOOD, "scores": True}
    response = api.client.post("/classify", json=body, headers=api.key("classify"))
    assert assert_problem(response, 403, "forbidden")["scope"] == "scores"
    assert_problem(api.client.post("/classify", json=body, headers=api.key("scores")), 403, "forbidden")


def test_revoking_twice(api: Api) -> None:
    prompt_id = add_prompt(api.service, soft_prompt(1))
    headers = api.key("admin")
    path = f"/admin/prompts/{prompt_id}/revoke"
    for body, field in (({}, "reason"), ({"reason": " "}, "reason"), ({"reason": "r", "force": True}, "force")):
        assert_problem(api.client.post(path, json=body, headers=headers), 422, "invalid-input", field=field)
    assert_problem(api.client.post(path, headers=headers), 422, "invalid-input", field="body")
    assert api.client.post(path, json={"reason": MARKER}, headers=headers).status_code == 200
    problem = assert_problem(api.client.post(path, json={"reason": MARKER}, headers=headers), 409, "conflict")
    assert problem["state"] == "revoked"


def test_cancelling_what_has_ended(api: Api) -> None:
    prompt_id = add_prompt(api.service, soft_prompt(2))
    headers = api.key("requests", "admin")
    active = api.client.get(f"/admin/prompts/{prompt_id}", headers=headers).json()["request_id"]
    cancelled = api.submit(headers)["id"]
    assert api.client.post(f"/unlearn-requests/{cancelled}/cancel", headers=headers).status_code == 200
    failed = api.submit(headers)["id"]
    with api.service.sessions.begin() as session:
        claimed = claim(api.service, failed)
        lifecycle.fail(session, claimed, code="check-failed", detail="retain accuracy fell")
    for request_id, state in ((active, "active"), (cancelled, "cancelled"), (failed, "failed")):
        response = api.client.post(f"/unlearn-requests/{request_id}/cancel", headers=headers)
        assert assert_problem(response, 409, "conflict")["state"] == state


def test_the_servers_own_limit_on_steps(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_training_steps=300) as api:
        for steps, status in ((300, 202), (301, 422), (100_000, 422)):
            body = {"forget_texts": [GOOD], "options": {"max_steps": steps}}
            response = api.client.post("/unlearn-requests", json=body, headers=api.key("requests"))
            if status == 202:
                assert response.status_code == 202
            else:
                assert_problem(response, 422, "invalid-input", field="options.max_steps", limit=300)


def test_field_paths() -> None:
    assert field_path(("body", "forget_texts", 3, "text")) == "forget_texts[3].text"
    assert field_path(("body", 0)) == "[0]"
    assert field_path(("query", "limit")) == "query.limit"
    assert field_path(("body",)) == "body"
    assert field_path(("body", "a b")) == "(unnamed)"


@pytest.mark.parametrize(
    ("path", "body", "field", "limit"),
    [
        ("/classify", {"texts": [1] * 16_385}, "texts", 16_384),
        ("/unlearn-requests", {"forget_texts": [{}] * 16_385}, "forget_texts", 16_384),
        ("/unlearn-requests", {"forget_texts": [GOOD], "options": MANY_NAMES}, "options", 32),
        ("/unlearn-requests", {"forget_texts": [{"text": GOOD} | MANY_NAMES]}, "forget_texts[0]", 32),
        ("/classify", MANY_NAMES, "body", 32),
    ],
)
def test_a_body_of_very_many_entries_is_one_error(roomy: Api, path: str, body: Any, field: str, limit: int) -> None:
    """Millions of tiny entries, each with an error of its own, would hold the server up for many seconds."""
    response = roomy.client.post(path, json=body, headers=roomy.key("requests", "classify"))
    problem = assert_problem(response, 422, "invalid-input")
    assert [(e["field"], e["limit"]) for e in problem["errors"]] == [(field, limit)]
