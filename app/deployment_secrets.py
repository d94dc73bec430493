"""Keys of the deployment that must outlive the master key: random or derived once, sealed, in the table ``secrets``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app import db
from app.tables import Secret, utcnow

if TYPE_CHECKING:
    from app.vault import Vault


def load_or_create(session: Session, vault: Vault, name: str, make: Callable[[], bytes]) -> bytes:
    """The secret of this name; of processes that start together, all get the first one's. Raises VaultError."""
    found = _read(session, name)
    if found is None:
        db.begin_write(session)
        key = vault.new_key()
        sealed = key + vault.seal(key, make(), aad=_aad(name))
        dialect: Any = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
        row = dialect.insert(Secret).values(name=name, wrapped=sealed, created_at=utcnow())
        session.execute(row.on_conflict_do_nothing(index_elements=[Secret.name]))
        found = _read(session, name)
        assert found is not None
    key, payload = vault.split(found)
    return vault.open(key, payload, aad=_aad(name))


def missing(session: Session, names: Iterable[str]) -> set[str]:
    """Which of these are not there."""
    return set(names).difference(session.scalars(select(Secret.name)))


def _read(session: Session, name: str) -> bytes | None:
    return session.scalar(select(Secret.wrapped).where(Secret.name == name))


def _aad(name: str) -> str:
    return f"secret:{name}"
