"""Keys of the deployment that must outlive the master key: random or derived once, sealed, in the table ``secrets``.

A row holds its own data key, wrapped, and the secret sealed under that. Nothing here commits.
"""

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
    found = find(session, vault, name)
    if found is None:
        add(session, vault, name, make())
        found = find(session, vault, name)
        assert found is not None
    return found


def find(session: Session, vault: Vault, name: str) -> bytes | None:
    """Raises VaultError when it is there and does not open: it is never replaced."""
    stored = session.scalar(select(Secret.wrapped).where(Secret.name == name))
    if stored is None:
        return None
    wrapped, payload = vault.split(stored)
    return vault.open(wrapped, payload, aad=_aad(name))


def add(session: Session, vault: Vault, name: str, secret: bytes) -> bool:
    """Store it unless there is one by now; says whether this one is the one. Raises KeyStoreAway.

    Where it is not, its key's share is left behind, and opens nothing: that is once in the life of a deployment.
    """
    wrapped = vault.new_key()  # before anything is locked
    stored = wrapped + vault.seal(wrapped, secret, aad=_aad(name))
    db.begin_write(session)
    dialect: Any = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    # PostgreSQL waits here for another transaction that inserts the same name, and then sees its row.
    row = dialect.insert(Secret).values(name=name, wrapped=stored, created_at=utcnow()).on_conflict_do_nothing()
    return session.scalar(row.returning(Secret.name)) is not None


def missing(session: Session, names: Iterable[str]) -> set[str]:
    """Which of these are not there."""
    return set(names).difference(session.scalars(select(Secret.name)))


def _aad(name: str) -> str:
    return f"secret:{name}"
