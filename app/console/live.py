"""A request's progress as it happens: parts of its page, made here and sent as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app import lifecycle
from app.auth import Caller
from app.console import session as cookie
from app.console.access import ReaderPage, login_of
from app.console.pages import fragment
from app.console.request_page import ADDRESS, all_events, pictures_of, view_of
from app.deps import RequestId, Service, ServiceDep
from app.errors import Unauthenticated
from app.event_streams import RETRY_SECONDS
from app.keys import READS_ALL
from app.routes.unlearn_requests import EVENT_PAGE, POLL_SECONDS, read_events
from app.tables import RequestEvent

router = APIRouter()


@dataclass
class _Watch:
    """What one open page has been told."""

    service: Service
    caller: Caller
    login: cookie.Login
    request_id: str
    after: int = 0  # the newest event of which it has been told
    events: list[RequestEvent] = field(default_factory=list)  # once there is news: all

    def look(self) -> tuple[bool, str | None, str]:
        """Whether more will come; ``progress`` or ``state`` where there is news; and the parts of the page for it.

        Raises Unauthenticated once the key behind the page is revoked or expired, or its session was logged out of.
        """
        with self.service.sessions() as session:
            cookie.key_of(session, self.login)
        known, news = self.after, list[RequestEvent]()
        goes_on, more = True, True
        while more:
            goes_on, events = read_events(self.service, self.request_id, news[-1].id if news else known)
            news += events
            more = len(events) == EVENT_PAGE
        if not news:
            return goes_on, None, ""
        if known and not self.events:  # for news only: a page without a place asks every few seconds
            self.events = [event for event in all_events(self.service, self.request_id) if event.id <= known]
        self.events += news
        self.after = news[-1].id
        kinds = {event.type for event in news}
        kind = "state" if "state" in kinds else "progress"
        view = view_of(self.service, self.caller, self.request_id, self.events)
        if kind == "state":  # evidence is committed with the state that it comes with
            view |= pictures_of(self.service, self.request_id)
        return goes_on, kind, fragment("request_live.html", {**view, "state_changed": kind == "state"})


def _known(
    request: Request,
    caller: ReaderPage,
    request_id: RequestId,
    service: ServiceDep,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
    last_event_id: Annotated[int | None, Header(alias="Last-Event-ID", ge=0, le=2**63 - 1)] = None,
) -> _Watch:
    """Checked before the stream starts, since after its first byte no 404 can be sent.

    ``after``: the page was made with that. ``last_event_id``: a stream before this one told it that.
    """
    with service.sessions() as session:
        lifecycle.get_request(session, request_id, owner=caller.owner(*READS_ALL))
    return _Watch(service, caller, login_of(request.scope), request_id, max(after, last_event_id or 0))


async def _place(caller: ReaderPage, service: ServiceDep) -> AsyncIterator[bool]:
    """Whether there is a place for one more stream of this key; it is taken until the answer ends."""
    with nullcontext() if (full := service.streams.full(caller.key_id)) else service.streams.one(caller.key_id):
        yield not full


@router.get(ADDRESS + "/live", response_class=EventSourceResponse)
async def live(
    watch: Annotated[_Watch, Depends(_known)], stays: Annotated[bool, Depends(_place)], service: ServiceDep
) -> AsyncIterator[ServerSentEvent]:
    """``progress`` and ``state``, each with the parts of the page that it changes, then ``done``.

    Each says as its id how far the page then is, so that one that asks again gets what it does not have. Where the key
    has as many streams open as it may, it is told what there is and asks again a little later.
    """
    while not service.stopping.is_set():
        try:
            goes_on, kind, parts = await run_in_threadpool(watch.look)
        except Unauthenticated:
            return
        if kind is not None:
            yield ServerSentEvent(event=kind, id=str(watch.after), raw_data=parts)
        if not goes_on:
            yield ServerSentEvent(event="done", raw_data="done")
            return
        if not stays:
            yield ServerSentEvent(retry=1000 * RETRY_SECONDS)
            return
        with anyio.move_on_after(POLL_SECONDS):
            await service.stopping.wait()
