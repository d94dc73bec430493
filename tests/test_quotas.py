"""Quotas in the database: exact at the edge, also for two at once, and told with when there is room again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, assert_problem, claim, running
from sqlalchemy.orm import Session, sessionmaker

from app import keys, lifecycle, quotas
from app.errors import InvalidInput, QuotaExceeded
from app.lifecycle import ForgetText
from app.settings import Settings
from app.tables import RequestState, utcnow
from app.vault import Vault

Sessions = sessionmaker[Session]


def make_key(sessions: Sessions, limits: Mapping[str, int] | None = None) -> str:
    with sessions.begin() as session:
        return keys.create_key(session, name="k", scopes=["requests"], actor="test", limits=limits)[0].id


def settings(**limits: int) -> Settings:
    return Settings(_env_file=None, **limits)


def ask(
    sessions: Sessions, vault: Vault, key_id: str, limits: Settings, *, texts: int = 1, now: datetime | None = None
) -> str:
    """As the route does it: counted and added in one transaction."""
    now = now or utcnow()
    with sessions.begin() as session:
        quotas.check_request_quota(session, key_id, limits, texts=texts, now=now)
        return lifecycle.create_request(
            session,
            vault,
            texts=[ForgetText(f"text {n}") for n in range(texts)],
            reason=None,
            options={},
            fingerprint="f" * 64,
            api_key_id=key_id,
            now=now,
        ).id


def refused(sessions: Sessions, vault: Vault, key_id: str, limits: Settings, **rest: Any) -> dict[str, Any]:
    with pytest.raises(QuotaExceeded) as caught:
        ask(sessions, vault, key_id, limits, **rest)
    return caught.value.extra


def test_without_limits_nothing_is_counted(sessions: Sessions, vault: Vault) -> None:
    key_id = make_key(sessions)
    for _ in range(3):
        ask(sessions, vault, key_id, settings(), texts=5)


def test_requests_of_a_day(sessions: Sessions, vault: Vault) -> None:
    key_id, other = make_key(sessions), make_key(sessions)
    limits, start = settings(requests_per_day=2), utcnow()
    ask(sessions, vault, key_id, limits, now=start)
    second = ask(sessions, vault, key_id, limits, now=start + timedelta(hours=6))
    with sessions.begin() as session:  # what was asked for counts, whatever became of it
        lifecycle.request_cancel(session, second, actor="test")
    at = start + timedelta(hours=20)
    found = refused(sessions, vault, key_id, limits, now=at)
    assert found == {"limit": 2, "limit_name": "requests_per_day", "used": 2, "retry_after": 4 * 3600}
    ask(sessions, vault, other, limits, now=at)
    again = start + timedelta(hours=24)
    refused(sessions, vault, key_id, limits, now=again - timedelta(seconds=1))
    ask(sessions, vault, key_id, limits, now=again)


def test_when_there_is_room_after_a_limit_was_lowered(sessions: Sessions, vault: Vault) -> None:
    key_id, start = make_key(sessions), utcnow()
    for hours in (0, 1, 2, 3):
        ask(sessions, vault, key_id, settings(), now=start + timedelta(hours=hours))
    found = refused(sessions, vault, key_id, settings(requests_per_day=2), now=start + timedelta(hours=4))
    # Three have to leave for a second to fit beside the fourth: the one of hour 2 does so at hour 26.
    assert (found["used"], found["retry_after"]) == (4, 22 * 3600)


def test_texts_of_a_day(sessions: Sessions, vault: Vault) -> None:
    key_id, limits, start = make_key(sessions), settings(texts_per_day=10), utcnow()
    ask(sessions, vault, key_id, limits, texts=3, now=start)
    ask(sessions, vault, key_id, limits, texts=5, now=start + timedelta(hours=1))
    at = start + timedelta(hours=2)
    ask(sessions, vault, key_id, limits, texts=2, now=at)
    found = refused(sessions, vault, key_id, limits, texts=1, now=at)
    assert found == {"limit": 10, "limit_name": "texts_per_day", "used": 10, "retry_after": 22 * 3600}
    assert refused(sessions, vault, key_id, limits, texts=4, now=at)["retry_after"] == 23 * 3600
    with pytest.raises(InvalidInput) as caught:  # no day is long enough for these
        ask(sessions, vault, key_id, limits, texts=11, now=at)
    assert [(e["field"], e["limit"]) for e in caught.value.extra["errors"]] == [("forget_texts", 10)]


def test_requests_in_force(sessions: Sessions, vault: Vault) -> None:
    key_id, limits = make_key(sessions), settings(active_prompts=2)
    first = ask(sessions, vault, key_id, limits)
    ask(sessions, vault, key_id, limits, now=utcnow() - timedelta(days=30))
    found = refused(sessions, vault, key_id, limits)
    assert found == {"limit": 2, "limit_name": "active_prompts", "used": 2, "retry_after": quotas.ASK_AGAIN_SECONDS}
    with sessions.begin() as session:
        lifecycle.request_cancel(session, first, actor="test")
    ask(sessions, vault, key_id, limits)


def test_what_counts_as_in_force(sessions: Sessions, vault: Vault) -> None:
    counted = set()
    for state in RequestState:
        key_id = make_key(sessions)
        request_id = ask(sessions, vault, key_id, settings())
        with sessions.begin() as session:
            lifecycle.get_request(session, request_id).state = state
        try:
            ask(sessions, vault, key_id, settings(active_prompts=1))
        except QuotaExceeded:
            counted.add(state.value)
    assert counted == {"pending", "training", "evaluating", "awaiting_approval", "active"}


def test_a_keys_own_limits_come_first(sessions: Sessions, vault: Vault) -> None:
    strict, free = make_key(sessions, {"requests_per_day": 1}), make_key(sessions, {"requests_per_day": 0})
    limits = settings(requests_per_day=2)
    ask(sessions, vault, strict, limits)
    assert refused(sessions, vault, strict, limits)["limit"] == 1
    for _ in range(3):
        ask(sessions, vault, free, limits)


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """What each of so many threads got back, or what it raised."""
    barrier = threading.Barrier(count)
    ended: list[Any] = []

    def run() -> None:
        barrier.wait()
        try:
            ended.append(work())
        except Exception as error:
            ended.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_at_the_edge_exactly_one_passes(sessions: Sessions, vault: Vault) -> None:
    """Eight threads want the last place, and both databases give it to one of them."""
    for name in ("requests_per_day", "texts_per_day", "active_prompts"):
        key_id, given = make_key(sessions), settings(**{name: 3})
        for _ in range(2):
            ask(sessions, vault, key_id, given)
        ended = at_once(8, partial(ask, sessions, vault, key_id, given))
        refusals = [error for error in ended if isinstance(error, QuotaExceeded)]
        assert (sum(isinstance(found, str) for found in ended), len(refusals)) == (1, 7), (name, ended)
        assert all(error.extra["used"] == 3 for error in refusals)


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    with running(database_url, tmp_path, requests_per_day=2, texts_per_day=4) as api:
        yield api


def test_a_refused_request_leaves_nothing(api: Api) -> None:
    headers = api.key("requests")
    for _ in range(2):
        api.submit(headers)
    response = api.client.post("/unlearn-requests", json={"forget_texts": ["one more film"]}, headers=headers)
    problem = assert_problem(response, 429, "quota-exceeded")
    assert (problem["limit"], problem["used"], problem["limit_name"]) == (2, 2, "requests_per_day")
    assert 86_000 < int(response.headers["retry-after"]) <= 86_400
    assert len(api.client.get("/unlearn-requests", headers=headers).json()["items"]) == 2
    api.submit(api.key("requests"))


def test_more_texts_than_a_day_allows(api: Api) -> None:
    body = {"forget_texts": [f"the film is {word}" for word in ("good", "bad", "great", "awful", "by")]}
    response = api.client.post("/unlearn-requests", json=body, headers=api.key("requests"))
    assert_problem(response, 422, "invalid-input", field="forget_texts", limit=4)
    again = api.client.post("/unlearn-requests", json={"forget_texts": ["a"] * 5}, headers=api.key("requests"))
    assert again.status_code == 202, "equal texts count once"


def test_what_is_under_way_counts(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, active_prompts=1) as api:
        headers = api.key("requests")
        claim(api.service, api.submit(headers)["id"])
        response = api.client.post("/unlearn-requests", json={"forget_texts": ["a"]}, headers=headers)
        assert assert_problem(response, 429, "quota-exceeded")["limit_name"] == "active_prompts"
        assert response.headers["retry-after"] == "3600"
