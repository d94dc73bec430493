"""A request's progress as it happens: parts of its page, made here and sent as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app import keys, lifecycle
from app.auth import Caller
from app.console.access import ReaderPage
from app.console.pages import fragment
from app.console.request_page import ADDRESS, all_events, view_of
from app.deps import RequestId, Service, ServiceDep
from app.errors import Unauthenticated
from app.keys import READS_ALL
from app.routes.unlearn_requests import EVENT_PAGE, POLL_SECONDS, read_events
from app.tables import RequestEvent

router = APIRouter()


@dataclass
class _Watch:
    """What one open page has been told."""

    service: Service
    caller: Caller
    request_id: str
    events: list[RequestEvent] = field(default_factory=list)

    def look(self) -> tuple[bool, str | None, str]:
        """Whether more will come; ``progress`` or ``state`` where there is news; and the parts of the page for it.

        Raises Unauthenticated once the key behind the page is revoked or expired.
        """
        with self.service.sessions() as session:
            keys.in_force(session, self.caller.key_id)
        kinds = set()
        goes_on, more = True, True
        while more:
            after = self.events[-1].id if self.events else 0
            goes_on, events = read_events(self.service, self.request_id, after)
            kinds |= {event.type for event in events}
            self.events += events
            more = len(events) == EVENT_PAGE
        if not kinds:
            return goes_on, None, ""
        kind = "state" if "state" in kinds else "progress"
        view = view_of(self.service, self.caller, self.request_id, self.events)
        return goes_on, kind, fragment("request_live.html", {**view, "state_changed": kind == "state"})


def _known(
    caller: ReaderPage,
    request_id: RequestId,
    service: ServiceDep,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> _Watch:
    """Checked before the stream starts, since after its first byte no 404 can be sent. ``after``: the page has that."""
    with service.sessions() as session:
        lifecycle.get_request(session, request_id, owner=caller.owner(*READS_ALL))
    known = [event for event in all_events(service, request_id) if event.id <= after]
    return _Watch(service, caller, request_id, known)


@router.get(ADDRESS + "/live", response_class=EventSourceResponse)
async def live(watch: Annotated[_Watch, Depends(_known)], service: ServiceDep) -> AsyncIterator[ServerSentEvent]:
    """``progress`` and ``state``, each with the parts of the page that it changes, then ``done``."""
    while not service.stopping.is_set():
        try:
            goes_on, kind, parts = await run_in_threadpool(watch.look)
        except Unauthenticated:
            return
        if kind is not None:
            yield ServerSentEvent(event=kind, raw_data=parts)
        if not goes_on:
            yield ServerSentEvent(event="done", raw_data="done")
            return
        with anyio.move_on_after(POLL_SECONDS):
            await service.stopping.wait()
