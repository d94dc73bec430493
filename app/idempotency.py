"""What is asked twice: the same call (``Idempotency-Key``), and the same forget set by the same API key.

Both look before they write, in one transaction with what they guard, so nothing is left of a call that broke off. Who
comes second at the same moment: on PostgreSQL an advisory lock tells that the first call is still under way; on SQLite,
where one transaction writes at a time, the second waits and then finds what the first has made.

Nothing is found across API keys: an answer that a set is known already would tell who else asked to forget it.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.orm import Session

from app import db
from app.errors import IdempotencyInFlight, IdempotencyMismatch
from app.lifecycle import ForgetText, get_request
from app.tables import LIVE, IdempotencyKey, UnlearnRequest, utcnow
from app.terms import Terms
from app.vault import Vault


@dataclass(frozen=True)
class Call:
    """A call that came with a key. Its digests are keyed, and differ between API keys."""

    api_key_id: str
    digest: bytes
    body_digest: bytes


def name_call(vault: Vault, *, api_key_id: str, key: str, body: dict[str, Any]) -> Call:
    """``body``: as it was parsed, so that whitespace, order of names and fields left out do not matter."""
    digest = vault.tag("idempotency key", f"{api_key_id} {key}".encode())
    return Call(api_key_id, digest, vault.tag("idempotency body", digest + _canonical(body)))


def first_answer(session: Session, call: Call) -> tuple[UnlearnRequest, bool] | None:
    """The request that this call led to before, and whether that one had been there already. None: it is the first.

    Until the transaction ends nobody else is the first. Raises IdempotencyInFlight, IdempotencyMismatch.
    """
    db.begin_write(session)
    if _is_postgres(session):
        free = session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _lock_key(call.digest)})
        if not free:
            raise IdempotencyInFlight("the first call with this Idempotency-Key is still under way", retry_after=1)
    row = session.get(IdempotencyKey, (call.api_key_id, call.digest), populate_existing=True)
    if row is None:
        return None
    if not hmac.compare_digest(row.body_digest, call.body_digest):
        raise IdempotencyMismatch("this Idempotency-Key came with another body before; a new request needs a new key")
    request = get_request(session, row.request_id)
    return request, request.created_at != row.created_at  # what a call has made is of the same moment as its row


def remember(session: Session, call: Call, request: UnlearnRequest, *, now: datetime) -> None:
    """``now``: the request's ``created_at``, where this call has made it."""
    session.add(
        IdempotencyKey(
            api_key_id=call.api_key_id,
            digest=call.digest,
            body_digest=call.body_digest,
            request_id=request.id,
            created_at=now,
        )
    )
    session.flush()


def forget_old(session: Session, *, hours: float, now: datetime | None = None) -> int:
    """Delete the keys that are older; how many they were."""
    old = IdempotencyKey.created_at < (now or utcnow()) - timedelta(hours=hours)
    if session.scalar(select(IdempotencyKey.request_id).where(old).limit(1)) is None:
        return 0  # the usual case takes no lock
    gone = session.scalars(
        delete(IdempotencyKey)
        .where(old)
        .returning(IdempotencyKey.request_id)
        .execution_options(synchronize_session=False)
    )
    return len(gone.all())


def set_digest(
    vault: Vault,
    *,
    api_key_id: str,
    texts: Sequence[ForgetText],
    options: dict[str, Any],
    fingerprint: str,
    terms: Terms,
) -> bytes:
    """Of what makes two requests of one API key the same. Texts count as in ``vault.digest``, in no order."""
    members = sorted({json.dumps([vault.digest(item.text).hex(), item.label]) for item in texts})
    expires_at = None if terms.expires_at is None else terms.expires_at.isoformat()
    content = [api_key_id, members, options, fingerprint, terms.approval_required, expires_at]
    return vault.tag("forget set", _canonical(content))


def find_live(session: Session, *, api_key_id: str, digest: bytes) -> UnlearnRequest | None:
    """The API key's request for this very set that waits, trains or is active; not one that is being cancelled.

    Whoever asks for the same set waits here until this transaction ends.
    """
    db.begin_write(session)
    if _is_postgres(session):
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(digest)})
    query = (
        select(UnlearnRequest)
        .where(
            UnlearnRequest.api_key_id == api_key_id,
            UnlearnRequest.set_digest == digest,
            UnlearnRequest.state.in_(LIVE),
            UnlearnRequest.cancel_requested.is_(False),
        )
        .order_by(UnlearnRequest.id.desc())
        .limit(1)
    )
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _is_postgres(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"


def _lock_key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)
