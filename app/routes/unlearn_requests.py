"""Erasure requests: submit, follow, cancel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from app import keys, lifecycle, receipts
from app.audit_chain import AuditBroken
from app.audit_schemas import SignedReceipt
from app.auth import Caller, CancellingCaller, ReaderCaller, RequestsCaller
from app.deps import Limit, RequestCursor, RequestId, Service, ServiceDep
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidInput,
    KeyStoreAway,
    MalformedBody,
    NotFound,
    NotReady,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    Unauthenticated,
)
from app.failpoints import failpoint
from app.keys import READS_ALL
from app.problems import UnsupportedMediaType, problems
from app.request_filters import ID_PREFIX, RequestFilter
from app.schemas import UnlearnRequestIn, UnlearnRequestOut, UnlearnRequestPage, UtcMoment
from app.schemas_dry_run import DryRunOut
from app.signing import canonical
from app.submission import check_body, rehearse, submit
from app.tables import LIVE, RequestEvent, RequestState

router = APIRouter(tags=["unlearn requests"], responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited))

POLL_SECONDS = 0.5
EVENT_PAGE = 500
GOES_ON = frozenset(LIVE) - {RequestState.ACTIVE}
"""States of a request that has something left to report; that an active one may be revoked later is no progress."""


_TRUE = {"description": "`true`, or absent.", "schema": {"type": "string"}}
_HEADERS = {
    "Location": {"description": "The request's address.", "schema": {"type": "string"}},
    "Idempotency-Replayed": _TRUE,
}


def _visible(key: str) -> str:
    if not 1 <= len(key) <= 255 or not all("!" <= character <= "~" for character in key):
        raise PydanticCustomError("idempotency_key", "must have 1 to 255 visible ASCII characters")
    return key


IdempotencyKey = Annotated[
    Annotated[str, WithJsonSchema({"type": "string", "pattern": "^[!-~]{1,255}$"})] | None,
    AfterValidator(lambda key: None if key is None else _visible(key)),
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible ASCII characters of the client's choice, new for every request. The same call "
        "with the same key leads to the same request (`Idempotency-Replayed: true`), for 24 hours by default.",
    ),
]


@router.post(
    "/unlearn-requests",
    status_code=202,
    response_model=UnlearnRequestOut,
    responses={
        202: {"headers": _HEADERS},
        200: {
            "model": UnlearnRequestOut | DryRunOut,
            "description": "This API key's request for the same texts is live: here it is, and no other was made. "
            "Or, with `dry_run`, what the request would do; nothing is stored.",
            "headers": {**_HEADERS, "Letheon-Duplicate": _TRUE},
        },
        **problems(
            MalformedBody,
            BodyTimeout,
            BodyTooLarge,
            Overloaded,
            DeadlineExceeded,
            NotReady,
            KeyStoreAway,
            UnsupportedMediaType,
            InvalidInput,
            IdempotencyMismatch,
            IdempotencyInFlight,
            RateLimited,
            QuotaExceeded,
        ),
    },
)
def create_unlearn_request(
    body: UnlearnRequestIn,
    caller: RequestsCaller,
    service: ServiceDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="Report what the request would do, and store nothing.")] = False,
) -> Any:
    """Ask to forget texts. 202: the request is stored and will be trained, whatever breaks meanwhile.

    200 with `Letheon-Duplicate: true`: this API key has a live request for the same texts, labels, options, approval
    and expiry, and here it is.
    """
    check_body(service, body)
    if dry_run:
        return JSONResponse(rehearse(service, caller, body).model_dump(mode="json"))
    made = submit(service, caller, body, idempotency_key=idempotency_key)
    response.headers["Location"] = f"/unlearn-requests/{made.request.id}"
    if made.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    if made.duplicate:
        response.status_code = 200
        response.headers["Letheon-Duplicate"] = "true"
    return made.request


async def _filter(
    id_prefix: Annotated[str | None, Query(pattern=ID_PREFIX, description="Ids that begin so.")] = None,
    api_key_id: Annotated[
        str | None,
        Query(pattern=r"^key_[0-9a-f]{16}$", description="Asked by this key. Others than yours for who reads all."),
    ] = None,
    received_from: Annotated[UtcMoment | None, Query(description="The person asked then or later.")] = None,
    received_before: Annotated[UtcMoment | None, Query(description="The person asked before that.")] = None,
    due_before: Annotated[
        UtcMoment | None, Query(description="Neither in force nor over, and due before that: of now, what is overdue.")
    ] = None,
) -> RequestFilter:
    return RequestFilter(
        id_prefix=id_prefix,
        keys=None if api_key_id is None else (api_key_id,),
        received_from=received_from,
        received_before=received_before,
        due_before=due_before,
    )


@router.get("/unlearn-requests", response_model=UnlearnRequestPage)
def list_unlearn_requests(
    caller: ReaderCaller,
    service: ServiceDep,
    where: Annotated[RequestFilter, Depends(_filter)],
    limit: Limit = 50,
    cursor: RequestCursor = None,
    state: Annotated[RequestState | None, Query()] = None,
) -> Any:
    """Requests, newest first: the key's own, or all with `admin`, `auditor` or `approve`.

    All that is given must hold.
    """
    owner = caller.owner(*READS_ALL)
    with service.sessions() as session:
        items, next_cursor = lifecycle.list_requests(
            session, limit=limit, cursor=cursor, state=state, where=where, owner=owner
        )
    return {"items": items, "next_cursor": next_cursor}


@router.get("/unlearn-requests/{request_id}", response_model=UnlearnRequestOut, responses=problems(NotFound))
def get_unlearn_request(caller: ReaderCaller, request_id: RequestId, service: ServiceDep) -> Any:
    """State, progress, metrics and, if it failed, why. 404 for another key's, unless with a scope that reads all."""
    with service.sessions() as session:
        return lifecycle.get_request(session, request_id, owner=caller.owner(*READS_ALL))


@router.get(
    "/unlearn-requests/{request_id}/receipt",
    response_model=SignedReceipt,
    responses=problems(NotFound, Conflict, AuditBroken, KeyStoreAway),
)
def get_receipt(caller: ReaderCaller, request_id: RequestId, service: ServiceDep) -> Response:
    """What was done about a request, signed: the same bytes as long as nothing happens to it. 409 while it is open."""
    document = receipts.build(service.sessions, service.vault, request_id, owner=caller.owner(*READS_ALL))
    return Response(canonical(document), media_type="application/json")


@router.post(
    "/unlearn-requests/{request_id}/cancel", response_model=UnlearnRequestOut, responses=problems(NotFound, Conflict)
)
def cancel_unlearn_request(caller: CancellingCaller, request_id: RequestId, service: ServiceDep) -> Any:
    """Cancel the key's own request, or any with `admin`.

    A waiting request ends at once; a running one stops at its next step (`cancel_requested`).
    """
    with service.sessions.begin() as session:
        row = lifecycle.request_cancel(session, request_id, actor=caller.key_id, owner=caller.owner("admin"))
        failpoint("request_cancel.before_commit")
    failpoint("request_cancel.after_commit")
    return row


@dataclass(frozen=True)
class _Followed:
    """A request whose events somebody reads for as long as its key may."""

    service: Service
    key_id: str
    request_id: str

    def look(self, after: int) -> tuple[bool, list[RequestEvent]]:
        """As ``read_events``. Raises Unauthenticated, Forbidden or NotFound once the key could not ask any more."""
        with self.service.sessions() as session:
            key = keys.in_force(session, self.key_id)
            caller = Caller(key.id, frozenset(key.scopes), key.limits or {})
            caller.require_any(("requests", *READS_ALL))
            lifecycle.get_state(session, self.request_id, owner=caller.owner(*READS_ALL))
        return read_events(self.service, self.request_id, after)


async def a_stream(caller: ReaderCaller, service: ServiceDep) -> AsyncIterator[None]:
    """A place for as long as the answer takes, also where its client vanishes. Raises RateLimited."""
    with service.streams.one(caller.key_id):
        yield


def followed(caller: ReaderCaller, request_id: RequestId, service: ServiceDep) -> _Followed:
    """Checked before the stream starts, since after its first byte no 404 can be sent."""
    with service.sessions() as session:
        lifecycle.get_state(session, request_id, owner=caller.owner(*READS_ALL))
    return _Followed(service, caller.key_id, request_id)


@router.get(
    "/unlearn-requests/{request_id}/events",
    response_class=EventSourceResponse,
    responses=problems(NotFound),
    dependencies=[Depends(a_stream)],
)
async def stream_unlearn_request_events(
    request: Annotated[_Followed, Depends(followed)],
    service: ServiceDep,
    last_event_id: Annotated[
        int | None, Header(alias="Last-Event-ID", ge=0, le=2**63 - 1, description="Resume behind this event.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events `state` and `progress` from the start or behind `Last-Event-ID`.

    The stream ends when the request is active or has ended, and when the API key is revoked, expires or may no longer
    see the request. A comment is sent every 15 seconds of silence. 429 while the key has as many open as it may.
    """
    after = last_event_id or 0
    while not service.stopping.is_set():
        try:
            goes_on, events = await run_in_threadpool(request.look, after)
        except (Unauthenticated, Forbidden, NotFound):
            return
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


def read_events(service: Service, request_id: str, after: int) -> tuple[bool, list[RequestEvent]]:
    """A page of events, and whether more will come."""
    # The state first: its event is committed with it, so a final state seen here has its event in the list.
    with service.sessions() as session:
        goes_on = lifecycle.get_state(session, request_id) in GOES_ON
        return goes_on, lifecycle.list_events(session, request_id, after=after, limit=EVENT_PAGE)
