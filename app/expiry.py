"""Requests that run out: what is in force is revoked, what is not yet fails. Nothing here commits."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import active_set
from app.errors import Conflict
from app.lifecycle import end_failed, lock_request
from app.tables import RUNNING, Prompt, RequestState, UnlearnRequest, utcnow

CODE = "expired"
_BEFORE = (RequestState.PENDING, *RUNNING, RequestState.AWAITING_APPROVAL)
_AFTER = (RequestState.ACTIVE, RequestState.SUSPENDED)


def due(session: Session, now: datetime | None = None) -> list[str]:
    """Requests whose ``expires_at`` has passed, the one that expired first in front."""
    query = (
        select(UnlearnRequest.id)
        .where(
            UnlearnRequest.state.in_((*_BEFORE, *_AFTER)),
            UnlearnRequest.expires_at <= (now or utcnow()),
            UnlearnRequest.cancel_requested.is_(False),  # that ends it, too, and is what its client asked for last
        )
        .order_by(UnlearnRequest.expires_at, UnlearnRequest.id)
    )
    return list(session.scalars(query))


def expire(session: Session, request_id: str, now: datetime | None = None) -> bool:
    """End one that is due; False when somebody else did, when it has just become active and its turn comes again, and
    when it is not due: a clock may have been set back since it was found.

    A transaction for each: the active set is locked for one revocation, and several workers may do this at once. No
    second person is asked: the end was part of what was asked for. Raises NotReady.
    """
    end = session.scalar(select(UnlearnRequest.expires_at).where(UnlearnRequest.id == request_id))  # never changes
    if end is None or end > (now or utcnow()):
        return False
    prompt_id = session.scalar(select(Prompt.id).where(Prompt.request_id == request_id))
    if prompt_id is not None:
        try:
            active_set.revoke_prompt(session, prompt_id, actor="system", code=CODE, reason=None)
        except Conflict:
            return False
        return True
    request = lock_request(session, request_id)
    if request.state not in _BEFORE or request.cancel_requested:
        return False
    # Its worker, if it has one, is fenced off: whatever it writes next raises LeaseLost.
    end_failed(session, request, actor="system", code=CODE, detail="it expired before it was active")
    return True
