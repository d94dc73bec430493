"""What makes the audit log a chain, and what a checkpoint says of it: the same for a database and for an export.

``hash = SHA-256(prev_hash ‖ canonical JSON of the entry)``. The chain shows any altered, removed or inserted entry
before its end. A signed checkpoint shows that the log once had ``seq`` entries and ended in ``hash``: a chain that was
made anew from some entry on, or cut, no longer has that entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from app.errors import LetheonError
from app.signing import PublicKey, canonical

GENESIS = "0" * 64
CHECKPOINT = "letheon audit checkpoint v1"  # the signature's purpose
_HASHED = ("action", "actor", "at", "detail", "seq", "subject")


class AuditBroken(LetheonError):
    """The log is not what was written; ``extra['seq']`` is the first entry that is wrong, as far as can be told.

    Or a row of the state is not what the log says of it; then ``extra`` has its ``request_id``, ``api_key_id`` or, of
    an active set, ``version``.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "audit-broken"
    title: ClassVar[str] = "The audit log, or what it tells of, was altered"


class Chain:
    """A walk along the log: how many entries, and the hash of the last."""

    def __init__(self, seq: int = 0, head: str = GENESIS) -> None:
        self.seq, self.head = seq, head

    def add(self, entry: Mapping[str, Any]) -> None:
        """The next entry, with ``at`` as ``iso`` writes it. Raises AuditBroken."""
        seq = self.seq + 1
        expected = _hash(self.head, {**entry, "seq": seq})
        if entry["seq"] != seq or entry["prev_hash"] != self.head or entry["hash"] != expected:
            raise AuditBroken(f"audit entry {seq} is missing or was altered", seq=seq)
        self.seq, self.head = seq, expected


def entry_hash(
    prev_hash: str, *, seq: int, at: datetime, actor: str, action: str, subject: str, detail: dict[str, Any]
) -> str:
    entry = {"action": action, "actor": actor, "at": iso(at), "detail": detail, "seq": seq, "subject": subject}
    return _hash(prev_hash, entry)


def iso(at: datetime) -> str:
    """A time as entries, checkpoints and receipts write it."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def checkpoint_statement(*, seq: int, hash: str, at: str, key_id: str) -> dict[str, Any]:
    """What is signed: the log had ``seq`` entries at that time, and the last had this hash."""
    return {"at": at, "hash": hash, "key_id": key_id, "seq": seq}


def check_checkpoint(checkpoint: Mapping[str, Any], public_key: PublicKey | None, entry: str) -> None:
    """Hold a checkpoint against the hash of the entry it names and, with a key, its signature. Raises AuditBroken."""
    seq = checkpoint["seq"]
    statement = {name: checkpoint[name] for name in ("at", "hash", "key_id", "seq")}
    if public_key is not None:
        if checkpoint["key_id"] != public_key.key_id:
            raise AuditBroken(f"the checkpoint of entry {seq} is signed by another key", seq=seq)
        if not public_key.verifies(CHECKPOINT, statement, checkpoint["signature"]):
            raise AuditBroken(f"the checkpoint of entry {seq} was altered: its signature does not hold", seq=seq)
    if checkpoint["hash"] != entry:
        raise AuditBroken(f"the log was rewritten at entry {seq} or before: a signed checkpoint has another", seq=seq)


def _hash(prev_hash: str, entry: Mapping[str, Any]) -> str:
    body = canonical({name: entry[name] for name in _HASHED})
    return hashlib.sha256(prev_hash.encode() + body).hexdigest()
