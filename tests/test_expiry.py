"""Requests that run out: by hand, by several workers at once, and by the reaper."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from floor import activate, await_approval, must_take, state, submit, terms
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import wait_for

from app import active_set, audit, expiry, idempotency, keys, lifecycle
from app.errors import LeaseLost
from app.tables import IdempotencyKey, Prompt, UnlearnRequest, utcnow
from app.vault import Vault
from worker.chores import end_expired, forget_old_keys
from worker.threads import Reaper

Sessions = sessionmaker[Session]
LATER = timedelta(hours=1)


def due(sessions: Sessions, later: timedelta = LATER) -> list[str]:
    with sessions() as session:
        return expiry.due(session, utcnow() + later)


def expire(sessions: Sessions, request_id: str) -> bool:
    with sessions.begin() as session:
        return expiry.expire(session, request_id, utcnow() + LATER)


def test_what_is_in_force_is_revoked(sessions: Sessions, vault: Vault) -> None:
    stays = activate(sessions, vault, must_take(sessions, submit(sessions, vault, "a")), version=0)
    request_id = submit(sessions, vault, "b", terms=terms(minutes=30))
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=1)
    assert due(sessions, timedelta()) == []
    assert due(sessions) == [request_id]
    assert expire(sessions, request_id) and not expire(sessions, request_id)
    assert due(sessions) == []
    with sessions() as session:
        prompt = active_set.get_prompt(session, prompt_id)
        assert (prompt.state, prompt.revoked_by, prompt.revoke_code) == ("revoked", "system", "expired")
        assert prompt.sealed is prompt.wrapped_key is None
        assert lifecycle.get_request(session, request_id).state == "revoked"
        assert [member.id for member in active_set.read_members(session)[1]] == [stays]
        audit.verify(session)


@pytest.mark.parametrize("before", ["pending", "training", "evaluating", "awaiting_approval"])
def test_what_is_not_in_force_yet_fails(sessions: Sessions, vault: Vault, before: str) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True, minutes=30))
    claim = must_take(sessions, request_id) if before != "pending" else None
    if claim and before == "evaluating":
        with sessions.begin() as session:
            lifecycle.start_evaluating(session, claim)
    if claim and before == "awaiting_approval":
        await_approval(sessions, claim)
    assert state(sessions, request_id) == before and due(sessions) == [request_id]
    assert expire(sessions, request_id) and not expire(sessions, request_id)
    with sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.failure is not None and (row.state, row.failure["code"]) == ("failed", "expired")
        assert row.wrapped_key is row.sealed_texts is None
        if claim:
            with pytest.raises(LeaseLost):
                lifecycle.hold(session, claim)


@pytest.mark.parametrize("in_force", [False, True])
def test_a_clock_that_was_set_back_meanwhile_ends_nothing(sessions: Sessions, vault: Vault, in_force: bool) -> None:
    request_id = submit(sessions, vault, terms=terms(minutes=30))
    if in_force:
        activate(sessions, vault, must_take(sessions, request_id), version=0)
    assert due(sessions) == [request_id]
    with sessions.begin() as session:
        assert not expiry.expire(session, request_id)
    assert state(sessions, request_id) == ("active" if in_force else "pending")


def test_what_is_being_cancelled_is_left_to_that(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, terms=terms(minutes=30))
    must_take(sessions, request_id)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="key_1")
    assert due(sessions) == [] and not expire(sessions, request_id)


def test_several_workers_at_once(sessions: Sessions, vault: Vault) -> None:
    ids = []
    for n in range(4):
        ids.append(submit(sessions, vault, f"text {n}", terms=terms(minutes=30)))
        activate(sessions, vault, must_take(sessions, ids[-1]), version=n)
    ids += [submit(sessions, vault, f"waits {n}", terms=terms(minutes=30)) for n in range(2)]
    barrier = threading.Barrier(3)
    ended: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            barrier.wait()
            ended.extend(request_id for request_id in due(sessions) if expire(sessions, request_id))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and sorted(ended) == sorted(ids)
    with sessions() as session:
        assert active_set.read_active_set(session).version == 8, "four came, four went"
        assert active_set.active_prompts(session) == []
        audit.verify(session)


def test_the_reaper_ends_what_has_run_out_and_forgets_old_keys(sessions: Sessions, vault: Vault) -> None:
    with sessions.begin() as session:
        key, _ = keys.create_key(session, name="test", scopes=["requests"], actor="test")
    active = submit(sessions, vault, "a", terms=terms(minutes=30), api_key_id=key.id)
    activate(sessions, vault, must_take(sessions, active), version=0)
    waiting = submit(sessions, vault, "b", terms=terms(minutes=30))
    past = utcnow() - timedelta(days=2)
    with sessions.begin() as session:
        call = idempotency.name_call(vault, api_key_id=key.id, key="k", body={})
        idempotency.remember(session, call, lifecycle.get_request(session, active), now=past)
        session.execute(update(UnlearnRequest).values(expires_at=past))
    rung: list[Any] = []
    died = threading.Event()
    chores = [partial(end_expired, sessions), partial(forget_old_keys, sessions, 47.0)]
    reaper = Reaper(
        sessions, rung.append, every=0.05, ring_seconds=60, max_attempts=3, on_death=died.set, chores=chores
    )
    reaper.start()

    def done() -> bool:
        with sessions() as session:
            return session.scalars(select(IdempotencyKey)).all() == []

    wait_for(done, "the reaper")
    reaper.stop()
    reaper.join(60)
    assert not reaper.is_alive()
    assert not died.is_set() and not reaper.crashed
    assert (state(sessions, active), state(sessions, waiting)) == ("revoked", "failed")
    with sessions() as session:
        assert session.scalars(select(Prompt.revoke_code)).all() == ["expired"]
