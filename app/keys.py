"""API keys: ``lth_<16 hex of the id>_<43 url-safe characters>``. Only a digest of the secret is stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import audit, db
from app.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from app.tables import ApiKey, utcnow

SCOPES = ("requests", "classify", "scores", "approve", "auditor", "admin", "metrics")
"""``requests``: one's own. ``approve``: agree to what another key asked for. ``auditor``: read everything but texts.
``admin``: all of it, and revoke, which un-forgets."""

_PRESENTED = re.compile(r"lth_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NO_DIGEST = bytes(32)  # compared with when the id is unknown, so that this takes as long as a wrong secret


def create_key(session: Session, *, name: str, scopes: Sequence[str], actor: str) -> tuple[ApiKey, str]:
    """A new key and its plaintext, which exists only in this return value. Raises InvalidInput."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidInput("scopes must be one or more of " + ", ".join(SCOPES), field="scopes")
    if not name.strip() or len(name) > 100:
        raise InvalidInput("name must have 1 to 100 characters", field="name")
    suffix, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    ordered = [scope for scope in SCOPES if scope in scopes]
    key = ApiKey(id=f"key_{suffix}", name=name, scopes=ordered, digest=secret_digest(secret), created_at=utcnow())
    session.add(key)
    session.flush()
    audit.append(session, actor=actor, action="key.created", subject=key.id, detail={"scopes": ordered})
    return key, f"lth_{suffix}_{secret}"


def authenticate(session: Session, presented: str) -> ApiKey:
    """The key that was presented. Raises Unauthenticated, with one message for every cause."""
    match = _PRESENTED.fullmatch(presented)
    key = session.get(ApiKey, f"key_{match[1]}", populate_existing=True) if match else None
    same = hmac.compare_digest(secret_digest(match[2] if match else ""), key.digest if key else _NO_DIGEST)
    if key is None or not same or key.revoked_at is not None:
        raise Unauthenticated("the API key is unknown, wrong or revoked")
    return key


def require(scopes: Collection[str], scope: str) -> None:
    """Raises Forbidden."""
    if scope not in scopes:
        raise Forbidden(f"this needs an API key with the scope '{scope}'", scope=scope)


def list_keys(session: Session) -> list[ApiKey]:
    """Oldest first, revoked ones included."""
    return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)))


def revoke_key(session: Session, key_id: str, *, actor: str) -> ApiKey:
    """Raises NotFound, Conflict (already revoked)."""
    db.begin_write(session)
    query = select(ApiKey).where(ApiKey.id == key_id).with_for_update()
    key = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if key is None:
        raise NotFound("no such API key")
    if key.revoked_at is not None:
        raise Conflict("the API key is already revoked")
    key.revoked_at = utcnow()
    audit.append(session, actor=actor, action="key.revoked", subject=key.id, detail={})
    return key


def secret_digest(secret: str) -> bytes:
    """SHA-256, on purpose: the secret is 256 random bits, so there is no guessing for a slow hash to slow down."""
    return hashlib.sha256(secret.encode()).digest()
