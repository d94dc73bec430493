"""SQLAlchemy tables. The database is the queue and the only shared state.

Times are timezone-aware UTC. Ids sort by creation time (``new_id``), so an id is also a pagination cursor.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    TypeDecorator,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class RequestState(StrEnum):
    """``pending → training → evaluating → active → revoked``; ``failed`` and ``cancelled`` are final as well.

    ``awaiting_approval``: trained and checked, and nobody else has agreed yet; approved, it is ``pending`` again and is
    checked on the set as it is then. ``suspended``: out of force because an earlier active set was restored; it can
    come back.
    """

    PENDING = "pending"
    TRAINING = "training"
    EVALUATING = "evaluating"
    AWAITING_APPROVAL = "awaiting_approval"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PromptState(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"


class DeliveryState(StrEnum):
    PENDING = "pending"
    SENDING = "sending"  # until ``next_at``; whoever sends it and has not said how it went by then is gone
    DELIVERED = "delivered"
    FAILED = "failed"


RUNNING = (RequestState.TRAINING, RequestState.EVALUATING)
LIVE = (RequestState.PENDING, *RUNNING, RequestState.AWAITING_APPROVAL, RequestState.ACTIVE)
"""States whose forget texts must stay out of every retain set (promise 9)."""
OPEN = (RequestState.PENDING, *RUNNING, RequestState.AWAITING_APPROVAL)
"""States of a request that is still owed to somebody."""


def utcnow() -> datetime:
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """``prefix_`` + 12 hex digits of milliseconds + 16 random hex digits: unguessable, sorts by time."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on every dialect (SQLite drops the zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("naive datetime")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


BigIntPk = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[str]: JSON}


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    scopes: Mapped[list[str]]
    digest: Mapped[bytes] = mapped_column(LargeBinary(32))  # SHA-256 of the 256-bit secret
    limits: Mapped[dict[str, Any] | None] = mapped_column(
        JSON
    )  # its own where they differ from the settings' (app.quotas)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # within a minute: not every request writes
    revoked_at: Mapped[datetime | None]


class UnlearnRequest(Base):
    """One erasure request. ``wrapped_key`` opens ``sealed_texts`` and the checkpoint; both go when the request ends."""

    __tablename__ = "unlearn_requests"
    __table_args__ = (
        Index("ix_unlearn_requests_state_id", "state", "id"),
        Index("ix_unlearn_requests_api_key_id_id", "api_key_id", "id"),
        Index("ix_unlearn_requests_set_digest", "set_digest"),
        Index("ix_unlearn_requests_received_at", "received_at"),
        Index("ix_unlearn_requests_due_at", "due_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    state: Mapped[str] = mapped_column(String(20))
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    num_texts: Mapped[int]
    reason: Mapped[str | None] = mapped_column(String(500))
    options: Mapped[dict[str, Any]]
    fingerprint: Mapped[str] = mapped_column(String(64))  # of the model the prompt is to be trained for
    wrapped_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    sealed_texts: Mapped[bytes | None] = mapped_column(LargeBinary)
    shred_at: Mapped[datetime | None]  # ended, and its texts are kept until then (`keep_texts_hours`)
    set_digest: Mapped[bytes | None] = mapped_column(LargeBinary(32))  # keyed, of texts, labels and options: dedupe

    received_at: Mapped[datetime | None]  # when the person asked, which may be before the operator did here
    due_at: Mapped[datetime | None]  # by law: a month after the person's request was received
    expires_at: Mapped[datetime | None]  # then the prompt is revoked, and what it hid is answered again
    approval_required: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    approved_by: Mapped[str | None] = mapped_column(String(40))
    approved_at: Mapped[datetime | None]

    attempt: Mapped[int] = mapped_column(default=0)  # fences off a worker that lost its lease
    lease_expiries: Mapped[int] = mapped_column(default=0, server_default="0")  # `attempt` may go down again, this not
    lease_owner: Mapped[str | None] = mapped_column(String(100))
    lease_expires_at: Mapped[datetime | None]
    last_step_at: Mapped[datetime | None]  # a heartbeat proves a live process, this proves progress
    rung_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)

    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    failure: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # {"code", "detail"}


class ForgetDigest(Base):
    """Keyed digest (HMAC) of one normalised forget text: dedupe and retain filtering without the text."""

    __tablename__ = "forget_digests"

    request_id: Mapped[str] = mapped_column(ForeignKey("unlearn_requests.id", ondelete="CASCADE"), primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)


class Checkpoint(Base):
    """The last training checkpoint, sealed under the request's key, so that any worker can resume."""

    __tablename__ = "checkpoints"

    request_id: Mapped[str] = mapped_column(ForeignKey("unlearn_requests.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int]
    updated_at: Mapped[datetime]
    sealed: Mapped[bytes] = mapped_column(LargeBinary)


class Evidence(Base):
    """What the checks left to look at (``app.evidence``), sealed under the request's key until it has a prompt.

    Without ``sealed`` it could not be made, and ``absent`` is the kind of error.
    """

    __tablename__ = "evidence"

    request_id: Mapped[str] = mapped_column(ForeignKey("unlearn_requests.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime]
    sealed: Mapped[bytes | None] = mapped_column(LargeBinary)
    absent: Mapped[str | None] = mapped_column(String(60))


class RequestEvent(Base):
    """Progress and state changes, in order; the SSE stream reads these rows and ``id`` is its event id."""

    __tablename__ = "request_events"
    __table_args__ = (Index("ix_request_events_request_id_id", "request_id", "id"),)

    id: Mapped[int] = mapped_column(BigIntPk, primary_key=True, autoincrement=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("unlearn_requests.id", ondelete="CASCADE"))
    at: Mapped[datetime]
    type: Mapped[str] = mapped_column(String(20))  # "state" | "progress"
    data: Mapped[dict[str, Any]]


class Prompt(Base):
    """A trained soft prompt and its gate, sealed under a key of their own (they are personal data too).

    Key and sealed bytes go when the prompt is revoked; what stays is the record.
    """

    __tablename__ = "prompts"
    __table_args__ = (Index("ix_prompts_state_position", "state", "position"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("unlearn_requests.id"), unique=True)
    state: Mapped[str] = mapped_column(String(20))
    position: Mapped[int]  # order of activation = order of concatenation
    fingerprint: Mapped[str] = mapped_column(String(64))
    num_virtual_tokens: Mapped[int]
    hidden_size: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))  # SHA-256 of the safetensors bytes
    mode: Mapped[str] = mapped_column(String(20))
    gate_digest: Mapped[str | None] = mapped_column(String(64))  # SHA-256 of the gate's bytes; mode routed only
    gate_space: Mapped[str | None] = mapped_column(ForeignKey("gate_spaces.digest"))
    wrapped_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    sealed: Mapped[bytes | None] = mapped_column(LargeBinary)
    sealed_gate: Mapped[bytes | None] = mapped_column(LargeBinary)
    sealed_canaries: Mapped[bytes | None] = mapped_column(LargeBinary)  # mode concatenate only
    metrics: Mapped[dict[str, Any]]
    seconds_to_active: Mapped[float] = mapped_column(Float)
    activated_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    revoked_by: Mapped[str | None] = mapped_column(String(40))
    revoke_code: Mapped[str | None] = mapped_column(String(30))
    revoke_reason: Mapped[str | None] = mapped_column(String(500))
    # Where two persons are needed: who asked first. Another one's revoke carries it out.
    revoke_asked_by: Mapped[str | None] = mapped_column(String(40))
    revoke_asked_at: Mapped[datetime | None]


class GateSpace(Base):
    """What gates are directions in: statistics of the retain set, shared by all requests that were fitted with it."""

    __tablename__ = "gate_spaces"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)  # SHA-256 of ``data``
    source: Mapped[str] = mapped_column(String(64), unique=True)  # of model, layers and retain rows
    created_at: Mapped[datetime]
    data: Mapped[bytes] = mapped_column(LargeBinary)


class ActiveSetVersion(Base):
    """One active set that is or was in force. Written once; only ``checks`` comes later, where they run afterwards."""

    __tablename__ = "active_set_versions"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(64))
    size: Mapped[int]
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(100))
    reason: Mapped[str | None] = mapped_column(String(500))
    checks: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class ActiveSetMember(Base):
    """In which versions a prompt was in force: from ``from_version`` to before ``to_version`` (None: it still is)."""

    __tablename__ = "active_set_members"

    prompt_id: Mapped[str] = mapped_column(ForeignKey("prompts.id"), primary_key=True)
    from_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    to_version: Mapped[int | None]


class ActiveSet(Base):
    """The single row (id 1) that names the active set in force. Its version moves with every activate and revoke."""

    __tablename__ = "active_set"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))  # over the ordered digests of prompts and gates
    updated_at: Mapped[datetime]


class AuditEntry(Base):
    """Append-only, hash-chained: ``hash = SHA-256(prev_hash ‖ canonical JSON of the entry)``."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_subject_seq", "subject", "seq"),)

    seq: Mapped[int] = mapped_column(BigIntPk, primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(String(100))  # API key id, worker name or "system"
    action: Mapped[str] = mapped_column(String(50))
    subject: Mapped[str] = mapped_column(String(40))
    detail: Mapped[dict[str, Any]]
    prev_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class AuditCheckpoint(Base):
    """A signed statement that the log had ``seq`` entries, ending in ``hash``. A copy kept elsewhere proves a cut."""

    __tablename__ = "audit_checkpoints"

    seq: Mapped[int] = mapped_column(BigIntPk, primary_key=True, autoincrement=False)
    hash: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime]
    key_id: Mapped[str] = mapped_column(String(64))
    signature: Mapped[bytes] = mapped_column(LargeBinary(64))  # Ed25519


class Secret(Base):
    """A key of the deployment, wrapped under the master key, so that it outlives the master key's rotation."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    wrapped: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]


class PendingShred(Base):
    """A key share that is to be destroyed in the key store: written with what shreds it, deleted when it is done."""

    __tablename__ = "pending_shreds"

    share_id: Mapped[bytes] = mapped_column(LargeBinary(16), primary_key=True)
    at: Mapped[datetime]


class PreparedShare(Base):
    """A key share of a row that is yet to come, whose transaction deletes this; left behind, the share is destroyed."""

    __tablename__ = "prepared_shares"

    share_id: Mapped[bytes] = mapped_column(LargeBinary(16), primary_key=True)
    at: Mapped[datetime]


class IdempotencyKey(Base):
    """What an ``Idempotency-Key`` of an API key led to. Digests are keyed: neither key nor body is kept."""

    __tablename__ = "idempotency_keys"

    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    body_digest: Mapped[bytes] = mapped_column(LargeBinary(32))
    request_id: Mapped[str] = mapped_column(ForeignKey("unlearn_requests.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]


class EndedSession(Base):
    """A session of the console that somebody logged out of, until it would have ended by itself."""

    __tablename__ = "ended_sessions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    expires_at: Mapped[datetime]


class Webhook(Base):
    """Where an API key's owner wants state changes of its requests told. The signing secret is sealed.

    ``all_requests``: of everybody's requests; for keys that may read those.
    """

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    url: Mapped[str] = mapped_column(String(2000))
    states: Mapped[list[str]]  # told of these; empty: of all
    all_requests: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    wrapped_key: Mapped[bytes] = mapped_column(LargeBinary)
    sealed_secret: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]


class WebhookDelivery(Base):
    """One message to one webhook, written with the change that it tells of; kept as the log of its delivery."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_state_next_at", "state", "next_at"),
        Index("ix_webhook_deliveries_webhook_id_id", "webhook_id", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    request_id: Mapped[str | None] = mapped_column(ForeignKey("unlearn_requests.id", ondelete="CASCADE"))  # of no ping
    payload: Mapped[dict[str, Any]]  # ids, states and times only
    state: Mapped[str] = mapped_column(String(20))
    attempts: Mapped[int] = mapped_column(default=0)  # fences off whoever was too slow
    next_at: Mapped[datetime | None]  # when it is due, or when a delivery under way counts as lost
    created_at: Mapped[datetime]
    sent_at: Mapped[datetime | None]  # when its last attempt began
    delivered_at: Mapped[datetime | None]
    last_status: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(String(100))  # a kind, never a body
