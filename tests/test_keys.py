from __future__ import annotations

import hmac
import logging
import re
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app import audit, entry_facts, keys
from app.auth import create_first_key
from app.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from app.key_uses import KeyUses
from app.tables import ApiKey, AuditEntry, utcnow

Sessions = sessionmaker[Session]


def test_create_and_authenticate(sessions: Sessions) -> None:
    with sessions.begin() as session:
        key, plaintext = keys.create_key(session, name="ops", scopes=["admin", "requests"], actor="system")
    assert re.fullmatch(r"lth_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", plaintext)
    with sessions() as session:
        found = keys.authenticate(session, plaintext)
        assert (found.id, found.name, found.scopes) == (key.id, "ops", ["requests", "admin"])


def test_the_secret_is_not_stored(sessions: Sessions) -> None:
    with sessions.begin() as session:
        key, plaintext = keys.create_key(session, name="ops", scopes=["admin"], actor="system")
        secret = plaintext.split("_", 2)[2]
    with sessions() as session:
        row = session.get_one(ApiKey, key.id)
        audited = session.scalars(select(AuditEntry).order_by(AuditEntry.seq)).all()
        stored = repr([vars(row), *map(vars, audited)])
        assert secret not in stored
        assert len(row.digest) == 32
        assert audit.verify(session) == 1


@pytest.mark.parametrize("damage", ["", "x", "lth__", "wrong secret", "unknown id", "trailing", "é", "newline"])
def test_wrong_keys_are_refused_alike(sessions: Sessions, damage: str) -> None:
    with sessions.begin() as session:
        _, plaintext = keys.create_key(session, name="ops", scopes=["admin"], actor="system")
    presented = {
        "wrong secret": plaintext[:-43] + "A" * 43,
        "unknown id": "lth_" + "0" * 16 + plaintext[20:],
        "trailing": plaintext + "A",
        "newline": plaintext + "\n",
    }.get(damage, damage)
    with sessions() as session, pytest.raises(Unauthenticated) as caught:
        keys.authenticate(session, presented)
    assert caught.value.detail == "the API key is unknown, wrong, expired or revoked"


def test_revoke(sessions: Sessions) -> None:
    with sessions.begin() as session:
        key, plaintext = keys.create_key(session, name="ops", scopes=["admin"], actor="system")
    with sessions.begin() as session:
        assert keys.revoke_key(session, key.id, actor="cli").revoked_at is not None
    with sessions() as session:
        with pytest.raises(Unauthenticated):
            keys.authenticate(session, plaintext)
        assert [row.id for row in keys.list_keys(session)] == [key.id]
    with sessions() as session:
        with pytest.raises(Conflict):
            keys.revoke_key(session, key.id, actor="cli")
        with pytest.raises(NotFound):
            keys.revoke_key(session, "key_0", actor="cli")


@pytest.mark.parametrize(
    ("name", "scopes"), [("", ["admin"]), (" ", ["admin"]), ("n" * 101, ["admin"]), ("n", []), ("n", ["root"])]
)
def test_bad_input(sessions: Sessions, name: str, scopes: list[str]) -> None:
    with sessions() as session, pytest.raises(InvalidInput):
        keys.create_key(session, name=name, scopes=scopes, actor="cli")


def test_an_expired_key_is_refused(sessions: Sessions) -> None:
    now = utcnow()
    with sessions.begin() as session:
        key, plaintext = keys.create_key(
            session, name="ops", scopes=["admin"], actor="system", expires_at=now + timedelta(days=1), now=now
        )
    with sessions() as session:
        last = now + timedelta(days=1) - timedelta(microseconds=1)
        assert keys.authenticate(session, plaintext, now=last).id == key.id
        with pytest.raises(Unauthenticated):
            keys.authenticate(session, plaintext, now=now + timedelta(days=1))
        [entry] = session.scalars(select(AuditEntry))
        made = entry_facts.key_digest(key.name, key.digest, now)
        end = (now + timedelta(days=1)).isoformat()
        assert entry.detail == {"scopes": ["admin"], "record_digest": made, "expires_at": end}
        assert audit.verify(session) == 1


def test_every_key_goes_through_the_same_comparison(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comparison of two digests in constant time, whatever is wrong, and one answer."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counting(one: bytes, two: bytes) -> bool:
        compared.append((len(one), len(two)))
        return real(one, two)

    monkeypatch.setattr(keys.hmac, "compare_digest", counting)
    for cause in ("malformed", "unknown", "wrong", "expired", "revoked", None):
        with sessions.begin() as session:
            key, plaintext = keys.create_key(session, name="ops", scopes=["admin"], actor="system")
            if cause == "expired":
                key.expires_at = utcnow() - timedelta(seconds=1)
            if cause == "revoked":
                key.revoked_at = utcnow()
        presented = {
            "malformed": "lth_x",
            "unknown": "lth_" + "0" * 16 + plaintext[20:],
            "wrong": plaintext[:-43] + "A" * 43,
        }.get(cause or "", plaintext)
        compared.clear()
        with sessions() as session:
            if cause is None:
                assert keys.authenticate(session, presented).id == key.id
            else:
                with pytest.raises(Unauthenticated) as caught:
                    keys.authenticate(session, presented)
                assert caught.value.detail == "the API key is unknown, wrong, expired or revoked"
                assert caught.value.extra == {}
        assert compared == [(32, 32)], cause


def test_time_alone_makes_no_key_with_every_scope(sessions: Sessions) -> None:
    with sessions.begin() as session:
        key, _ = keys.create_key(session, name="ops", scopes=["admin"], actor="system")
        key.expires_at = utcnow() - timedelta(seconds=1)
    assert create_first_key(sessions) is None
    with sessions.begin() as session:
        keys.revoke_key(session, key.id, actor="cli")
    assert create_first_key(sessions) is not None


def test_limits(sessions: Sessions) -> None:
    limits = {"requests_per_day": 5, "rate_per_minute": 0}
    with sessions.begin() as session:
        key, _ = keys.create_key(session, name="ops", scopes=["requests"], actor="system", limits=limits)
    with sessions() as session:
        assert session.get_one(ApiKey, key.id).limits == limits
        [entry] = session.scalars(select(AuditEntry))
        made = entry_facts.key_digest(key.name, key.digest, key.created_at)
        assert entry.detail == {"scopes": ["requests"], "record_digest": made, "limits": limits}
        past = utcnow() - timedelta(seconds=1)
        for bad, field in (
            ({"limits": {"requests": 5}}, "limit"),
            ({"limits": {"texts_per_day": -1}}, "limit"),
            ({"limits": {"texts_per_day": 2**31}}, "limit"),
            ({"expires_at": past}, "expires"),
        ):
            with pytest.raises(InvalidInput) as caught:
                keys.create_key(session, name="n", scopes=["admin"], actor="cli", **bad)  # type: ignore[arg-type]
            assert caught.value.extra["field"] == field


# --- last use --------------------------------------------------------------------------------------------------------


@pytest.fixture
def uses(sessions: Sessions) -> Iterator[KeyUses]:
    """One that writes when it is told to."""
    uses = KeyUses(sessions, every=3600)
    yield uses
    uses.close()


def make(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return keys.create_key(session, name="ops", scopes=["admin"], actor="system")[0].id


def last_used(sessions: Sessions, key_id: str) -> datetime | None:
    with sessions() as session:
        return session.get_one(ApiKey, key_id).last_used_at


def test_uses_are_written_together(sessions: Sessions, uses: KeyUses) -> None:
    ids, before = [make(sessions) for _ in range(3)], utcnow()
    for _ in range(50):
        uses.note(ids[0])
        uses.note(ids[1])
    assert last_used(sessions, ids[0]) is None, "no call writes"
    uses.write()
    at = last_used(sessions, ids[0])
    assert at is not None and before <= at <= utcnow()
    assert last_used(sessions, ids[1]) is not None and last_used(sessions, ids[2]) is None
    with sessions.begin() as session:
        keys.note_uses(session, {ids[0]: before - timedelta(hours=1)})
    assert last_used(sessions, ids[0]) == at, "another replica's later use stays"


def test_a_use_that_cannot_be_written_waits(
    sessions: Sessions, uses: KeyUses, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key_id = make(sessions)
    uses.note(key_id)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):

        def fail(*_: object) -> None:
            raise OperationalError("UPDATE", {}, Exception("database is locked"))

        broken.setattr(keys, "note_uses", fail)
        uses.write()
    assert "not written yet" in caplog.text and key_id not in caplog.text
    assert last_used(sessions, key_id) is None
    uses.write()
    assert last_used(sessions, key_id) is not None


def test_the_thread_writes_and_ends(sessions: Sessions) -> None:
    key_id = make(sessions)
    written = threading.Event()
    uses = KeyUses(sessions, every=0.01)
    real = uses.write

    def write() -> None:
        real()
        if last_used(sessions, key_id) is not None:
            written.set()

    uses.write = write  # type: ignore[method-assign]
    uses.note(key_id)
    assert written.wait(60)
    other = make(sessions)
    uses.note(other)
    uses.close()
    assert last_used(sessions, other) is not None, "what is left is written at the end"
    assert not any(thread.name == "key-uses" and thread.is_alive() for thread in threading.enumerate())
