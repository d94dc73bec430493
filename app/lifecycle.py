"""The life of an erasure request: its states, the transitions between them, and what each one leaves behind.

Every function takes a session and never commits. A transition is one row change, one event and one audit entry in the
caller's transaction; the forget texts, their checkpoint and the key that opens both go when the request ends.

Rows are locked first, the audit chain last, and the chain's lock is global until the commit. So a transaction makes one
transition (or, like the reaper, locks all its rows first); one that goes on to lock rows after an entry may deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session, defer

from app import audit, db, entry_facts, evidence, shredding, webhook_queue
from app.audit_chain import iso
from app.errors import Conflict, InvalidInput, LeaseLost, NotFound
from app.request_filters import EVERYTHING, RequestFilter
from app.tables import (
    RUNNING,
    Checkpoint,
    ForgetDigest,
    RequestEvent,
    RequestState,
    UnlearnRequest,
    new_id,
    utcnow,
)
from app.terms import Terms
from app.vault import Vault

TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.PENDING: frozenset({RequestState.TRAINING, RequestState.CANCELLED, RequestState.FAILED}),
    RequestState.TRAINING: frozenset(
        {
            RequestState.TRAINING,  # another worker takes over after the lease expired
            RequestState.EVALUATING,
            RequestState.PENDING,
            RequestState.FAILED,
            RequestState.CANCELLED,
        }
    ),
    RequestState.EVALUATING: frozenset(
        {
            RequestState.TRAINING,  # the checks failed and another try follows; or taken over, from the checkpoint
            RequestState.AWAITING_APPROVAL,
            RequestState.ACTIVE,
            RequestState.PENDING,
            RequestState.FAILED,
            RequestState.CANCELLED,
        }
    ),
    RequestState.AWAITING_APPROVAL: frozenset({RequestState.PENDING, RequestState.FAILED, RequestState.CANCELLED}),
    RequestState.ACTIVE: frozenset({RequestState.SUSPENDED, RequestState.REVOKED}),
    RequestState.SUSPENDED: frozenset({RequestState.ACTIVE, RequestState.REVOKED}),
    RequestState.REVOKED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.CANCELLED: frozenset(),
}
ENDS_TRAINING = frozenset({RequestState.ACTIVE, RequestState.FAILED, RequestState.CANCELLED})
"""Reaching one of these destroys the forget texts, or sets the time for it."""


class CancelRequested(Conflict):
    """The client cancelled before activation; the holder has to call ``finish_cancelled``."""


@dataclass(frozen=True)
class ForgetText:
    """One text to forget and, if the client knows it, the label the model gives it."""

    text: str
    label: str | None = None

    def __repr__(self) -> str:  # a forget text must not reach a log through a repr
        return "ForgetText(…)"


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a request. ``owner`` is unique to the claim, so no earlier holder can pass for it."""

    request_id: str
    attempt: int
    owner: str


def create_request(
    session: Session,
    vault: Vault,
    *,
    texts: Sequence[ForgetText],
    reason: str | None,
    options: dict[str, Any],
    fingerprint: str,
    api_key_id: str | None,
    terms: Terms | None = None,
    set_digest: bytes | None = None,
    checkpoint: bytes | None = None,
    now: datetime | None = None,
) -> UnlearnRequest:
    """Store a pending request with its texts sealed under a key of its own. Raises InvalidInput when there are none.

    Without ``terms`` it has no deadline and no end, and nobody has to agree. ``checkpoint``: what its first worker goes
    on from. All is sealed before anything is written here, since the key store is asked.
    """
    if not texts:
        raise InvalidInput("a request needs at least one forget text")
    now = now or utcnow()
    request_id = new_id("req")
    wrapped = vault.new_key()
    payload = json.dumps([[item.text, item.label] for item in texts], separators=(",", ":"))
    training = None if checkpoint is None else vault.seal(wrapped, checkpoint, aad=checkpoint_aad(request_id, 0))
    request = UnlearnRequest(
        id=request_id,
        state=RequestState.PENDING,
        api_key_id=api_key_id,
        created_at=now,
        updated_at=now,
        num_texts=len(texts),
        reason=reason,
        options=options,
        fingerprint=fingerprint,
        wrapped_key=wrapped,
        sealed_texts=vault.seal(wrapped, payload.encode(), aad=texts_aad(request_id)),
        set_digest=set_digest,
        received_at=terms.received_at if terms else None,
        due_at=terms.due_at if terms else None,
        expires_at=terms.expires_at if terms else None,
        approval_required=terms.approval_required if terms else False,
        attempt=0,
        cancel_requested=False,
    )
    session.add(request)
    session.flush()  # there is no ORM relationship to order the inserts, so the parent goes first
    if training is not None:
        session.add(Checkpoint(request_id=request_id, step=0, updated_at=now, sealed=training))
    digests = {vault.digest(item.text) for item in texts}
    session.add_all(ForgetDigest(request_id=request_id, digest=digest) for digest in sorted(digests))
    record_state(
        session,
        request,
        before=None,
        actor=api_key_id or "system",
        detail={"num_texts": len(texts)},
        now=now,
        facts=entry_facts.of_request(request, digests),
    )
    return request


def get_request(session: Session, request_id: str, *, owner: str | None = None) -> UnlearnRequest:
    """With ``owner``, only what this API key asked for is there. Raises NotFound."""
    return _the_one(session, select(UnlearnRequest).where(*_is(request_id, owner)))


def get_state(session: Session, request_id: str, *, owner: str | None = None) -> RequestState:
    """As ``get_request``, for whoever asks twice a second: a row may hold megabytes of sealed texts."""
    found = session.scalar(select(UnlearnRequest.state).where(*_is(request_id, owner)))
    if found is None:
        raise NotFound("no such unlearn request")
    return RequestState(found)


def list_requests(
    session: Session,
    *,
    limit: int,
    cursor: str | None = None,
    state: str | None = None,
    where: RequestFilter = EVERYTHING,
    owner: str | None = None,
) -> tuple[list[UnlearnRequest], str | None]:
    """One page, newest first, and the cursor of the next; with ``owner``, of what this API key asked for.

    The sealed texts are not read with the rows. Raises InvalidInput for an unknown state or cursor.
    """
    query = select(UnlearnRequest).options(defer(UnlearnRequest.sealed_texts)).where(*where.conditions())
    query = query.order_by(UnlearnRequest.id.desc()).limit(limit + 1)
    if owner is not None:
        query = query.where(UnlearnRequest.api_key_id == owner)
    if state is not None:
        if state not in list(RequestState):
            raise InvalidInput("state is not one of " + ", ".join(RequestState), field="state")
        query = query.where(UnlearnRequest.state == state)
    if cursor is not None:
        check_cursor(cursor, "req_")
        query = query.where(UnlearnRequest.id < cursor)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def list_events(session: Session, request_id: str, *, after: int = 0, limit: int = 500) -> list[RequestEvent]:
    """Events with an id above ``after``, oldest first; empty for an unknown request."""
    query = (
        select(RequestEvent)
        .where(RequestEvent.request_id == request_id, RequestEvent.id > after)
        .order_by(RequestEvent.id)
        .limit(limit)
    )
    return list(session.scalars(query))


def request_cancel(session: Session, request_id: str, *, actor: str, owner: str | None = None) -> UnlearnRequest:
    """Cancel a request that waits at once; ask the worker to stop a running one. Raises NotFound, Conflict."""
    request = lock_request(session, request_id, owner=owner)
    state = RequestState(request.state)
    if state in (RequestState.PENDING, RequestState.AWAITING_APPROVAL):
        move(session, request, RequestState.CANCELLED, actor=actor)
    elif state in RUNNING:
        if not request.cancel_requested:
            request.cancel_requested = True
            request.updated_at = utcnow()
            audit.append(session, actor=actor, action="request.cancel_requested", subject=request.id, detail={})
    elif state in (RequestState.ACTIVE, RequestState.SUSPENDED):
        raise Conflict(f"the request is {state.value}; revoke its prompt instead", state=state.value)
    else:
        raise Conflict(f"the request has already ended as {state.value}", state=state.value)
    return request


def start_evaluating(session: Session, claim: Claim) -> None:
    """Training is done, the checks begin. Said twice, as in ``start_again``, it counts once. Raises LeaseLost."""
    request = hold(session, claim)
    if request.state != RequestState.EVALUATING:
        move(session, request, RequestState.EVALUATING, actor=claim.owner, detail={"attempt": claim.attempt})


def start_again(session: Session, claim: Claim, tried: dict[str, Any]) -> None:
    """The checks failed, and another try follows; ``tried``: figures of the one that failed. Raises LeaseLost.

    Said twice, because the answer to the first commit was lost, it counts once.
    """
    request = hold(session, claim)
    if request.state != RequestState.TRAINING:
        move(session, request, RequestState.TRAINING, actor=claim.owner, detail={"tried": tried})


def list_tries(session: Session, request_id: str) -> list[dict[str, Any]]:
    """What ``start_again`` was told, oldest first, by whichever attempt."""
    query = select(RequestEvent.data).where(RequestEvent.request_id == request_id, RequestEvent.type == "state")
    return [data["tried"] for data in session.scalars(query.order_by(RequestEvent.id)) if "tried" in data]


def fail(session: Session, claim: Claim, *, code: str, detail: str, metrics: dict[str, Any] | None = None) -> None:
    """End the request with a stated failure; ``detail`` must hold no text. Raises LeaseLost."""
    end_failed(session, hold(session, claim), actor=claim.owner, code=code, detail=detail, metrics=metrics)


def finish_cancelled(session: Session, claim: Claim) -> None:
    """The worker stopped because the client asked for it. Raises LeaseLost."""
    move(session, hold(session, claim), RequestState.CANCELLED, actor=claim.owner)


def release(session: Session, claim: Claim) -> None:
    """Hand the request back at a cooperative shutdown: checkpoint kept, attempt not counted. Raises LeaseLost.

    A cancellation that arrived meanwhile is honoured instead.
    """
    request = hold(session, claim)
    if request.cancel_requested:
        move(session, request, RequestState.CANCELLED, actor=claim.owner)
        return
    request.attempt -= 1  # the claim's unique owner fences off the old holder, so the number may be used again
    request.rung_at = None
    move(session, request, RequestState.PENDING, actor=claim.owner, detail={"why": "released"})


# --- what the other floor modules build on -------------------------------------------------------------------------


def lock_request(session: Session, request_id: str, *, owner: str | None = None) -> UnlearnRequest:
    """The request as it is now, locked until the transaction ends; ``owner`` as in ``get_request``. Raises NotFound."""
    db.begin_write(session)
    return _the_one(session, select(UnlearnRequest).where(*_is(request_id, owner)).with_for_update())


def _is(request_id: str, owner: str | None) -> tuple[Any, ...]:
    # Part of the query, so that another's request is looked for, and not found, exactly as one that does not exist.
    mine = () if owner is None else (UnlearnRequest.api_key_id == owner,)
    return (UnlearnRequest.id == request_id, *mine)


def _the_one(session: Session, query: Select[UnlearnRequest]) -> UnlearnRequest:
    request = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if request is None:
        raise NotFound("no such unlearn request")
    return request


def hold(session: Session, claim: Claim) -> UnlearnRequest:
    """The claimed request, locked until the transaction ends. Raises LeaseLost when the claim no longer holds.

    An expired lease that nobody took still holds: what counts is that no one else can have written since, and the
    attempt, the unique owner and the state say so under the row lock.
    """
    request_id = session.scalar(
        update(UnlearnRequest)
        .where(*held_by(claim))
        .values(updated_at=utcnow())
        .returning(UnlearnRequest.id)
        .execution_options(synchronize_session=False)
    )
    if request_id is None:
        raise LeaseLost("the request is no longer held by this attempt", request_id=claim.request_id)
    return get_request(session, request_id)


def held_by(claim: Claim) -> tuple[Any, ...]:
    """The fence: WHERE conditions that every write of a worker carries."""
    return (
        UnlearnRequest.id == claim.request_id,
        UnlearnRequest.attempt == claim.attempt,
        UnlearnRequest.lease_owner == claim.owner,
        UnlearnRequest.state.in_(RUNNING),
    )


def move(
    session: Session,
    request: UnlearnRequest,
    to: RequestState,
    *,
    actor: str,
    detail: dict[str, Any] | None = None,
    now: datetime | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Apply one transition to a locked request; ``facts`` as in ``record_state``. Raises Conflict when TRANSITIONS does
    not allow it.
    """
    before = RequestState(request.state)
    if to not in TRANSITIONS[before]:
        raise Conflict(f"a request that is {before.value} cannot become {to.value}", state=before.value)
    now = now or utcnow()
    request.state = to
    request.updated_at = now
    if to not in RUNNING:
        request.lease_owner = request.lease_expires_at = None
    if to in ENDS_TRAINING and before != RequestState.SUSPENDED:
        request.finished_at = now
        end_texts(session, request, now)
        facts = {**(facts or {}), "finished_at": iso(now), "shred_at": entry_facts.time_or_none(request.shred_at)}
    if to in (RequestState.FAILED, RequestState.CANCELLED):
        evidence.drop(session, request.id)
    record_state(session, request, before=before, actor=actor, detail=detail or {}, now=now, facts=facts)


def record_state(
    session: Session,
    request: UnlearnRequest,
    *,
    before: RequestState | None,
    actor: str,
    detail: dict[str, Any],
    now: datetime,
    facts: dict[str, Any] | None = None,
) -> None:
    """The event, the webhooks' messages and the audit entry of a transition that the row already shows.

    ``facts``: what only the entry states (``app.entry_facts``).
    """
    state = RequestState(request.state).value
    event = RequestEvent(request_id=request.id, at=now, type="state", data={"state": state, **detail})
    session.add(event)
    webhook_queue.enqueue(session, request, event, before=before)
    audit.append(
        session,
        actor=actor,
        action=f"request.{state}" if before else "request.created",
        subject=request.id,
        detail={"from": before.value if before else None, "to": state, **detail, **(facts or {})},
    )


def end_failed(
    session: Session,
    request: UnlearnRequest,
    *,
    actor: str,
    code: str,
    detail: str,
    metrics: dict[str, Any] | None = None,
    now: datetime | None = None,
) -> None:
    """Fail a locked request."""
    request.failure = {"code": code, "detail": detail}
    if metrics is not None:
        request.metrics = metrics
    # None: this brought no figures. What the row has is not stated again, or an altered one would be vouched for.
    facts = {"metrics_digest": entry_facts.json_digest(metrics)}
    move(session, request, RequestState.FAILED, actor=actor, detail={"code": code}, now=now, facts=facts)


def end_texts(session: Session, request: UnlearnRequest, now: datetime) -> None:
    """Shred the texts, now or (``keep_texts_hours``) when the reaper finds that they are due; the checkpoint now."""
    keep: timedelta = session.info.get(db.KEEP_TEXTS, timedelta())
    if not keep or request.wrapped_key is None:
        shred(session, request)
        return
    request.shred_at = now + keep
    db.note_shredding(session)
    _drop_checkpoint(session, request)


def shred(session: Session, request: UnlearnRequest) -> None:
    """Destroy the forget texts: without the wrapped key, whatever copy of the sealed bytes is left stays sealed."""
    shredding.destroy_key(session, request.wrapped_key)
    request.wrapped_key = None
    request.sealed_texts = None
    request.shred_at = None
    _drop_checkpoint(session, request)


def _drop_checkpoint(session: Session, request: UnlearnRequest) -> None:
    session.execute(
        delete(Checkpoint).where(Checkpoint.request_id == request.id),
        execution_options={"synchronize_session": False},
    )


def texts_aad(request_id: str) -> str:
    return f"{request_id}:texts"


def checkpoint_aad(request_id: str, step: int) -> str:
    return f"{request_id}:checkpoint:{step}"


def check_cursor(cursor: str, prefix: str) -> None:
    if not cursor.startswith(prefix) or len(cursor) > 40 or not cursor.isascii() or not cursor.isprintable():
        raise InvalidInput("the cursor is not one that this server gave out", field="cursor")
