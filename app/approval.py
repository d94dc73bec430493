"""A second person's agreement: what is trained and checked waits for another API key than the one that asked.

While a request waits its texts and the finished training stay sealed under its key. Approved, it is ``pending`` again:
a worker takes up what was trained, checks it on the set as it is by then, and activates it. Nothing here commits.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import entry_facts
from app.audit_chain import iso
from app.errors import Conflict, SameKey
from app.lifecycle import CancelRequested, Claim, end_failed, hold, lock_request, move
from app.tables import AuditEntry, RequestState, UnlearnRequest, utcnow


def needed(request: UnlearnRequest, *, always: bool = False) -> bool:
    """Whether somebody else has to agree before this request comes into force, and nobody has yet.

    ``always``: the setting of whoever would put it in force, so that a request from before it was turned on waits, too.
    """
    return (request.approval_required or always) and request.approved_at is None


def await_approval(
    session: Session, claim: Claim, *, metrics: dict[str, Any], prompt_digest: str, gate_digest: str | None
) -> None:
    """The checks passed: let go of the request until it is decided on. Raises LeaseLost, CancelRequested.

    ``gate_digest``: of the gate that was checked. It is on record and not bound: the gate is fitted anew afterwards.
    An approval that there was is void: it was of another prompt than this one.
    """
    request = hold(session, claim)
    if request.cancel_requested:
        raise CancelRequested("the request was cancelled before its approval", request_id=request.id)
    request.approval_required = True  # by now, if not when it came
    request.approved_by = request.approved_at = None
    request.metrics = metrics
    detail = {"prompt_digest": prompt_digest}
    facts = {"gate_digest": gate_digest, "metrics_digest": entry_facts.json_digest(metrics)}
    move(session, request, RequestState.AWAITING_APPROVAL, actor=claim.owner, detail=detail, facts=facts)


def approved_digest(session: Session, request: UnlearnRequest) -> str | None:
    """The digest of the prompt that was approved; None while none was."""
    if request.approved_at is None:
        return None
    waited = (AuditEntry.subject == request.id, AuditEntry.action == f"request.{RequestState.AWAITING_APPROVAL.value}")
    query = select(AuditEntry.detail).where(*waited).order_by(AuditEntry.seq.desc()).limit(1)
    return str(session.scalars(query).one()["prompt_digest"])


def approve(session: Session, request_id: str, *, actor: str) -> UnlearnRequest:
    """Agree; the caller rings for a worker after the commit. Raises NotFound, SameKey, Conflict."""
    request = _undecided(session, request_id, actor)
    now = utcnow()
    request.approved_by, request.approved_at = actor[:40], now
    # What the training took is no fault of what follows; the claim's unique owner fences off whoever held it before.
    request.attempt = 0
    request.rung_at = None
    facts = {"approved_at": iso(now)}
    move(session, request, RequestState.PENDING, actor=actor, detail={"why": "approved"}, now=now, facts=facts)
    return request


def reject(session: Session, request_id: str, *, actor: str, reason: str) -> UnlearnRequest:
    """End it as failed, its texts destroyed; the reason stays on its row. Raises NotFound, SameKey, Conflict."""
    request = _undecided(session, request_id, actor)
    end_failed(session, request, actor=actor, code="rejected", detail=reason)
    return request


def _undecided(session: Session, request_id: str, actor: str) -> UnlearnRequest:
    request = lock_request(session, request_id)
    if request.api_key_id == actor:
        raise SameKey("the key that asked for this cannot decide on it: that takes another person's")
    if request.state != RequestState.AWAITING_APPROVAL:
        raise Conflict(f"the request is {request.state}, it does not wait for an approval", state=request.state)
    return request
