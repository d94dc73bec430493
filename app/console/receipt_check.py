"""A receipt that somebody has kept, held against this deployment: its signature, and the log that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import receipt_format
from app.receipt_format import ReceiptInvalid
from app.signing_key import find_public_key
from app.tables import AuditEntry, UnlearnRequest
from app.vault import Vault
from app.words import STATES


@dataclass(frozen=True)
class Verdict:
    """``good``: the file is what was given out, and the log still says so. ``since``: what happened afterwards."""

    good: bool
    said: str
    request_id: str | None = None
    since: str | None = None


def examine(session: Session, vault: Vault, data: bytes) -> Verdict:
    """Raises VaultError."""
    public = find_public_key(session, vault)
    if public is None:
        return Verdict(False, "nothing was ever signed here")
    try:
        receipt, _ = receipt_format.verify(data, public)
    except ReceiptInvalid as error:
        return Verdict(False, error.detail)
    wrong = _first_other(session, receipt["audit"])
    if wrong is not None:
        return Verdict(False, f"its signature holds, but the log no longer has entry {wrong} as it names it")
    stated = receipt["request"]
    request = session.get(UnlearnRequest, stated["id"])
    if request is None:
        return Verdict(False, "its signature holds, but there is no such request here")
    now = STATES[request.state]
    since = None if request.state == stated["state"] else f"Since then the request has gone on: {now.lower()}."
    return Verdict(True, f"{STATES[stated['state']].lower()} when it was made", request.id, since)


def _first_other(session: Session, entries: list[dict[str, Any]]) -> int | None:
    """The first entry that the log does not have, or has with another hash."""
    query = select(AuditEntry.seq, AuditEntry.hash).where(AuditEntry.seq.in_([entry["seq"] for entry in entries]))
    hashes = dict(session.execute(query).all())
    return next((entry["seq"] for entry in entries if hashes.get(entry["seq"]) != entry["hash"]), None)
