"""API keys held against the log: one that was put into the table by SQL, or widened there, acts as any other.

Keys are made and revoked, and nothing else happens to them; when they were last used is in no entry.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from app import entry_facts
from app.audit_chain import AuditBroken, iso
from app.entry_facts import time_or_none
from app.tables import ApiKey, AuditEntry

_UNREADABLE = (ValueError, TypeError, AttributeError, DataError)  # nothing that was written here
_ID = re.compile(r"key_[0-9a-f]{16}")
ANY_TIME = "any"  # an older entry says that it was revoked, and not when
_COLUMNS = (
    *(ApiKey.id, ApiKey.name, ApiKey.scopes, ApiKey.digest, ApiKey.limits),
    *(ApiKey.created_at, ApiKey.expires_at, ApiKey.revoked_at),
)


def hold(session: Session) -> None:
    """Every key against the entries about it, as of one moment. Raises AuditBroken."""
    told = _told(session)
    actors = select(AuditEntry.actor).where(AuditEntry.actor.startswith("key_", autoescape=True)).distinct()
    if made_up := sorted(actor for actor in session.scalars(actors) if _ID.fullmatch(actor) and actor not in told):
        raise _broken(made_up[0], "it did what the log has, which does not have the key")
    for key_id, shown in _shown(session).items():
        facts = told.pop(key_id, None)
        if facts is None:
            raise _broken(key_id, "the log does not have it")
        if facts["revoked_at"] == ANY_TIME and shown["revoked_at"] is not None:
            del facts["revoked_at"]
        if wrong := [name for name in facts if facts[name] != shown[name]]:
            raise _broken(key_id, f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what the log says")
    if told:
        raise _broken(min(told), "its row is missing")


def _shown(session: Session) -> dict[str, dict[str, Any]]:
    """What the rows say of each key. Raises AuditBroken, which names one that cannot be read."""
    try:
        return _read(session)
    except _UNREADABLE:
        for key_id in session.scalars(select(ApiKey.id).order_by(ApiKey.id)).all():
            try:
                _read(session, ApiKey.id == key_id)
            except _UNREADABLE:
                raise _broken(key_id, "it cannot be read") from None
        raise


def _read(session: Session, *where: ColumnElement[bool]) -> dict[str, dict[str, Any]]:
    return {
        row.id: {
            "scopes": row.scopes,
            "limits": row.limits or None,
            "expires_at": time_or_none(row.expires_at),
            "record_digest": entry_facts.key_digest(row.name, row.digest, row.created_at),
            "revoked_at": time_or_none(row.revoked_at),
        }
        for row in session.execute(select(*_COLUMNS).where(*where).order_by(ApiKey.id))
    }


def _told(session: Session) -> dict[str, dict[str, Any]]:
    """What the entries say of each key. What an older one does not state is missing. Raises AuditBroken."""
    told: dict[str, dict[str, Any]] = {}
    query = select(AuditEntry.subject, AuditEntry.action, AuditEntry.detail).order_by(AuditEntry.seq)
    for subject, action, detail in session.execute(query.where(AuditEntry.action.in_(("key.created", "key.revoked")))):
        try:
            told[subject] = _created(detail) if action == "key.created" else _revoked(told[subject], detail)
        except (ValueError, TypeError, LookupError, AttributeError):  # the log was made anew, and not by us
            raise _broken(subject, "its entries cannot be read") from None
    return told


def _created(detail: dict[str, Any]) -> dict[str, Any]:
    end = detail.get("expires_at")
    facts = {
        "scopes": detail["scopes"],
        "limits": detail.get("limits"),
        "expires_at": None if end is None else iso(datetime.fromisoformat(end)),
        "revoked_at": None,
    }
    return facts | {name: detail[name] for name in ("record_digest",) if name in detail}


def _revoked(facts: dict[str, Any], detail: dict[str, Any]) -> dict[str, Any]:
    return facts | {"revoked_at": detail.get("revoked_at", ANY_TIME)}


def _broken(key_id: str, what: str) -> AuditBroken:
    return AuditBroken(f"API key {key_id}: {what}", api_key_id=key_id)
