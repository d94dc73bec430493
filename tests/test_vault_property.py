"""Random lives: what was revoked or has ended is gone for whoever holds every backup and every master key.

The model of each run is a database file, a key store, and an archive of every wrapped key with what it sealed: the
backups that somebody may have kept, of every moment.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from databases import migrated_database
from floor import activate, must_take, submit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from vault_kit import sharing

from app import active_set, audit, db, lifecycle, reconcile, rotation, shredding
from app.errors import VaultError
from app.keystore import KeyStore
from app.lifecycle import texts_aad
from app.tables import AuditEntry, Prompt, PromptState, RequestState, UnlearnRequest
from app.vault import Vault

Kept = tuple[bytes, bytes, str]


class World:
    def __init__(self, folder: Path) -> None:
        self.engine = db.make_engine(migrated_database(folder / "letheon.db"))
        self.crashing = db.make_sessions(self.engine)  # nobody finishes what it commits
        self.sessions = db.make_sessions(self.engine)
        self.keystore = KeyStore(f"sqlite:///{folder / 'keystore.db'}")
        self.masters = [bytes(range(32))]
        self.archive: dict[str, set[Kept]] = {}
        reconcile.make_ready(self.sessions, self.vault)
        self.digest = self.vault.digest("x")

    @property
    def vault(self) -> Vault:
        """What a service of this moment runs with: the current master key and the one before."""
        return sharing(self.keystore, *self.masters[-2:][::-1])

    @property
    def thief(self) -> Vault:
        return sharing(self.keystore, *self.masters)

    def pick(self, index: int, state: str) -> str | None:
        table = Prompt if state in list(PromptState) else UnlearnRequest
        with self.sessions() as session:
            ids = session.scalars(select(table.id).where(table.state == state).order_by(table.id)).all()
        return ids[index % len(ids)] if ids else None

    def create(self, index: int) -> None:
        submit(self.sessions, self.vault, f"text {index}")

    def activate(self, index: int) -> None:
        if request_id := self.pick(index, "pending"):
            with self.sessions() as session:
                version = active_set.read_active_set(session).version
            activate(self.sessions, self.vault, must_take(self.sessions, request_id), version=version)

    def suspend(self, index: int) -> None:
        with self.sessions() as session:
            version = active_set.read_active_set(session).version
            in_force = active_set.active_prompts(session)
        if len(in_force) == 1 and version == 1:
            with self.sessions.begin() as session:
                active_set.restore(session, 0, mode="concatenate", fingerprint="f" * 64, actor="k", reason="test")

    def revoke(self, index: int) -> None:
        self._revoke(index, self.sessions)

    def revoke_and_die(self, index: int) -> None:
        self._revoke(index, self.crashing)

    def _revoke(self, index: int, sessions: db.sessionmaker[db.Session]) -> None:
        state = "suspended" if index % 2 else "active"
        if prompt_id := self.pick(index, state):
            with sessions.begin() as session:
                if session.get_one(Prompt, prompt_id).state != PromptState.REVOKED:
                    active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)

    def cancel(self, index: int) -> None:
        self._cancel(index, self.sessions)

    def cancel_and_die(self, index: int) -> None:
        self._cancel(index, self.crashing)

    def _cancel(self, index: int, sessions: db.sessionmaker[db.Session]) -> None:
        if request_id := self.pick(index, "pending"):
            with sessions.begin() as session:
                lifecycle.request_cancel(session, request_id, actor="key_1")

    def finish(self, index: int) -> None:
        shredding.finish(self.sessions, self.vault)

    def rotate(self, index: int) -> None:
        """All of it, so that the key before this one may be forgotten."""
        self.masters.append(secrets.token_bytes(32))
        self.rotate_a_little(index)
        for where in rotation.COLUMNS:
            after: str | None = ""
            while after is not None:
                with self.sessions.begin() as session:
                    after = rotation.rotate_some(session, self.vault, where, after, actor="test").last

    def rotate_a_little(self, index: int) -> None:
        where = list(rotation.COLUMNS)[index % len(rotation.COLUMNS)]
        with self.sessions.begin() as session:
            rotation.rotate_some(session, self.vault, where, "", actor="test")

    def forget_a_key(self, index: int) -> None:
        """A call that broke off between its key and its commit."""
        self.vault.new_key()

    def restart(self, index: int) -> None:
        self.sessions = db.make_sessions(self.engine)
        reconcile.make_ready(self.sessions, self.vault)

    def check(self) -> None:
        """Archive what is there; then everything is as it must be."""
        live: set[str] = set()
        vault = self.vault
        with self.sessions() as session:
            for prompt in session.scalars(select(Prompt)):
                if prompt.wrapped_key is not None and prompt.sealed is not None:
                    live.add(prompt.id)
                    aad = active_set.prompt_aad(prompt.id, prompt.digest)
                    self.archive.setdefault(prompt.id, set()).add((prompt.wrapped_key, prompt.sealed, aad))
                assert (prompt.id in live) == (prompt.state != PromptState.REVOKED)
            for request in session.scalars(select(UnlearnRequest)):
                if request.wrapped_key is not None and request.sealed_texts is not None:
                    live.add(request.id)
                    kept = (request.wrapped_key, request.sealed_texts, texts_aad(request.id))
                    self.archive.setdefault(request.id, set()).add(kept)
                assert (request.id in live) == (request.state == RequestState.PENDING)
        for row_id in live:
            assert any(opens(vault, kept) for kept in self.archive[row_id]), "in force, so it opens"
        shredding.finish(self.sessions, vault)
        for row_id in set(self.archive) - live:
            assert not any(opens(self.thief, kept) for kept in self.archive[row_id]), "revoked or ended"
        vault = self.vault
        with self.sessions.begin() as session:
            vault.adopt(session)
        assert vault.digest("x") == self.digest


def opens(vault: Vault, kept: Kept) -> bool:
    wrapped, sealed, aad = kept
    try:
        vault.open(wrapped, sealed, aad=aad)
    except VaultError:
        return False
    return True


STEPS: list[Callable[[World, int], None]] = [
    World.create,
    World.activate,
    World.suspend,
    World.revoke,
    World.revoke_and_die,
    World.cancel,
    World.cancel_and_die,
    World.finish,
    World.rotate,
    World.rotate_a_little,
    World.forget_a_key,
    World.restart,
]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), min_size=4, max_size=14))
def test_what_has_ended_is_gone_and_what_is_in_force_opens(steps: list[tuple[Callable[..., None], int]]) -> None:
    memory = Path("/dev/shm")  # where there is one: nothing here asks whether a disk was reached
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = World(Path(folder))
        try:
            # Something to lose in every example: one in force, one that waits.
            for step, index in [(World.create, 0), (World.activate, 0), (World.create, 1), *steps]:
                step(world, index)
                world.check()
            with world.sessions() as session:
                audit.verify(session)
                assert session.scalars(select(AuditEntry.seq)).all()
        finally:
            world.engine.dispose()
