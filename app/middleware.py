"""Pure-ASGI middleware: request ids, an access log that holds no content, the last line of defence, the body limit."""

from __future__ import annotations

import codecs
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from anyio import fail_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import db, tracing
from app.errors import BodyTimeout, BodyTooLarge, LetheonError, MalformedBody, Overloaded
from app.metrics import METHODS, Metrics
from app.problems import RefusedBody, Unavailable, problem_response
from app.tracebacks import where

access_log = logging.getLogger("letheon.access")
log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RESOURCE_ID = re.compile(r"[a-z]{3}_[0-9a-f]{28}")


def route_template(scope: Scope) -> str:
    """The matched route; nothing of the URL itself, which may hold anything."""
    return str(getattr(scope.get("route"), "path", "(no route)"))


def logged_path(scope: Scope) -> str:
    """The matched route with its resource ids."""
    params = scope.get("path_params", {})
    return re.sub(
        r"\{(\w+)\}",
        lambda name: value if _RESOURCE_ID.fullmatch(value := str(params.get(name[1]))) else name[0],
        route_template(scope),
    )


class RequestContext:
    """Gives each request an id (the client's, if it is a plain one), logs, counts and traces it.

    What nobody caught becomes a 500 and ends here: the server would log it with its message.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        presented = headers.get("x-request-id", "")
        request_id = presented if _REQUEST_ID.fullmatch(presented) else secrets.token_hex(8)
        status, broken = 0, False
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status, broken
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            try:
                await send(message)
            except Exception:
                broken = True
                raise

        with tracing.request(scope["path"], headers.get("traceparent")) as ended:
            try:
                await self.app(scope, receive, send_with_id)
            except Exception as error:
                if broken:
                    log.info("request %s: the connection is gone: %s", request_id, where(error))
                    return
                log.error("unhandled in request %s: %s", request_id, where(error))
                if status == 0:
                    problem = LetheonError("an unexpected error; the server's log has it under this request's id")
                    await problem_response(scope, problem)(scope, receive, send_with_id)
            finally:
                seconds = time.perf_counter() - started
                method = scope["method"] if scope["method"] in METHODS else "(other)"
                route = route_template(scope)
                self.metrics.http(method, route, status, seconds)
                ended(method, route, status)
                access_log.info("%s %s %d %.1fms %s", method, logged_path(scope), status, seconds * 1000, request_id)


class BodyLimit:
    """What a body may cost, whoever sends it.

    None is read for a key that is not in force: ``admit(scope)``, which may wait for the database, says so; it may also
    name a lower limit. Bytes are counted as they arrive, whatever Content-Length says; all of it must be UTF-8, and be
    there within ``seconds``. All requests in progress together hold ``max_held`` bytes of bodies at most; one alone may
    always have its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        admit: Callable[[Scope], Awaitable[int | None]],
        max_bytes: int,
        max_held: int,
        seconds: float,
    ) -> None:
        self.app, self.admit = app, admit
        self.max_bytes, self.max_held, self.seconds = max_bytes, max_held, seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:
            await problem_response(scope, self._too_large(self.max_bytes))(scope, receive, send)
            return
        received, admitted, arrived = 0, False, False
        most = self.max_bytes
        deadline = time.monotonic() + self.seconds
        decoder = codecs.getincrementaldecoder("utf-8")()

        async def limited() -> Message:
            nonlocal received, admitted, arrived, most
            if arrived:  # what comes now is the client's leaving
                return await receive()
            if not admitted:
                most = await self._admit(scope) or self.max_bytes
                admitted = True
            try:
                with fail_after(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise RefusedBody(BodyTimeout(f"the body was not there within {self.seconds:g} s")) from None
            if message["type"] == "http.request":
                chunk = message.get("body", b"")
                arrived = not message.get("more_body", False)
                received += len(chunk)
                self._held += len(chunk)
                if received > most:
                    raise RefusedBody(self._too_large(most))
                if received < self._held and self._held > self.max_held:
                    raise RefusedBody(Overloaded("the bodies of other requests take all the room", retry_after=1))
                try:
                    decoder.decode(chunk, final=arrived)
                except UnicodeDecodeError:  # holds the bytes, so it is not chained
                    errors = [{"field": "body", "message": "not valid UTF-8"}]
                    raise RefusedBody(MalformedBody("the body is not valid UTF-8", errors=errors)) from None
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self._held -= received

    async def _admit(self, scope: Scope) -> int | None:
        try:
            return await self.admit(scope)
        except LetheonError as error:
            raise RefusedBody(error) from None
        except db.UNANSWERED:
            raise RefusedBody(Unavailable("the database does not answer")) from None

    def _too_large(self, most: int) -> BodyTooLarge:
        message = f"over the limit of {most} bytes"
        errors = [{"field": "body", "message": message, "limit": most}]
        return BodyTooLarge(f"the body is {message}", errors=errors)
