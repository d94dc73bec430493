"""Webhooks as their owners see them: made, listed, disabled, tried, and the log of what was sent. Nothing here commits.

``of`` is the key whose webhooks may be seen; None: everybody's. Messages are signed as the Standard Webhooks
specification has it (https://www.standardwebhooks.com).
"""

from __future__ import annotations

import base64
import hmac
import json
import math
import secrets
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import audit, db, keys, webhook_urls
from app.errors import Conflict, InvalidInput, NotFound
from app.lifecycle import check_cursor
from app.tables import ApiKey, DeliveryState, RequestState, Webhook, WebhookDelivery, new_id, utcnow
from app.vault import Vault
from app.webhook_queue import OPEN, PAUSES, disable, lock_webhook, new_delivery

MAX_PER_KEY = 10
PING = "ping"
_SECRET_PREFIX = "whsec_"  # noqa: S105  # what the specification puts before a secret
_SECRET_BYTES = 32


def create_webhook(
    session: Session,
    vault: Vault,
    *,
    api_key_id: str,
    scopes: Collection[str],
    url: str,
    states: Sequence[str] = (),
    all_requests: bool = False,
    private: bool = False,
) -> tuple[Webhook, str]:
    """A new webhook of a key and its signing secret, which exists in clear only in this return value.

    ``private``: the setting `webhook_private`. Raises InvalidInput (URL, states), Forbidden (``all_requests`` without a
    scope that reads all, or one's own without `requests`), Conflict (too many) and KeyStoreAway.
    """
    webhook_urls.parse(url, private=private)
    if any(state not in list(RequestState) for state in states):
        raise InvalidInput("each must be one of " + ", ".join(RequestState), field="states")
    keys.require(scopes, *(keys.READS_ALL if all_requests else ("requests",)))  # else it would have nothing to tell
    _check_room(session, api_key_id)  # before there is a key that nothing would need
    webhook_id, wrapped = new_id("whk"), vault.new_key()
    secret = _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
    sealed = vault.seal(wrapped, secret.encode(), aad=_secret_aad(webhook_id))
    db.begin_write(session)
    # Two at once would both find room.
    session.execute(select(ApiKey.id).where(ApiKey.id == api_key_id).with_for_update(key_share=True))
    _check_room(session, api_key_id)
    webhook = Webhook(
        id=webhook_id,
        api_key_id=api_key_id,
        url=url,
        states=[state.value for state in RequestState if state in states],
        all_requests=all_requests,
        wrapped_key=wrapped,
        sealed_secret=sealed,
        created_at=utcnow(),
    )
    session.add(webhook)
    detail = {"states": webhook.states, "all_requests": all_requests}
    audit.append(session, actor=api_key_id, action="webhook.created", subject=webhook_id, detail=detail)
    return webhook, secret


def _check_room(session: Session, api_key_id: str) -> None:
    """Raises Conflict."""
    mine = select(func.count()).where(Webhook.api_key_id == api_key_id, Webhook.disabled_at.is_(None))
    if (session.scalar(mine) or 0) >= MAX_PER_KEY:
        raise Conflict(f"an API key has at most {MAX_PER_KEY} webhooks; disable one first", limit=MAX_PER_KEY)


def get_webhook(session: Session, webhook_id: str, *, of: str | None) -> Webhook:
    """Raises NotFound, also for another key's."""
    webhook = session.get(Webhook, webhook_id, populate_existing=True)
    if webhook is None or of not in (None, webhook.api_key_id):
        raise NotFound("no such webhook")
    return webhook


def list_webhooks(
    session: Session, *, of: str | None, limit: int, cursor: str | None = None
) -> tuple[list[Webhook], str | None]:
    """One page, newest first, disabled ones included, and the cursor of the next. Raises InvalidInput."""
    query = select(Webhook).order_by(Webhook.id.desc()).limit(limit + 1)
    if of is not None:
        query = query.where(Webhook.api_key_id == of)
    if cursor is not None:
        check_cursor(cursor, "whk_")
        query = query.where(Webhook.id < cursor)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def disable_webhook(session: Session, webhook_id: str, *, of: str | None, actor: str) -> Webhook:
    """End a webhook; what waits for it is not sent. Twice is once. Raises NotFound."""
    webhook = _lock(session, webhook_id, of)
    disable(session, webhook, actor=actor, why="asked", now=utcnow())
    return webhook


def list_deliveries(
    session: Session,
    webhook_id: str,
    *,
    of: str | None,
    limit: int,
    cursor: str | None = None,
    state: str | None = None,
) -> tuple[list[WebhookDelivery], str | None]:
    """One page of the log, newest first, and the cursor of the next. Raises NotFound, InvalidInput."""
    get_webhook(session, webhook_id, of=of)
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    if state is not None:
        if state not in list(DeliveryState):
            raise InvalidInput("state is not one of " + ", ".join(DeliveryState), field="state")
        query = query.where(WebhookDelivery.state == state)
    if cursor is not None:
        check_cursor(cursor, "dlv_")
        query = query.where(WebhookDelivery.id < cursor)
    rows = list(session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit + 1)))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def redeliver(session: Session, webhook_id: str, delivery_id: str, *, of: str | None) -> WebhookDelivery:
    """Send a message once more, now, under its old id; one that is due is left as it is.

    Or it could be used to hammer somebody: of one webhook one message at a time, and a pause after any that was sent.
    Raises NotFound, Conflict (on its way, too soon after another, or webhook disabled).
    """
    _lock_enabled(session, webhook_id, of)
    query = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.webhook_id == webhook_id)
    row = session.scalars(query.with_for_update(), execution_options={"populate_existing": True}).one_or_none()
    if row is None:
        raise NotFound("no such delivery")
    if row.state == DeliveryState.SENDING:
        raise Conflict("the message is being sent", state=row.state)
    now = utcnow()
    if row.state == DeliveryState.PENDING and row.next_at is not None and row.next_at <= now:
        return row
    due = select(WebhookDelivery.id).where(
        WebhookDelivery.webhook_id == webhook_id,
        WebhookDelivery.state == DeliveryState.PENDING,
        WebhookDelivery.next_at <= now,
    )
    if session.scalar(due.limit(1)) is not None:
        raise Conflict("another message of the webhook is due", state=row.state, retry_after=math.ceil(PAUSES[0]))
    left = _pause_left(session, webhook_id, now)
    if left > 0:
        raise Conflict("the webhook was sent a message a moment ago", state=row.state, retry_after=math.ceil(left))
    row.state, row.next_at = DeliveryState.PENDING, now
    return row


def _pause_left(session: Session, webhook_id: str, now: datetime) -> float:
    """Seconds until the webhook may be sent a message again by hand; one pause at most.

    The times are the workers'. One whose clock is ahead by more than that is not asked, or it would refuse for as long.
    """
    pause = timedelta(seconds=PAUSES[0])
    newest = select(func.max(WebhookDelivery.sent_at)).where(
        WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.sent_at <= now + pause
    )
    sent_at = session.scalar(newest)
    return 0.0 if sent_at is None else min(sent_at + pause - now, pause).total_seconds()


def ping(session: Session, webhook_id: str, *, of: str | None) -> WebhookDelivery:
    """A message that tells of nothing, to see whether it arrives. Raises NotFound, Conflict (disabled; one waits)."""
    _lock_enabled(session, webhook_id, of)
    query = select(WebhookDelivery.id).where(
        WebhookDelivery.webhook_id == webhook_id,
        WebhookDelivery.request_id.is_(None),
        WebhookDelivery.state.in_(OPEN),
    )
    if session.scalar(query.limit(1)) is not None:  # or it could be used to hammer somebody
        raise Conflict("an earlier ping is still on its way")
    now = utcnow()
    payload = {"type": PING, "timestamp": now.isoformat(), "data": {"webhook_id": webhook_id}}
    row = new_delivery(webhook_id, payload, None, now)
    session.add(row)
    session.flush()
    return row


# --- what is sent ----------------------------------------------------------------------------------------------------


def encode(payload: dict[str, Any]) -> bytes:
    """The body: the same bytes each time that a message is sent."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def open_secret(vault: Vault, webhook_id: str, wrapped_key: bytes, sealed_secret: bytes) -> str:
    """Raises VaultError."""
    return vault.open(wrapped_key, sealed_secret, aad=_secret_aad(webhook_id)).decode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of the specification: HMAC-SHA256 over ``id.timestamp.body``."""
    key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, sha256)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


def _secret_aad(webhook_id: str) -> str:
    return f"{webhook_id}:secret"


def _lock(session: Session, webhook_id: str, of: str | None) -> Webhook:
    get_webhook(session, webhook_id, of=of)
    return lock_webhook(session, webhook_id)


def _lock_enabled(session: Session, webhook_id: str, of: str | None) -> None:
    if _lock(session, webhook_id, of).disabled_at is not None:
        raise Conflict("the webhook is disabled")
