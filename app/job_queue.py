"""The database as the queue: claim, lease, heartbeat, checkpoints, and the reaper's statements.

A claim is one conditional UPDATE. Everything a worker writes afterwards carries its fence (``lifecycle.held_by``), so
a worker that was presumed dead gets LeaseLost instead of overwriting its successor. Nothing here commits.
"""

from __future__ import annotations

import json
import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from app import audit, db
from app.errors import LeaseLost, VaultError
from app.lifecycle import (
    TRANSITIONS,
    Claim,
    ForgetText,
    checkpoint_aad,
    end_failed,
    held_by,
    hold,
    move,
    record_state,
    shred,
    texts_aad,
)
from app.tables import RUNNING, Checkpoint, RequestEvent, RequestState, UnlearnRequest, utcnow
from app.vault import Vault

__all__ = [
    "Claim",
    "checkpoint_aad",
    "claim",
    "heartbeat",
    "load_checkpoint",
    "next_pending",
    "open_texts",
    "read_key",
    "reap",
    "record_progress",
    "ring_due",
    "save_checkpoint",
    "shred_due",
]


def claim(
    session: Session,
    request_id: str,
    *,
    owner: str,
    lease_seconds: float,
    max_attempts: int,
    now: datetime | None = None,
) -> Claim | None:
    """Take a request that waits, or whose lease expired. None: unknown, held by another, ended or out of attempts."""
    now = now or utcnow()
    seen = session.scalar(select(UnlearnRequest.state).where(UnlearnRequest.id == request_id))
    if seen is None or RequestState.TRAINING not in TRANSITIONS[RequestState(seen)]:
        return None
    unique_owner = f"{owner[:80]}#{secrets.token_hex(6)}"
    attempt = session.scalar(
        update(UnlearnRequest)
        .where(
            UnlearnRequest.id == request_id,
            UnlearnRequest.state == seen,  # so that the audit names the state it came from; a miss is rung again
            or_(UnlearnRequest.state == RequestState.PENDING, UnlearnRequest.lease_expires_at < now),
            UnlearnRequest.attempt < max_attempts,
            UnlearnRequest.cancel_requested.is_(False),  # an expired and cancelled one is the reaper's
        )
        .values(
            state=RequestState.TRAINING,
            attempt=UnlearnRequest.attempt + 1,
            lease_expiries=UnlearnRequest.lease_expiries + (1 if seen in RUNNING else 0),
            lease_owner=unique_owner,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
            started_at=func.coalesce(UnlearnRequest.started_at, now),
            updated_at=now,
        )
        .returning(UnlearnRequest.attempt)
        .execution_options(synchronize_session=False)
    )
    if attempt is None:
        return None
    request = session.get_one(UnlearnRequest, request_id, populate_existing=True)
    record_state(session, request, before=RequestState(seen), actor=unique_owner, detail={"attempt": attempt}, now=now)
    return Claim(request_id, attempt, unique_owner)


def open_texts(session: Session, vault: Vault, claim: Claim) -> list[ForgetText]:
    """The forget texts, in clear, for the holder only. Raises LeaseLost, VaultError."""
    row = session.execute(
        select(UnlearnRequest.wrapped_key, UnlearnRequest.sealed_texts).where(*held_by(claim))
    ).one_or_none()
    if row is None:
        raise lost(claim)
    if row.sealed_texts is None:
        raise VaultError("the request holds no texts")
    payload = vault.open(row.wrapped_key, row.sealed_texts, aad=texts_aad(claim.request_id))
    return [ForgetText(text, label) for text, label in json.loads(payload)]


def heartbeat(session: Session, claim: Claim, *, lease_seconds: float, now: datetime | None = None) -> bool:
    """Extend the lease; True = the client asked to cancel. Raises LeaseLost."""
    now = now or utcnow()
    return fenced_update(session, claim, lease_expires_at=now + timedelta(seconds=lease_seconds))


def record_progress(session: Session, claim: Claim, progress: dict[str, Any]) -> bool:
    """Store a progress figure and its event; True = the client asked to cancel. Raises LeaseLost."""
    now = utcnow()
    cancel = fenced_update(session, claim, progress=progress, last_step_at=now, updated_at=now)
    session.add(RequestEvent(request_id=claim.request_id, at=now, type="progress", data=progress))
    return cancel


def read_key(session: Session, claim: Claim) -> bytes:
    """The key of a held request, for what is sealed before its row is locked. Raises LeaseLost, VaultError."""
    row = session.execute(select(UnlearnRequest.wrapped_key).where(*held_by(claim))).one_or_none()
    if row is None:
        raise lost(claim)
    key: bytes | None = row.wrapped_key
    if key is None:
        raise VaultError("the request's key is gone")
    return key


def save_checkpoint(session: Session, vault: Vault, claim: Claim, *, step: int, data: bytes) -> None:
    """Replace the checkpoint, sealed under the request's key. Raises LeaseLost, VaultError, KeyStoreAway."""
    # Sealed first: a heartbeat waits for the row that ``hold`` locks, and on SQLite everybody who writes.
    sealed = vault.seal(read_key(session, claim), data, aad=checkpoint_aad(claim.request_id, step))
    hold(session, claim)
    row = session.get(Checkpoint, claim.request_id, populate_existing=True)
    if row is None:
        session.add(Checkpoint(request_id=claim.request_id, step=step, updated_at=utcnow(), sealed=sealed))
    else:
        row.step, row.updated_at, row.sealed = step, utcnow(), sealed


def load_checkpoint(session: Session, vault: Vault, claim: Claim) -> tuple[int, bytes] | None:
    """The last checkpoint of any attempt as (step, bytes). Raises LeaseLost, VaultError."""
    row = session.execute(
        select(UnlearnRequest.wrapped_key, Checkpoint.step, Checkpoint.sealed)
        .outerjoin(Checkpoint, Checkpoint.request_id == UnlearnRequest.id)
        .where(*held_by(claim))
    ).one_or_none()
    if row is None:
        raise lost(claim)
    if row.sealed is None:
        return None
    return row.step, vault.open(row.wrapped_key, row.sealed, aad=checkpoint_aad(claim.request_id, row.step))


def reap(session: Session, *, max_attempts: int, now: datetime | None = None) -> list[str]:
    """Put requests whose lease expired back in the queue, end those out of attempts or cancelled; ids touched."""
    now = now or utcnow()
    due = or_(
        and_(UnlearnRequest.state.in_(RUNNING), UnlearnRequest.lease_expires_at < now),
        and_(UnlearnRequest.state == RequestState.PENDING, UnlearnRequest.attempt >= max_attempts),
    )
    if session.scalar(select(UnlearnRequest.id).where(due).limit(1)) is None:
        return []  # the usual case takes no lock
    db.begin_write(session)
    # All rows are locked before the first audit entry (whose lock is global), so two reapers cannot deadlock.
    query = select(UnlearnRequest).where(due).order_by(UnlearnRequest.id).with_for_update(skip_locked=True)
    rows = list(session.scalars(query, execution_options={"populate_existing": True}))
    for row in rows:
        if row.state in RUNNING:
            row.lease_expiries += 1
        if row.cancel_requested:
            move(session, row, RequestState.CANCELLED, actor="reaper", now=now)
        elif row.attempt >= max_attempts:
            detail = f"the worker was lost {row.attempt} times"
            end_failed(session, row, actor="reaper", code="attempts-exhausted", detail=detail, now=now)
        else:
            row.rung_at = None
            move(session, row, RequestState.PENDING, actor="reaper", detail={"why": "lease expired"}, now=now)
    return [row.id for row in rows]


def shred_due(session: Session, *, now: datetime | None = None) -> list[str]:
    """Shred the texts whose time is up (``keep_texts_hours``); ids touched."""
    now = now or utcnow()
    due = UnlearnRequest.shred_at <= now
    if session.scalar(select(UnlearnRequest.id).where(due).limit(1)) is None:
        return []
    db.begin_write(session)
    query = select(UnlearnRequest).where(due).order_by(UnlearnRequest.id).with_for_update(skip_locked=True)
    rows = list(session.scalars(query, execution_options={"populate_existing": True}))
    for row in rows:
        shred(session, row)
    for row in rows:
        audit.append(session, actor="reaper", action="request.shredded", subject=row.id, detail={})
    return [row.id for row in rows]


def ring_due(session: Session, *, ring_seconds: float, now: datetime | None = None) -> list[str]:
    """Waiting requests, oldest first, that were not announced for ``ring_seconds``; marks them announced."""
    now = now or utcnow()
    ids = session.scalars(
        update(UnlearnRequest)
        .where(
            UnlearnRequest.state == RequestState.PENDING,
            or_(UnlearnRequest.rung_at.is_(None), UnlearnRequest.rung_at < now - timedelta(seconds=ring_seconds)),
        )
        .values(rung_at=now)
        .returning(UnlearnRequest.id)
        .execution_options(synchronize_session=False)
    )
    return sorted(ids)


def next_pending(session: Session) -> str | None:
    """The oldest waiting request."""
    return session.scalar(
        select(UnlearnRequest.id)
        .where(UnlearnRequest.state == RequestState.PENDING)
        .order_by(UnlearnRequest.id)
        .limit(1)
    )


def fenced_update(session: Session, claim: Claim, **values: Any) -> bool:
    """Write columns of a held request; returns its cancel flag. Raises LeaseLost."""
    cancel = session.scalar(
        update(UnlearnRequest)
        .where(*held_by(claim))
        .values(**values)
        .returning(UnlearnRequest.cancel_requested)
        .execution_options(synchronize_session=False)
    )
    if cancel is None:
        raise lost(claim)
    return cancel


def lost(claim: Claim) -> LeaseLost:
    return LeaseLost("the request is no longer held by this attempt", request_id=claim.request_id)
