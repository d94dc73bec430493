"""All requests, a page at a time."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app import lifecycle
from app.console.access import ReaderPage
from app.console.pages import render
from app.console.words import STATES
from app.deps import RequestCursor, ServiceDep
from app.keys import READS_ALL
from app.tables import OPEN, RequestState, utcnow

router = APIRouter()

PAGE = 50
FILTERS: dict[str, tuple[str, tuple[RequestState, ...]]] = {
    "all": ("All", ()),
    "open": ("Open", OPEN),
    "awaiting_approval": ("Need approval", (RequestState.AWAITING_APPROVAL,)),
    "active": ("In force", (RequestState.ACTIVE,)),
    "suspended": ("Suspended", (RequestState.SUSPENDED,)),
    "revoked": ("Revoked", (RequestState.REVOKED,)),
    "failed": ("Failed", (RequestState.FAILED,)),
    "cancelled": ("Cancelled", (RequestState.CANCELLED,)),
}


SHOWS = {states[0].value: name for name, (_, states) in FILTERS.items() if len(states) == 1} | {
    state.value: "open" for state in OPEN if state != RequestState.AWAITING_APPROVAL
}
"""Which choice shows a state."""


@router.get("/console/requests")
def requests_page(
    request: Request,
    caller: ReaderPage,
    service: ServiceDep,
    show: Annotated[str, Query(pattern=f"^({'|'.join(FILTERS)})$")] = "all",
    cursor: RequestCursor = None,
) -> Any:
    """Newest first: one query of a page's rows and one more, whatever there is behind it."""
    owner = caller.owner(*READS_ALL)
    with service.sessions() as session:
        rows, following = lifecycle.list_requests(
            session, limit=PAGE, cursor=cursor, states=FILTERS[show][1], owner=owner
        )
    return render(
        request.scope,
        "requests.html",
        caller=caller,
        rows=rows,
        following=following,
        first=cursor is None,
        show=show,
        filters=[(name, title) for name, (title, _) in FILTERS.items()],
        everybody=owner is None,
        words=STATES,
        open_states=OPEN,
        now=utcnow(),
    )
