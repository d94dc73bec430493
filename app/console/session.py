"""The console's session: a signed, expiring cookie that names an API key. The key itself stays in no browser.

Of a session nothing is kept here but its end, where somebody logs out (``app.ended_sessions``). Each request looks its
key up again, so what is revoked or expired ends it at once.
"""

from __future__ import annotations

import hmac
import re
import secrets
from base64 import urlsafe_b64encode
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import Scope

from app import ended_sessions, keys
from app.errors import Unauthenticated
from app.tables import ApiKey
from app.vault import Vault

_PURPOSE = "console session v2"
_TOKEN = re.compile(r"(key_[0-9a-f]{16})\.([0-9a-f]{32})\.(\d{1,12})\.(\d{1,12})\.([A-Za-z0-9_-]{43})", re.ASCII)
_ENDED = "log in: there is no session, or it has ended"


@dataclass(frozen=True)
class Login:
    """What a token says: whose it is, which of that key's sessions, and until when."""

    key_id: str
    id: str
    expires_at: datetime


def issue(vault: Vault, key_id: str, *, now: datetime, hours: float) -> str:
    """``key id . session id . issued . expires . signature``, times in Unix seconds."""
    expires = int((now + timedelta(hours=hours)).timestamp())
    stated = f"{key_id}.{secrets.token_hex(16)}.{int(now.timestamp())}.{expires}"
    return f"{stated}.{_signature(vault, stated)}"


def read(vault: Vault, token: str, *, now: datetime) -> Login:
    """What a token of ours says. Raises Unauthenticated, with one message for every cause."""
    match = _TOKEN.fullmatch(token)
    stated, _, signature = token.rpartition(".")
    same = hmac.compare_digest(_signature(vault, stated).encode(), signature.encode())
    if match is None or not same or not int(match[3]) <= now.timestamp() + 60 or now.timestamp() >= int(match[4]):
        raise Unauthenticated(_ENDED)
    return Login(match[1], match[2], datetime.fromtimestamp(int(match[4]), UTC))


def key_of(session: Session, login: Login) -> ApiKey:
    """Its key, in force. Raises Unauthenticated, also once anybody has logged out of this session."""
    if ended_sessions.has_ended(session, login.id):
        raise Unauthenticated(_ENDED)
    return keys.in_force(session, login.key_id)


def log_out(sessions: sessionmaker[Session], login: Login, *, now: datetime) -> None:
    """End it, for every copy of its token."""
    with suppress(IntegrityError), sessions.begin() as session:  # another logout was first
        ended_sessions.end(session, login.id, expires_at=login.expires_at, now=now)


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
