"""The requests that one may see, narrowed and a page at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy.orm import Session

from app import lifecycle, request_filters
from app.console.access import ReaderPage
from app.console.pages import render
from app.deps import RequestCursor, ServiceDep
from app.keys import READS_ALL
from app.request_filters import ID_PREFIX, RequestFilter
from app.tables import OPEN, RequestState, UnlearnRequest, utcnow
from app.words import STATES

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

DUE: dict[str, tuple[str, int | None]] = {
    "": ("Any time", None),
    "0": ("Overdue", 0),
    "3": ("Within 3 days, or overdue", 3),
    "7": ("Within 7 days, or overdue", 7),
    "30": ("Within 30 days, or overdue", 30),
}
_DAY = r"^(\d{4}-\d\d-\d\d)?$"


@dataclass(frozen=True)
class Asked:
    """What the form holds, as it was sent. ``first`` and ``last``: days on which persons asked, both included."""

    show: str
    id: str
    key: str
    first: str
    last: str
    due: str

    def query(self, **changes: str | None) -> str:
        """The same as the end of an address, with ``changes``; what is not given is left out."""
        values = {
            "show": "" if self.show == "all" else self.show,
            "id": self.id,
            "key": self.key,
            "from": self.first,
            "to": self.last,
            "due": self.due,
            **changes,
        }
        found = urlencode({name: value for name, value in values.items() if value})
        return f"?{found}" if found else ""

    @property
    def alone(self) -> Asked:
        """The state and nothing else."""
        return Asked(self.show, "", "", "", "", "")

    @property
    def narrowed(self) -> bool:
        """By more than the state."""
        return any((self.id, self.key, self.first, self.last, self.due))


async def _asked(
    show: Annotated[str, Query(pattern=f"^({'|'.join(FILTERS)})$")] = "all",
    request_id: Annotated[str, Query(alias="id", max_length=100)] = "",
    key: Annotated[str, Query(max_length=100)] = "",
    first: Annotated[str, Query(alias="from", pattern=_DAY)] = "",
    last: Annotated[str, Query(alias="to", pattern=_DAY)] = "",
    due: Annotated[str, Query(pattern=f"^({'|'.join(DUE)})$")] = "",
) -> Asked:
    return Asked(show, request_id.strip(), key.strip(), first, last, due)


@router.get("/console/requests")
def requests_page(
    request: Request,
    caller: ReaderPage,
    service: ServiceDep,
    asked: Annotated[Asked, Depends(_asked)],
    cursor: RequestCursor = None,
) -> Any:
    """Newest first: one query of a page's rows and one more, whatever there is behind it."""
    owner = caller.owner(*READS_ALL)
    rows: list[UnlearnRequest] = []
    following, names = None, dict[str, str]()
    with service.sessions() as session:
        where, wrong = _where(session, asked, everybody=owner is None)
        if where is not None:
            rows, following = lifecycle.list_requests(session, limit=PAGE, cursor=cursor, where=where, owner=owner)
        if owner is None:
            names = request_filters.key_names(session, sorted({row.api_key_id for row in rows if row.api_key_id}))
    return render(
        request.scope,
        "requests.html",
        caller=caller,
        status=200 if wrong is None else 422,
        rows=rows,
        names=names,
        older=f"console/requests{asked.query(cursor=following)}" if following else None,
        newest=f"console/requests{asked.query()}",
        clear=f"console/requests{asked.alone.query()}",
        first=cursor is None,
        asked=asked,
        wrong=wrong,
        filters=[
            (f"console/requests{asked.query(show='' if name == 'all' else name)}", title, name == asked.show)
            for name, (title, _) in FILTERS.items()
        ],
        due_choices=[(value, title) for value, (title, _) in DUE.items()],
        everybody=owner is None,
        words=STATES,
        open_states=OPEN,
        now=utcnow(),
    )


def _where(session: Session, asked: Asked, *, everybody: bool) -> tuple[RequestFilter | None, str | None]:
    """What to look for; or None, and what is wrong with what was given."""
    prefix = None
    if asked.id:
        prefix = asked.id.lower() if asked.id.lower().startswith("req_") else f"req_{asked.id.lower()}"
        if not re.fullmatch(ID_PREFIX, prefix):
            return None, "An id begins with req_ and goes on with digits and the letters a to f"
    keys = None
    if asked.key:
        if not everybody:
            return None, "This key sees what it has asked for itself, so it cannot look for others"
        keys = request_filters.keys_called(session, asked.key) if asked.key.isprintable() else []
    try:
        first = _midnight(asked.first)
        last = _midnight(asked.last)
        behind = None if last is None else last + timedelta(days=1)
    except (ValueError, OverflowError):
        return None, "There is no such day"
    days = DUE[asked.due][1]
    return (
        RequestFilter(
            states=FILTERS[asked.show][1],
            id_prefix=prefix,
            keys=keys,
            received_from=first,
            received_before=behind,
            due_before=None if days is None else utcnow() + timedelta(days=days),
        ),
        None,
    )


def _midnight(day: str) -> datetime | None:
    """The beginning of a day, UTC. Raises ValueError."""
    return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC) if day else None
