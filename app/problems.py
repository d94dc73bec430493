"""RFC 9457 problem responses: the one place where an exception becomes what a client sees.

A problem says what is wrong, where, and which limit applies. It never repeats a value that the client sent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from app import db
from app.errors import BodyTooLarge, InvalidInput, LetheonError, MalformedBody, Unauthenticated
from app.metrics import METHODS

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
URN = "urn:letheon:problem:"
MAX_ERRORS = 20  # a body with thousands of bad texts is told about the first ones

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")
_LIMITS = ("le", "lt", "ge", "gt", "max_length", "min_length")


AsPage = Callable[[Scope, LetheonError, dict[str, Any], dict[str, str]], Response | None]
"""``app.state.problem_page``: from scope, error, problem object and headers to a page; None where a program asks."""


class UnsupportedMediaType(LetheonError):
    status, code, title = 415, "unsupported-media-type", "The request body must be JSON"


class Unavailable(LetheonError):
    status, code, title = 503, "unavailable", "A service that this server needs does not answer"


class RefusedBody(HTTPException):
    """A LetheonError that may be raised while a body is read: FastAPI turns all but HTTPException into a bare 400."""

    def __init__(self, error: LetheonError) -> None:
        super().__init__(error.status, error.detail)
        self.error = error


class FieldError(BaseModel):
    """One thing that is wrong with the request."""

    field: str = Field(description="Where: a path into the body, or `query.…`, `header.…`.")
    message: str
    limit: float | int | None = Field(default=None, description="The limit that was passed, if it is one.")


class Problem(BaseModel):
    """An RFC 9457 problem object."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Names the kind of problem; stable.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's path, without its query.")
    code: str = Field(description="The last part of `type`, for programs.")
    errors: list[FieldError] | None = None


class _Bare(LetheonError):
    """An HTTP error of the framework (404 for a path, 405), which has no class of its own."""

    def __init__(self, status: int) -> None:
        phrase = HTTPStatus(status).phrase
        super().__init__(phrase)
        self.bare_status, self.bare_code = status, phrase.lower().replace(" ", "-")


def problem_response(scope: Scope, error: LetheonError, headers: Mapping[str, str] | None = None) -> Response:
    """The problem object of ``error`` for the request in ``scope``; a page for people where a page was asked for."""
    status, code, title = error.status, error.code, error.title
    if isinstance(error, _Bare):
        status, code, title = error.bare_status, error.bare_code, error.detail
    extra = dict(error.extra)
    sent = dict(headers or {})
    if isinstance(error, Unauthenticated):
        sent["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge):
        sent["Connection"] = "close"  # or a client could go on sending the rest for ever
    if status in (429, 503) or "retry_after" in extra:
        sent["Retry-After"] = str(extra.pop("retry_after", 1))
    if "field" in extra:
        extra["errors"] = [{"field": extra.pop("field"), "message": error.detail}]
    if status >= 500:
        log.warning("%d %s: %s", status, code, error.detail)
    body = {
        **extra,
        "type": URN + code,
        "title": title,
        "status": status,
        "detail": error.detail,
        "instance": scope["path"],
        "code": code,
    }
    as_page: AsPage | None = getattr(scope["app"].state, "problem_page", None)
    page = as_page(scope, error, body, sent) if as_page is not None else None
    return page or JSONResponse(body, status_code=status, headers=sent, media_type=MEDIA_TYPE)


def invalid(errors: Sequence[Mapping[str, Any]], omitted: int = 0) -> InvalidInput:
    """InvalidInput whose detail is the first error and whose ``errors`` holds them all."""
    more = len(errors) - 1 + omitted
    detail = f"{errors[0]['field']}: {errors[0]['message']}" + (f" (and {more} more)" if more else "")
    return InvalidInput(detail, errors=list(errors), **({"errors_omitted": omitted} if omitted else {}))


def field_path(loc: Sequence[str | int]) -> str:
    """``("body", "forget_texts", 3, "text")`` → ``forget_texts[3].text``.

    A name that the client made up is shown only when it is a plain one: someone may send texts as keys.
    """
    where, *rest = loc
    path = "" if where == "body" else str(where)
    for part in rest:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += ("." if path else "") + (part if _PLAIN_NAME.fullmatch(part) else "(unnamed)")
    return path or "body"


def validation_problem(exc: RequestValidationError) -> LetheonError:
    """What is wrong with a body, by the field; never the values."""
    found = exc.errors()
    if found and found[0]["type"] == "json_invalid":
        at = found[0]["loc"][-1]
        message = f"not valid JSON at character {at}"
        return MalformedBody(f"the body is {message}", errors=[{"field": "body", "message": message}])
    if isinstance(exc.body, bytes):  # FastAPI parses only what is declared as JSON
        return UnsupportedMediaType("send the body with Content-Type: application/json")
    errors = []
    for item in found[:MAX_ERRORS]:
        error: dict[str, Any] = {"field": field_path(item["loc"]), "message": item["msg"]}
        context = item.get("ctx", {})
        limit = next((context[name] for name in _LIMITS if isinstance(context.get(name), int | float)), None)
        errors.append(error if limit is None else {**error, "limit": limit})
    return invalid(errors, omitted=len(found) - len(errors))


def _allowed(app: FastAPI, scope: Scope) -> list[str]:
    """The methods of this path."""
    return [
        method
        for method in sorted(METHODS)
        if any(route.matches({**scope, "method": method})[0] == Match.FULL for route in app.routes)
    ]


def install(app: FastAPI) -> None:
    """Register the handlers. An exception without one ends in ``middleware.RequestContext`` as a bare 500."""

    async def letheon_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, LetheonError)
        return problem_response(request.scope, exc)

    async def http_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        if isinstance(exc, RefusedBody):
            # The rest of the body was not read, so the connection cannot be used again.
            return problem_response(request.scope, exc.error, {"Connection": "close"})
        if exc.status_code == 400:  # FastAPI's "error parsing the body": nesting too deep, a number too long
            return problem_response(request.scope, MalformedBody("the body cannot be read as JSON"))
        headers = dict(exc.headers or {})
        if exc.status_code == 405:  # the framework names the methods of the first route of this path only
            headers["Allow"] = ", ".join(_allowed(app, request.scope))
        return problem_response(request.scope, _Bare(exc.status_code), headers)

    async def validation_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return problem_response(request.scope, validation_problem(exc))

    async def database_error(request: Request, exc: Exception) -> Response:
        return problem_response(request.scope, Unavailable("the database does not answer"))

    app.add_exception_handler(LetheonError, letheon_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    for kind in db.UNANSWERED:
        app.add_exception_handler(kind, database_error)


def problems(*kinds: type[LetheonError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` of a route that may end in these errors."""
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        response = responses.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        response["content"][MEDIA_TYPE]["examples"][kind.code] = {
            "value": {
                "type": URN + kind.code,
                "title": kind.title,
                "status": kind.status,
                "detail": kind.title,
                "instance": "/…",
                "code": kind.code,
            }
        }
    return responses
