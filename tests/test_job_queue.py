from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from floor import FINGERPRINT, SECRET, activate, await_approval, must_take, state, submit, take, terms
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, approval, audit, job_queue, lifecycle
from app.errors import LeaseLost, VaultError
from app.lifecycle import Claim
from app.sealing import seal_prompt
from app.tables import Checkpoint, RequestEvent, UnlearnRequest, utcnow
from app.vault import Vault

Sessions = sessionmaker[Session]
LATER = timedelta(hours=1)


def reap(sessions: Sessions, *, attempts: int = 3) -> list[str]:
    with sessions.begin() as session:
        return job_queue.reap(session, max_attempts=attempts, now=utcnow() + LATER)


def test_many_claim_at_once_and_one_wins(sessions: Sessions, vault: Vault) -> None:
    for _ in range(5):
        request_id = submit(sessions, vault)
        barrier = threading.Barrier(4)
        claims: list[Claim | None] = []
        errors: list[BaseException] = []

        def work(
            request_id: str = request_id,
            barrier: threading.Barrier = barrier,
            claims: list[Claim | None] = claims,
            errors: list[BaseException] = errors,
        ) -> None:
            try:
                barrier.wait()
                claims.append(take(sessions, request_id))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len([claim for claim in claims if claim]) == 1
        with sessions() as session:
            assert lifecycle.get_request(session, request_id).attempt == 1


def test_claim_reads_back(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, "one", "two", "one")
    claim = must_take(sessions, request_id)
    with sessions() as session:
        request = lifecycle.get_request(session, request_id)
        assert (request.state, request.attempt, request.lease_owner) == ("training", 1, claim.owner)
        assert request.started_at is not None
        texts = job_queue.open_texts(session, vault, claim)
        assert [(item.text, item.label) for item in texts] == [(text, "negative") for text in ("one", "two", "one")]
        assert "one" not in repr(texts)


@pytest.mark.parametrize("ending", ["unknown", "held", "cancelled"])
def test_what_cannot_be_claimed(sessions: Sessions, vault: Vault, ending: str) -> None:
    request_id = submit(sessions, vault)
    if ending == "unknown":
        request_id = "req_0"
    elif ending == "held":
        must_take(sessions, request_id)
    else:
        with sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="key_1")
    assert take(sessions, request_id) is None


def test_an_expired_lease_is_taken_over_with_its_checkpoint(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    first = must_take(sessions, request_id, lease=-1)
    with sessions.begin() as session:
        assert job_queue.load_checkpoint(session, vault, first) is None
        job_queue.save_checkpoint(session, vault, first, step=10, data=b"old")
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, first, step=20, data=b"state")
    second = must_take(sessions, request_id, owner="w2")
    assert second.attempt == 2
    with sessions() as session:
        assert job_queue.load_checkpoint(session, vault, second) == (20, b"state")
        sealed = session.get_one(Checkpoint, request_id).sealed
        assert b"state" not in sealed
        with pytest.raises(VaultError):  # a checkpoint does not pass for one of another step
            key = lifecycle.get_request(session, request_id).wrapped_key
            vault.open(key, sealed, aad=job_queue.checkpoint_aad(request_id, 10))


def test_an_expired_lease_that_nobody_took_still_holds(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault), lease=-1)
    with sessions.begin() as session:
        assert job_queue.heartbeat(session, claim, lease_seconds=60) is False
    assert take(sessions, claim.request_id, owner="w2") is None


WRITES: dict[str, Callable[[Session, Vault, Claim], object]] = {
    "open_texts": lambda session, vault, claim: job_queue.open_texts(session, vault, claim),
    "heartbeat": lambda session, vault, claim: job_queue.heartbeat(session, claim, lease_seconds=60),
    "record_progress": lambda session, vault, claim: job_queue.record_progress(session, claim, {"step": 1}),
    "save_checkpoint": lambda session, vault, claim: job_queue.save_checkpoint(
        session, vault, claim, step=1, data=b"x"
    ),
    "load_checkpoint": lambda session, vault, claim: job_queue.load_checkpoint(session, vault, claim),
    "start_evaluating": lambda session, vault, claim: lifecycle.start_evaluating(session, claim),
    "fail": lambda session, vault, claim: lifecycle.fail(session, claim, code="x", detail="y"),
    "finish_cancelled": lambda session, vault, claim: lifecycle.finish_cancelled(session, claim),
    "release": lambda session, vault, claim: lifecycle.release(session, claim),
    "await_approval": lambda session, vault, claim: approval.await_approval(
        session, claim, metrics={}, prompt_digest="", gate_digest=None
    ),
    "activate": lambda session, vault, claim: active_set.activate(
        session,
        claim,
        seal_prompt(vault, vault.new_key(), prompt=b"", digest=hashlib.sha256().hexdigest()),
        fingerprint=FINGERPRINT,
        num_virtual_tokens=1,
        hidden_size=1,
        metrics={},
        expected_version=0,
    ),
}


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("fence", ["taken over", "reaped", "released and retaken", "approved and retaken", "ended"])
def test_a_zombie_gets_lease_lost_on_every_write(sessions: Sessions, vault: Vault, write: str, fence: str) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=fence == "approved and retaken"))
    zombie = must_take(sessions, request_id, lease=-1)
    if fence == "taken over":
        must_take(sessions, request_id)
    elif fence == "reaped":
        assert reap(sessions) == [request_id]
    elif fence == "released and retaken":  # the same worker, the same attempt number: still another claim
        with sessions.begin() as session:
            lifecycle.release(session, zombie)
        assert must_take(sessions, request_id).attempt == zombie.attempt
    elif fence == "approved and retaken":  # again the same attempt number
        await_approval(sessions, zombie)
        with sessions.begin() as session:
            approval.approve(session, request_id, actor="key_2")
        assert must_take(sessions, request_id).attempt == zombie.attempt
    else:
        activate(sessions, vault, zombie, version=0)
    before = snapshot(sessions, request_id)
    with sessions() as session:
        with pytest.raises(LeaseLost):
            WRITES[write](session, vault, zombie)
        session.commit()  # a caller that goes on by mistake still writes nothing
    assert snapshot(sessions, request_id) == before


def snapshot(sessions: Sessions, request_id: str) -> object:
    with sessions() as session:
        request = lifecycle.get_request(session, request_id)
        row = {column.name: getattr(request, column.name) for column in UnlearnRequest.__table__.columns}
        return row, len(lifecycle.list_events(session, request_id)), active_set.read_active_set(session)


def test_attempts_run_out(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    for attempt in (1, 2):
        assert must_take(sessions, request_id, lease=-1, attempts=2).attempt == attempt
        if attempt == 1:
            assert reap(sessions, attempts=2) == [request_id]
            assert state(sessions, request_id) == "pending"
    assert take(sessions, request_id, attempts=2) is None
    assert reap(sessions, attempts=2) == [request_id]
    assert reap(sessions, attempts=2) == []  # doing it again changes nothing
    with sessions() as session:
        request = lifecycle.get_request(session, request_id)
        assert request.state == "failed"
        assert request.failure == {"code": "attempts-exhausted", "detail": "the worker was lost 2 times"}
        assert request.wrapped_key is request.sealed_texts is None
        assert audit.verify(session) == 5  # created, training, pending, training, failed


def test_a_lowered_cap_ends_what_waits(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    must_take(sessions, request_id, lease=-1)
    reap(sessions)
    assert take(sessions, request_id, attempts=1) is None
    assert reap(sessions, attempts=1) == [request_id]
    assert state(sessions, request_id) == "failed"


def test_reap_leaves_the_living_alone(sessions: Sessions, vault: Vault) -> None:
    submit(sessions, vault)
    must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        assert job_queue.reap(session, max_attempts=3) == []


def test_reap_ends_a_cancelled_request_of_a_lost_worker(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    must_take(sessions, request_id, lease=-1)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="key_1")
    assert take(sessions, request_id, owner="w2") is None
    assert reap(sessions) == [request_id]
    assert state(sessions, request_id) == "cancelled"


def test_two_reapers_at_once_touch_each_request_once(sessions: Sessions, vault: Vault) -> None:
    ids = [submit(sessions, vault) for _ in range(6)]
    for request_id in ids:
        must_take(sessions, request_id, lease=-1)
    touched: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            touched.extend(reap(sessions))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(touched) == sorted(ids)
    with sessions() as session:
        assert audit.verify(session) == 18


def test_release_keeps_checkpoint_and_attempt(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, claim, step=7, data=b"state")
    with sessions.begin() as session:
        lifecycle.release(session, claim)
    assert state(sessions, claim.request_id) == "pending"
    again = must_take(sessions, claim.request_id)
    assert again.attempt == 1
    with sessions() as session:
        assert job_queue.load_checkpoint(session, vault, again) == (7, b"state")


def test_progress_and_cancel_flag(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        assert job_queue.record_progress(session, claim, {"step": 1, "loss": 0.5}) is False
    with sessions.begin() as session:
        assert lifecycle.request_cancel(session, claim.request_id, actor="key_1").cancel_requested
    with sessions.begin() as session:
        assert job_queue.record_progress(session, claim, {"step": 2, "loss": 0.4}) is True
        assert job_queue.heartbeat(session, claim, lease_seconds=60) is True
    with sessions() as session:
        request = lifecycle.get_request(session, claim.request_id)
        assert request.progress == {"step": 2, "loss": 0.4}
        assert request.last_step_at is not None
        events = lifecycle.list_events(session, claim.request_id)
        assert [event.data.get("step") for event in events if event.type == "progress"] == [1, 2]
        assert lifecycle.list_events(session, claim.request_id, after=events[-2].id) == events[-1:]


def test_ring_due_and_next_pending(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session:
        assert job_queue.next_pending(session) is None
    ids = sorted(submit(sessions, vault) for _ in range(3))
    now = utcnow()
    with sessions.begin() as session:
        assert job_queue.next_pending(session) == ids[0]
        assert job_queue.ring_due(session, ring_seconds=60, now=now) == ids
        assert job_queue.ring_due(session, ring_seconds=60, now=now + timedelta(seconds=59)) == []
    claim = must_take(sessions, ids[0])
    with sessions.begin() as session:
        assert job_queue.ring_due(session, ring_seconds=60, now=now + timedelta(seconds=61)) == ids[1:]
    with sessions.begin() as session:
        lifecycle.release(session, claim)
    with sessions.begin() as session:
        assert job_queue.ring_due(session, ring_seconds=60, now=now + timedelta(seconds=61)) == ids[:1]


def test_no_event_or_audit_row_holds_a_text(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        lifecycle.fail(session, claim, code="checks-failed", detail="forget_abstain 0.5 < 0.9")
    with sessions() as session:
        rows = [*session.scalars(select(RequestEvent)), *session.scalars(select(UnlearnRequest))]
        assert SECRET not in repr([vars(row) for row in rows])
