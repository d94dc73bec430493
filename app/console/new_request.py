"""Asking to forget: texts from a paste or a file, what is wrong with them, what would happen, and then the request."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError

from app.auth import Caller
from app.console import uploads
from app.console.access import RequestsPage
from app.console.forms import Form, Sent, checked
from app.console.pages import render, see_other
from app.console.uploads import Entry, Unreadable
from app.deps import Service, ServiceDep
from app.errors import IdempotencyMismatch, LetheonError
from app.problems import validation_problem
from app.schemas import TrainingOptions, UnlearnRequestIn
from app.schemas_dry_run import DryRunOut
from app.submission import check_body, rehearse, submit

router = APIRouter()

SHOWN = 100
WHOLE = ("num_virtual_tokens", "max_steps", "seed")
OPTIONS = ("num_virtual_tokens", "max_steps", "learning_rate", "alpha", "beta", "seed")
TERMS = ("reason", "received", "expires", "require_approval")


@router.get("/console/requests/new")
def new_request(request: Request, caller: RequestsPage, service: ServiceDep) -> Any:
    return _page(request, caller, service, _Given(Sent({})))


@router.post("/console/requests/new")
def send_request(request: Request, caller: RequestsPage, form: Form, service: ServiceDep) -> Any:
    """``do``: ``check`` the texts, ``rehearse`` (a dry run), or ``send``; what is not good comes back with why."""
    return _handle(request, caller, form, service)


@dataclass(frozen=True, repr=False)
class _Given:
    """What the form held: good rows, bad ones, and why the file could not be read at all."""

    form: Sent
    good: list[Entry] = field(default_factory=list)
    bad: list[Entry] = field(default_factory=list)
    unreadable: str | None = None

    @property
    def missing(self) -> bool:
        return not (self.good or self.bad or self.unreadable) and self.form.one("do") != "clear"


def _handle(request: Request, caller: Caller, form: Sent, service: Service) -> Any:
    given = _read(service, form)
    do = form.one("do")
    if given.bad or given.unreadable or given.missing or do not in ("rehearse", "send"):
        # Not an error's status: rows to be mended are a stage of this form, and browsers report what is none.
        return _page(request, caller, service, given, sent=True)
    try:
        body = _body(given)
        check_body(service, body)
        if do == "rehearse":
            return _page(request, caller, service, given, report=rehearse(service, caller, body))
        made = submit(service, caller, body, idempotency_key=form.one("idempotency_key") or None)
    except RequestValidationError as error:
        return _page(request, caller, service, given, error=validation_problem(error))
    except IdempotencyMismatch:
        said = "This form was sent before with other texts or terms. Sent once more it makes a second request."
        return _page(request, caller, service, given, error=IdempotencyMismatch(said), renew=True)
    except LetheonError as error:
        return _page(request, caller, service, given, error=error)
    done = "again" if made.replayed else "duplicate" if made.duplicate else "sent"
    return see_other(request.scope, f"console/requests/{made.request.id}?done={done}")


def _read(service: Service, form: Sent) -> _Given:
    if form.one("do") == "clear":
        return _Given(form)
    kept: list[Entry] = []
    entries, unreadable = list[Entry](), None
    try:
        kept = uploads.read_kept(form.one("kept"))
    except Unreadable as error:
        unreadable = str(error)
    places, texts, labels, left_out = (
        form.all(name) for name in ("mend_place", "mend_text", "mend_label", "mend_drop")
    )
    entries += uploads.mended(places, texts, labels, left_out)
    try:
        entries += uploads.read_pasted(form.one("pasted"))
        if form.file is not None:
            entries += uploads.read_file(*form.file, service.serving.labels)
    except Unreadable as error:
        unreadable = str(error)
    good, bad = uploads.examine(service.serving, [*kept, *entries])
    if len(bad) > uploads.MENDABLE:
        first = f"{bad[0].place}: {bad[0].field}: {bad[0].fault}"
        unreadable = f"{len(bad)} rows need correcting, more than {uploads.MENDABLE}; the first is {first}"
        good, bad = uploads.examine(service.serving, kept)[0], []
    return _Given(form, good, bad, unreadable)


def _body(given: _Given) -> UnlearnRequestIn:
    """As a program would have sent it. Raises RequestValidationError."""
    values: dict[str, Any] = {
        "forget_texts": [{"text": entry.text, "label": entry.label} for entry in given.good],
        "require_approval": given.form.one("require_approval") == "on",
    }
    if reason := given.form.one("reason").strip():
        values["reason"] = reason
    for name, key in (("received", "received_at"), ("expires", "expires_at")):
        if day := given.form.one(name):
            values[key] = _midnight(day)
    options = {name: _number(name, value) for name in OPTIONS if (value := given.form.one(name).strip())}
    if options:
        values["options"] = checked(TrainingOptions, options).model_dump(exclude_none=True)
    return checked(UnlearnRequestIn, values)


def _midnight(day: str) -> str:
    """The beginning of a day, UTC, as bodies have it; what is no day is refused there."""
    try:
        return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).isoformat()
    except ValueError:
        return "not a day"


def _number(name: str, value: str) -> int | float | str:
    try:
        return int(value) if name in WHOLE else float(value)
    except ValueError:
        return "not a number"


def _page(
    request: Request,
    caller: Caller,
    service: Service,
    given: _Given,
    *,
    report: DryRunOut | None = None,
    error: LetheonError | None = None,
    renew: bool = False,
    sent: bool = False,
) -> Any:
    key = given.form.one("idempotency_key")
    return render(
        request.scope,
        "new_request.html",
        caller=caller,
        status=200 if error is None else error.status,
        good=given.good[:SHOWN],
        count=len(given.good),
        kept=uploads.keep(given.good),
        bad=given.bad,
        unreadable=given.unreadable,
        missing=sent and given.missing,
        report=report,
        error=error,
        errors=error.extra.get("errors", []) if error is not None else [],
        values={name: given.form.one(name) for name in (*TERMS, *OPTIONS)},
        idempotency_key=key if key and not renew else secrets.token_urlsafe(24),
        labels=service.serving.labels,
        limits={
            "texts": service.settings.max_forget_texts,
            "tokens": service.serving.max_text_tokens,
            "bytes": service.settings.max_body_bytes,
        },
        settings=service.settings,
    )
