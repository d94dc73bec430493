"""A log with checkpoints in a database, and the forger's tools: chains made anew, signed by whoever is at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.orm import Session, sessionmaker

from app import audit, audit_export
from app.audit_chain import CHECKPOINT, GENESIS, checkpoint_statement, entry_hash
from app.signing import Signer
from app.signing_key import load_signer
from app.tables import AuditCheckpoint, AuditEntry
from app.vault import Vault

Sessions = sessionmaker[Session]
NOW = "2026-01-02T03:04:05.000006+00:00"


def fill(sessions: Sessions, count: int) -> None:
    for number in range(count):
        with sessions.begin() as session:
            detail = {"number": number, "ratio": 0.1 + number, "name": "é", "nested": {"b": [1, None], "a": True}}
            audit.append(session, actor="key_1", action="test.done", subject=f"req_{number}", detail=detail)


def make_checkpoint(sessions: Sessions, vault: Vault) -> AuditCheckpoint:
    with sessions.begin() as session:
        return audit.checkpoint(session, load_signer(session, vault))


def export_lines(sessions: Sessions, vault: Vault) -> list[bytes]:
    with sessions.begin() as session:
        signer = load_signer(session, vault)
        head = audit.checkpoint(session, signer)
    return b"".join(audit.export(sessions, signer, head)).splitlines(keepends=True)


def the_signer(sessions: Sessions, vault: Vault) -> Signer:
    with sessions.begin() as session:
        return load_signer(session, vault)


def rewrite_database(sessions: Sessions, start: int, actor: str = "nobody") -> None:
    """Change entry ``start`` and make the chain anew behind it, as somebody with the database's password could."""
    with sessions.begin() as session:
        session.execute(update(AuditEntry).where(AuditEntry.seq == start).values(actor=actor))
        prev = GENESIS if start == 1 else session.get_one(AuditEntry, start - 1).hash
        for entry in session.query(AuditEntry).where(AuditEntry.seq >= start).order_by(AuditEntry.seq):
            entry.prev_hash = prev
            prev = entry.hash = entry_hash(
                prev,
                seq=entry.seq,
                at=entry.at,
                actor=entry.actor,
                action=entry.action,
                subject=entry.subject,
                detail=entry.detail,
            )


def cut_database(sessions: Sessions, last: int) -> None:
    with sessions.begin() as session:
        session.execute(delete(AuditEntry).where(AuditEntry.seq > last))


def forge_export(entries: Sequence[dict[str, Any]], signer: Signer) -> list[bytes]:
    """An export that is right in itself: hashes, one checkpoint and head made anew, signed by ``signer``."""
    prev, made = GENESIS, []
    for seq, entry in enumerate(entries, start=1):
        entry = {**entry, "seq": seq, "prev_hash": prev}
        at = datetime.fromisoformat(entry["at"]).astimezone(UTC)
        fields = {name: entry[name] for name in ("seq", "actor", "action", "subject", "detail")}
        entry["hash"] = prev = entry_hash(prev, at=at, **fields)
        made.append(entry)
    key = signer.public
    statement = checkpoint_statement(seq=len(made), hash=prev, at=NOW, key_id=key.key_id)
    signature = signer.sign(CHECKPOINT, statement)
    point = {"kind": "checkpoint", "public_key": key.hex(), "signature": signature, **statement}
    return with_head(audit_export.to_lines([*made, point]).splitlines(keepends=True), signer)


def with_head(lines: Sequence[bytes], signer: Signer) -> list[bytes]:
    """Lines that end in one checkpoint, and a last line that signs them as they are."""
    point = json.loads(lines[-1])
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    head = audit_export.head_line(signer, seq=point["seq"], hash=point["hash"], at=NOW, checkpoints=1, digest=digest)
    return [*lines, head]


def entries_of(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    return [document for document in map(json.loads, lines) if document["kind"] == "entry"]
