"""Moving every wrapped key to the current master key. What the data keys sealed is not touched.

A few rows a transaction, so it can run beside the service and be cut off anywhere: a key that was moved needs nothing
the next time. Nothing here commits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app import active_set, audit, db, deployment_secrets
from app.errors import Conflict, KeyDestroyed, ShareMissing, WrongMasterKey
from app.tables import PendingShred, PreparedShare, Prompt, Secret, UnlearnRequest, Webhook
from app.vault import DIGEST_SECRETS, Vault, share_id

COLUMNS: dict[str, tuple[Any, Any]] = {
    "requests": (UnlearnRequest.id, UnlearnRequest.wrapped_key),
    "prompts": (Prompt.id, Prompt.wrapped_key),
    "webhooks": (Webhook.id, Webhook.wrapped_key),
    "secrets": (Secret.name, Secret.wrapped),
}
"""Wherever a wrapped key is kept: its row's name, and the column."""
CHUNK = 50
UNKNOWN, DESTROYED, MISSING = "unknown", "destroyed", "missing"


@dataclass(frozen=True)
class Step:
    """What one transaction did: rows read, keys moved, and where the next one goes on. ``last`` None: none is left."""

    read: int
    moved: int
    last: str | None


def check_adopted(session: Session) -> None:
    """Raises Conflict while digests still hang on the master key, which a rotation would take from them."""
    if deployment_secrets.missing(session, DIGEST_SECRETS):
        raise Conflict("the digest keys are not in the database yet: start the service once with its present key")


def count_keys(session: Session) -> int:
    counts = (session.scalar(select(func.count(column))) for _, column in COLUMNS.values())
    return sum(count or 0 for count in counts)


def rotate_some(session: Session, vault: Vault, where: str, after: str, *, actor: str) -> Step:
    """Move the next keys of one table, and say so in the audit log. Raises VaultError for a key that does not open.

    A key whose share is destroyed stays: it opens nothing, and the next start sees to its row.
    """
    name, column = COLUMNS[where]
    db.begin_write(session)
    if where == "prompts":  # a revoke reads its prompt under this lock
        active_set.lock_active_set(session)
    query = (
        select(name, column)
        .where(column.is_not(None), name > after)
        .order_by(name)
        .limit(CHUNK)
        .with_for_update(key_share=True)
    )
    rows = session.execute(query).all()
    moved = 0
    for row_name, stored in rows:
        wrapped, payload = vault.split(stored)
        try:
            fresh = vault.rewrap(wrapped)
        except KeyDestroyed:
            continue
        if fresh is not None:
            statement = update(name.class_).where(name == row_name).values({column: fresh + payload})
            session.execute(statement.execution_options(synchronize_session=False))
            moved += 1
    if moved:
        db.note_shredding(session)  # the old wrapped keys are to be gone from the disk
        audit.append(
            session, actor=actor, action="vault.rotated", subject=vault.key_id, detail={"table": where, "keys": moved}
        )
    return Step(len(rows), moved, rows[-1][0] if rows else None)


def tally(session: Session, vault: Vault) -> Counter[str]:
    """How many keys are wrapped under which master key, by its id; ``unknown``, ``destroyed`` or ``missing`` else."""
    counts: Counter[str] = Counter()
    for wrapped in _wrapped(session, vault):
        try:
            counts[vault.wrapped_under(wrapped)] += 1
        except WrongMasterKey:
            counts[UNKNOWN] += 1
        except KeyDestroyed:
            counts[DESTROYED] += 1
        except ShareMissing:
            counts[MISSING] += 1
    return counts


def unreferenced(session: Session, vault: Vault) -> int:
    """Shares that no key of this database needs: of calls that broke off, or of what came after a restored backup."""
    if vault.keystore is None:
        return 0
    shares = vault.keystore.live_ids()  # first: a share comes before its key
    # In the order in which a share goes from one to the next meanwhile.
    used = set(session.scalars(select(PreparedShare.share_id)))
    used |= {found for wrapped in _wrapped(session, vault) if (found := share_id(wrapped)) is not None}
    used |= set(session.scalars(select(PendingShred.share_id)))
    return len(shares - used)


def _wrapped(session: Session, vault: Vault) -> Iterator[bytes]:
    for _, column in COLUMNS.values():
        for stored in session.scalars(select(column).where(column.is_not(None))).all():
            yield vault.split(stored)[0]
