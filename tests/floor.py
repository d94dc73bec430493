"""Short ways to put requests into a database, shared by the tests of the floor."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from app import active_set, approval, job_queue, lifecycle, shredding
from app.active_set import TrainedGate
from app.lifecycle import Claim, ForgetText
from app.sealing import seal_prompt
from app.tables import utcnow
from app.terms import Terms, agree
from app.vault import Vault

FINGERPRINT = "f" * 64
SECRET = "Zebulon Quist was dreadful in this film"
Sessions = sessionmaker[Session]


def submit(
    sessions: Sessions,
    vault: Vault,
    *texts: str,
    terms: Terms | None = None,
    api_key_id: str | None = None,
    options: dict[str, Any] | None = None,
    set_digest: bytes | None = None,
) -> str:
    """A pending request; its id."""
    with sessions.begin() as session:
        return lifecycle.create_request(
            session,
            vault,
            texts=[ForgetText(text, "negative") for text in texts or (SECRET,)],
            reason="asked by mail",
            options=options or {},
            fingerprint=FINGERPRINT,
            api_key_id=api_key_id,
            terms=terms,
            set_digest=set_digest,
        ).id


def terms(*, approval: bool = False, minutes: float | None = None) -> Terms:
    """Terms of a request that was received now, and that expires in so many minutes."""
    now = utcnow()
    expires_at = None if minutes is None else now + timedelta(minutes=minutes)
    return agree(received_at=None, expires_at=expires_at, approval_required=approval, months=1, now=now)


def await_approval(sessions: Sessions, claim: Claim, *, data: bytes = b"tensor") -> None:
    """Check a claimed request and leave it to somebody else's decision."""
    digest = hashlib.sha256(data).hexdigest()
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, claim)
    with sessions.begin() as session:
        approval.await_approval(session, claim, metrics={"forget_abstain": 1.0}, prompt_digest=digest, gate_digest=None)


def take(
    sessions: Sessions, request_id: str, *, owner: str = "w1", lease: float = 60, attempts: int = 3
) -> Claim | None:
    with sessions.begin() as session:
        return job_queue.claim(session, request_id, owner=owner, lease_seconds=lease, max_attempts=attempts)


def must_take(sessions: Sessions, request_id: str, *, owner: str = "w1", lease: float = 60, attempts: int = 3) -> Claim:
    claim = take(sessions, request_id, owner=owner, lease=lease, attempts=attempts)
    assert claim is not None
    return claim


def activate(
    sessions: Sessions,
    vault: Vault,
    claim: Claim,
    *,
    data: bytes = b"tensor",
    version: int,
    gate: TrainedGate | None = None,
    metrics: dict[str, Any] | None = None,
) -> str:
    """Check and activate a claimed request; the prompt's id."""
    with sessions.begin() as session:  # a transaction for each transition, see app.lifecycle
        if lifecycle.get_request(session, claim.request_id).state != "evaluating":
            lifecycle.start_evaluating(session, claim)
    key = shredding.prepare_key(sessions, vault)
    prompt = seal_prompt(vault, key, prompt=data, digest=hashlib.sha256(data).hexdigest(), gate=gate)
    with sessions.begin() as session:
        return active_set.activate(
            session,
            claim,
            prompt,
            fingerprint=FINGERPRINT,
            num_virtual_tokens=30,
            hidden_size=576,
            metrics=metrics or {"forget_abstain": 1.0},
            expected_version=version,
        ).id


def state(sessions: Sessions, request_id: str) -> str:
    with sessions() as session:
        return lifecycle.get_request(session, request_id).state
