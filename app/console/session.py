"""The console's session: a signed, expiring cookie that names an API key. The key itself stays in no browser.

Nothing of a session is kept here: each request looks its key up again, so what is revoked or expired ends it at once.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from datetime import datetime, timedelta

from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import Scope

from app.errors import Unauthenticated
from app.vault import Vault

_PURPOSE = "console session v1"
_TOKEN = re.compile(r"(key_[0-9a-f]{16})\.(\d{1,12})\.(\d{1,12})\.([A-Za-z0-9_-]{43})", re.ASCII)


def issue(vault: Vault, key_id: str, *, now: datetime, hours: float) -> str:
    """``key id . issued . expires . signature``, times in Unix seconds."""
    stated = f"{key_id}.{int(now.timestamp())}.{int((now + timedelta(hours=hours)).timestamp())}"
    return f"{stated}.{_signature(vault, stated)}"


def key_of(vault: Vault, token: str, *, now: datetime) -> str:
    """The id of the key that a token was issued to. Raises Unauthenticated, with one message for every cause."""
    match = _TOKEN.fullmatch(token)
    stated, _, signature = token.rpartition(".")
    same = hmac.compare_digest(_signature(vault, stated).encode(), signature.encode())
    if match is None or not same or not int(match[2]) <= now.timestamp() + 60 or now.timestamp() >= int(match[3]):
        raise Unauthenticated("log in: there is no session, or it has ended")
    return match[1]


def presented(scope: Scope) -> str:
    """The token that came with a request; empty without one."""
    raw = next((value for name, value in scope["headers"] if name == b"cookie"), b"")
    return cookie_parser(raw.decode("latin-1")).get(_cookie(scope), "")


def start(response: Response, scope: Scope, token: str, *, hours: float) -> None:
    """Set the cookie."""
    _set(response, scope, token, int(hours * 3600))


def end(response: Response, scope: Scope) -> None:
    """Have the browser drop it."""
    _set(response, scope, "", 0)


def _cookie(scope: Scope) -> str:
    # With the prefix a browser takes it from this very host over TLS only, from no neighbour's subdomain.
    return "__Host-letheon" if scope["scheme"] == "https" else "letheon"


def _set(response: Response, scope: Scope, token: str, seconds: int) -> None:
    secure = scope["scheme"] == "https"
    response.set_cookie(_cookie(scope), token, max_age=seconds, secure=secure, httponly=True, samesite="strict")


def _signature(vault: Vault, stated: str) -> str:
    return urlsafe_b64encode(vault.tag(_PURPOSE, stated.encode("utf-8", "replace"))).rstrip(b"=").decode()
