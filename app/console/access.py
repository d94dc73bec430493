"""Who may see a page: the session's key, looked up for every request, under the very scopes of the API."""

from __future__ import annotations

from typing import Annotated

from fastapi import Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import SecurityScopes
from starlette.datastructures import Headers
from starlette.types import Scope

from app import auth, db
from app.auth import Caller, admitted, known_caller
from app.console import session as cookie
from app.deps import Service, ServiceDep
from app.errors import Forbidden
from app.keys import READS_ALL
from app.tables import utcnow

PREFIX = "/console/"
LOGIN = "/console/login"
LOGIN_BYTES = 1024  # nobody has been asked who they are yet


class CrossSite(Forbidden):
    """An unsafe request that another site's page, or no page at all, has sent."""

    code, title = "cross-site", "This did not come from a page of this console"


def path_of(scope: Scope) -> str:
    """The path below wherever the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_console(scope: Scope) -> bool:
    path = path_of(scope)
    return path == "/" or path.startswith(PREFIX)


async def admit(scope: Scope) -> int | None:
    """As ``auth.admit``, for both: who may send a body at all, and how much of one, if less than the settings allow.

    Raises Unauthenticated, RateLimited, CrossSite.
    """
    if not is_console(scope):
        await auth.admit(scope)
        return None
    check_same_origin(scope)
    if path_of(scope) == LOGIN:
        return LOGIN_BYTES
    await run_in_threadpool(_by_session, scope["app"].state.service, scope)
    return None


def check_same_origin(scope: Scope) -> None:
    """Raises CrossSite unless the browser says that a page of this very origin asks.

    The cookie is ``SameSite=Strict``; this holds where a browser knows nothing of that, and for the login.
    """
    headers = Headers(scope=scope)
    site = headers.get("sec-fetch-site")
    if site is not None:
        same = site == "same-origin"
    else:  # over plain HTTP, other than to this machine, browsers send an Origin only
        same = headers.get("origin", "").partition("://")[2] == headers.get("host") != ""
    if not same:
        raise CrossSite("open the console and try again there; programs use the API, with a key of their own")


async def same_origin(request: Request) -> None:
    """For every unsafe route of the console. Raises CrossSite."""
    if request.method not in ("GET", "HEAD"):
        check_same_origin(request.scope)


_LOGIN = "letheon.login"  # of a scope


def login_of(scope: Scope) -> cookie.Login:
    """Of a request whose caller is known."""
    login: cookie.Login = scope[_LOGIN]
    return login


def _by_session(service: Service, scope: Scope) -> Caller:
    login = cookie.read(service.vault, cookie.presented(scope), now=utcnow())
    with service.sessions() as session:
        db.impatient(session)
        key = cookie.key_of(session, login)
    scope[_LOGIN] = login
    return admitted(service, key, scope)


async def authorize_page(any_of: SecurityScopes, service: ServiceDep, request: Request) -> Caller:
    """The caller behind the session, which has one of the scopes. Raises Unauthenticated, RateLimited, Forbidden."""
    caller = known_caller(request.scope)
    if caller is None:
        caller = await run_in_threadpool(_by_session, service, request.scope)
    if any_of.scopes:
        caller.require_any(any_of.scopes)
    return caller


AnyCaller = Annotated[Caller, Security(authorize_page, scopes=[])]
RequestsPage = Annotated[Caller, Security(authorize_page, scopes=["requests"])]
ReaderPage = Annotated[Caller, Security(authorize_page, scopes=["requests", *READS_ALL])]
CancellingPage = Annotated[Caller, Security(authorize_page, scopes=["requests", "admin"])]
ApproverPage = Annotated[Caller, Security(authorize_page, scopes=["approve"])]
ClassifyPage = Annotated[Caller, Security(authorize_page, scopes=["classify"])]
AuditorPage = Annotated[Caller, Security(authorize_page, scopes=["auditor", "admin"])]
AdminPage = Annotated[Caller, Security(authorize_page, scopes=["admin"])]
