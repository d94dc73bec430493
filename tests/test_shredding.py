"""Shredding with a key store: what is destroyed when, and that kill -9 at any moment leaves one of two states."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
from floor import activate, must_take, state, submit
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker
from vault_kit import OLD, on_disk, pending, prompt_opens, share_of, sharing, texts_open
from worker_kit import ROOT, wait_for

from app import active_set, audit, db, job_queue, lifecycle, shredding
from app.keystore import KeyStore
from app.lifecycle import Claim
from app.tables import AuditEntry, Checkpoint, UnlearnRequest, utcnow
from app.vault import Vault
from worker.chores import shred_due
from worker.threads import Reaper

Sessions = sessionmaker[Session]


@pytest.fixture
def sealing(keystore: KeyStore) -> Vault:
    return sharing(keystore)


def revoke(sessions: Sessions, prompt_id: str) -> None:
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)


def alive(keystore: KeyStore, found: bytes) -> bool:
    known, share = keystore.read(found)
    assert known
    return share is not None


def test_what_ends_takes_its_share_along(sessions: Sessions, sealing: Vault, keystore: KeyStore) -> None:
    shredding.attach(sessions, sealing)
    first, second = submit(sessions, sealing), submit(sessions, sealing)
    texts, waiting = share_of(sessions, first), share_of(sessions, second)
    claim = must_take(sessions, first)
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, sealing, claim, step=5, data=b"state")
        sealed = session.scalars(select(Checkpoint.sealed)).one()
        wrapped = lifecycle.get_request(session, first).wrapped_key
    prompt_id = activate(sessions, sealing, claim, version=0)
    prompt = share_of(sessions, prompt_id)
    assert [alive(keystore, found) for found in (texts, waiting, prompt)] == [False, True, True]
    with pytest.raises(Exception, match="share of this value was destroyed"):  # and the checkpoint with it
        sealing.open(wrapped, sealed, aad=job_queue.checkpoint_aad(first, 5))
    assert prompt_opens(sessions, sealing, prompt_id) and texts_open(sessions, sealing, second)
    revoke(sessions, prompt_id)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, second, actor="key_1")
    assert [alive(keystore, found) for found in (texts, waiting, prompt)] == [False] * 3
    assert pending(sessions) == set() and keystore.counts() == (0, 3)


def test_only_what_was_committed_is_destroyed(sessions: Sessions, sealing: Vault, keystore: KeyStore) -> None:
    shredding.attach(sessions, sealing)
    first, second = submit(sessions, sealing), submit(sessions, sealing)
    share = share_of(sessions, first)
    with sessions() as session:
        lifecycle.request_cancel(session, first, actor="key_1")
        session.flush()
        session.rollback()
        assert alive(keystore, share)
        lifecycle.request_cancel(session, second, actor="key_1")  # the same session, and this time it is meant
        with session.begin_nested():
            session.execute(select(UnlearnRequest.id))
        assert keystore.counts() == (2, 0), "a savepoint is no commit"
        session.commit()
    shredding.finish(sessions, sealing)
    assert keystore.counts() == (1, 1) and texts_open(sessions, sealing, first)


POINTS = ["before the commit", "before the log is empty", "before the row is deleted", "after the commit"]
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from sqlalchemy import event
from app import active_set, db, shredding
from app.keystore import KeyStore
from app.vault import Vault
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def revoke(prompt_id, point):
    store = KeyStore({keys!r})
    sessions = db.make_sessions(db.make_engine({url!r}))
    shredding.attach(sessions, Vault(bytes(range(32)), keystore=store))
    destroy = store.destroy
    if point == "before the commit":
        event.listen(sessions, "before_commit", die)
    elif point == "after the commit":
        store.destroy = die
    elif point == "before the log is empty":
        store._empty_log = die
    elif point == "before the row is deleted":
        store.destroy = lambda ids: (destroy(ids), die())
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
for prompt_id, point in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        revoke(prompt_id, point)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_9_anywhere_leaves_all_or_is_finished_by_the_reaper(
    engine: Engine, sessions: Sessions, sealing: Vault, keystore: KeyStore
) -> None:
    prompts = [
        activate(sessions, sealing, must_take(sessions, submit(sessions, sealing)), version=version)
        for version in range(len(POINTS))
    ]
    shredding.finish(sessions, sealing)  # the texts
    shares = [share_of(sessions, prompt_id) for prompt_id in prompts]
    secrets = [keystore.read(found)[1] for found in shares]
    script = KILLED.format(root=str(ROOT), keys=keystore._url, url=engine.url.render_as_string(hide_password=False))
    arguments = [part for pair in zip(prompts, POINTS, strict=True) for part in pair]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(POINTS)
    assert prompt_opens(sessions, sealing, prompts[0])
    assert [alive(keystore, found) for found in shares] == [True, False, False, True]
    assert pending(sessions) == set(shares[1:]), "the reaper is told of all"

    died = threading.Event()
    reaper = Reaper(
        sessions,
        lambda _: None,
        every=60,
        ring_seconds=60,
        max_attempts=3,
        on_death=died.set,
        chores=[partial(shred_due, sessions, sealing)],
    )
    reaper.start()
    wait_for(lambda: pending(sessions) == set(), "the reaper")
    reaper.stop()
    reaper.join()
    assert not died.is_set()
    assert [alive(keystore, found) for found in shares] == [True, False, False, False]
    if engine.dialect.name == "sqlite":
        files = on_disk(keystore)
        assert [secret is not None and secret in files for secret in secrets] == [True, False, False, False]
    assert prompt_opens(sessions, sealing, prompts[0])
    assert shredding.finish(sessions, sealing) == 0


def test_a_share_of_another_store_stays_pending(
    sessions: Sessions, sealing: Vault, keystore: KeyStore, vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    request_id = submit(sessions, sealing)
    share = share_of(sessions, request_id)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="key_1")
    other = KeyStore(keystore._url)
    with keystore._engine().begin() as connection:
        connection.exec_driver_sql("ALTER TABLE shares RENAME TO kept")
    assert shredding.finish(sessions, sharing(other)) == 0 == shredding.finish(sessions, vault)
    assert pending(sessions) == {share}
    assert "could not be destroyed yet" in caplog.text and "no key store is configured" in caplog.text
    assert share.hex() not in caplog.text
    with keystore._engine().begin() as connection:
        connection.exec_driver_sql("DROP TABLE shares")
        connection.exec_driver_sql("ALTER TABLE kept RENAME TO shares")
    assert shredding.finish(sessions, sealing) == 1 and pending(sessions) == set()
    other.close()


def test_a_key_store_that_is_away_holds_no_revoke_up(
    sessions: Sessions, sealing: Vault, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shredding.attach(sessions, sealing)
    request_id = submit(sessions, sealing)

    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, OSError())

    with monkeypatch.context() as patched:
        patched.setattr(keystore, "_engine", away)
        with sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="key_1")
        assert state(sessions, request_id) == "cancelled" and len(pending(sessions)) == 1
    keystore._away_until = 0.0  # the pause after a call that failed is over
    assert shredding.finish(sessions, sealing) == 1


def test_many_at_once(sessions: Sessions, sealing: Vault, keystore: KeyStore) -> None:
    """More than the pool has connections: whoever commits holds one, and must not wait for another."""
    shredding.attach(sessions, sealing)
    requests = [submit(sessions, sealing) for _ in range(20)]
    errors: list[BaseException] = []
    together = threading.Barrier(len(requests))

    def work(request_id: str) -> None:
        try:
            together.wait()
            with sessions.begin() as session:
                lifecycle.request_cancel(session, request_id, actor="key_1")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(request_id,)) for request_id in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    shredding.finish(sessions, sealing)  # what found the database locked
    assert keystore.counts() == (0, len(requests)) and pending(sessions) == set()


# --- texts that are kept for a while ----------------------------------------------------------------------------------


def active(sessions: Sessions, vault: Vault, claim: Claim) -> None:
    activate(sessions, vault, claim, version=0)


def failed(sessions: Sessions, vault: Vault, claim: Claim) -> None:
    with sessions.begin() as session:
        lifecycle.fail(session, claim, code="diverged", detail="the loss became infinite")


@pytest.mark.parametrize("end", [active, failed])
def test_texts_are_kept_as_long_as_was_said(
    engine: Engine, keystore: KeyStore, end: Callable[[Sessions, Vault, Claim], None]
) -> None:
    sessions, sealing = db.make_sessions(engine, keep_texts=timedelta(hours=2)), sharing(keystore)
    shredding.attach(sessions, sealing)
    claim = must_take(sessions, submit(sessions, sealing))
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, sealing, claim, step=5, data=b"state")
    share = share_of(sessions, claim.request_id)
    end(sessions, sealing, claim)
    with sessions() as session:
        row = lifecycle.get_request(session, claim.request_id)
        assert session.scalars(select(Checkpoint)).all() == [], "it was for the training only"
    assert row.shred_at is not None and row.finished_at is not None
    assert row.shred_at - row.finished_at == timedelta(hours=2)
    assert texts_open(sessions, sealing, row.id)

    def shred(minutes: int) -> list[str]:
        with sessions.begin() as session:
            return job_queue.shred_due(session, now=utcnow() + timedelta(minutes=minutes))

    assert shred(119) == [] and texts_open(sessions, sealing, row.id)
    assert shred(121) == [row.id] and shred(121) == []
    with sessions() as session:
        row = lifecycle.get_request(session, claim.request_id)
        assert (row.wrapped_key, row.sealed_texts, row.shred_at) == (None, None, None)
        last = session.scalars(select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(1)).one()
        assert (last.action, last.subject) == ("request.shredded", row.id)
        audit.verify(session)
    assert not alive(keystore, share) and pending(sessions) == set()


def test_nothing_is_kept_by_default(sessions: Sessions, vault: Vault) -> None:
    assert vault.new_key()[0] == 1 and Vault(OLD).keystore is None
    request_id = submit(sessions, vault)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="key_1")
    with sessions() as session:
        row = lifecycle.get_request(session, request_id)
    assert (row.wrapped_key, row.sealed_texts, row.shred_at) == (None, None, None) and pending(sessions) == set()
