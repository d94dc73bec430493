"""Messages to webhooks: written with the state change that they tell of, sent by workers, kept as a log.

At least once: a message is claimed, sent, then recorded, and a sender that dies in between leaves it to the next one
when its lease is over. Its id is the same each time, so a receiver can tell. Nothing here commits.

Rows of webhooks and keys are locked so that a message may be added to them meanwhile (FOR NO KEY UPDATE): whoever makes
a transition may hold the audit lock already.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from app import audit, db, shredding
from app.errors import NotFound
from app.keys import READS_ALL
from app.tables import (
    ActiveSet,
    ApiKey,
    DeliveryState,
    RequestEvent,
    RequestState,
    UnlearnRequest,
    Webhook,
    WebhookDelivery,
    new_id,
    utcnow,
)

OPEN = (DeliveryState.PENDING, DeliveryState.SENDING)
PAUSES = (5.0, 30.0, 120.0, 600.0, 3600.0, 3 * 3600.0, 6 * 3600.0, 12 * 3600.0)
"""Seconds after the first, second, … failed attempt; the last one for all that follow."""
PER_WEBHOOK, PER_KEY = 2, 4
"""Messages under way at once in one process, so that receivers that hang leave room for those of others."""
_CLEAN_ROWS = 1000


class DeliveryError(StrEnum):
    """Why an attempt failed. A kind only: what a receiver answers is neither read nor kept."""

    STATUS = "status"  # neither 2xx nor one of the next two
    REDIRECT = "redirect"  # not followed: it could lead anywhere
    GONE = "gone"  # 410: the receiver wants no more
    TIMEOUT = "timeout"
    NAME = "name"  # the host's name does not resolve
    ADDRESS = "address"  # it resolves to an address that webhooks must not reach
    CONNECT = "connect"
    TLS = "tls"
    BROKEN = "broken"  # the connection ended, or what came was no HTTP
    SECRET = "secret"  # noqa: S105  # the signing secret does not open
    KEY_STORE = "key-store"  # it does not answer, so nothing could be signed; no attempt is used
    INTERNAL = "internal"  # a bug; the worker's log says where
    LOST = "lost"  # every attempt ended with the death of its worker
    DISABLED = "disabled"  # the webhook was disabled, or its key has ended


@dataclass(frozen=True, repr=False)
class Due:
    """A claimed message, and what it takes to send it."""

    id: str
    webhook_id: str
    api_key_id: str
    attempt: int
    url: str
    payload: dict[str, Any]
    wrapped_key: bytes
    sealed_secret: bytes


@dataclass(frozen=True)
class Outcome:
    """How an attempt went; without ``error`` it was delivered."""

    error: DeliveryError | None = None
    status: int | None = None
    retry_after: float | None = None


def enqueue(session: Session, request: UnlearnRequest, event: RequestEvent, *, before: RequestState | None) -> None:
    """A message for each webhook that is to be told of this state change, in its transaction.

    A webhook tells of what its key may read: its own requests, or everybody's where it has one of ``READS_ALL``.
    """
    session.flush()
    query = (
        select(Webhook.id, Webhook.states, Webhook.all_requests, ApiKey.scopes)
        .join(ApiKey, ApiKey.id == Webhook.api_key_id)
        .where(*_in_force(event.at), or_(Webhook.api_key_id == request.api_key_id, Webhook.all_requests))
        .order_by(Webhook.id)
    )
    told = [
        row.id
        for row in session.execute(query)
        if (not row.states or request.state in row.states)
        and (not row.all_requests or not set(READS_ALL).isdisjoint(row.scopes))
    ]
    if told:
        payload = _payload(session, request, event, before)
        session.add_all(new_delivery(webhook_id, payload, request.id, event.at) for webhook_id in told)


def new_delivery(webhook_id: str, payload: dict[str, Any], request_id: str | None, now: datetime) -> WebhookDelivery:
    return WebhookDelivery(
        id=new_id("dlv"),
        webhook_id=webhook_id,
        request_id=request_id,
        payload=payload,
        state=DeliveryState.PENDING,
        attempts=0,
        next_at=now,
        created_at=now,
    )


def claim(
    session: Session,
    *,
    limit: int,
    lease_seconds: float,
    max_attempts: int,
    in_flight: Collection[Due] = (),
    now: datetime | None = None,
) -> list[Due]:
    """Take messages that are due, oldest first, a few of each webhook and key. ``in_flight``: what is being sent.

    One whose senders died ``max_attempts`` times fails instead.
    """
    now = now or utcnow()
    hooks, owners = Counter(due.webhook_id for due in in_flight), Counter(due.api_key_id for due in in_flight)
    due = and_(WebhookDelivery.state.in_(OPEN), WebhookDelivery.next_at <= now)
    waiting = session.execute(
        select(Webhook.id, Webhook.api_key_id)
        .join(WebhookDelivery, WebhookDelivery.webhook_id == Webhook.id)
        .join(ApiKey, ApiKey.id == Webhook.api_key_id)
        .where(
            due,
            *_in_force(now),
            Webhook.id.not_in([hook for hook, count in hooks.items() if count >= PER_WEBHOOK]),
            Webhook.api_key_id.not_in([owner for owner, count in owners.items() if count >= PER_KEY]),
        )
        .group_by(Webhook.id, Webhook.api_key_id)
        .order_by(func.min(WebhookDelivery.next_at))
        .limit(10 * limit)
    ).all()
    if not waiting:
        return []  # the usual case takes no lock
    db.begin_write(session)
    taken: list[Due] = []
    for webhook_id, api_key_id in waiting:
        room = min(limit - len(taken), PER_WEBHOOK - hooks[webhook_id], PER_KEY - owners[api_key_id])
        if room <= 0:
            continue
        query = (
            select(WebhookDelivery, Webhook)
            .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
            .where(due, Webhook.id == webhook_id)
            .order_by(WebhookDelivery.next_at, WebhookDelivery.id)
            .limit(room)
            .with_for_update(of=WebhookDelivery, skip_locked=True)
        )
        for row, webhook in session.execute(query, execution_options={"populate_existing": True}):
            if row.state == DeliveryState.SENDING and row.attempts >= max_attempts:
                _end(row, DeliveryState.FAILED, DeliveryError.LOST)
                continue
            row.state = DeliveryState.SENDING
            row.attempts += 1
            row.sent_at, row.next_at = now, now + timedelta(seconds=lease_seconds)
            owners[api_key_id] += 1
            taken.append(
                Due(
                    id=row.id,
                    webhook_id=webhook_id,
                    api_key_id=api_key_id,
                    attempt=row.attempts,
                    url=webhook.url,
                    payload=row.payload,
                    wrapped_key=webhook.wrapped_key,
                    sealed_secret=webhook.sealed_secret,
                )
            )
    return taken


def record(session: Session, due: Due, outcome: Outcome, *, max_attempts: int, now: datetime | None = None) -> bool:
    """Write down how an attempt went. False: the lease was over and somebody else has taken the message since.

    410 disables the webhook, which is audited. Another failure is tried again after a pause, unless it was the last;
    what failed for want of the key store gives its attempt back.
    """
    now = now or utcnow()
    webhook = lock_webhook(session, due.webhook_id)
    query = select(WebhookDelivery).where(WebhookDelivery.id == due.id).with_for_update()
    row = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if row is None or row.state != DeliveryState.SENDING or row.attempts != due.attempt:
        return False
    row.last_status, row.last_error = outcome.status, outcome.error
    if outcome.error is None:
        _end(row, DeliveryState.DELIVERED, None)
        row.delivered_at = now
    elif outcome.error == DeliveryError.GONE:
        _end(row, DeliveryState.FAILED, outcome.error)
        disable(session, webhook, actor="webhooks", why="gone", now=now)
    elif webhook.disabled_at is None and outcome.error == DeliveryError.KEY_STORE:
        # Whoever had this number has just spoken, and whoever is late had a smaller one: it may be used again.
        row.attempts -= 1
        _try_again(row, now)
    elif webhook.disabled_at is not None or row.attempts >= max_attempts:
        _end(row, DeliveryState.FAILED, outcome.error)
    else:
        _try_again(row, now, outcome.retry_after)
    return True


def pause(attempts: int, retry_after: float | None = None) -> float:
    """Seconds until the next attempt: growing, spread by a fifth, and not sooner than the receiver asked for."""
    seconds = PAUSES[min(max(attempts, 1), len(PAUSES)) - 1] * random.uniform(0.8, 1.2)
    return max(seconds, min(retry_after or 0.0, PAUSES[-1]))


def lock_webhook(session: Session, webhook_id: str) -> Webhook:
    """The webhook as it is now, locked until the transaction ends. Raises NotFound."""
    db.begin_write(session)
    query = select(Webhook).where(Webhook.id == webhook_id).with_for_update(key_share=True)
    webhook = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if webhook is None:
        raise NotFound("no such webhook")
    return webhook


def disable(session: Session, webhook: Webhook, *, actor: str, why: str, now: datetime) -> None:
    """End a locked webhook; what waits for it fails. Once is enough."""
    if webhook.disabled_at is not None:
        return
    webhook.disabled_at = now
    waiting = update(WebhookDelivery).where(
        WebhookDelivery.webhook_id == webhook.id, WebhookDelivery.state == DeliveryState.PENDING
    )
    _fail_all(session, waiting)
    audit.append(session, actor=actor, action="webhook.disabled", subject=webhook.id, detail={"why": why})


def clean(session: Session, *, log_days: float, now: datetime | None = None) -> None:
    """End what waits for a webhook that has ended, or whose key has; drop what ended ``log_days`` ago.

    It waits for nobody's rows: what is locked, or too much for once, is left to the next time.
    """
    now = now or utcnow()
    db.begin_write(session)
    in_force = select(Webhook.id).join(ApiKey, ApiKey.id == Webhook.api_key_id).where(*_in_force(now))
    message = WebhookDelivery
    stranded = _lock_some(
        session, message, message.state.in_(OPEN), message.next_at <= now, message.webhook_id.not_in(in_force)
    )
    _fail_all(session, update(message).where(message.id.in_(stranded)))
    before = now - timedelta(days=log_days)
    apart: dict[str, Any] = {"execution_options": {"synchronize_session": False}}
    old = _lock_some(session, message, message.state.not_in(OPEN), message.created_at < before)
    session.execute(delete(message).where(message.id.in_(old)), **apart)
    ended = _lock_some(session, Webhook, Webhook.disabled_at < before)
    gone = delete(Webhook).where(Webhook.id.in_(ended)).returning(Webhook.wrapped_key)
    for wrapped in session.scalars(gone, **apart).all():
        shredding.destroy_key(session, wrapped)


def _lock_some(session: Session, table: type[Webhook | WebhookDelivery], *conditions: ColumnElement[bool]) -> list[str]:
    """Ids, in order, of rows that nobody else has locked; locked until the transaction ends."""
    query = select(table.id).where(*conditions).order_by(table.id).limit(_CLEAN_ROWS)
    return list(session.scalars(query.with_for_update(of=table, skip_locked=True)))


def _payload(
    session: Session, request: UnlearnRequest, event: RequestEvent, before: RequestState | None
) -> dict[str, Any]:
    """Ids, states, codes and times. Never a reason or a detail: those are free text."""

    def moment(value: datetime | None) -> str | None:
        return value.isoformat() if value is not None else None

    return {
        "type": f"request.{RequestState(request.state).value}",
        "timestamp": moment(event.at),
        "data": {
            "request_id": request.id,
            "state": RequestState(request.state).value,
            "previous_state": before.value if before is not None else None,
            "sequence": event.id,
            "failure_code": (request.failure or {}).get("code"),
            "active_set_version": session.scalar(select(ActiveSet.version)),
            "created_at": moment(request.created_at),
            "started_at": moment(request.started_at),
            "finished_at": moment(request.finished_at),
            "due_at": moment(request.due_at),
            "expires_at": moment(request.expires_at),
        },
    }


def _in_force(now: datetime) -> tuple[Any, ...]:
    """Conditions on a webhook and its key: what a revoked key may no longer read, its webhooks no longer tell."""
    alive = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now)
    return Webhook.disabled_at.is_(None), ApiKey.revoked_at.is_(None), alive


def _try_again(row: WebhookDelivery, now: datetime, retry_after: float | None = None) -> None:
    row.state = DeliveryState.PENDING
    row.next_at = now + timedelta(seconds=pause(row.attempts, retry_after))


def _end(row: WebhookDelivery, state: DeliveryState, error: DeliveryError | None) -> None:
    row.state, row.last_error, row.next_at = state, error, None


def _fail_all(session: Session, rows: Any) -> None:
    values = {"state": DeliveryState.FAILED, "last_error": DeliveryError.DISABLED, "next_at": None}
    session.execute(rows.values(**values), execution_options={"synchronize_session": False})
