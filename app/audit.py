"""The append-only, hash-chained log of what happened: who, what, on which subject. It never holds free text.

``hash = SHA-256(prev_hash ‖ canonical JSON of the entry)``. The chain shows any altered, removed or inserted
entry before its end; that the end itself was cut off only shows against a copy of the last hash kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from app import db
from app.errors import LetheonError
from app.tables import AuditEntry, utcnow

GENESIS = "0" * 64
_CHAIN_LOCK = 0x1E7E0002  # PostgreSQL advisory lock, held until the transaction ends


class AuditBroken(LetheonError):
    """The chain does not hold; ``extra['seq']`` is the first entry that is wrong."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "audit-broken"
    title: ClassVar[str] = "The audit log was altered"


def append(session: Session, *, actor: str, action: str, subject: str, detail: dict[str, Any]) -> AuditEntry:
    """Add an entry in the caller's transaction: no change without its entry, no entry without its change.

    Appends happen one at a time, from here to the commit, so a caller locks its rows first and commits soon after.
    """
    session.flush()  # the caller's rows first, so every transaction takes its locks in the same order
    db.begin_write(session)
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CHAIN_LOCK})
    head = session.execute(
        select(AuditEntry.seq, AuditEntry.hash).order_by(AuditEntry.seq.desc()).limit(1)
    ).one_or_none()
    seq, prev_hash = (head.seq + 1, head.hash) if head else (1, GENESIS)
    at, actor = utcnow(), actor[:100]
    entry = AuditEntry(
        seq=seq,
        at=at,
        actor=actor,
        action=action,
        subject=subject,
        detail=detail,
        prev_hash=prev_hash,
        hash=entry_hash(prev_hash, seq=seq, at=at, actor=actor, action=action, subject=subject, detail=detail),
    )
    session.add(entry)
    session.flush()
    return entry


def verify(session: Session) -> int:
    """Check the whole chain; returns how many entries it has. Raises AuditBroken."""
    prev_hash, count = GENESIS, 0
    columns = AuditEntry.__table__.c  # columns, not entities: the database's values, not the session's
    query = select(*columns).order_by(columns.seq).execution_options(yield_per=1000)
    with closing(session.execute(query)) as rows:
        for row in rows:
            count += 1
            expected = entry_hash(
                prev_hash,
                seq=count,
                at=row.at,
                actor=row.actor,
                action=row.action,
                subject=row.subject,
                detail=row.detail,
            )
            if row.seq != count or row.prev_hash != prev_hash or row.hash != expected:
                raise AuditBroken(f"audit entry {count} is missing or was altered", seq=count)
            prev_hash = row.hash
    return count


def entry_hash(
    prev_hash: str, *, seq: int, at: datetime, actor: str, action: str, subject: str, detail: dict[str, Any]
) -> str:
    body = {
        "action": action,
        "actor": actor,
        "at": at.astimezone(UTC).isoformat(timespec="microseconds"),
        "detail": detail,
        "seq": seq,
        "subject": subject,
    }
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(prev_hash.encode() + canonical.encode()).hexdigest()
