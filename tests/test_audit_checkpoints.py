"""Signed checkpoints of the audit log: what they show that the chain does not."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from audit_kit import cut_database, fill, make_checkpoint, rewrite_database, the_signer
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import wait_for

from app import audit
from app.audit_chain import AuditBroken
from app.errors import NotFound
from app.signing import PublicKey, Signer, new_private_key
from app.signing_key import verify_audit
from app.tables import AuditCheckpoint, AuditEntry, Secret, utcnow
from app.vault import Vault
from worker.chores import sign_audit_log
from worker.threads import Reaper

Sessions = sessionmaker[Session]


def broken_at(sessions: Sessions, vault: Vault) -> int:
    with sessions() as session, pytest.raises(AuditBroken) as caught:
        verify_audit(session, vault)
    seq: int = caught.value.extra["seq"]
    return seq


def test_a_checkpoint_is_of_the_head_and_made_once(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session, pytest.raises(NotFound):
        audit.checkpoint(session, Signer(new_private_key()))
    fill(sessions, 3)
    first = make_checkpoint(sessions, vault)  # the key's own entry is the fourth
    again = make_checkpoint(sessions, vault)
    assert (first.seq, again.seq, first.signature) == (4, 4, again.signature)
    fill(sessions, 2)
    assert make_checkpoint(sessions, vault).seq == 6
    with sessions() as session:
        assert verify_audit(session, vault) == 6
        assert session.scalar(select(func.count()).select_from(AuditCheckpoint)) == 2


def test_when_one_is_due(sessions: Sessions, vault: Vault) -> None:
    def due(seconds: float) -> bool:
        with sessions() as session:
            return audit.checkpoint_is_due(session, 300, now=utcnow() + timedelta(seconds=seconds))

    assert not due(0)  # nothing to sign
    fill(sessions, 1)
    assert due(0)
    make_checkpoint(sessions, vault)
    assert not due(1000)  # nothing new
    fill(sessions, 1)
    assert not due(200) and due(301)
    assert due(-301)  # the last one's clock was ahead


def test_a_chain_made_anew_is_found_where_a_checkpoint_was(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 5)
    make_checkpoint(sessions, vault)
    fill(sessions, 5)
    rewrite_database(sessions, 3)
    with sessions() as session, pytest.raises(AuditBroken, match="entry 6 or before"):
        audit.verify(session)  # seen without the key, too
    assert broken_at(sessions, vault) == 6


def test_a_chain_made_anew_gets_no_signature(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 5)
    make_checkpoint(sessions, vault)
    fill(sessions, 5)
    rewrite_database(sessions, 3)
    with pytest.raises(AuditBroken) as caught:
        make_checkpoint(sessions, vault)
    assert caught.value.extra["seq"] == 6
    with sessions.begin() as session:  # and behind the last checkpoint every entry is looked at
        session.execute(delete(AuditCheckpoint))
        session.execute(update(AuditEntry).where(AuditEntry.seq == 8).values(subject="req_x"))
    with pytest.raises(AuditBroken) as caught:
        make_checkpoint(sessions, vault)
    assert caught.value.extra["seq"] == 8


def test_a_cut_log_is_found_and_gets_no_signature_also_when_it_grew_again(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 5)
    make_checkpoint(sessions, vault)
    cut_database(sessions, 2)
    assert broken_at(sessions, vault) == 3
    with pytest.raises(AuditBroken, match="entry 6 is missing"):
        make_checkpoint(sessions, vault)
    fill(sessions, 9)
    assert broken_at(sessions, vault) == 6
    with pytest.raises(AuditBroken, match="entry 6 or before"):
        make_checkpoint(sessions, vault)


def test_an_altered_checkpoint_is_found(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 2)
    old = make_checkpoint(sessions, vault)
    fill(sessions, 1)
    changes: list[tuple[str, Any, Any]] = [
        ("hash", old.hash, "1" * 64),
        ("at", old.at, old.at + timedelta(microseconds=1)),
        ("key_id", old.key_id, "1" * 32),
        ("signature", old.signature, old.signature[:-1] + bytes([old.signature[-1] ^ 1])),
    ]
    for column, right, wrong in changes:
        with sessions.begin() as session:
            session.execute(update(AuditCheckpoint).values({column: wrong}))
        assert broken_at(sessions, vault) == 3, column
        with pytest.raises(AuditBroken):
            make_checkpoint(sessions, vault)
        with sessions.begin() as session:
            session.execute(update(AuditCheckpoint).values({column: right}))
    assert make_checkpoint(sessions, vault).seq == 4


def test_checkpoints_by_another_key_or_without_one_are_found(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 2)
    make_checkpoint(sessions, vault)
    with sessions() as session, pytest.raises(AuditBroken, match="another key"):
        audit.verify(session, Signer(new_private_key()).public)
    with sessions.begin() as session:
        session.execute(delete(Secret))
    assert broken_at(sessions, vault) == 3
    with pytest.raises(AuditBroken, match="another key"):  # a new key does not go on where the old one was
        make_checkpoint(sessions, vault)


def test_an_entry_before_the_first_is_found(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 2)
    make_checkpoint(sessions, vault)
    with sessions.begin() as session:
        values = {"at": utcnow(), "actor": "a", "action": "a", "subject": "a", "detail": {}}
        session.add(AuditEntry(seq=0, prev_hash="0" * 64, hash="0" * 64, **values))
    assert broken_at(sessions, vault) == 1


@pytest.mark.parametrize("column", ["at", "detail", "actor"])
def test_what_cannot_even_be_read_is_named(sessions: Sessions, vault: Vault, column: str) -> None:
    fill(sessions, 5)
    with sessions.begin() as session:
        on_sqlite = session.get_bind().dialect.name == "sqlite"
        garbage = {
            "at": "'x'" if on_sqlite else "'infinity'",
            "detail": "'{'" if on_sqlite else "'{\"a\":1e999}'",
            "actor": "x'ff'" if on_sqlite else "chr(1)",
        }
        statement = f"UPDATE audit_log SET {column} = {garbage[column]} WHERE seq = 4"
        session.connection().exec_driver_sql(statement)
    assert broken_at(sessions, vault) == 4
    with pytest.raises(AuditBroken) as caught:
        make_checkpoint(sessions, vault)
    assert caught.value.extra["seq"] == 4


def test_checkpoints_made_at_once_agree(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 3)
    the_signer(sessions, vault)
    made: list[tuple[int, str]] = []
    barrier = threading.Barrier(3)

    def work() -> None:
        barrier.wait()
        row = make_checkpoint(sessions, vault)
        made.append((row.seq, row.hash))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and len(set(made)) == 1
    with sessions() as session:
        assert verify_audit(session, vault) == 4


def test_the_reaper_signs_and_an_altered_log_does_not_stop_it(
    sessions: Sessions, vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    fill(sessions, 2)
    died = threading.Event()
    chore = partial(sign_audit_log, sessions, vault, 0.001)
    reaper = Reaper(sessions, print, every=0.05, ring_seconds=60, max_attempts=3, on_death=died.set, chores=[chore])

    def last() -> int:
        with sessions() as session:
            return session.scalar(select(func.max(AuditCheckpoint.seq))) or 0

    reaper.start()
    try:
        wait_for(lambda: last() == 3, "a checkpoint")
        fill(sessions, 1)
        wait_for(lambda: last() == 4, "the next")
        rewrite_database(sessions, 2)
        fill(sessions, 1)
        wait_for(lambda: "the audit log gets no checkpoint: the log was rewritten" in caplog.text, "the alarm")
        assert last() == 4 and reaper.is_alive() and not died.is_set()
    finally:
        reaper.stop()
        reaper.join(5)


def test_the_page_of_a_subject(sessions: Sessions) -> None:
    fill(sessions, 5)
    with sessions() as session:
        items, before = audit.list_entries(session, limit=2)
        assert ([item.seq for item in items], before) == ([5, 4], 4)
        items, before = audit.list_entries(session, limit=3, before=before)
        assert ([item.seq for item in items], before) == ([3, 2, 1], None)
        assert [item.seq for item in audit.list_entries(session, limit=9, subject="req_3")[0]] == [4]
        assert [item.seq for item in audit.entries_about(session, "req_3", "req_1")] == [2, 4]


def test_a_public_key_is_not_taken_from_the_database(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 2)
    make_checkpoint(sessions, vault)
    known = the_signer(sessions, vault).public
    with sessions() as session:
        assert audit.verify(session, PublicKey(known.raw)) == 3
