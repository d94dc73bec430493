from __future__ import annotations

import re

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import audit, keys
from app.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from app.tables import ApiKey, AuditEntry

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
        audited = session.scalars(select(AuditEntry)).all()
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
    assert caught.value.detail == "the API key is unknown, wrong or revoked"


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
