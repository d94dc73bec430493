"""Erasure requests: submit, follow, cancel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app import lifecycle
from app.auth import RequestsCaller
from app.broker import enqueue_training
from app.deps import Cursor, Limit, RequestId, Service, ServiceDep
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    Forbidden,
    InvalidInput,
    MalformedBody,
    NotFound,
    Overloaded,
    Unauthenticated,
)
from app.lifecycle import ForgetText
from app.limits import check_count, check_texts
from app.problems import UnsupportedMediaType, problems
from app.schemas import UnlearnRequestIn, UnlearnRequestOut, UnlearnRequestPage
from app.tables import LIVE, RequestEvent, RequestState

router = APIRouter(tags=["unlearn requests"], responses=problems(Unauthenticated, Forbidden, InvalidInput))

POLL_SECONDS = 0.5
EVENT_PAGE = 500
# An active request has nothing left to report; that it may be revoked later is no progress.
_GOES_ON = frozenset(LIVE) - {RequestState.ACTIVE}


@router.post(
    "/unlearn-requests",
    status_code=202,
    response_model=UnlearnRequestOut,
    responses={
        202: {"headers": {"Location": {"description": "The request's address.", "schema": {"type": "string"}}}},
        **problems(MalformedBody, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType),
    },
)
def create_unlearn_request(
    body: UnlearnRequestIn, caller: RequestsCaller, service: ServiceDep, response: Response
) -> Any:
    """Ask to forget texts. 202: the request is stored and will be trained, whatever breaks meanwhile."""
    check_count("forget_texts", len(body.forget_texts), service.settings.max_forget_texts)
    check_texts(
        service.serving,
        [(f"forget_texts[{i}].text", item.text) for i, item in enumerate(body.forget_texts)],
        labels=[(f"forget_texts[{i}].label", item.label) for i, item in enumerate(body.forget_texts)],
    )
    texts = list(dict.fromkeys(ForgetText(item.text, item.label) for item in body.forget_texts))
    with service.sessions.begin() as session:
        row = lifecycle.create_request(
            session,
            service.vault,
            texts=texts,
            reason=body.reason,
            options=body.options.model_dump(exclude_none=True) if body.options else {},
            fingerprint=service.serving.llm.fingerprint,
            api_key_id=caller.key_id,
        )
    # Committed. A broker that is down costs seconds, not the request: the worker's reaper rings again.
    enqueue_training(service.celery, row.id, expires=service.settings.ring_seconds)
    response.headers["Location"] = f"/unlearn-requests/{row.id}"
    return row


@router.get("/unlearn-requests", response_model=UnlearnRequestPage)
def list_unlearn_requests(
    caller: RequestsCaller,
    service: ServiceDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[RequestState | None, Query()] = None,
) -> Any:
    """Requests, newest first."""
    with service.sessions() as session:
        items, next_cursor = lifecycle.list_requests(session, limit=limit, cursor=cursor, state=state)
    return {"items": items, "next_cursor": next_cursor}


@router.get("/unlearn-requests/{request_id}", response_model=UnlearnRequestOut, responses=problems(NotFound))
def get_unlearn_request(caller: RequestsCaller, request_id: RequestId, service: ServiceDep) -> Any:
    """State, progress, metrics and, if it failed, why."""
    with service.sessions() as session:
        return lifecycle.get_request(session, request_id)


@router.post(
    "/unlearn-requests/{request_id}/cancel", response_model=UnlearnRequestOut, responses=problems(NotFound, Conflict)
)
def cancel_unlearn_request(caller: RequestsCaller, request_id: RequestId, service: ServiceDep) -> Any:
    """Cancel. A waiting request ends at once; a running one stops at its next step (`cancel_requested`)."""
    with service.sessions.begin() as session:
        return lifecycle.request_cancel(session, request_id, actor=caller.key_id)


def _known_request(caller: RequestsCaller, request_id: RequestId, service: ServiceDep) -> str:
    """Checked before the stream starts, since after its first byte no 404 can be sent."""
    with service.sessions() as session:
        return lifecycle.get_request(session, request_id).id


@router.get("/unlearn-requests/{request_id}/events", response_class=EventSourceResponse, responses=problems(NotFound))
async def stream_unlearn_request_events(
    request_id: Annotated[str, Depends(_known_request)],
    service: ServiceDep,
    last_event_id: Annotated[
        int | None, Header(alias="Last-Event-ID", ge=0, le=2**63 - 1, description="Resume behind this event.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events `state` and `progress` from the start or behind `Last-Event-ID`.

    The stream ends when the request is active or has ended. A comment is sent every 15 seconds of silence.
    """
    after = last_event_id or 0
    while not service.stopping.is_set():
        goes_on, events = await run_in_threadpool(_read_events, service, request_id, after)
        for event in events:
            after = event.id
            data = {"at": event.at.isoformat(), **event.data}
            yield ServerSentEvent(event=event.type, id=str(event.id), data=data)
        if len(events) == EVENT_PAGE:
            continue
        if not goes_on:
            return
        with anyio.move_on_after(POLL_SECONDS):
            await service.stopping.wait()


def _read_events(service: Service, request_id: str, after: int) -> tuple[bool, list[RequestEvent]]:
    # The state first: its event is committed with it, so a final state seen here has its event in the list.
    with service.sessions() as session:
        goes_on = lifecycle.get_request(session, request_id).state in _GOES_ON
        return goes_on, lifecycle.list_events(session, request_id, after=after, limit=EVENT_PAGE)
