"""What the database tells Prometheus, counted on rows that the floor's own functions made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from floor import activate, await_approval, must_take, submit, terms
from sqlalchemy import Engine, event, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, job_queue, keys, lifecycle, webhook_queue, webhooks
from app.database_metrics import Seen, families, observe
from app.tables import DeliveryState, PendingShred, PromptState, RequestState, UnlearnRequest, utcnow
from app.terms import Terms
from app.vault import Vault

Sessions = sessionmaker[Session]


def look(sessions: Sessions, *, later: float = 0.0) -> Seen:
    """A reading, ``later`` seconds from now."""
    with sessions() as session:
        return observe(session, utcnow() + timedelta(seconds=later))


def reap(sessions: Sessions, *, attempts: int = 3) -> list[str]:
    with sessions.begin() as session:
        return job_queue.reap(session, max_attempts=attempts, now=utcnow() + timedelta(hours=1))


@pytest.fixture
def statements(engine: Engine) -> Iterator[list[str]]:
    said: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        said.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield said
    event.remove(engine, "before_cursor_execute", note)


def test_an_empty_database(sessions: Sessions) -> None:
    seen = look(sessions)
    assert seen == Seen(
        requests={state.value: 0 for state in RequestState},
        prompts={state.value: 0 for state in PromptState},
        version=0,
        attempts=0,
        lease_expiries=0,
        pending_seconds=None,
        open_seconds=None,
        lease_left=None,
        step_seconds=None,
        steps_done=0,
        steps_planned=0,
        deliveries={state.value: 0 for state in DeliveryState},
        overdue_seconds=None,
        evidence={"kept": 0, "absent": 0},
    )
    values = {family.name: [sample.value for sample in family.samples] for family in families(seen)}
    assert values["letheon_requests_pending_oldest_seconds"] == [0]
    assert values["letheon_training_lease_left_seconds"] == []


def test_states_and_ages(sessions: Sessions, vault: Vault) -> None:
    first, second, third = (submit(sessions, vault, f"text {i}") for i in range(3))
    must_take(sessions, first, lease=60)
    with sessions.begin() as session:
        old = utcnow() - timedelta(seconds=500)
        session.execute(update(UnlearnRequest).where(UnlearnRequest.id == second).values(updated_at=old))
        session.execute(update(UnlearnRequest).where(UnlearnRequest.id == first).values(created_at=old))
        lifecycle.request_cancel(session, third, actor="test")
    seen = look(sessions)
    assert {state: n for state, n in seen.requests.items() if n} == {"pending": 1, "training": 1, "cancelled": 1}
    assert seen.pending_seconds == pytest.approx(500, abs=5)
    assert seen.open_seconds == pytest.approx(500, abs=5)
    assert seen.lease_left == pytest.approx(60, abs=5)
    assert look(sessions, later=100).lease_left == pytest.approx(-40, abs=5)


def test_deadlines(sessions: Sessions, vault: Vault) -> None:
    def due(days: float) -> Terms:
        return replace(terms(), due_at=utcnow() + timedelta(days=days))

    for days in (-1, 6, 6.5, 8):
        submit(sessions, vault, terms=due(days))
    submit(sessions, vault)  # from a time when no deadline was kept
    waiting = submit(sessions, vault, terms=replace(due(-1), approval_required=True))
    await_approval(sessions, must_take(sessions, waiting))
    activate(sessions, vault, must_take(sessions, submit(sessions, vault, terms=due(-1))), version=0)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, submit(sessions, vault, terms=due(1)), actor="test")
    seen = look(sessions)
    assert (seen.overdue, seen.due_soon) == (2, 2)
    assert (look(sessions, later=3 * 86400).overdue, look(sessions, later=3 * 86400).due_soon) == (2, 3)
    values = {family.name: [sample.value for sample in family.samples] for family in families(seen)}
    assert (values["letheon_requests_overdue"], values["letheon_requests_due_soon"]) == ([2], [2])


def test_what_outlives_its_time(sessions: Sessions, vault: Vault) -> None:
    kept, over = (submit(sessions, vault, f"text {i}") for i in range(2))
    with sessions.begin() as session:
        for request_id in (kept, over):
            lifecycle.request_cancel(session, request_id, actor="test")
        for request_id, hours in ((kept, 1), (over, -0.5)):
            at = utcnow() + timedelta(hours=hours)
            session.execute(update(UnlearnRequest).where(UnlearnRequest.id == request_id).values(shred_at=at))
    assert look(sessions).shred_seconds == pytest.approx(1800, abs=20)
    with sessions.begin() as session:
        assert job_queue.shred_due(session) == [over]
    assert look(sessions).shred_seconds is None
    assert look(sessions, later=7200).shred_seconds == pytest.approx(3600, abs=20)
    with sessions.begin() as session:
        session.add(PendingShred(share_id=bytes(16), at=utcnow() - timedelta(days=1)))
    seen = look(sessions)
    assert seen.shred_seconds == pytest.approx(86400, abs=20)
    values = {family.name: [sample.value for sample in family.samples] for family in families(seen)}
    assert values["letheon_shredding_overdue_seconds"] == [seen.shred_seconds]


def test_the_queue_age_begins_anew_with_the_wait(sessions: Sessions, vault: Vault) -> None:
    """What a lost worker has put back waits since then; that it is old is another figure."""
    request_id = submit(sessions, vault)
    must_take(sessions, request_id, lease=-1)
    with sessions.begin() as session:
        session.execute(update(UnlearnRequest).values(created_at=utcnow() - timedelta(hours=2)))
    with sessions.begin() as session:
        assert job_queue.reap(session, max_attempts=3) == [request_id]
    seen = look(sessions)
    assert seen.pending_seconds == pytest.approx(0, abs=5)
    assert seen.open_seconds == pytest.approx(7200, abs=5)


def test_trainings_under_way(sessions: Sessions, vault: Vault) -> None:
    claims = [must_take(sessions, submit(sessions, vault, f"text {i}")) for i in range(3)]
    for claim, step in zip(claims, (10, 25, 40), strict=True):
        with sessions.begin() as session:
            job_queue.record_progress(session, claim, {"step": step, "total_steps": 100, "loss": 0.5})
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, claims[1])
        lifecycle.fail(session, claims[2], code="diverged", detail="the loss became infinite")
    seen = look(sessions, later=30)
    assert (seen.steps_done, seen.steps_planned) == (35, 200), "of what has ended nothing counts"
    assert seen.step_seconds == pytest.approx(30, abs=5)
    with sessions.begin() as session:
        assert job_queue.heartbeat(session, claims[0], lease_seconds=1000) is False
        assert job_queue.heartbeat(session, claims[1], lease_seconds=200) is False
    assert look(sessions).lease_left == pytest.approx(200, abs=5)
    with sessions.begin() as session:
        lifecycle.release(session, claims[0])
    assert look(sessions).steps_done == 25


def test_a_training_that_has_said_nothing_yet(sessions: Sessions, vault: Vault) -> None:
    must_take(sessions, submit(sessions, vault))
    seen = look(sessions, later=20)
    assert (seen.steps_done, seen.steps_planned) == (0, 0)
    assert seen.step_seconds == pytest.approx(20, abs=5)


def test_lease_expiries_only_grow_and_count_each_loss_once(sessions: Sessions, vault: Vault) -> None:
    def expiries() -> int:
        return look(sessions).lease_expiries

    request_id = submit(sessions, vault)
    must_take(sessions, request_id, lease=-1)
    assert expiries() == 0, "expired, but nobody has noticed"
    assert reap(sessions) == [request_id] and reap(sessions) == []
    assert expiries() == 1
    must_take(sessions, request_id, lease=-1)
    second = must_take(sessions, request_id, owner="w2")  # taken over before a reaper came
    assert (expiries(), look(sessions).attempts) == (2, 3)
    with sessions.begin() as session:
        lifecycle.release(session, second)  # a shutdown is no loss
    assert (expiries(), look(sessions).attempts) == (2, 2)
    third = must_take(sessions, request_id)
    activate(sessions, vault, third, version=0)
    assert expiries() == 2, "nor is an end"

    exhausted = submit(sessions, vault, "another")
    must_take(sessions, exhausted, lease=-1)
    assert reap(sessions, attempts=1) == [exhausted]
    assert expiries() == 3
    cancelled = must_take(sessions, submit(sessions, vault, "third"), lease=-1)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, cancelled.request_id, actor="test")
    assert reap(sessions) == [cancelled.request_id]
    assert expiries() == 4
    capped = submit(sessions, vault, "fourth")  # it waits, so no lease is there to expire
    with sessions.begin() as session:
        session.execute(update(UnlearnRequest).where(UnlearnRequest.id == capped).values(attempt=3))
    assert reap(sessions) == [capped]
    assert expiries() == 4
    assert {state: n for state, n in look(sessions).requests.items() if n} == {"active": 1, "failed": 2, "cancelled": 1}


def test_prompts_by_state(sessions: Sessions, vault: Vault) -> None:
    ids = [
        activate(sessions, vault, must_take(sessions, submit(sessions, vault, f"text {i}")), version=i)
        for i in range(3)
    ]
    with sessions.begin() as session:
        active_set.revoke_prompt(session, ids[0], actor="test", reason=None)
    seen = look(sessions)
    assert seen.prompts == {"active": 2, "suspended": 0, "revoked": 1}
    assert (seen.version, seen.requests["active"], seen.requests["revoked"]) == (4, 2, 1)


def test_messages_to_webhooks(sessions: Sessions, vault: Vault) -> None:
    with sessions.begin() as session:
        key, _ = keys.create_key(session, name="test", scopes=["requests"], actor="test")
        hook, _ = webhooks.create_webhook(
            session, vault, api_key_id=key.id, scopes=key.scopes, url="https://example.com/"
        )
        webhooks.ping(session, hook.id, of=None)
    assert look(sessions, later=100).overdue_seconds == pytest.approx(100, abs=5)
    with sessions.begin() as session:
        [due] = webhook_queue.claim(session, limit=9, lease_seconds=70, max_attempts=3)
    seen = look(sessions)
    assert (seen.deliveries["pending"], seen.deliveries["sending"], seen.overdue_seconds) == (0, 1, 0)
    assert look(sessions, later=100).overdue_seconds == pytest.approx(30, abs=5), "its sender is gone"
    failed = webhook_queue.Outcome(webhook_queue.DeliveryError.TIMEOUT)
    with sessions.begin() as session:
        webhook_queue.record(session, due, failed, max_attempts=1)
    seen = look(sessions, later=100)
    assert seen.deliveries == {"pending": 0, "sending": 0, "delivered": 0, "failed": 1}
    assert seen.overdue_seconds is None


def test_a_reading_is_six_queries_and_cannot_write(
    sessions: Sessions, vault: Vault, engine: Engine, statements: list[str]
) -> None:
    submit(sessions, vault)
    statements.clear()
    look(sessions)
    assert len([said for said in statements if said.startswith("SELECT")]) == 6
    assert not [said for said in statements if said.startswith(("INSERT", "UPDATE", "DELETE", "BEGIN IMMEDIATE"))]
    if engine.dialect.name == "postgresql":
        with sessions() as session:
            observe(session, utcnow())
            with pytest.raises(DBAPIError, match="read-only"):
                session.execute(text("UPDATE active_set SET version = 9"))
        with sessions() as session:  # the connection goes back to the pool as it was
            assert session.scalar(text("SHOW statement_timeout")) == "0"
            assert session.scalar(text("SHOW transaction_read_only")) == "off"
