"""What states, codes and messages are called on a page."""

from __future__ import annotations

from app.tables import RequestState

STATES: dict[str, str] = {
    RequestState.PENDING: "Waiting",
    RequestState.TRAINING: "Training",
    RequestState.EVALUATING: "Being checked",
    RequestState.AWAITING_APPROVAL: "Needs approval",
    RequestState.ACTIVE: "In force",
    RequestState.SUSPENDED: "Suspended",
    RequestState.REVOKED: "Revoked",
    RequestState.FAILED: "Failed",
    RequestState.CANCELLED: "Cancelled",
}

EXPLAINED: dict[str, str] = {
    RequestState.PENDING: "It is stored, its texts sealed, and waits for a worker.",
    RequestState.TRAINING: "A soft prompt learns to answer these texts with “unknown”. The model is not touched.",
    RequestState.EVALUATING: "The prompt is checked: what it forgets, and what it does to everything else.",
    RequestState.AWAITING_APPROVAL: "Trained and checked. Another person's key has to agree to it.",
    RequestState.ACTIVE: "From now on the service answers these texts with “unknown”, on every replica.",
    RequestState.SUSPENDED: "Out of force because an earlier active set was restored. It can come back.",
    RequestState.REVOKED: "The prompt was destroyed. The service answers as it did before the request.",
    RequestState.FAILED: "It ended without coming into force. Its texts are destroyed.",
    RequestState.CANCELLED: "It was cancelled before it came into force. Its texts are destroyed.",
}

STEPS = ("pending", "training", "evaluating", "active")

REVOKE_CODES: dict[str, str] = {
    "withdrawn": "The person withdrew the request",
    "mistake": "It was asked for by mistake",
    "harm": "It does harm to other answers",
    "superseded": "Another request takes its place",
    "other": "Another reason",
}

DONE: dict[str, str] = {
    "sent": "The request is stored. It will be trained, whatever breaks meanwhile.",
    "again": "This very form had been sent before: here is the request that it made.",
    "duplicate": "A request of yours for these texts is there already: here it is. No other was made.",
    "cancelled": "The request is cancelled.",
    "cancelling": "Cancelling: the training stops at its next step.",
    "approved": "Approved. The prompt is checked once more and then comes into force.",
    "rejected": "Rejected. The request has ended and its texts are destroyed.",
    "revoked": "Revoked. The old answers are back, on every replica, and the prompt is destroyed.",
    "asked": "Asked for. The prompt stays in force until another admin's key revokes it as well.",
    "withdrawn": "The revocation that was asked for is taken back.",
    "restored": "The earlier active set is in force again, as a new version.",
}
"""After a form was carried out, by the word in ``?done=``."""

ACTIONS: dict[str, str] = {
    "request.created": "Request made",
    "request.pending": "Put back in the queue",
    "request.training": "Training began",
    "request.evaluating": "Checks began",
    "request.awaiting_approval": "Checks passed, waits for approval",
    "request.active": "Came into force",
    "request.suspended": "Suspended",
    "request.revoked": "Revoked",
    "request.failed": "Failed",
    "request.cancelled": "Cancelled",
    "request.cancel_requested": "Cancellation asked for",
    "prompt.revoked": "Prompt destroyed",
    "prompt.revoke_asked": "Revocation asked for",
    "prompt.revoke_withdrawn": "Revocation taken back",
}
