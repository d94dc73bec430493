"""API keys: ``lth_<16 hex of the id>_<43 url-safe characters>``. Only a digest of the secret is stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from app import audit, db, entry_facts
from app.audit_chain import iso
from app.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from app.tables import ApiKey, utcnow

SCOPES = ("requests", "classify", "scores", "approve", "auditor", "admin", "metrics")
"""``requests``: one's own. ``approve``: agree to what another key asked for. ``auditor``: read everything but texts.
``admin``: all of it, and revoke, which un-forgets."""

READS_ALL = ("admin", "auditor", "approve")
"""Scopes that see the requests of every key, and whose webhooks may be told of them."""

LIMITS = ("rate_per_minute", "classify_texts_per_minute", "requests_per_day", "texts_per_day", "active_prompts")
"""Settings that a key may have its own value of."""
MAX_LIMIT = 2**31 - 1

_PRESENTED = re.compile(r"lth_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NO_DIGEST = bytes(32)  # compared with when the id is unknown, so that this takes as long as a wrong secret


def create_key(
    session: Session,
    *,
    name: str,
    scopes: Sequence[str],
    actor: str,
    expires_at: datetime | None = None,
    limits: Mapping[str, int] | None = None,
    now: datetime | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its plaintext, which exists only in this return value. Raises InvalidInput."""
    now = now or utcnow()
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidInput("scopes must be one or more of " + ", ".join(SCOPES), field="scopes")
    if not name.strip() or len(name) > 100:
        raise InvalidInput("name must have 1 to 100 characters", field="name")
    if expires_at is not None and expires_at <= now:
        raise InvalidInput("expires must be in the future", field="expires")
    for limit, value in (limits or {}).items():
        if limit not in LIMITS:
            raise InvalidInput("a limit is one of " + ", ".join(LIMITS), field="limit")
        if not 0 <= value <= MAX_LIMIT:
            raise InvalidInput(f"{limit} must be 0 (none) to {MAX_LIMIT}", field="limit")
    suffix, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    ordered = [scope for scope in SCOPES if scope in scopes]
    key = ApiKey(
        id=f"key_{suffix}",
        name=name,
        scopes=ordered,
        digest=secret_digest(secret),
        limits=dict(limits) if limits else None,
        created_at=now,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    detail: dict[str, Any] = {
        "scopes": ordered,
        "record_digest": entry_facts.key_digest(name, key.digest, now),
    }
    if expires_at is not None:
        detail["expires_at"] = expires_at.isoformat()
    if limits:
        detail["limits"] = dict(limits)
    audit.append(session, actor=actor, action="key.created", subject=key.id, detail=detail)
    return key, f"lth_{suffix}_{secret}"


def authenticate(session: Session, presented: str, *, now: datetime | None = None) -> ApiKey:
    """The key that was presented. Raises Unauthenticated, with one message for every cause."""
    (answer,) = authenticate_all(session, [presented], now=now).values()
    if isinstance(answer, Unauthenticated):
        raise answer
    return answer


def authenticate_all(
    session: Session, presented: Collection[str], *, now: datetime | None = None
) -> dict[str, ApiKey | Unauthenticated]:
    """What ``authenticate`` says to each, with one query for all."""
    now = now or utcnow()
    matches = {one: _PRESENTED.fullmatch(one) for one in presented}
    ids = {f"key_{match[1]}" for match in matches.values() if match}
    query = select(ApiKey).where(ApiKey.id.in_(ids)).execution_options(populate_existing=True)
    found = {key.id: key for key in session.scalars(query)} if ids else {}
    answers: dict[str, ApiKey | Unauthenticated] = {}
    for one, match in matches.items():
        key = found.get(f"key_{match[1]}") if match else None
        same = hmac.compare_digest(secret_digest(match[2] if match else ""), key.digest if key else _NO_DIGEST)
        # Last: whatever is wrong with a key, its secret has been compared.
        if key is None or not same or not is_in_force(key, now):
            answers[one] = Unauthenticated("the API key is unknown, wrong, expired or revoked")
        else:
            answers[one] = key
    return answers


def in_force(session: Session, key_id: str, *, now: datetime | None = None) -> ApiKey:
    """A key that was authenticated before, by its id. Raises Unauthenticated once it is revoked or expired."""
    key = session.get(ApiKey, key_id, populate_existing=True)
    if key is None or not is_in_force(key, now or utcnow()):
        raise Unauthenticated("the API key is expired or revoked")
    return key


def is_in_force(key: ApiKey, now: datetime) -> bool:
    return key.revoked_at is None and not has_expired(key, now)


def has_expired(key: ApiKey, now: datetime) -> bool:
    return key.expires_at is not None and key.expires_at <= now


def require(held: Collection[str], *any_of: str) -> None:
    """Raises Forbidden."""
    if not any(scope in held for scope in any_of):
        one = "the scope" if len(any_of) == 1 else "one of the scopes"
        names = ", ".join(f"'{scope}'" for scope in any_of)
        raise Forbidden(f"this needs an API key with {one} {names}", scope=any_of[0], scopes=list(any_of))


def note_uses(session: Session, uses: Mapping[str, datetime]) -> None:
    """When keys were last used, as far as that is later than what is known."""
    for key_id, at in sorted(uses.items()):  # in one order, so that two replicas cannot wait for each other
        session.execute(
            update(ApiKey)
            .where(ApiKey.id == key_id, or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < at))
            .values(last_used_at=at)
            .execution_options(synchronize_session=False)
        )


def list_keys(session: Session) -> list[ApiKey]:
    """Oldest first, revoked ones included."""
    return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)))


def revoke_key(session: Session, key_id: str, *, actor: str, detail: Mapping[str, str] | None = None) -> ApiKey:
    """``detail``: for the audit log. Raises NotFound, Conflict (already revoked)."""
    db.begin_write(session)
    query = select(ApiKey).where(ApiKey.id == key_id).with_for_update()
    key = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if key is None:
        raise NotFound("no such API key")
    if key.revoked_at is not None:
        raise Conflict("the API key is already revoked")
    key.revoked_at = utcnow()
    told = {**(detail or {}), "revoked_at": iso(key.revoked_at)}
    audit.append(session, actor=actor, action="key.revoked", subject=key.id, detail=told)
    return key


def secret_digest(secret: str) -> bytes:
    """SHA-256, on purpose: the secret is 256 random bits, so there is no guessing for a slow hash to slow down."""
    return hashlib.sha256(secret.encode()).digest()
