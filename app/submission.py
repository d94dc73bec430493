"""What happens when somebody asks to forget texts, by API or console: checks, then one transaction, then the bell."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from app import idempotency, lifecycle, terms
from app.auth import Caller
from app.broker import enqueue_training
from app.deps import Service
from app.failpoints import failpoint
from app.lifecycle import ForgetText
from app.limits import check_count, check_steps, check_texts
from app.quotas import check_request_quota
from app.schemas import UnlearnRequestIn
from app.schemas_dry_run import DryRunOut
from app.tables import UnlearnRequest, utcnow


@dataclass(frozen=True)
class Submitted:
    """``replayed``: this very call came before. ``duplicate``: this key's live request for the same set was there."""

    request: UnlearnRequest
    replayed: bool
    duplicate: bool


def check_body(service: Service, body: UnlearnRequestIn) -> None:
    """What depends on the configuration and the model. Raises InvalidInput."""
    check_count("forget_texts", len(body.forget_texts), service.settings.max_forget_texts)
    check_steps(service.settings, body.options)
    check_texts(
        service.serving,
        [(f"forget_texts[{i}].text", item.text) for i, item in enumerate(body.forget_texts)],
        labels=[(f"forget_texts[{i}].label", item.label) for i, item in enumerate(body.forget_texts)],
    )


def rehearse(service: Service, caller: Caller, body: UnlearnRequestIn) -> DryRunOut:
    """The dry run of a body that was checked. Raises RateLimited, Overloaded, DeadlineExceeded, NotReady."""
    service.rates.take_texts(caller.key_id, caller.limits, len(body.forget_texts))
    return service.dry_runs.report(body, answers=caller.may("classify"))


def submit(service: Service, caller: Caller, body: UnlearnRequestIn, *, idempotency_key: str | None) -> Submitted:
    """Store a body that was checked; when this returns it will be trained, whatever breaks meanwhile.

    Raises InvalidInput, QuotaExceeded, IdempotencyInFlight, IdempotencyMismatch.
    """
    texts = list(dict.fromkeys(ForgetText(item.text, item.label) for item in body.forget_texts))
    call = None
    if idempotency_key is not None:
        call = idempotency.name_call(
            service.vault, api_key_id=caller.key_id, key=idempotency_key, body=body.model_dump(mode="json")
        )
    now = utcnow()
    with service.sessions.begin() as session:
        answered = idempotency.first_answer(session, call) if call else None
        row, duplicate = answered or _find_or_create(session, service, caller.key_id, body, texts, now)
        if call and answered is None:
            idempotency.remember(session, call, row, now=now)
        failpoint("create.before_commit")
    failpoint("create.after_commit")
    if answered is None and not duplicate:
        # Committed. A broker that is down costs seconds, not the request: the worker's reaper rings again.
        enqueue_training(service.celery, row.id, expires=service.settings.ring_seconds)
    failpoint("create.rung")
    return Submitted(row, replayed=answered is not None, duplicate=duplicate)


def _find_or_create(
    session: Session, service: Service, key_id: str, body: UnlearnRequestIn, texts: list[ForgetText], now: datetime
) -> tuple[UnlearnRequest, bool]:
    """The request, and whether it was there: this key's live one for the same set.

    Raises QuotaExceeded, InvalidInput.
    """
    settings, fingerprint = service.settings, service.serving.llm.fingerprint
    options = body.options.model_dump(exclude_none=True) if body.options else {}
    agreed = terms.agree(
        received_at=body.received_at,
        expires_at=body.expires_at,
        approval_required=body.require_approval or settings.require_approval,
        months=settings.deadline_months,
        now=now,
    )
    digest = idempotency.set_digest(
        service.vault, api_key_id=key_id, texts=texts, options=options, fingerprint=fingerprint, terms=agreed
    )
    live = idempotency.find_live(session, api_key_id=key_id, digest=digest)
    if live is not None:
        return live, True
    check_request_quota(session, key_id, settings, texts=len(texts), now=now)
    created = lifecycle.create_request(
        session,
        service.vault,
        texts=texts,
        reason=body.reason,
        options=options,
        fingerprint=fingerprint,
        api_key_id=key_id,
        terms=agreed,
        set_digest=digest,
        now=now,
    )
    return created, False
