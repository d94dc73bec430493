"""What the states of a request are called wherever people read them: on pages and in reports."""

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
