"""A second person's word on a request that is trained and checked."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app import approval
from app.auth import ApproverCaller
from app.broker import enqueue_training
from app.deps import RequestId, ServiceDep
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    Forbidden,
    InvalidInput,
    MalformedBody,
    NotFound,
    Overloaded,
    RateLimited,
    SameKey,
    Unauthenticated,
)
from app.failpoints import failpoint
from app.problems import UnsupportedMediaType, problems
from app.schemas import RejectIn, UnlearnRequestOut

router = APIRouter(
    tags=["unlearn requests"], responses=problems(Unauthenticated, Forbidden, SameKey, InvalidInput, RateLimited)
)


@router.post(
    "/unlearn-requests/{request_id}/approve", response_model=UnlearnRequestOut, responses=problems(NotFound, Conflict)
)
def approve_unlearn_request(caller: ApproverCaller, request_id: RequestId, service: ServiceDep) -> Any:
    """Agree that a request which is `awaiting_approval` comes into force, with another key than the one that asked.

    The prompt that waits is checked once more, on the active set as it is by then, and activated.
    """
    with service.sessions.begin() as session:
        row = approval.approve(session, request_id, actor=caller.key_id)
        failpoint("approve.before_commit")
    failpoint("approve.after_commit")
    enqueue_training(service.celery, row.id, expires=service.settings.ring_seconds)
    return row


@router.post(
    "/unlearn-requests/{request_id}/reject",
    response_model=UnlearnRequestOut,
    responses=problems(MalformedBody, NotFound, Conflict, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType),
)
def reject_unlearn_request(caller: ApproverCaller, request_id: RequestId, body: RejectIn, service: ServiceDep) -> Any:
    """End a request that is `awaiting_approval` as `failed` with the code `rejected`; its texts are destroyed."""
    with service.sessions.begin() as session:
        row = approval.reject(session, request_id, actor=caller.key_id, reason=body.reason)
        failpoint("reject.before_commit")
    failpoint("reject.after_commit")
    return row
