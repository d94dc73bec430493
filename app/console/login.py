"""In and out: an API key, shown once, becomes a cookie."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool

from app import db, keys
from app.auth import admitted
from app.console import session as cookie
from app.console.access import AnyCaller, login_of
from app.console.forms import Form
from app.console.pages import HEADERS, render, safe_next, see_other
from app.deps import Service, ServiceDep
from app.errors import Unauthenticated
from app.tables import utcnow

router = APIRouter()

NextPage = Annotated[str, Query(max_length=200, alias="next")]


@router.get("/console/login")
async def login_page(request: Request, next_page: NextPage = "") -> Any:
    return render(request.scope, "login.html", caller=None, error=None, next_page=safe_next(next_page))


@router.post("/console/login")
async def log_in(request: Request, form: Form, service: ServiceDep) -> Any:
    """One look-up and one comparison, as for an API call: nobody guesses faster here. Raises RateLimited."""
    next_page = safe_next(form.one("next"))
    try:
        token = await run_in_threadpool(_token, service, request, form.one("key").strip())
    except Unauthenticated as error:
        return render(request.scope, "login.html", caller=None, status=401, error=error.detail, next_page=next_page)
    response = see_other(request.scope, next_page)
    cookie.start(response, request.scope, token, hours=service.settings.console_session_hours)
    return response


def _token(service: Service, request: Request, presented: str) -> str:
    now = utcnow()
    with service.sessions() as session:
        db.impatient(session)
        key = keys.authenticate(session, presented, now=now)
    admitted(service, key, request.scope)
    return cookie.issue(service.vault, key.id, now=now, hours=service.settings.console_session_hours)


@router.post("/console/logout")
def log_out(request: Request, caller: AnyCaller, service: ServiceDep) -> Any:
    """Ends the session on every replica, for whoever else holds its cookie too."""
    cookie.log_out(service.sessions, login_of(request.scope), now=utcnow())
    response = see_other(request.scope, "console/login")
    response.headers.update({**HEADERS, "Clear-Site-Data": '"cache"'})
    cookie.end(response, request.scope)
    return response
