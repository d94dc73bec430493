"""API keys held against the log: what SQL does to them is found, and what is done with one that it made up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import delete, insert, text, update
from sqlalchemy.orm import Session, sessionmaker
from test_audit_state import broken, holds, older

from app import audit, keys
from app.tables import ApiKey, utcnow

Sessions = sessionmaker[Session]


def made(sessions: Sessions, **values: Any) -> str:
    with sessions.begin() as session:
        return keys.create_key(session, **{"name": "a", "scopes": ["classify"], "actor": "test", **values})[0].id


def change(sessions: Sessions, key_id: str, **values: Any) -> None:
    with sessions.begin() as session:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(**values))


def test_keys_hold_whatever_they_were_made_with(sessions: Sessions) -> None:
    later = (utcnow() + timedelta(days=1)).astimezone(timezone(timedelta(hours=2)))
    made(sessions, name="naïve ✓", scopes=["admin", "metrics"], limits={"texts_per_day": 0}, expires_at=later)
    made(sessions, limits={})
    ended = made(sessions)
    with sessions.begin() as session:
        keys.revoke_key(session, ended, actor="test", detail={"code": "reconciled"})
        keys.note_uses(session, {ended: utcnow()})
    assert holds(sessions) == 4


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scopes": ["classify", "admin"]}, "scopes is"),
        ({"digest": bytes(32)}, "record_digest is"),
        ({"name": "b", "limits": {"requests_per_day": 1}}, "limits, record_digest are"),
        ({"expires_at": datetime(2100, 1, 1, tzinfo=UTC)}, "expires_at is"),
        ({"revoked_at": datetime(2000, 1, 1, tzinfo=UTC)}, "revoked_at is"),
    ],
)
def test_a_key_that_was_altered(sessions: Sessions, values: dict[str, Any], named: str) -> None:
    key_id = made(sessions)
    change(sessions, key_id, **values)
    found = broken(sessions)
    assert found.detail == f"API key {key_id}: {named} not what the log says"
    assert found.extra == {"api_key_id": key_id}


def test_a_key_back_in_force(sessions: Sessions) -> None:
    key_id = made(sessions)
    with sessions.begin() as session:
        keys.revoke_key(session, key_id, actor="test")
    assert holds(sessions)
    change(sessions, key_id, revoked_at=None)
    assert broken(sessions).detail == f"API key {key_id}: revoked_at is not what the log says"


def test_a_key_that_is_missing_or_that_nobody_made(sessions: Sessions) -> None:
    key_id = made(sessions)
    with sessions.begin() as session:
        session.execute(delete(ApiKey))
    assert broken(sessions).detail == f"API key {key_id}: its row is missing"
    other = "key_" + "0" * 16
    with sessions.begin() as session:
        row = {"id": other, "name": "b", "scopes": ["admin"], "digest": bytes(32), "created_at": utcnow()}
        session.execute(insert(ApiKey).values(row))
    assert broken(sessions).detail == f"API key {other}: the log does not have it"


def test_what_was_done_with_a_key_that_is_gone_again(sessions: Sessions) -> None:
    other = "key_" + "0" * 16
    with sessions.begin() as session:
        audit.append(session, actor=other, action="prompt.exported", subject="prm_1", detail={})
    assert broken(sessions).detail == f"API key {other}: it did what the log has, which does not have the key"


def test_a_key_that_cannot_be_read(sessions: Sessions) -> None:
    key_id = made(sessions)
    with sessions.begin() as session:
        if session.get_bind().dialect.name == "sqlite":
            session.execute(text("UPDATE api_keys SET scopes = 'no JSON'"))
        else:
            session.execute(text("UPDATE api_keys SET created_at = 'infinity'"))
    assert broken(sessions).detail == f"API key {key_id}: it cannot be read"


def test_of_older_keys_what_their_entries_state(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        older(patch)
        key_id, ended = made(sessions), made(sessions)
        with sessions.begin() as session:
            keys.revoke_key(session, ended, actor="test")
    assert holds(sessions)
    change(sessions, key_id, name="b")
    change(sessions, ended, revoked_at=datetime(2000, 1, 1, tzinfo=UTC))
    assert holds(sessions)
    change(sessions, ended, revoked_at=None)
    assert broken(sessions).detail == f"API key {ended}: revoked_at is not what the log says"
    change(sessions, ended, revoked_at=utcnow())
    change(sessions, key_id, scopes=["admin"])
    assert broken(sessions).detail == f"API key {key_id}: scopes is not what the log says"
