"""What the audit log and the receipts look like over the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.schemas import Row


class AuditEntryOut(Row):
    """One thing that happened: ids, digests and codes, never free text."""

    seq: int
    at: datetime
    actor: str = Field(description="The id of an API key, a worker, `cli` or `system`.")
    action: str
    subject: str
    detail: dict[str, Any]
    prev_hash: str
    hash: str = Field(description="SHA-256 over `prev_hash` and the entry as canonical JSON.")


class AuditPage(BaseModel):
    items: list[AuditEntryOut]
    next_before: int | None = Field(description="Ask again with this as `before`; null on the last page.")


class AuditCheckpointOut(BaseModel):
    """A signed statement: at that time the log had `seq` entries, and the last one had this hash."""

    kind: Literal["checkpoint"]
    seq: int
    hash: str
    at: str
    key_id: str
    public_key: str
    signature: str = Field(description="Ed25519, in hex.")


class PublicKeyOut(BaseModel):
    """What checkpoints, exports and receipts are verified with. Keep a copy where this server cannot reach it."""

    algorithm: Literal["Ed25519"]
    key_id: str = Field(description="The beginning of the key's SHA-256.")
    public_key: str = Field(description="32 bytes in hex.")


class SignedReceipt(BaseModel):
    """A receipt and the signature over its bytes as they are sent: verify it with `letheon receipt verify`."""

    receipt: dict[str, Any]
    signature: str = Field(description="Ed25519, in hex.")
