"""Versions of the active set: recorded once, put back exactly, and a revoked prompt is gone for good."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from databases import database_kinds, fresh_database, migrated_database
from floor import FINGERPRINT, activate, must_take, state, submit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, audit, audit_state, db, job_queue, lifecycle, set_history
from app.active_set import ActiveSetView, TrainedGate, set_digest
from app.errors import Conflict, NotFound, NotReady, VaultError
from app.lifecycle import ForgetText
from app.sealing import seal_prompt
from app.settings import Mode
from app.tables import ActiveSet, ActiveSetMember, ActiveSetVersion, AuditEntry, Prompt, UnlearnRequest
from app.vault import Vault

Sessions = sessionmaker[Session]
SPACE = b"the statistics of a retain set"


def make_gate(sessions: Sessions, data: bytes) -> TrainedGate:
    """For the floor a gate is bytes and a digest, like the prompt."""
    with sessions.begin() as session:
        space = active_set.find_gate_space(session, "source") or active_set.add_gate_space(session, "source", SPACE)
    return TrainedGate(data, hashlib.sha256(data).hexdigest(), space)


def put(sessions: Sessions, vault: Vault, data: bytes, *, gate: bytes | None = None) -> str:
    claim = must_take(sessions, submit(sessions, vault))
    trained = make_gate(sessions, gate) if gate is not None else None
    with sessions() as session:
        version = active_set.read_active_set(session).version
    return activate(sessions, vault, claim, data=data, version=version, gate=trained)


def revoke(sessions: Sessions, prompt_id: str) -> None:
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)


def restore(sessions: Sessions, version: int, mode: Mode = Mode.CONCATENATE) -> ActiveSetView:
    with sessions.begin() as session:
        return active_set.restore(
            session, version, mode=mode, fingerprint=FINGERPRINT, actor="key_1", reason="too much is unknown"
        )


def members(sessions: Sessions, version: int) -> list[str]:
    with sessions() as session:
        return [prompt.id for prompt in set_history.members_of(session, version)]


def in_force(sessions: Sessions) -> list[str]:
    """Through the digest: NotReady when the rows do not agree."""
    with sessions() as session:
        return [member.id for member in active_set.read_members(session)[1]]


def states(sessions: Sessions, *prompts: str) -> list[str]:
    """Of prompts whose requests must say the same."""
    with sessions() as session:
        rows = [active_set.get_prompt(session, prompt_id) for prompt_id in prompts]
    assert [state(sessions, row.request_id) for row in rows] == [row.state for row in rows]
    return [row.state for row in rows]


def everything(sessions: Sessions) -> list[Any]:
    """All that a restore can change, row by row."""
    tables = (ActiveSet, ActiveSetVersion, ActiveSetMember, Prompt, UnlearnRequest, AuditEntry)
    with sessions() as session:
        rows: list[Any] = [[tuple(row) for row in session.execute(select(*t.__table__.c))] for t in tables]
    return [sorted(table, key=repr) for table in rows]


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_every_change_is_recorded(sessions: Sessions, vault: Vault) -> None:
    first, second = put(sessions, vault, b"1"), put(sessions, vault, b"2")
    revoke(sessions, first)
    third = put(sessions, vault, b"3")
    restore(sessions, 3)
    expected = {0: [], 1: [first], 2: [first, second], 3: [second], 4: [second, third], 5: [second]}
    assert {version: members(sessions, version) for version in expected} == expected
    with sessions() as session:
        rows, before = set_history.list_versions(session, limit=9)
        assert ([row.version for row in rows], before) == ([5, 4, 3, 2, 1, 0], None)
        assert [row.size for row in rows] == [len(expected[row.version]) for row in rows]
        actors = [row.created_by.partition("#")[0] for row in rows]
        assert actors == ["key_1", "w1", "key_1", "w1", "w1", "system"]
        assert [row.reason for row in rows] == ["too much is unknown", *[None] * 5]
        assert [row.checks for row in rows] == [
            None,
            {"forget_abstain": 1.0},
            None,
            *[{"forget_abstain": 1.0}] * 2,
            None,
        ]
        assert active_set.read_active_set(session) == ActiveSetView(5, rows[0].digest)
        audit.verify(session)


def test_pages_and_checks_that_come_later(sessions: Sessions, vault: Vault) -> None:
    for number in range(3):
        put(sessions, vault, bytes([number]))
    with sessions.begin() as session:
        page, before = set_history.list_versions(session, limit=2)
        rest, end = set_history.list_versions(session, limit=2, before=before)
        assert [row.version for row in page + rest] == [3, 2, 1, 0]
        assert end is None
        set_history.save_checks(session, 0, {"passed": True})
        with pytest.raises(NotFound):
            set_history.save_checks(session, 9, {})
    with sessions() as session:
        assert set_history.get_version(session, 0).checks == {"passed": True}
        with pytest.raises(NotFound):
            set_history.get_version(session, 9)


# --- restoring -------------------------------------------------------------------------------------------------------


def test_restore_brings_back_exactly_an_earlier_set(sessions: Sessions, vault: Vault) -> None:
    prompts = [put(sessions, vault, data) for data in (b"1", b"2", b"3")]
    with sessions() as session:
        digests = {row.version: row.digest for row in set_history.list_versions(session, limit=9)[0]}
        finished = {row.id: row.finished_at for row in session.scalars(select(UnlearnRequest))}
    assert restore(sessions, 1) == ActiveSetView(4, digests[1])
    assert in_force(sessions) == members(sessions, 4) == prompts[:1]
    assert states(sessions, *prompts) == ["active", "suspended", "suspended"]

    assert restore(sessions, 3) == ActiveSetView(5, digests[3])  # and forward again
    assert in_force(sessions) == prompts
    assert states(sessions, *prompts) == ["active"] * 3

    assert restore(sessions, 0) == ActiveSetView(6, digests[0])
    assert in_force(sessions) == []
    fourth = put(sessions, vault, b"4")  # beside nothing, though three came before
    assert in_force(sessions) == [fourth]
    assert restore(sessions, 2) == ActiveSetView(8, digests[2])
    assert in_force(sessions) == prompts[:2]
    assert states(sessions, *prompts, fourth) == ["active", "active", "suspended", "suspended"]
    with sessions() as session:
        for prompt, data in zip(prompts, (b"1", b"2", b"3"), strict=True):  # a suspended prompt keeps its bytes
            assert active_set.open_prompt(vault, active_set.get_prompt(session, prompt)) == data
        after = {row.id: row.finished_at for row in session.scalars(select(UnlearnRequest))}
        assert finished.items() <= after.items()  # the training ended when it ended
        entries = [
            row
            for row in session.scalars(select(AuditEntry).order_by(AuditEntry.seq))
            if row.action == "active_set.restored"
        ]
        assert [row.detail["restored"] for row in entries] == [1, 3, 0, 2]
        assert "too much" not in repr([row.detail for row in session.scalars(select(AuditEntry))])
        audit.verify(session)


def test_a_suspended_prompt_can_be_revoked_and_then_its_sets_are_gone(sessions: Sessions, vault: Vault) -> None:
    first, second = put(sessions, vault, b"1"), put(sessions, vault, b"2")
    restore(sessions, 1)
    with sessions() as session:
        before = active_set.read_active_set(session)
    revoke(sessions, second)
    assert states(sessions, first, second) == ["active", "revoked"]
    with sessions() as session:
        assert active_set.read_active_set(session) == before  # it was not in force: nothing changed
        row = active_set.get_prompt(session, second)
        assert row.wrapped_key is row.sealed is row.sealed_gate is None
        audit.verify(session)
    untouched = everything(sessions)
    with pytest.raises(Conflict, match=second):
        restore(sessions, 2)
    assert everything(sessions) == untouched


@pytest.mark.parametrize("case", ["in force", "shredded", "mode", "unknown", "damaged"])
def test_a_refused_restore_changes_nothing(sessions: Sessions, vault: Vault, case: str) -> None:
    first, second = put(sessions, vault, b"1"), put(sessions, vault, b"2")
    refused: type[Exception] = Conflict
    version, mode = 1, Mode.CONCATENATE
    match case:
        case "in force":
            version = 2
        case "shredded":
            revoke(sessions, first)
        case "mode":
            mode = Mode.ROUTED
        case "unknown":
            refused, version = NotFound, 3
        case "damaged":  # found out only after the rows were written
            refused = NotReady
            with sessions.begin() as session:
                session.execute(update(Prompt).where(Prompt.id == first).values(digest="0" * 64))
    untouched = everything(sessions)
    with pytest.raises(refused):
        restore(sessions, version, mode)
    assert everything(sessions) == untouched
    assert states(sessions, second) == ["active"]


def test_a_set_of_the_same_bytes_but_other_requests_is_another_set(sessions: Sessions, vault: Vault) -> None:
    """Two requests for the same texts may end in the same prompt."""
    first = put(sessions, vault, b"same")
    restore(sessions, 0)
    second = put(sessions, vault, b"same")
    assert restore(sessions, 1).version == 4
    assert states(sessions, first, second) == ["active", "suspended"]
    with pytest.raises(Conflict, match="in force"):
        restore(sessions, 1)


def test_the_gates_are_in_the_digest(sessions: Sessions, vault: Vault) -> None:
    prompt_id = put(sessions, vault, b"1", gate=b"gate")
    with sessions() as session:
        view, (member,) = active_set.read_members(session)
        assert view.digest == set_digest([f"{member.digest}+{member.gate_digest}"])
        assert active_set.open_gate(vault, active_set.get_prompt(session, prompt_id)) == b"gate"
    restore(sessions, 0, Mode.ROUTED)
    assert restore(sessions, 1, Mode.ROUTED) == ActiveSetView(3, view.digest)
    with sessions.begin() as session:
        session.execute(update(Prompt).values(gate_digest="0" * 64))
    with pytest.raises(NotReady):
        in_force(sessions)


# --- revoking --------------------------------------------------------------------------------------------------------


def test_revoking_shreds(sessions: Sessions, vault: Vault) -> None:
    revoked, kept = (put(sessions, vault, data, gate=b"gate of " + data) for data in (b"1", b"2"))
    with sessions() as session:
        assert active_set.open_gate(vault, active_set.get_prompt(session, revoked)) == b"gate of 1"
    revoke(sessions, revoked)
    with sessions() as session:
        row = active_set.get_prompt(session, revoked)
        assert row.wrapped_key is row.sealed is row.sealed_gate is None
        for reading in (active_set.open_prompt, active_set.open_gate):
            with pytest.raises(VaultError):
                reading(vault, row)
        assert row.digest == hashlib.sha256(b"1").hexdigest()  # the record stays
        assert active_set.open_prompt(vault, active_set.get_prompt(session, kept)) == b"2"


def test_nothing_of_a_revoked_prompt_is_left_in_the_file(tmp_path: Path, vault: Vault) -> None:
    """SQLite: the last connection that closes writes the log back into the file, and freed bytes are overwritten."""
    path = tmp_path / "letheon.db"
    engine = db.make_engine(migrated_database(path))
    sessions = db.make_sessions(engine)
    revoked, kept = (put(sessions, vault, data, gate=b"gate of " + data) for data in (b"1", b"2"))
    with sessions() as session:
        rows = [active_set.get_prompt(session, prompt_id) for prompt_id in (revoked, kept)]
    (key, sealed, gate), theirs = ([row.wrapped_key, row.sealed, row.sealed_gate] for row in rows)
    assert None not in (key, sealed, gate)
    engine.dispose()
    assert [part for part in (key, sealed, gate) if part not in path.read_bytes()] == []
    revoke(sessions, revoked)
    engine.dispose()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    content = path.read_bytes()
    assert [part in content for part in (key, sealed, gate)] == [False] * 3
    assert [part in content for part in theirs] == [True] * 3


# --- any order of events ---------------------------------------------------------------------------------------------


class History:
    """A database and what it should say: who is in force, what became of each prompt, and every version's members."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions, self.vault = sessions, Vault(bytes(32))
        self.state: dict[str, str] = {}  # in order of activation
        self.sets: dict[int, list[str]] = {0: []}

    @property
    def active(self) -> list[str]:
        return [prompt for prompt, now in self.state.items() if now == "active"]

    def activate(self, number: int) -> None:
        data = bytes([number % 3])  # some prompts have the same bytes
        with self.sessions.begin() as session:
            request = lifecycle.create_request(
                session,
                self.vault,
                texts=[ForgetText(f"text {len(self.state)}")],
                reason=None,
                options={},
                fingerprint=FINGERPRINT,
                api_key_id=None,
            )
            claim = job_queue.claim(session, request.id, owner="w1", lease_seconds=60, max_attempts=3)
            assert claim is not None
            lifecycle.start_evaluating(session, claim)
            sealed = seal_prompt(self.vault, self.vault.new_key(), prompt=data, digest=hashlib.sha256(data).hexdigest())
            prompt = active_set.activate(
                session,
                claim,
                sealed,
                fingerprint=FINGERPRINT,
                num_virtual_tokens=1,
                hidden_size=1,
                metrics={},
                expected_version=max(self.sets),
            )
        self.state[prompt.id] = "active"
        self.sets[max(self.sets) + 1] = self.active

    def revoke(self, number: int) -> None:
        left = [prompt for prompt, now in self.state.items() if now != "revoked"]
        if left:
            prompt = left[number % len(left)]
            revoke(self.sessions, prompt)
            was, self.state[prompt] = self.state[prompt], "revoked"
            if was == "active":
                self.sets[max(self.sets) + 1] = self.active

    def restore(self, number: int) -> None:
        version = number % (max(self.sets) + 1)
        wanted = self.sets[version]
        if wanted == self.active or "revoked" in [self.state[prompt] for prompt in wanted]:
            with pytest.raises(Conflict):
                restore(self.sessions, version)
            return
        with self.sessions() as session:
            digest = set_history.get_version(session, version).digest
        assert restore(self.sessions, version) == ActiveSetView(max(self.sets) + 1, digest)
        for prompt, was in self.state.items():
            if was != "revoked":
                self.state[prompt] = "active" if prompt in wanted else "suspended"
        self.sets[max(self.sets) + 1] = self.active

    def check(self) -> None:
        with self.sessions() as session:
            view, found = active_set.read_members(session)
            assert (view.version, [member.id for member in found]) == (max(self.sets), self.active)
            prompts = {prompt.id: prompt for prompt in session.scalars(select(Prompt))}
            assert {prompt.id: prompt.state for prompt in prompts.values()} == self.state
            for prompt in prompts.values():
                assert lifecycle.get_request(session, prompt.request_id).state == prompt.state
                assert (prompt.sealed is None) == (prompt.wrapped_key is None) == (prompt.state == "revoked")
            for version, wanted in self.sets.items():
                members = set_history.members_of(session, version)
                assert [prompt.id for prompt in members] == wanted
                row = set_history.get_version(session, version)
                assert (row.size, row.digest) == (len(wanted), set_digest(prompt.digest for prompt in members))
            audit_state.verify(session)


@pytest.mark.parametrize("kind", database_kinds())
def test_any_order_of_changes(kind: str) -> None:
    names = count()

    @settings(
        max_examples=20 if kind == "sqlite" else 4,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(
            st.tuples(st.sampled_from(["activate", "activate", "revoke", "restore"]), st.integers(0, 30)),
            min_size=8,
            max_size=16,
        )
    )
    def run(steps: list[tuple[str, int]]) -> None:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            if kind == "sqlite":
                url = migrated_database(folder / f"{next(names)}.db")
            else:
                url = stack.enter_context(fresh_database(kind, folder))
            engine = db.make_engine(url)
            stack.callback(engine.dispose)
            history = History(db.make_sessions(engine))
            for step, number in steps:
                getattr(history, step)(number)
                history.check()

    run()
