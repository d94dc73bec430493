"""What codes, actions and messages are called on a page; states are in ``app.words``."""

from __future__ import annotations

from app.tables import RequestState

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

REVOKED_BECAUSE: dict[str, str] = {
    **REVOKE_CODES,
    "expired": "Its end had come",
    "reconciled": "It had been revoked before the backup that this database was restored from",
}
"""Every code that a revocation may have: nobody chooses the last two."""

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
    "request.shredded": "Key to its texts destroyed",
    "prompt.exported": "Prompt exported",
    "prompt.imported": "Prompt imported",
    "active_set.restored": "Earlier active set restored",
    "key.created": "API key made",
    "key.revoked": "API key revoked",
    "signing_key.created": "Signing key made",
    "vault.rotated": "Master key changed",
    "webhook.created": "Webhook made",
    "webhook.disabled": "Webhook switched off",
}
"""Of entries of the audit log."""
