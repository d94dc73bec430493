"""One request: where it stands, what it forgot, what that did to everything else, what happened, what can be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy import select
from starlette.responses import HTMLResponse

from app import audit, evidence, evidence_pictures, lifecycle, receipts
from app.auth import Caller
from app.console.access import AdminPage, ApproverPage, CancellingPage, ReaderPage
from app.console.figures import bars, checks, empty_curve, progress_of
from app.console.forms import Form, checked
from app.console.pages import HEADERS, fragment, render, see_other
from app.console.words import ACTIONS, DONE, EXPLAINED, REVOKE_CODES, REVOKED_BECAUSE, STEPS
from app.deps import RequestId, Service, ServiceDep
from app.errors import Conflict, LetheonError, NotFound, NotReady, SameKey, VaultError
from app.keys import READS_ALL
from app.problems import validation_problem
from app.report_schemas import ReportFormat
from app.request_filters import key_names
from app.routes import admin, approvals, reports, unlearn_requests
from app.routes.unlearn_requests import EVENT_PAGE, GOES_ON
from app.schemas import RejectIn, RevokeIn
from app.set_history import RECORD_ONLY
from app.settings import Mode, Settings
from app.tables import OPEN, Prompt, PromptState, RequestEvent, RequestState, utcnow
from app.words import STATES

router = APIRouter()

ADDRESS = "/console/requests/{request_id}"
Done = Annotated[str | None, Query(pattern=f"^({'|'.join(DONE)})$")]


def all_events(service: Service, request_id: str) -> list[RequestEvent]:
    events: list[RequestEvent] = []
    with service.sessions() as session:
        while True:
            after = events[-1].id if events else 0
            page = lifecycle.list_events(session, request_id, after=after, limit=EVENT_PAGE)
            events += page
            if len(page) < EVENT_PAGE:
                return events


def view_of(service: Service, caller: Caller, request_id: str, events: list[RequestEvent]) -> dict[str, Any]:
    """What the page's parts are made of. Raises NotFound, also for another key's, unless the caller reads all."""
    with service.sessions() as session:
        row = lifecycle.get_request(session, request_id, owner=caller.owner(*READS_ALL))
        query = select(Prompt).where(Prompt.request_id == request_id).options(*RECORD_ONLY)
        prompt = session.scalars(query).one_or_none()
        trail = audit.entries_about(session, request_id, *([prompt.id] if prompt else []))
        names = key_names(session, [row.api_key_id]) if row.api_key_id and caller.may(*READS_ALL) else {}
    progress = progress_of(events)
    found = row.metrics or {}
    mine = row.api_key_id == caller.key_id
    return {
        "row": row,
        "prompt": prompt,
        "trail": [(entry, ACTIONS.get(entry.action, entry.action)) for entry in trail],
        "progress": progress,
        "curve": progress.curve if progress else empty_curve(),
        "bars": bars(row),
        "checks": checks(found, found.get("limits") or _limits(service.settings)),
        "warnings": found.get("warnings") or [],
        "word": STATES[row.state],
        "explained": EXPLAINED[row.state],
        "after": events[-1].id if events else 0,
        "steps": _steps(row.state, row.approval_required),
        "goes_on": row.state in GOES_ON,
        "overdue": row.state in OPEN and row.due_at is not None and row.due_at <= utcnow(),
        "has_receipt": row.state in receipts.AVAILABLE,
        "may_cancel": caller.may("admin") or (mine and caller.may("requests")),
        "may_decide": caller.may("approve") and not mine,
        "may_revoke": caller.may("admin"),
        "is_open": row.state in OPEN,
        "in_force": prompt is not None and prompt.state != PromptState.REVOKED,
        "codes": REVOKE_CODES,
        "because": REVOKED_BECAUSE,
        "needs_two": service.settings.revoke_needs_two,
        "asked_by_me": prompt is not None and prompt.revoke_asked_by == caller.key_id,
        "mine": mine,
        "key_name": names.get(row.api_key_id or ""),
    }


@router.get(ADDRESS)
def request_page(
    request: Request, caller: ReaderPage, request_id: RequestId, service: ServiceDep, done: Done = None
) -> Any:
    return _page(request, caller, request_id, service, said=DONE[done] if done else None)


@router.post(ADDRESS + "/cancel")
def cancel(request: Request, caller: CancellingPage, request_id: RequestId, service: ServiceDep) -> Any:
    def act() -> str:
        row = unlearn_requests.cancel_unlearn_request(caller, request_id, service)
        return "cancelled" if row.state == RequestState.CANCELLED else "cancelling"

    return _acted(request, caller, request_id, service, act)


@router.post(ADDRESS + "/approve")
def approve(request: Request, caller: ApproverPage, request_id: RequestId, service: ServiceDep) -> Any:
    def act() -> str:
        approvals.approve_unlearn_request(caller, request_id, service)
        return "approved"

    return _acted(request, caller, request_id, service, act)


@router.post(ADDRESS + "/reject")
def reject(request: Request, caller: ApproverPage, request_id: RequestId, form: Form, service: ServiceDep) -> Any:
    def act() -> str:
        body = checked(RejectIn, {"reason": form.one("reason")})
        approvals.reject_unlearn_request(caller, request_id, body, service)
        return "rejected"

    return _acted(request, caller, request_id, service, act)


@router.post(ADDRESS + "/revoke")
def revoke(request: Request, caller: AdminPage, request_id: RequestId, form: Form, service: ServiceDep) -> Any:
    def act() -> str:
        body = checked(RevokeIn, {"code": form.one("code"), "reason": form.one("reason")})
        answer = Response()
        admin.revoke_prompt(caller, _prompt_of(service, request_id), body, service, answer)
        return "revoked" if answer.status_code == 200 else "asked"

    return _acted(request, caller, request_id, service, act)


@router.post(ADDRESS + "/withdraw")
def withdraw(request: Request, caller: AdminPage, request_id: RequestId, service: ServiceDep) -> Any:
    def act() -> str:
        admin.withdraw_revoke(caller, _prompt_of(service, request_id), service)
        return "withdrawn"

    return _acted(request, caller, request_id, service, act)


@router.get(ADDRESS + "/pictures")
def pictures(caller: ReaderPage, request_id: RequestId, service: ServiceDep) -> Any:
    """Of its evidence, small: what the evidence page puts in where one scrolls to it."""
    with service.sessions() as session:
        lifecycle.get_request(session, request_id, owner=caller.owner(*READS_ALL))
    found = pictures_of(service, request_id, small=True)
    return HTMLResponse(fragment("small_pictures.html", found), headers=HEADERS)


@router.get(ADDRESS + "/receipt")
def receipt(caller: ReaderPage, request_id: RequestId, service: ServiceDep) -> Any:
    """The signed receipt as a file."""
    response = unlearn_requests.get_receipt(caller, request_id, service)
    response.headers["Content-Disposition"] = f'attachment; filename="{request_id}.receipt.json"'
    return response


@router.get(ADDRESS + "/report")
def report(
    caller: ReaderPage,
    request_id: RequestId,
    service: ServiceDep,
    report_format: Annotated[ReportFormat, Query(alias="format")] = ReportFormat.HTML,
) -> Any:
    """The report, as the API gives it."""
    return reports.get_report(caller, request_id, service, report_format)


def _acted(request: Request, caller: Caller, request_id: str, service: Service, act: Callable[[], str]) -> Any:
    """Carried out, the page is shown anew; else it is shown with what was in the way."""
    try:
        done = act()
    except (Conflict, SameKey) as error:
        return _page(request, caller, request_id, service, error=error)
    except RequestValidationError as error:
        return _page(request, caller, request_id, service, error=validation_problem(error))
    return see_other(request.scope, f"console/requests/{request_id}?done={done}")


def _page(
    request: Request,
    caller: Caller,
    request_id: str,
    service: Service,
    *,
    said: str | None = None,
    error: LetheonError | None = None,
) -> Any:
    view = view_of(service, caller, request_id, all_events(service, request_id))
    view |= pictures_of(service, request_id)
    status = 200 if error is None else error.status
    return render(request.scope, "request.html", caller=caller, status=status, said=said, error=error, **view)


def pictures_of(service: Service, request_id: str, *, small: bool = False) -> dict[str, Any]:
    """Of the request's evidence, or why there are none. ``room``: it is still to come, and its place is kept."""
    with service.sessions() as session:
        request = lifecycle.get_request(session, request_id)
        try:
            found = evidence.read(session, service.vault, request)
        except (Conflict, NotReady, VaultError) as error:
            room = request.state in OPEN and service.settings.evidence_texts > 0
            said = "the evidence comes with its checks" if error.extra.get("why") == "not-yet" else error.detail
            return {"pictures": [], "no_pictures": said, "room": room}
    drawn = [
        ("embedding", evidence_pictures.embedding_svg(found, small=small)),
        ("membership", evidence_pictures.membership_svg(found, small=small)),
    ]
    return {"pictures": drawn, "no_pictures": None, "room": True}


def _prompt_of(service: Service, request_id: str) -> str:
    with service.sessions() as session:
        prompt_id = session.scalar(select(Prompt.id).where(Prompt.request_id == request_id))
    if prompt_id is None:
        raise NotFound("the request has no prompt")
    return prompt_id


def _limits(settings: Settings) -> dict[str, Any]:
    """The limits that the checks of a request will have, by the names that its metrics have them under."""
    names = ["min_forget_abstain", "max_retain_drop", "max_class_drop", "max_neighbour_drop", "max_prompt_norm"]
    if settings.mode == Mode.ROUTED:
        names.append("max_total_claim_rate")
    return {name: getattr(settings, name) for name in names}


def _steps(state: str, approval: bool) -> list[tuple[str, str]]:
    """The way of a request, each step ``done``, ``now`` or ``ahead``; for one that ended elsewhere, up to there."""
    way = [*STEPS[:3], *(["awaiting_approval"] if approval else []), STEPS[3]]
    if state in (RequestState.REVOKED, RequestState.SUSPENDED):
        way.append(state)
    elif state not in way:
        way = [way[0], state]
    at = way.index(state)
    return [(STATES[step], "done" if i < at else "now" if i == at else "ahead") for i, step in enumerate(way)]
