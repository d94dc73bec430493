"""The prompts that there are and were, the active sets that they made, and the way back to an earlier one."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError

from app import active_set, set_history
from app.auth import Caller
from app.console.access import AdminPage, AuditorPage
from app.console.forms import Form, checked
from app.console.pages import render, see_other
from app.console.words import DONE
from app.deps import PromptCursor, Service, ServiceDep
from app.errors import Conflict, LetheonError
from app.problems import validation_problem
from app.routes import admin
from app.schemas import RestoreIn
from app.tables import PromptState

router = APIRouter()

PAGE = 25
VERSIONS = 10
STATES = {
    "all": "All",
    **{state.value: words for state, words in zip(PromptState, ("In force", "Suspended", "Revoked"), strict=True)},
}


@router.get("/console/prompts")
def prompts_page(
    request: Request,
    caller: AuditorPage,
    service: ServiceDep,
    show: Annotated[str, Query(pattern=f"^({'|'.join(STATES)})$")] = "all",
    cursor: PromptCursor = None,
    before: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
    done: Annotated[str | None, Query(pattern="^restored$")] = None,
) -> Any:
    return _page(request, caller, service, show=show, cursor=cursor, before=before, said=DONE[done] if done else None)


@router.post("/console/active-sets/{version}/restore")
def restore(
    request: Request,
    caller: AdminPage,
    version: Annotated[int, Path(ge=0, le=2**31 - 1)],
    form: Form,
    service: ServiceDep,
) -> Any:
    """Put an earlier set in force, as the API does."""
    try:
        admin.restore_active_set(caller, version, checked(RestoreIn, {"reason": form.one("reason")}), service)
    except Conflict as error:
        return _page(request, caller, service, error=error)
    except RequestValidationError as error:
        return _page(request, caller, service, error=validation_problem(error))
    return see_other(request.scope, "console/prompts?done=restored")


def _page(
    request: Request,
    caller: Caller,
    service: Service,
    *,
    show: str = "all",
    cursor: str | None = None,
    before: int | None = None,
    said: str | None = None,
    error: LetheonError | None = None,
) -> Any:
    with service.sessions() as session:
        view = active_set.read_active_set(session)
        state = None if show == "all" else show
        rows, following = active_set.list_prompts(session, limit=PAGE, cursor=cursor, state=state)
        versions, earlier = set_history.list_versions(session, limit=VERSIONS, before=before)

    def address(**changes: Any) -> str:
        """This page with another part of a list; what the other list shows stays."""
        values = {"show": None if show == "all" else show, "cursor": cursor, "before": before, **changes}
        query = urlencode({name: value for name, value in values.items() if value is not None})
        return "console/prompts" + (f"?{query}" if query else "")

    return render(
        request.scope,
        "prompts.html",
        caller=caller,
        status=200 if error is None else error.status,
        view=view,
        rows=rows,
        first=cursor is None,
        older=address(cursor=following) if following is not None else None,
        newest=address(cursor=None),
        versions=versions,
        reasons=any(one.reason for one in versions),
        first_versions=before is None,
        earlier=address(before=earlier) + "#sets" if earlier is not None else None,
        latest=address(before=None) + "#sets",
        show=show,
        filters=list(STATES.items()),
        words=STATES,
        may_restore=caller.may("admin"),
        said=said,
        error=error,
    )
