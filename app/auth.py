"""API keys at the door: ``Authorization: Bearer lth_…`` → the key's id and scopes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.orm import Session, sessionmaker
from starlette.datastructures import Headers
from starlette.types import Scope

from app import keys
from app.deps import Service, ServiceDep
from app.errors import Unauthenticated

_bearer = HTTPBearer(
    auto_error=False, scheme_name="apiKey", description="An API key, `lth_…`. Each operation names the scope it needs."
)


@dataclass(frozen=True)
class Caller:
    """Who asks: what audit entries name as actor, and what they may do."""

    key_id: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """Raises Forbidden."""
        keys.require(self.scopes, scope)


_CALLER = "letheon.caller"  # of a scope


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def presented_key(credentials: HTTPAuthorizationCredentials | None) -> str:
    """Raises Unauthenticated."""
    if credentials is None:
        raise Unauthenticated("send an API key as 'Authorization: Bearer lth_…'")
    return credentials.credentials


def admit(scope: Scope) -> None:
    """Before a body is read, whoever sends it: the key in the headers, for ``authorize``. Raises Unauthenticated."""
    scheme, key = get_authorization_scheme_param(Headers(scope=scope).get("authorization"))
    credentials = HTTPAuthorizationCredentials(scheme=scheme, credentials=key) if scheme.lower() == "bearer" else None
    scope[_CALLER] = _caller(scope["app"].state.service, presented_key(credentials))


def _caller(service: Service, presented: str) -> Caller:
    with service.sessions() as session:
        key = keys.authenticate(session, presented)
        return Caller(key.id, frozenset(key.scopes))


async def authorize(
    required: SecurityScopes,
    credentials: Credentials,
    service: ServiceDep,
    request: Request,
) -> Caller:
    """The caller behind the presented key. Raises Unauthenticated, Forbidden."""
    caller: Caller | None = request.scope.get(_CALLER)
    if caller is None:
        caller = await run_in_threadpool(_caller, service, presented_key(credentials))
    for scope in required.scopes:
        caller.require(scope)
    return caller


RequestsCaller = Annotated[Caller, Security(authorize, scopes=["requests"])]
ApproveCaller = Annotated[Caller, Security(authorize, scopes=["approve"])]
ClassifyCaller = Annotated[Caller, Security(authorize, scopes=["classify"])]
AdminCaller = Annotated[Caller, Security(authorize, scopes=["admin"])]


def create_first_key(sessions: sessionmaker[Session]) -> str | None:
    """The plaintext of a new key with every scope when the database has no key in force, else None."""

    def in_force(session: Session) -> int:
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
