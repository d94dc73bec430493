"""Whose requests a key sees, follows, lists and cancels, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, assert_problem, claim, running, take_database_away

from app import keys, lifecycle
from app.errors import NotFound
from app.tables import utcnow

UNKNOWN = "req_" + "0" * 28
PATHS = [("GET", ""), ("GET", "/events"), ("POST", "/cancel")]


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path) as api:
        yield api


def listed(api: Api, headers: dict[str, str], **params: Any) -> list[str]:
    answer = api.client.get("/unlearn-requests", params=params, headers=headers)
    assert answer.status_code == 200
    return [item["id"] for item in answer.json()["items"]]


def test_a_key_has_its_own_requests_only(api: Api) -> None:
    one, two = api.key("requests"), api.key("requests", "classify", "scores", "metrics")
    own, others = api.submit(one)["id"], api.submit(two)["id"]
    assert (listed(api, one), listed(api, two)) == ([own], [others])
    assert listed(api, one, state="pending") == [own]
    assert listed(api, one, cursor=UNKNOWN.replace("0", "f")) == [own]
    for method, path in PATHS:
        response = api.client.request(method, f"/unlearn-requests/{others}{path}", headers=one)
        assert_problem(response, 404, "not-found")
    with api.service.sessions() as session:
        assert lifecycle.get_request(session, others).state == "pending", "it was not cancelled"
    assert api.client.get(f"/unlearn-requests/{own}", headers=one).json()["id"] == own
    assert api.client.post(f"/unlearn-requests/{own}/cancel", headers=one).json()["state"] == "cancelled"
    stream = api.client.get(f"/unlearn-requests/{own}/events", headers=one)
    assert '"cancelled"' in stream.text


def test_who_reads_all(api: Api) -> None:
    refused: list[int] = []
    for scope in ("auditor", "approve", "admin"):
        ids = [api.submit(api.key("requests"))["id"] for _ in range(2)]
        for headers in (api.key(scope), api.key(scope, "requests")):
            assert listed(api, headers)[:2] == ids[::-1]
            assert api.client.get(f"/unlearn-requests/{ids[0]}", headers=headers).json()["id"] == ids[0]
            response = api.client.post(f"/unlearn-requests/{ids[0]}/cancel", headers=headers)
            if scope == "admin":
                assert response.status_code in (200, 409)
            else:  # without `requests` there is nothing that it could cancel, with it only its own
                refused.append(response.status_code)
        with api.service.sessions() as session:
            state = lifecycle.get_request(session, ids[0]).state
        assert state == ("cancelled" if scope == "admin" else "pending")
    assert refused == [403, 404] * 2


def test_anothers_id_is_as_good_as_unknown(api: Api) -> None:
    """In whatever state the other request is: the same answer to the last byte but for the id itself."""
    headers, other = api.key("requests"), api.key("requests")
    pending, running, cancelled = (api.submit(other)["id"] for _ in range(3))
    claim(api.service, running)
    assert api.client.post(f"/unlearn-requests/{cancelled}/cancel", headers=other).status_code == 200
    for method, path in PATHS:
        answers = []
        for request_id in (UNKNOWN, pending, running, cancelled):
            response = api.client.request(method, f"/unlearn-requests/{request_id}{path}", headers=headers)
            shown = {name: value for name, value in response.headers.items() if name != "x-request-id"}
            answers.append((response.status_code, shown, response.content.replace(request_id.encode(), b"ID")))
        assert answers[0][0] == 404
        assert all(answer == answers[0] for answer in answers)


def test_requests_of_no_key_are_nobodys(api: Api) -> None:
    """Those of older versions, say: only who reads all sees them."""
    headers = api.key("requests")
    request_id = api.submit(headers)["id"]
    with api.service.sessions.begin() as session:
        lifecycle.get_request(session, request_id).api_key_id = None
    assert listed(api, headers) == []
    assert_problem(api.client.get(f"/unlearn-requests/{request_id}", headers=headers), 404, "not-found")
    assert listed(api, api.key("auditor")) == [request_id]


def test_the_floor_narrows_to_an_owner(api: Api) -> None:
    ids = {}
    for headers in (api.key("requests"), api.key("requests")):
        request_id = api.submit(headers)["id"]
        ids["key_" + headers["Authorization"].split("_")[1]] = request_id
    (one, mine), (two, others) = ids.items()
    with api.service.sessions() as session:
        assert [row.id for row in lifecycle.list_requests(session, limit=9, owner=one)[0]] == [mine]
        assert lifecycle.get_request(session, mine, owner=one).api_key_id == one
        with pytest.raises(NotFound):
            lifecycle.get_request(session, mine, owner=two)
        with pytest.raises(NotFound):
            lifecycle.lock_request(session, others, owner=one)
        with pytest.raises(NotFound):
            lifecycle.request_cancel(session, others, actor=one, owner=one)
        assert lifecycle.lock_request(session, others, owner=two).id == others


def test_calls_do_not_write_when_a_key_was_used(api: Api) -> None:
    headers = {name: api.key(name) for name in ("requests", "classify", "metrics", "admin")}

    def used() -> dict[str, bool]:
        with api.service.sessions() as session:
            found = {key.id: key.last_used_at is not None for key in keys.list_keys(session)}
        return {name: found["key_" + h["Authorization"].split("_")[1]] for name, h in headers.items()}

    for _ in range(3):
        assert listed(api, headers["requests"]) == []
        assert api.client.post("/classify", json={"text": "good"}, headers=headers["classify"]).status_code == 200
        assert api.client.get("/metrics", headers=headers["metrics"]).status_code == 200
    wrong = {"Authorization": headers["admin"]["Authorization"][:-43] + "A" * 43}
    assert_problem(api.client.get("/admin/prompts", headers=wrong), 401, "unauthenticated")
    assert not any(used().values())
    api.service.key_uses.write()
    assert used() == {"requests": True, "classify": True, "metrics": True, "admin": False}


def test_a_call_that_reads_does_not_wait_for_the_writer(tmp_path: Path) -> None:
    """SQLite has one; while a worker writes, keys are still let in."""
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        headers = api.key("requests", "classify")
        with api.service.engine.connect() as writer:
            writer.exec_driver_sql("BEGIN IMMEDIATE")
            assert listed(api, headers) == []
            assert api.client.post("/classify", json={"text": "good"}, headers=headers).status_code == 200


def test_a_scraping_key_is_remembered_until_it_expires_at_most(tmp_path: Path) -> None:
    """While the database is away, a key that it confirmed lately is let through; not beyond its own end."""
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        with api.service.sessions.begin() as session:
            expires = utcnow() + timedelta(seconds=60)
            _, plaintext = keys.create_key(session, name="p", scopes=["metrics"], actor="test", expires_at=expires)
        headers = {"Authorization": f"Bearer {plaintext}"}
        assert api.client.get("/metrics", headers=headers).status_code == 200
        confirmed = api.service.scrapes._confirmed
        [(digest, (at, left))] = confirmed.items()
        assert 0 < left <= 60
        take_database_away(api.service, tmp_path)
        assert api.client.get("/metrics", headers=headers).status_code == 200
        confirmed[digest] = (at - 61, left)  # a minute later
        assert_problem(api.client.get("/metrics", headers=headers), 503, "unavailable")
