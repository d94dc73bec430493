"""API keys at the door: ``Authorization: Bearer lth_…`` → the key's id and scopes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.orm import Session, sessionmaker
from starlette.datastructures import Headers
from starlette.types import Scope

from app import keys
from app.deps import Service, ServiceDep
from app.errors import Unauthenticated
from app.tables import ApiKey

_bearer = HTTPBearer(
    auto_error=False, scheme_name="apiKey", description="An API key, `lth_…`. Each operation names the scope it needs."
)


@dataclass(frozen=True)
class Caller:
    """Who asks: what audit entries name as actor, and what they may do."""

    key_id: str
    scopes: frozenset[str]
    limits: Mapping[str, int]  # the key's own, before the settings'

    def may(self, *scopes: str) -> bool:
        """Whether the key has one of these."""
        return not self.scopes.isdisjoint(scopes)

    def require(self, scope: str) -> None:
        """Raises Forbidden."""
        keys.require(self.scopes, scope)

    def require_any(self, scopes: Sequence[str]) -> None:
        """Raises Forbidden."""
        keys.require(self.scopes, *scopes)

    def owner(self, *unless: str) -> str | None:
        """What queries for requests are narrowed to: the caller's own, unless it has one of these scopes."""
        return None if self.may(*unless) else self.key_id


_CALLER, _SECONDS = "letheon.caller", "letheon.caller-seconds"  # of a scope
UNCOUNTED = ("/classify", "/console/logout")  # has a limit of its own, on texts; must always be possible


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def presented_key(credentials: HTTPAuthorizationCredentials | None) -> str:
    """Raises Unauthenticated."""
    if credentials is None:
        raise Unauthenticated("send an API key as 'Authorization: Bearer lth_…'")
    return credentials.credentials


def known_caller(scope: Scope) -> Caller | None:
    """Who this request was found to come from, before its body was read."""
    caller: Caller | None = scope.get(_CALLER)
    return caller


def seconds_to_know(scope: Scope) -> float:
    """How long it took to find out who asks; the time that a call allows counts it."""
    seconds: float = scope.get(_SECONDS, 0.0)
    return seconds


async def admit(scope: Scope) -> None:
    """Before a body is read, whoever sends it: the key in the headers, for ``authorize``.

    Raises Unauthenticated, RateLimited, Overloaded, Unavailable.
    """
    scheme, key = get_authorization_scheme_param(Headers(scope=scope).get("authorization"))
    credentials = HTTPAuthorizationCredentials(scheme=scheme, credentials=key) if scheme.lower() == "bearer" else None
    await _caller(scope["app"].state.service, presented_key(credentials), scope)


async def _caller(service: Service, presented: str, scope: Scope) -> Caller:
    asked = time.monotonic()
    key = await service.key_lookups.find(presented)
    scope[_SECONDS] = time.monotonic() - asked
    return admitted(service, key, scope)


def admitted(service: Service, key: ApiKey, scope: Scope) -> Caller:
    """The caller of this request, by a key that is in force; counts the call. Raises RateLimited."""
    caller = Caller(key.id, frozenset(key.scopes), key.limits or {})
    service.key_uses.note(caller.key_id)
    # Only once the key is known to be good: nobody else may use up what it is allowed.
    if scope["path"].removeprefix(scope.get("root_path", "")) not in UNCOUNTED:
        service.rates.take_call(caller.key_id, caller.limits)
    scope[_CALLER] = caller  # a call is counted once
    return caller


async def authorize(
    any_of: SecurityScopes,
    credentials: Credentials,
    service: ServiceDep,
    request: Request,
) -> Caller:
    """The caller behind the presented key, which has one of the scopes.

    Raises Unauthenticated, RateLimited, Forbidden, Overloaded, Unavailable.

    FastAPI adds up the scopes of nested dependencies: a dependency that asks for this one must not name more of them.
    """
    caller = known_caller(request.scope)
    if caller is None:
        caller = await _caller(service, presented_key(credentials), request.scope)
    caller.require_any(any_of.scopes)
    return caller


RequestsCaller = Annotated[Caller, Security(authorize, scopes=["requests"])]
ReaderCaller = Annotated[Caller, Security(authorize, scopes=["requests", *keys.READS_ALL])]
CancellingCaller = Annotated[Caller, Security(authorize, scopes=["requests", "admin"])]
ApproverCaller = Annotated[Caller, Security(authorize, scopes=["approve"])]
ClassifyCaller = Annotated[Caller, Security(authorize, scopes=["classify"])]
AuditorCaller = Annotated[Caller, Security(authorize, scopes=["auditor", "admin"])]
AdminCaller = Annotated[Caller, Security(authorize, scopes=["admin"])]


def describe_scopes(document: dict[str, Any]) -> None:
    """Say in an OpenAPI document that one of an operation's scopes is enough: as alternatives, and in words."""
    for operation in (found for item in document["paths"].values() for found in item.values()):
        required = [pair for way in operation.get("security", []) for pair in way.items()]
        ways = [(name, scope) for name, scopes in required for scope in scopes]
        if ways:
            operation["security"] = [{name: [scope]} for name, scope in ways]
            names = " or ".join(f"`{scope}`" for _, scope in ways)
            operation["description"] = f"{operation.get('description', '')}\n\nScope: {names}.".strip()


def create_first_key(sessions: sessionmaker[Session]) -> str | None:
    """The plaintext of a new key with every scope when the database has no key in force, else None."""

    def in_force(session: Session) -> int:
        # Expired ones count: no key with every scope comes about because time has passed.
        return sum(key.revoked_at is None for key in keys.list_keys(session))

    with sessions() as session:
        if in_force(session):
            return None
        _, plaintext = keys.create_key(session, name="first-key", scopes=keys.SCOPES, actor="system")
        # Creating a key takes the audit lock, so of two first starts the second sees the first one's key here.
        if in_force(session) > 1:
            session.rollback()
            return None
        session.commit()
    return plaintext
