from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from databases import database_kinds, fresh_database, migrated_database
from floor import FINGERPRINT, SECRET, activate, await_approval, must_take, state, submit, take, terms
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, approval, audit, audit_state, db, expiry, job_queue, lifecycle, revoking
from app.errors import Conflict, InvalidInput, LeaseLost, NotFound
from app.lifecycle import TRANSITIONS, CancelRequested, Claim, ForgetText
from app.tables import OPEN, RUNNING, AuditEntry, Checkpoint, ForgetDigest, RequestState, UnlearnRequest, utcnow
from app.vault import Vault

Sessions = sessionmaker[Session]


def test_create(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, SECRET, SECRET.upper(), "another")
    with sessions() as session:
        request = lifecycle.get_request(session, request_id)
        assert (request.state, request.num_texts, request.attempt) == ("pending", 3, 0)
        assert request.sealed_texts is not None
        assert SECRET.encode() not in request.sealed_texts
        assert set(session.scalars(select(ForgetDigest.digest))) == {vault.digest(SECRET), vault.digest("another")}
        assert [event.data["state"] for event in lifecycle.list_events(session, request_id)] == ["pending"]
        assert audit.verify(session) == 1


def test_create_is_undone_whole(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session:
        lifecycle.create_request(
            session,
            vault,
            texts=[ForgetText("x")],
            reason=None,
            options={},
            fingerprint=FINGERPRINT,
            api_key_id=None,
        )
        session.rollback()
        for table in (UnlearnRequest, ForgetDigest, AuditEntry):
            assert session.scalar(select(func.count()).select_from(table)) == 0


def test_create_without_texts(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session, pytest.raises(InvalidInput):
        lifecycle.create_request(
            session, vault, texts=[], reason=None, options={}, fingerprint=FINGERPRINT, api_key_id=None
        )


def test_pages(sessions: Sessions, vault: Vault) -> None:
    ids = sorted((submit(sessions, vault) for _ in range(5)), reverse=True)
    with sessions() as session:
        seen, cursor = [], None
        while True:
            page, cursor = lifecycle.list_requests(session, limit=2, cursor=cursor)
            seen += [request.id for request in page]
            if cursor is None:
                break
        assert seen == ids
        assert lifecycle.list_requests(session, limit=5)[1] is None
        assert lifecycle.list_requests(session, limit=5, state="failed") == ([], None)
        assert len(lifecycle.list_requests(session, limit=9, state="pending")[0]) == 5
        for bad in ({"state": "x"}, {"cursor": "x"}, {"cursor": "req_\x00"}, {"cursor": "req_" + "0" * 99}):
            with pytest.raises(InvalidInput):
                lifecycle.list_requests(session, limit=5, **bad)


def test_unknown_ids(sessions: Sessions) -> None:
    with sessions() as session:
        with pytest.raises(NotFound):
            lifecycle.get_request(session, "req_0")
        with pytest.raises(NotFound):
            lifecycle.request_cancel(session, "req_0", actor="key_1")
        assert lifecycle.list_events(session, "req_0") == []


def test_cancel_waiting_running_and_ended(sessions: Sessions, vault: Vault) -> None:
    waiting, running, active = (submit(sessions, vault) for _ in range(3))
    claim = must_take(sessions, running)
    prompt = activate(sessions, vault, must_take(sessions, active), version=0)
    for _ in range(2):
        with sessions.begin() as session:  # asking twice is no error
            assert lifecycle.request_cancel(session, running, actor="key_1").state == "training"
    with sessions.begin() as session:
        assert lifecycle.request_cancel(session, waiting, actor="key_1").state == "cancelled"
    for ended in (waiting, active):
        with sessions() as session, pytest.raises(Conflict):
            lifecycle.request_cancel(session, ended, actor="key_1")
    with sessions.begin() as session:
        lifecycle.release(session, claim)  # a shutdown honours the cancellation
    assert state(sessions, running) == "cancelled"
    with sessions() as session:
        for request_id in (waiting, running, active):
            request = lifecycle.get_request(session, request_id)
            assert request.wrapped_key is request.sealed_texts is None
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 0
        assert active_set.get_prompt(session, prompt).state == "active"
        asked = [
            row.action for row in session.scalars(select(AuditEntry).order_by(AuditEntry.seq)) if row.subject == running
        ]
        assert asked.count("request.cancel_requested") == 1


def test_every_move_outside_the_table_is_refused(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    for before in RequestState:
        for after in set(RequestState) - TRANSITIONS[before]:
            with sessions() as session:
                request = lifecycle.lock_request(session, request_id)
                request.state = before
                with pytest.raises(Conflict):
                    lifecycle.move(session, request, after, actor="test")
                session.rollback()


class Requests(RuleBasedStateMachine):
    """Clients, workers and a reaper in any order; the model is what each may expect, ``shown`` the last state seen."""

    kind = "sqlite"
    requests = Bundle("requests")
    claims = Bundle("claims")  # zombies stay in here

    @initialize()
    def open(self) -> None:
        self.stack = ExitStack()
        if self.kind == "sqlite":
            folder = self.stack.enter_context(TemporaryDirectory())
            url = migrated_database(Path(folder) / "test.db")
        else:
            url = self.stack.enter_context(fresh_database(self.kind, Path()))
        self.engine: Engine = db.make_engine(url)
        self.stack.callback(self.engine.dispose)
        self.sessions = db.make_sessions(self.engine)
        self.vault = Vault(bytes(32))
        self.shown: dict[str, str] = {}
        self.holder: dict[str, Claim | None] = {}
        self.expired: set[str] = set()
        self.asked_to_cancel: set[str] = set()
        self.texts: list[str] = []

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()

    @rule(target=requests, agreed=st.booleans(), minutes=st.sampled_from([None, 90]))
    def submit(self, agreed: bool, minutes: float | None) -> str:
        text = f"text number {len(self.holder)}"
        request_id = submit(self.sessions, self.vault, text, terms=terms(approval=agreed, minutes=minutes))
        self.holder[request_id] = None
        self.texts.append(text)
        return request_id

    @rule(target=claims, request_id=requests, lease=st.sampled_from([1800, -1]))
    def claim(self, request_id: str, lease: float) -> object:
        claim = take(self.sessions, request_id, lease=lease)
        if claim is None:
            return multiple()
        assert self.holder[request_id] is None or request_id in self.expired
        self.holder[request_id] = claim
        (self.expired.add if lease < 0 else self.expired.discard)(request_id)
        return claim

    @rule(claim=claims)
    def heartbeat(self, claim: Claim) -> None:
        if self.as_worker(claim, lambda session: job_queue.heartbeat(session, claim, lease_seconds=1800)):
            self.expired.discard(claim.request_id)

    @rule(claim=claims)
    def checkpoint(self, claim: Claim) -> None:
        self.as_worker(claim, lambda session: job_queue.save_checkpoint(session, self.vault, claim, step=1, data=b"x"))

    @rule(claim=claims)
    def evaluate(self, claim: Claim) -> None:
        if self.shown.get(claim.request_id) != "evaluating":
            self.as_worker(claim, lambda session: lifecycle.start_evaluating(session, claim))

    @rule(claim=claims)
    def activate(self, claim: Claim) -> None:
        with self.sessions() as session:
            version = active_set.read_active_set(session).version
        try:
            activate(self.sessions, self.vault, claim, version=version)
        except CancelRequested:
            assert claim.request_id in self.asked_to_cancel
            assert self.holder[claim.request_id] == claim
        except Conflict:
            assert self.undecided(claim.request_id)
        except LeaseLost:
            assert self.holder[claim.request_id] != claim
        else:
            assert not self.undecided(claim.request_id)
            self.ended(claim)

    @rule(request_id=requests)
    def see_through(self, request_id: str) -> None:
        """Both at once: by chance alone a claim and its activation seldom meet, least of all undecided."""
        claim = take(self.sessions, request_id, lease=1800)
        if claim is not None:
            self.holder[request_id] = claim
            self.expired.discard(request_id)
            self.activate(claim)

    def undecided(self, request_id: str) -> bool:
        with self.sessions() as session:
            return approval.needed(lifecycle.get_request(session, request_id))

    @rule(claim=claims)
    def await_approval(self, claim: Claim) -> None:
        try:
            await_approval(self.sessions, claim)
        except CancelRequested:
            assert claim.request_id in self.asked_to_cancel
        except Conflict:
            assert not self.undecided(claim.request_id)
        except LeaseLost:
            assert self.holder[claim.request_id] != claim
        else:
            assert self.undecided(claim.request_id)
            self.ended(claim)

    @rule(request_id=requests, agree=st.booleans())
    def decide(self, request_id: str, agree: bool) -> None:
        try:
            with self.sessions.begin() as session:
                if agree:
                    request = approval.approve(session, request_id, actor="key_2")
                    assert (request.attempt, request.approved_by) == (0, "key_2")
                else:
                    approval.reject(session, request_id, actor="key_2", reason="not theirs")
        except Conflict:
            assert self.shown.get(request_id) != "awaiting_approval"
        else:
            assert self.shown[request_id] == "awaiting_approval"

    @rule(hours=st.sampled_from([0, 2]))
    def expire(self, hours: int) -> None:
        later = timedelta(hours=hours)
        with patch.object(audit, "utcnow", lambda: utcnow() + later):  # the entries are of then, too
            self.expire_at(hours)

    def expire_at(self, hours: int) -> None:
        now = utcnow() + timedelta(hours=hours)
        with self.sessions() as session:
            due = expiry.due(session, now)
        assert hours or due == []
        for request_id in due:
            with self.sessions.begin() as session:
                assert expiry.expire(session, request_id, now)
            with self.sessions.begin() as session:
                assert not expiry.expire(session, request_id, now)  # another worker had the same list
            self.holder[request_id] = None

    @rule(claim=consumes(claims))
    def fail(self, claim: Claim) -> None:
        if self.as_worker(claim, lambda session: lifecycle.fail(session, claim, code="x", detail="y")):
            self.ended(claim)

    @rule(claim=consumes(claims))
    def finish_cancelled(self, claim: Claim) -> None:
        if self.as_worker(claim, lambda session: lifecycle.finish_cancelled(session, claim)):
            self.ended(claim)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        if self.as_worker(claim, lambda session: lifecycle.release(session, claim)):
            self.ended(claim)

    @rule(request_id=requests)
    def cancel(self, request_id: str) -> None:
        before = self.shown.get(request_id, "pending")
        try:
            with self.sessions.begin() as session:
                lifecycle.request_cancel(session, request_id, actor="key_1")
        except Conflict:
            assert before not in OPEN
        else:
            assert before in OPEN
            self.asked_to_cancel.add(request_id)

    @rule(minutes=st.sampled_from([0, 60]))
    def reap(self, minutes: int) -> None:
        with self.sessions.begin() as session:
            ids = job_queue.reap(session, max_attempts=3, now=utcnow() + timedelta(minutes=minutes))
        for request_id in ids:
            self.holder[request_id] = None

    @precondition(lambda self: any(state == "active" for state in self.shown.values()))
    @rule()
    def revoke(self) -> None:
        with self.sessions.begin() as session:
            prompt = active_set.active_prompts(session)[0]
            active_set.revoke_prompt(session, prompt.id, actor="key_1", reason=None)

    @precondition(lambda self: any(state == "active" for state in self.shown.values()))
    @rule(actor=st.sampled_from(["key_1", "key_2"]))
    def revoke_by_two(self, actor: str) -> None:
        with self.sessions() as session:
            prompt = active_set.active_prompts(session)[0]
        asked_by = prompt.revoke_asked_by
        try:
            with self.sessions.begin() as session:
                found, done = revoking.revoke(session, prompt.id, actor=actor, code="harm", reason="r", needs_two=True)
        except Conflict:
            assert asked_by == actor
        else:
            assert done == (asked_by is not None) == (found.state == "revoked")
            assert asked_by != actor and found.revoke_asked_by == (asked_by or actor)

    def as_worker(self, claim: Claim, work: Callable[[Session], object]) -> bool:
        """A worker's write succeeds exactly when its claim is the one that holds."""
        holds = self.holder[claim.request_id] == claim
        try:
            with self.sessions.begin() as session:
                work(session)
        except LeaseLost:
            assert not holds
            return False
        assert holds
        return True

    def ended(self, claim: Claim) -> None:
        self.holder[claim.request_id] = None

    @invariant()
    def rows_agree(self) -> None:
        if not hasattr(self, "sessions"):
            return
        with self.sessions() as session:
            active = active_set.active_prompts(session)
            assert [m.id for m in active_set.read_members(session)[1]] == [prompt.id for prompt in active]
            rows, _ = lifecycle.list_requests(session, limit=1000)
            assert {prompt.request_id for prompt in active} == {row.id for row in rows if row.state == "active"}
            assert active_set.forgotten_digests(session) == {self.vault.digest(text) for text in self.texts}
            checkpoints = set(session.scalars(select(Checkpoint.request_id)))
            for row in rows:
                states = [e.data["state"] for e in lifecycle.list_events(session, row.id) if e.type == "state"]
                assert states[0] == "pending"
                assert states[-1] == row.state
                for before, after in pairwise(states):
                    assert RequestState(after) in TRANSITIONS[RequestState(before)]
                unfinished = row.state in OPEN
                if row.state in ("active", "revoked") and row.approval_required:
                    assert row.approved_by == "key_2" and "awaiting_approval" in states
                assert (row.wrapped_key is not None) == (row.sealed_texts is not None) == unfinished
                assert unfinished or row.id not in checkpoints
                assert (row.finished_at is not None) == (not unfinished)
                assert (row.lease_owner is not None) == (row.state in RUNNING)
                assert row.attempt <= 3
                if row.id in self.asked_to_cancel:
                    assert row.state in (*RUNNING, "cancelled", "failed")
                self.shown[row.id] = row.state
            audited = session.scalar(
                select(func.count()).select_from(AuditEntry).where(AuditEntry.action.like("request.%"))
            )
            state_events = sum(
                len([e for e in lifecycle.list_events(session, row.id) if e.type == "state"]) for row in rows
            )
            assert audited is not None
            assert 0 <= audited - state_events <= len(self.asked_to_cancel)
            audit_state.verify(session)


def run_machine(kind: str, examples: int, steps: int) -> None:
    machine = type("Machine", (Requests,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.parametrize("kind", database_kinds())
def test_any_order_of_events(kind: str) -> None:
    run_machine(kind, examples=30 if kind == "sqlite" else 8, steps=30)
