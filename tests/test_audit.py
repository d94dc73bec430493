from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import delete, update
from sqlalchemy.orm import Session, sessionmaker

from app import audit
from app.audit import AuditBroken
from app.tables import AuditEntry

Sessions = sessionmaker[Session]


def fill(sessions: Sessions, count: int) -> None:
    for number in range(count):
        with sessions.begin() as session:
            detail = {"number": number, "ratio": 0.1 + number, "name": "é", "nested": {"b": [1, None], "a": True}}
            audit.append(session, actor="key_1", action="test.done", subject=f"req_{number}", detail=detail)


def test_chain_verifies_after_a_round_trip(sessions: Sessions) -> None:
    with sessions() as session:
        assert audit.verify(session) == 0
    fill(sessions, 5)
    with sessions() as session:
        assert audit.verify(session) == 5


def test_several_entries_in_one_transaction_and_a_long_actor(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for subject in ("a", "b"):
            audit.append(session, actor="w" * 300, action="x", subject=subject, detail={})
    with sessions() as session:
        assert audit.verify(session) == 2


def test_rollback_leaves_no_gap(sessions: Sessions) -> None:
    fill(sessions, 1)
    with sessions() as session:
        audit.append(session, actor="a", action="x", subject="s", detail={})
        session.rollback()
    fill(sessions, 1)
    with sessions() as session:
        assert audit.verify(session) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"actor": "someone else"},
        {"action": "test.undone"},
        {"subject": "req_x"},
        {"detail": {"number": 2}},
        {"prev_hash": "1" * 64},
        {"hash": "1" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_altered_entry_is_named(sessions: Sessions, change: dict[str, Any]) -> None:
    fill(sessions, 4)
    with sessions.begin() as session:
        session.execute(update(AuditEntry).where(AuditEntry.seq == 3).values(**change))
    with sessions() as session, pytest.raises(AuditBroken) as caught:
        audit.verify(session)
    assert caught.value.extra["seq"] == 3


def test_an_entry_rewritten_with_its_own_hash_breaks_the_next(sessions: Sessions) -> None:
    fill(sessions, 4)
    with sessions.begin() as session:
        entry = session.get_one(AuditEntry, 2)
        entry.actor = "someone else"
        entry.hash = audit.entry_hash(
            entry.prev_hash,
            seq=2,
            at=entry.at,
            actor=entry.actor,
            action=entry.action,
            subject=entry.subject,
            detail=entry.detail,
        )
    with sessions() as session, pytest.raises(AuditBroken) as caught:
        audit.verify(session)
    assert caught.value.extra["seq"] == 3


@pytest.mark.parametrize("seq", [1, 2])
def test_a_removed_entry_is_noticed(sessions: Sessions, seq: int) -> None:
    fill(sessions, 3)
    with sessions.begin() as session:
        session.execute(delete(AuditEntry).where(AuditEntry.seq == seq))
    with sessions() as session, pytest.raises(AuditBroken) as caught:
        audit.verify(session)
    assert caught.value.extra["seq"] == seq


def test_concurrent_appends_keep_one_chain(sessions: Sessions) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            fill(sessions, 10)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with sessions() as session:
        assert audit.verify(session) == 40
