"""Nobody holds what others wait for while asking the key store, and a key that was made for nothing is destroyed."""

from __future__ import annotations

import sqlite3
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from api_kit import soft_prompt, tiny_llm
from floor import activate, must_take, submit, terms
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.orm import Session, sessionmaker
from vault_kit import pending, prompt_opens, share_of, sharing
from webhook_kit import add_key
from worker_kit import ask, forget_texts, write_retain

from app import active_set, approval, db, evidence, interop, lifecycle, rotation, shredding, webhooks
from app.errors import KeyDestroyed
from app.keystore import KeyStore
from app.lifecycle import Claim
from app.sealing import seal_prompt
from app.settings import Mode, Settings
from app.signing_key import load_signer
from app.tables import PreparedShare, Prompt, UnlearnRequest, utcnow
from app.vault import Vault, share_id
from models.examples import read_examples
from worker.chores import shred_due, sign_audit_log
from worker.context import Context
from worker.job import Job
from worker.tasks import run_job
from worker.threads import Heartbeat

Sessions = sessionmaker[Session]
LATER = timedelta(hours=shredding.PREPARED_HOURS, minutes=1)
_CHAIN = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = :key "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


@pytest.fixture
def sealing(keystore: KeyStore) -> Vault:
    return sharing(keystore)


def prepared(sessions: Sessions) -> set[bytes]:
    with sessions() as session:
        return set(session.scalars(select(PreparedShare.share_id)))


def locked(engine: Engine) -> bool:
    """Whether the audit log is locked: on SQLite all that is written has one lock."""
    if engine.dialect.name == "sqlite":
        with closing(sqlite3.connect(str(engine.url.database), timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            connection.execute("ROLLBACK")
            return False
    with engine.connect() as connection:
        return bool(connection.scalar(text(_CHAIN), {"key": 0x1E7E0002}))


@contextmanager
def watched(engine: Engine, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Who asked the key store, as the frames of each call; none of them may hold the log's lock."""
    answering, calls, holders = keystore._answering, list[list[str]](), list[list[str]]()

    def asked() -> AbstractContextManager[None]:
        frames = [frame.name for frame in traceback.extract_stack()][:-1]
        calls.append(frames)
        if locked(engine):
            holders.append(frames)
        return answering()

    with monkeypatch.context() as patched:
        patched.setattr(keystore, "_answering", asked)
        yield calls
    assert not holders, " ".join(holders[0])


# --- nobody waits for the key store behind the log's lock -------------------------------------------------------------


@pytest.fixture
def context(sessions: Sessions, sealing: Vault, tmp_path: Path, request: pytest.FixtureRequest) -> Context:
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        mode=getattr(request, "param", Mode.ROUTED),
        num_virtual_tokens=4,
        max_steps=6,
        max_tries=1,
        checkpoint_seconds=0.001,
        lease_seconds=300,
        heartbeat_seconds=100,  # it writes, too
        check_retain_rows=16,
        evidence_texts=8,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
        max_neighbour_drop=1,
    )
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    return Context(settings=settings, sessions=sessions, vault=sealing, llm=tiny_llm(), retain=retain)


def row_of(context: Context, request_id: str) -> UnlearnRequest:
    with context.sessions() as session:
        return lifecycle.get_request(session, request_id)


@pytest.mark.parametrize("context", list(Mode), indirect=True)
def test_a_job_seals_before_it_locks(
    context: Context, engine: Engine, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = ask(context, terms=terms(approval=True))
    with watched(engine, keystore, monkeypatch) as calls:
        run_job(context, request_id)
        assert row_of(context, request_id).state == "awaiting_approval"
        with context.sessions.begin() as session:
            approval.approve(session, request_id, actor="key_2")
        run_job(context, request_id)
    assert row_of(context, request_id).state == "active"
    asked = {name for frames in calls for name in frames}
    assert asked >= {"save_checkpoint", "keep", "await_approval", "prepare_key", "seal_prompt", "open_texts"}
    with context.sessions() as session:
        shown = evidence.read(session, context.vault, lifecycle.get_request(session, request_id))
        [prompt] = session.scalars(select(Prompt))
    assert shown["prompt_digest"] == prompt.digest and prompt_opens(context.sessions, context.vault, prompt.id)
    assert prepared(context.sessions) == set()


def test_what_else_asks_the_key_store_and_writes_to_the_log(
    context: Context, engine: Engine, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, vault = context.sessions, context.vault
    key_id = add_key(sessions)
    request_id = ask(context)
    run_job(context, request_id)
    with sessions() as session:
        prompt_id = session.scalars(select(Prompt.id)).one()
    with watched(engine, keystore, monkeypatch) as calls:
        sign_audit_log(sessions, vault, 0)  # and makes the signing key
        with sessions.begin() as session:
            webhooks.create_webhook(
                session, vault, api_key_id=key_id, scopes=["requests"], url="https://hooks.example/"
            )
        with sessions.begin() as session:
            interop.export_prompt(session, vault, context.llm, context.settings, prompt_id, "safetensors", actor=key_id)
        with sessions.begin() as session:
            interop.import_prompt(
                session,
                vault,
                context.llm,
                context.settings,
                soft_prompt(1),
                forget_texts(),
                actor=key_id,
                reason=None,
                terms=terms(),
            )
        shred_due(sessions, vault)
    asked = {name for frames in calls for name in frames}
    assert asked >= {"load_signer", "create_webhook", "export_prompt", "import_prompt", "finish"}
    with sessions.begin() as session:
        assert load_signer(session, vault).public  # it was stored, and opens


# --- and nothing is left behind ---------------------------------------------------------------------------------------


def test_a_key_that_found_its_row_is_the_rows(sessions: Sessions, sealing: Vault, keystore: KeyStore) -> None:
    wrapped = shredding.prepare_key(sessions, sealing)
    assert prepared(sessions) == {share_id(wrapped)} and keystore.counts() == (1, 0)
    with sessions() as session:
        assert rotation.unreferenced(session, sealing) == 0
    prompt_id = activate(sessions, sealing, must_take(sessions, submit(sessions, sealing)), version=0)
    assert prepared(sessions) == {share_id(wrapped)}, "of that other one nobody has made use"
    assert shredding.give_up(sessions, sealing) == 0, "it is not old enough"
    assert shredding.give_up(sessions, sealing, now=utcnow() + LATER) == 1
    shred_due(sessions, sealing)
    assert keystore.destroyed([share_id(wrapped) or b""])[share_id(wrapped) or b""] is not None
    assert prompt_opens(sessions, sealing, prompt_id) and prepared(sessions) == pending(sessions) == set()
    with sessions() as session, pytest.raises(KeyDestroyed, match="given up"):
        shredding.use_key(session, wrapped)


def test_a_share_that_was_never_stored_needs_no_end(
    sessions: Sessions, sealing: Vault, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the process was killed between the two."""
    monkeypatch.setattr(keystore, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shredding.prepare_key(sessions, sealing)
    assert len(prepared(sessions)) == 1 and keystore.counts() == (0, 0)
    assert shredding.give_up(sessions, sealing, now=utcnow() + LATER) == 0
    assert prepared(sessions) == pending(sessions) == set()


@pytest.mark.parametrize("committed", [True, False])
def test_of_the_row_and_the_reaper_one_gets_the_share(
    sessions: Sessions, sealing: Vault, keystore: KeyStore, committed: bool
) -> None:
    wrapped = shredding.prepare_key(sessions, sealing)
    given_up: list[int] = []
    reaper = threading.Thread(
        target=lambda: given_up.append(shredding.give_up(sessions, sealing, now=utcnow() + LATER))
    )
    with sessions() as session:
        shredding.use_key(session, wrapped)
        reaper.start()  # it sees the row, and waits for what becomes of it
        if committed:
            session.commit()
    reaper.join()
    assert given_up == [0 if committed else 1] and prepared(sessions) == set()
    assert pending(sessions) == (set() if committed else {share_id(wrapped)})


def test_without_a_key_store_there_is_nothing_to_prepare(sessions: Sessions, vault: Vault) -> None:
    wrapped = shredding.prepare_key(sessions, vault)
    with sessions.begin() as session:
        shredding.use_key(session, wrapped)
    assert shredding.give_up(sessions, vault, now=utcnow() + LATER) == 0 and prepared(sessions) == set()


@pytest.mark.parametrize("when", ["before it seals", "before it commits"])
def test_a_job_whose_key_was_given_up_takes_another(context: Context, keystore: KeyStore, when: str) -> None:
    class TooLate(Job):
        lost: bytes | None = None

        def give_up(self) -> None:
            self.lost, sessions = self.key, self.context.sessions
            assert shredding.give_up(sessions, self.context.vault, now=utcnow() + LATER) == 1
            shredding.finish(sessions, self.context.vault)

        def activate(self, *what: Any) -> None:
            if when == "before it seals":
                self.key = shredding.prepare_key(self.context.sessions, self.context.vault)
                self.give_up()
            super().activate(*what)

        def commit(self, work: Callable[[Session], Any], *, at: str = "") -> Any:
            if at == "activate" and self.lost is None:
                self.give_up()
            return super().commit(work, at=at)

    request_id = ask(context)
    claim = must_take(context.sessions, request_id)
    with Heartbeat(context.sessions, claim, lease_seconds=300, every=100) as heartbeat:
        job = TooLate(context, claim, heartbeat)
        assert job.run()
    assert row_of(context, request_id).state == "active"
    with context.sessions() as session:
        [prompt] = session.scalars(select(Prompt))
    assert prompt_opens(context.sessions, context.vault, prompt.id) and prepared(context.sessions) == set()
    lost = share_id(job.lost)
    assert lost is not None and lost != share_of(context.sessions, prompt.id)
    assert keystore.read(lost) == (True, None)


def test_a_job_that_never_activates_leaves_its_key_to_the_reaper(context: Context, keystore: KeyStore) -> None:
    class Cancelled(Job):
        def commit(self, work: Callable[[Session], Any], *, at: str = "") -> Any:
            if at == "activate":
                with self.context.sessions.begin() as session:
                    lifecycle.request_cancel(session, self.claim.request_id, actor="key_1")
            return super().commit(work, at=at)

    request_id = ask(context)
    claim: Claim = must_take(context.sessions, request_id)
    with Heartbeat(context.sessions, claim, lease_seconds=300, every=100) as heartbeat:
        Cancelled(context, claim, heartbeat).run()
    assert row_of(context, request_id).state == "cancelled" and len(prepared(context.sessions)) == 1
    assert shredding.give_up(context.sessions, context.vault, now=utcnow() + LATER) == 1
    shredding.finish(context.sessions, context.vault)
    assert keystore.counts()[0] == 0, "neither of its texts nor of its prompt"


def test_a_prompt_is_stored_under_a_prepared_key_only(sessions: Sessions, sealing: Vault) -> None:
    claim = must_take(sessions, submit(sessions, sealing))
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, claim)
    data = soft_prompt(1)
    sealed = seal_prompt(sealing, sealing.new_key(), prompt=data.to_bytes(), digest=data.digest)
    with sessions() as session, pytest.raises(KeyDestroyed):
        active_set.activate(
            session,
            claim,
            sealed,
            fingerprint="f" * 64,
            num_virtual_tokens=4,
            hidden_size=32,
            metrics={},
            expected_version=0,
        )


def test_an_older_version_destroys_what_was_prepared(
    database_url: str, engine: Engine, sessions: Sessions, sealing: Vault, keystore: KeyStore
) -> None:
    wrapped = shredding.prepare_key(sessions, sealing)
    engine.dispose()
    db.downgrade(database_url, "0006")
    assert "prepared_shares" not in inspect(engine).get_table_names()
    assert pending(sessions) == {share_id(wrapped)} and shredding.finish(sessions, sealing) == 1
    engine.dispose()
    db.upgrade(database_url)
    assert prepared(sessions) == set() and keystore.counts() == (0, 1)
