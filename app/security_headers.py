"""Headers that tell browsers to make as little as possible of what this server sends, errors included."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

API_POLICY = "default-src 'none'; frame-ancestors 'none'"
DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Swagger UI sets styles of its elements. Scripts, and what they may talk to, are this server's alone."""
CONSOLE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""The console's pages: nothing inline, nothing of another host."""
STRICT_TRANSPORT = "max-age=31536000"


class SecurityHeaders:
    """Pure ASGI, outermost. A route's own Content-Security-Policy and Referrer-Policy stay; so does its Cache-Control
    where what it sends never changes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Frame-Options"] = "DENY"
                headers.setdefault("Referrer-Policy", "no-referrer")
                if "immutable" not in headers.get("Cache-Control", ""):
                    headers["Cache-Control"] = "no-store"
                headers.setdefault("Content-Security-Policy", API_POLICY)
                # uvicorn sets the scheme from X-Forwarded-Proto for proxies that it trusts (FORWARDED_ALLOW_IPS).
                if scope.get("scheme") == "https":
                    headers["Strict-Transport-Security"] = STRICT_TRANSPORT
            await send(message)

        await self.app(scope, receive, send_with_headers)
