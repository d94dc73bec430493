"""The same call twice, and the same forget set twice: one request, whoever is first and whatever breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from api_kit import MARKER, Api, assert_problem, claim, running, tiny_llm
from databases import database_kinds, fresh_database
from sqlalchemy import func, select

from app import idempotency, keys, lifecycle
from app.errors import IdempotencyInFlight
from app.idempotency import Call
from app.lifecycle import ForgetText
from app.tables import IdempotencyKey, UnlearnRequest, utcnow
from app.vault import Vault

BODY = {"forget_texts": [f"{MARKER} is bad", {"text": f"{MARKER} was good", "label": "positive"}]}


@pytest.fixture(scope="module", params=database_kinds())
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service for all tests; each has keys of its own."""
    folder = tmp_path_factory.mktemp("life")
    with fresh_database(request.param, folder) as url, running(url, folder) as api:
        yield api


def post(api: Api, headers: dict[str, str], key: str | None = None, **body: Any) -> httpx2.Response:
    sent = headers if key is None else {**headers, "Idempotency-Key": key}
    return api.client.post("/unlearn-requests", json={**BODY, **body}, headers=sent)


@pytest.fixture
def made(api: Api) -> Callable[[], tuple[int, int]]:
    """How many requests and messages there are since the test began."""

    def count() -> tuple[int, int]:
        with api.service.sessions() as session:
            requests = session.scalar(select(func.count()).select_from(UnlearnRequest)) or 0
        return requests, len(list((api.service.settings.broker_dir / "messages").glob("*.msg")))

    before = count()
    return lambda: (count()[0] - before[0], count()[1] - before[1])


Made = Callable[[], tuple[int, int]]


def test_the_same_call_again_is_the_same_request(api: Api, made: Made) -> None:
    headers = api.key("requests")
    first = post(api, headers, "order-7")
    assert first.status_code == 202 and "idempotency-replayed" not in first.headers
    raw = b'{ "reason": null,\n"forget_texts": [{"text": "%s is bad"}, {"label": "positive", "text": "%s was good"}] }'
    again = api.client.post(
        "/unlearn-requests",
        content=raw % (MARKER.encode(), MARKER.encode()),
        headers={**headers, "Idempotency-Key": "order-7", "Content-Type": "application/json"},
    )
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true" and "letheon-duplicate" not in again.headers
    assert made() == (1, 1)
    claim(api.service, first.json()["id"])
    assert post(api, headers, "order-7").json()["state"] == "training", "the request as it is by now"


def test_another_body_is_refused(api: Api, made: Made) -> None:
    headers = api.key("requests")
    post(api, headers, "order-7")
    for changed in ({"reason": "other"}, {"forget_texts": [f"{MARKER} is bad"]}, {"require_approval": True}):
        assert_problem(post(api, headers, "order-7", **changed), 422, "idempotency-mismatch")
    assert made()[0] == 1


def test_a_key_is_of_its_api_key_only(api: Api) -> None:
    first, second = post(api, api.key("requests"), "1"), post(api, api.key("requests"), "1", reason="other body")
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] != second.json()["id"]


def test_a_refused_call_keeps_no_key(api: Api) -> None:
    headers = api.key("requests")
    assert_problem(post(api, headers, "order-7", expires_at="2020-01-01T00:00:00Z"), 422, "invalid-input")
    assert post(api, headers, "order-7").status_code == 202


def test_keys_that_are_none(api: Api, made: Made) -> None:
    for key in ("", "a b", "x" * 256, "\x7f", "é", "tab\there"):
        headers: Any = {**api.key("requests"), "Idempotency-Key": key.encode("latin-1")}
        response = api.client.post("/unlearn-requests", json=BODY, headers=headers)
        assert_problem(response, 422, "invalid-input", field="header.Idempotency-Key")
    assert made() == (0, 0)


def test_the_longest_key(api: Api) -> None:
    assert post(api, api.key("requests"), "!~" + "x" * 253).status_code == 202


@pytest.mark.parametrize("key", ["order-7", None])
def test_many_at_once_make_one_request(api: Api, made: Made, key: str | None) -> None:
    """With a key, and without one: the forget set is the same."""
    headers = api.key("requests")
    barrier = threading.Barrier(8)
    answers: list[httpx2.Response] = []

    def work() -> None:
        barrier.wait()
        answers.append(post(api, headers, key))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8 and made() == (1, 1)
    new = [a for a in answers if a.status_code == 202 and "idempotency-replayed" not in a.headers]
    assert len(new) == 1
    for answer in answers:
        if answer.status_code == 409:
            assert key and assert_problem(answer, 409, "idempotency-in-flight")
            assert answer.headers["retry-after"] == "1"
        else:
            assert answer.json()["id"] == new[0].json()["id"]
            assert answer.status_code == (202 if key or answer is new[0] else 200)


def one_call(api: Api) -> tuple[Call, dict[str, str]]:
    """What the route makes of a call with the key ``order-7``."""
    headers = api.key("requests")
    with api.service.sessions() as session:
        owner = max(keys.list_keys(session), key=lambda key: key.created_at).id
    return idempotency.name_call(api.service.vault, api_key_id=owner, key="order-7", body={}), headers


def create(api: Api, session: Any, call: Call) -> UnlearnRequest:
    row = lifecycle.create_request(
        session,
        api.service.vault,
        texts=[ForgetText(MARKER)],
        reason=None,
        options={},
        fingerprint=tiny_llm().fingerprint,
        api_key_id=call.api_key_id,
    )
    idempotency.remember(session, call, row, now=row.created_at)
    return row


def test_a_call_under_way_is_told_or_waited_for(api: Api) -> None:
    call, headers = one_call(api)
    found: list[tuple[UnlearnRequest, bool] | None] = []

    def second() -> None:
        with api.service.sessions.begin() as session:
            found.append(idempotency.first_answer(session, call))

    waiting = threading.Thread(target=second)
    with api.service.sessions.begin() as session:
        assert idempotency.first_answer(session, call) is None
        row = create(api, session, call)
        if api.service.engine.dialect.name == "postgresql":
            with api.service.sessions() as other, pytest.raises(IdempotencyInFlight):
                idempotency.first_answer(other, call)
            refused = assert_problem(post(api, headers, "order-7"), 409, "idempotency-in-flight")
            assert "retry_after" not in refused
        else:
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive() and found == []
    if not waiting.ident:
        waiting.start()
    waiting.join(20)
    [answer] = found
    assert answer is not None and (answer[0].id, answer[1]) == (row.id, False)


def test_nothing_is_left_of_a_call_that_broke_off(api: Api, made: Made) -> None:
    call, _ = one_call(api)
    with pytest.raises(RuntimeError), api.service.sessions.begin() as session:
        assert idempotency.first_answer(session, call) is None
        create(api, session, call)
        raise RuntimeError
    with api.service.sessions.begin() as session:
        assert idempotency.first_answer(session, call) is None
        create(api, session, call)
    assert made()[0] == 1


def test_old_keys_are_forgotten_and_neither_key_nor_text_was_kept(api: Api) -> None:
    headers = api.key("requests")
    post(api, headers, "order-7")
    with api.service.sessions() as session:
        row = session.scalars(select(IdempotencyKey).order_by(IdempotencyKey.created_at.desc())).first()
        assert row is not None
        assert b"order-7" not in row.digest and len(row.digest) == len(row.body_digest) == 32
    for hours, some in ((23, False), (25, True), (25, False)):
        with api.service.sessions.begin() as session:
            later = utcnow() + timedelta(hours=hours)
            assert (idempotency.forget_old(session, hours=24, now=later) > 0) == some
    again = post(api, headers, "order-7")
    assert again.status_code == 200 and again.headers["letheon-duplicate"] == "true", "the request itself is there"


# --- the same forget set ---------------------------------------------------------------------------------------------


def test_a_live_request_for_the_same_set_is_the_answer(api: Api, made: Made) -> None:
    headers = api.key("requests")
    first = post(api, headers).json()
    same = [{"text": f"{MARKER.upper()}   WAS good", "label": "positive"}, f"{MARKER} is bad", f"{MARKER} is  BAD"]
    again = post(api, headers, forget_texts=same, reason="asked once more")
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    assert again.headers["letheon-duplicate"] == "true"
    assert again.headers["location"] == f"/unlearn-requests/{first['id']}"
    assert made() == (1, 1)
    replayed = [post(api, headers, "k") for _ in range(2)]
    assert [(r.status_code, r.headers.get("idempotency-replayed")) for r in replayed] == [(200, None), (200, "true")]
    assert all(r.headers["letheon-duplicate"] == "true" for r in replayed)


@pytest.mark.parametrize(
    "change",
    [
        {"forget_texts": [f"{MARKER} is bad"]},
        {"forget_texts": [f"{MARKER} is bad", f"{MARKER} was good"]},  # another label
        {"options": {"seed": 1}},
        {"require_approval": True},
        {"expires_at": "2099-01-01T00:00:00Z"},
    ],
)
def test_another_set_or_other_terms_are_another_request(api: Api, change: dict[str, Any]) -> None:
    headers = api.key("requests")
    first, second = post(api, headers), post(api, headers, **change)
    assert (second.status_code, first.json()["id"] == second.json()["id"]) == (202, False)
    assert post(api, headers, **change).json()["id"] == second.json()["id"]


def test_what_others_ask_for_is_not_told(api: Api) -> None:
    first, second = post(api, api.key("requests")), post(api, api.key("requests"))
    assert second.status_code == 202 and first.json()["id"] != second.json()["id"]
    assert set(first.headers) == set(second.headers)
    with api.service.sessions() as session:
        query = select(UnlearnRequest.set_digest).where(
            UnlearnRequest.id.in_([first.json()["id"], second.json()["id"]])
        )
        digests = list(session.scalars(query))
    assert len(set(digests)) == 2, "nor by the digests in the database"


def test_a_request_that_ended_or_is_being_cancelled_is_no_answer(api: Api) -> None:
    headers = api.key("requests")
    first = post(api, headers).json()["id"]
    claim(api.service, first)
    assert post(api, headers).json()["id"] == first
    api.client.post(f"/unlearn-requests/{first}/cancel", headers=headers)
    second = post(api, headers)
    assert second.status_code == 202 and second.json()["id"] != first
    api.client.post(f"/unlearn-requests/{second.json()['id']}/cancel", headers=headers)
    assert post(api, headers).status_code == 202


def test_tags_of_other_purposes_keys_and_vaults_differ(vault: Vault) -> None:
    tags = [
        vault.tag("a", b"x"),
        vault.tag("a", b"y"),
        vault.tag("b", b"x"),
        vault.digest("x"),
        vault.gate_digest("x"),
        Vault(bytes(32)).tag("a", b"x"),
    ]
    assert len(set(tags)) == len(tags) and vault.tag("a", b"x") == tags[0]
