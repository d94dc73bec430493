"""The append-only, hash-chained log of what happened: who, what, on which subject. It never holds free text.

The chain (``app.audit_chain``) shows what was altered before its end. Checkpoints, signed and stored beside it, show a
rewritten or shortened log as well, as long as one of them is still there: copies of them belong elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session, aliased, sessionmaker

from app import audit_export, db
from app.audit_chain import (
    CHECKPOINT,
    GENESIS,
    AuditBroken,
    Chain,
    check_checkpoint,
    checkpoint_statement,
    entry_hash,
    iso,
)
from app.errors import NotFound
from app.signing import PublicKey, Signer
from app.tables import AuditCheckpoint, AuditEntry, utcnow

__all__ = [
    "GENESIS",
    "AuditBroken",
    "append",
    "check_about",
    "checkpoint",
    "checkpoint_document",
    "checkpoint_is_due",
    "entries_about",
    "entry_hash",
    "export",
    "list_entries",
    "newest_checkpoint",
    "verify",
]

_CHAIN_LOCK = 0x1E7E0002  # PostgreSQL advisory lock, held until the transaction ends
_PAGE = 1000

T = TypeVar("T", AuditEntry, AuditCheckpoint)


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


def verify(session: Session, public_key: PublicKey | None = None) -> int:
    """Check the whole chain and every checkpoint; returns how many entries there are. Raises AuditBroken.

    Signatures are checked with ``public_key``, which the database alone cannot vouch for; without it only that each
    checkpoint names an entry of this chain.
    """
    promised = session.scalar(select(func.max(AuditCheckpoint.seq))) or 0  # before the entries, which only get more
    chain = _walk(session, Chain(), public_key)
    if promised > chain.seq:
        seq = chain.seq + 1
        raise AuditBroken(f"audit entry {seq} is missing: a checkpoint says that there were {promised}", seq=seq)
    return chain.seq


def check_about(session: Session, *subjects: str) -> None:
    """Each entry on these subjects is what its own hash says, and hangs between its neighbours. Raises AuditBroken.

    As of one moment. That the whole chain holds, and that none is missing from it, is for ``verify``.
    """
    before, after = aliased(AuditEntry), aliased(AuditEntry)
    last = select(func.max(AuditEntry.seq)).scalar_subquery()
    query = (
        select(
            *AuditEntry.__table__.c, before.hash.label("hung_on"), after.prev_hash.label("held_by"), last.label("last")
        )
        .outerjoin(before, before.seq == AuditEntry.seq - 1)
        .outerjoin(after, after.seq == AuditEntry.seq + 1)
        .where(AuditEntry.subject.in_(subjects))
        .order_by(AuditEntry.seq)
    )
    for row in session.execute(query).all():
        seq = row.seq
        names = ("seq", "at", "actor", "action", "subject", "detail")
        if row.hash != entry_hash(row.prev_hash, **{name: getattr(row, name) for name in names}):
            raise AuditBroken(f"audit entry {seq} was altered", seq=seq)
        if row.prev_hash != (GENESIS if seq == 1 else row.hung_on):
            raise AuditBroken(f"audit entry {seq} does not follow from the one before it", seq=seq)
        if row.held_by != row.hash and (row.held_by is not None or seq < row.last):
            raise AuditBroken(f"audit entry {seq + 1} does not follow from the one before it", seq=seq + 1)


def checkpoint(session: Session, signer: Signer) -> AuditCheckpoint:
    """The signed checkpoint of the log as it is, made where the head has moved since the last. The caller commits.

    Only what follows from the last one is signed: a rewritten log gets no signature. Raises AuditBroken, and NotFound
    while the log is empty.
    """
    last = newest_checkpoint(session)
    start = Chain()
    if last is not None:
        found = session.scalar(select(AuditEntry.hash).where(AuditEntry.seq == last.seq))
        if found is None:
            raise AuditBroken(f"audit entry {last.seq} is missing: a signed checkpoint has it", seq=last.seq)
        check_checkpoint(_as_dict(last), signer.public, found)
        start = Chain(last.seq, last.hash)
    chain = _walk(session, start, signer.public)
    if last is not None and last.seq == chain.seq:
        return last
    if chain.seq == 0:
        raise NotFound("the audit log has no entry yet")
    at, key_id = utcnow(), signer.public.key_id
    statement = checkpoint_statement(seq=chain.seq, hash=chain.head, at=iso(at), key_id=key_id)
    signature = bytes.fromhex(signer.sign(CHECKPOINT, statement))
    db.begin_write(session)
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    values = {"seq": chain.seq, "hash": chain.head, "at": at, "key_id": key_id, "signature": signature}
    session.execute(insert(AuditCheckpoint).values(values).on_conflict_do_nothing())  # another one's is as good
    return session.get_one(AuditCheckpoint, chain.seq, populate_existing=True)


def checkpoint_is_due(session: Session, every_seconds: float, now: datetime | None = None) -> bool:
    """Whether there are entries behind the last checkpoint, and it is as old as this."""
    head = session.scalar(select(func.max(AuditEntry.seq)))
    last = newest_checkpoint(session)
    if head is None or last is None or head == last.seq:
        return head is not None and last is None
    # A checkpoint of the future, from a clock that was wrong, must not put off the next for ever.
    return not timedelta(0) <= (now or utcnow()) - last.at < timedelta(seconds=every_seconds)


def newest_checkpoint(session: Session) -> AuditCheckpoint | None:
    query = select(AuditCheckpoint).order_by(AuditCheckpoint.seq.desc()).limit(1)
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def checkpoint_document(row: AuditCheckpoint, public_key: PublicKey) -> dict[str, Any]:
    """A checkpoint as it is given out, with the key that it is signed by."""
    return {"kind": "checkpoint", "public_key": public_key.hex(), **_as_dict(row)}


def list_entries(
    session: Session, *, limit: int, before: int | None = None, subject: str | None = None
) -> tuple[list[AuditEntry], int | None]:
    """One page, newest first, and the ``before`` of the next."""
    query = select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(AuditEntry.seq < before)
    if subject is not None:
        query = query.where(AuditEntry.subject == subject)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].seq if len(rows) > limit else None


def entries_about(session: Session, *subjects: str) -> list[AuditEntry]:
    """All entries on these subjects, oldest first."""
    return list(session.scalars(select(AuditEntry).where(AuditEntry.subject.in_(subjects)).order_by(AuditEntry.seq)))


def export(sessions: sessionmaker[Session], signer: Signer, head: AuditCheckpoint) -> Iterator[bytes]:
    """The log up to ``head`` as NDJSON, a page at a time: entries, checkpoints, and a signed last line.

    A page is a transaction of its own, so a reader who is slow holds nothing in the database.
    """
    digest, checkpoints = hashlib.sha256(), 0
    for entries in _pages(sessions, AuditEntry, head.seq):
        chunk = audit_export.to_lines({"kind": "entry", **_as_dict(row)} for row in entries)
        digest.update(chunk)
        yield chunk
    for points in _pages(sessions, AuditCheckpoint, head.seq):
        chunk = audit_export.to_lines(checkpoint_document(row, signer.public) for row in points)
        digest.update(chunk)
        checkpoints += len(points)
        yield chunk
    yield audit_export.head_line(
        signer, seq=head.seq, hash=head.hash, at=iso(utcnow()), checkpoints=checkpoints, digest=digest.hexdigest()
    )


def _pages(sessions: sessionmaker[Session], table: type[T], upto: int) -> Iterator[list[T]]:
    after = 0
    while True:
        with sessions() as session:
            query = select(table).where(table.seq > after, table.seq <= upto).order_by(table.seq).limit(_PAGE)
            rows = list(session.scalars(query))
        if not rows:
            return
        after = rows[-1].seq
        yield rows


def _walk(session: Session, chain: Chain, public_key: PublicKey | None, page: int = _PAGE) -> Chain:
    """Follow the log from where ``chain`` stands, checkpoints on the way included. Raises AuditBroken."""
    entries, points = AuditEntry.__table__.c, AuditCheckpoint.__table__.c
    # Columns, not entities: the database's values, not the session's. One statement: both as of one moment.
    query = (
        select(*entries, *(column.label(f"point_{column.name}") for column in points))
        .outerjoin(AuditCheckpoint, points.seq == entries.seq)
        .order_by(entries.seq)
        .execution_options(yield_per=page)
    )
    if chain.seq:  # from the start there is no bound: an entry below 1 is one too many
        query = query.where(entries.seq > chain.seq)
    try:
        with closing(session.execute(query)) as rows:
            for row in rows.mappings():
                chain.add({**row, "at": iso(row["at"])})
                if row["point_seq"] is not None:
                    point = {name: row[f"point_{name}"] for name in points.keys()}  # noqa: SIM118  # no mapping
                    check_checkpoint(_plain(point), public_key, chain.head)
    except (ValueError, TypeError, DataError):  # a time that is none, JSON that is none: nothing that we wrote
        if page > 1:  # it was somewhere on this page
            return _walk(session, chain, public_key, page=1)
        raise AuditBroken(f"audit entry {chain.seq + 1} cannot be read: it was altered", seq=chain.seq + 1) from None
    return chain


def _as_dict(row: AuditEntry | AuditCheckpoint) -> dict[str, Any]:
    return _plain({column.name: getattr(row, column.name) for column in row.__table__.columns})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Times and signatures as JSON has them."""
    plain = {**values, "at": iso(values["at"])}
    if "signature" in plain:
        plain["signature"] = plain["signature"].hex()
    return plain
