"""The prompts in force. One row names the set; every activation, revocation and restoration moves its version.

The row is locked first, so these happen one after another. A set that was in force once is never altered: its version
keeps its digest and its members (``app.set_history``). Nothing here commits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import approval, audit, db, entry_facts, evidence, set_history, shredding
from app.audit_chain import iso
from app.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    NotReady,
    StaleActiveSet,
    VaultError,
)
from app.lifecycle import CancelRequested, Claim, check_cursor, hold, lock_request, move
from app.settings import Mode
from app.tables import ActiveSet, ForgetDigest, GateSpace, Prompt, PromptState, RequestState, utcnow
from app.vault import Vault

READ_CHUNK = 200  # prompts per statement: a row of a large model holds megabytes


@dataclass(frozen=True)
class ActiveSetView:
    version: int
    digest: str


@dataclass(frozen=True)
class Member:
    """What names one prompt in force, and says whether it can be served. ``gate_digest`` is None without a gate."""

    id: str
    digest: str
    gate_digest: str | None
    gate_space: str | None
    mode: str

    @property
    def name(self) -> str:
        return self.digest if self.gate_digest is None else f"{self.digest}+{self.gate_digest}"


@dataclass(frozen=True, repr=False)
class TrainedGate:
    """A gate's bytes, their SHA-256 in hex, and the digest of the space it was fitted in."""

    data: bytes
    digest: str
    space: str


@dataclass(frozen=True, repr=False)
class SealedPrompt:
    """What ``activate`` stores, made by ``app.sealing``. With a gate it is of mode ``routed``, else of the other."""

    id: str
    wrapped_key: bytes
    digest: str
    sealed: bytes
    gate: TrainedGate | None
    sealed_gate: bytes | None
    sealed_canaries: bytes | None


def set_digest(names: Iterable[str]) -> str:
    """The digest of a stack: SHA-256 over the ordered names of its members."""
    return hashlib.sha256(json.dumps(list(names), separators=(",", ":")).encode()).hexdigest()


def read_active_set(session: Session) -> ActiveSetView:
    """One indexed query. Raises NotReady when the row is missing."""
    row = session.execute(select(ActiveSet.version, ActiveSet.digest).where(ActiveSet.id == 1)).one_or_none()
    if row is None:
        raise NotReady("the active set has no row; run the migrations")
    return ActiveSetView(row.version, row.digest)


_MEMBER = (Prompt.id, Prompt.digest, Prompt.gate_digest, Prompt.gate_space, Prompt.mode)


def read_members(session: Session) -> tuple[ActiveSetView, list[Member]]:
    """The active set and its members, in order, as of one moment: a single statement. Raises NotReady."""
    query = (
        select(ActiveSet.version, ActiveSet.digest.label("set_digest"), *_MEMBER)
        .outerjoin(Prompt, Prompt.state == PromptState.ACTIVE)
        .where(ActiveSet.id == 1)
        .order_by(Prompt.position)
    )
    rows = session.execute(query).all()
    if not rows:
        raise NotReady("the active set has no row; run the migrations")
    view = ActiveSetView(rows[0].version, rows[0].set_digest)
    members = [Member(r.id, r.digest, r.gate_digest, r.gate_space, r.mode) for r in rows if r.id is not None]
    if set_digest(member.name for member in members) != view.digest:
        raise NotReady("the active prompts do not match the active set's digest")
    return view, members


def read_prompts(session: Session, ids: Sequence[str]) -> list[Prompt]:
    """Whole rows, sealed bytes included, in any order; those that are gone are missing."""
    query = select(Prompt).execution_options(populate_existing=True)
    chunks = [ids[start : start + READ_CHUNK] for start in range(0, len(ids), READ_CHUNK)]
    return [row for chunk in chunks for row in session.scalars(query.where(Prompt.id.in_(chunk)))]


def read_records(session: Session, ids: Sequence[str]) -> list[Prompt]:
    """The same without the sealed bytes."""
    query = select(Prompt).where(Prompt.id.in_(ids)).options(*set_history.RECORD_ONLY)
    return list(session.scalars(query)) if ids else []


def active_prompts(session: Session) -> list[Prompt]:
    """The prompts in force, in order of activation."""
    return list(session.scalars(select(Prompt).where(Prompt.state == PromptState.ACTIVE).order_by(Prompt.position)))


def open_prompt(vault: Vault, prompt: Prompt) -> bytes:
    """The safetensors bytes. Raises VaultError, also when they are not the bytes that were activated."""
    if prompt.sealed is None:
        raise VaultError("the prompt was shredded")
    return vault.open(prompt.wrapped_key, prompt.sealed, aad=prompt_aad(prompt.id, prompt.digest))


def open_gate(vault: Vault, prompt: Prompt) -> bytes:
    """The gate's bytes. Raises VaultError."""
    if prompt.sealed_gate is None or prompt.gate_digest is None:
        raise VaultError("the prompt has no gate")
    return vault.open(prompt.wrapped_key, prompt.sealed_gate, aad=gate_aad(prompt.id, prompt.gate_digest))


def open_canaries(vault: Vault, prompt: Prompt) -> list[str]:
    """Stand-ins for the request's forget texts, for later checks; none where it has none. Raises VaultError."""
    if prompt.sealed_canaries is None:
        return []
    texts: list[str] = json.loads(
        vault.open(prompt.wrapped_key, prompt.sealed_canaries, aad=canaries_aad(prompt.id, prompt.digest))
    )
    return texts


def read_gate_space(session: Session, digest: str) -> bytes:
    """Raises NotFound, VaultError when the bytes are not those of the digest."""
    data = session.scalar(select(GateSpace.data).where(GateSpace.digest == digest))
    if data is None:
        raise NotFound("no such gate space")
    if hashlib.sha256(data).hexdigest() != digest:
        raise VaultError("the gate space was altered")
    return data


def find_gate_space(session: Session, source: str) -> str | None:
    """The digest of the space that was made from ``source``."""
    return session.scalar(select(GateSpace.digest).where(GateSpace.source == source))


def add_gate_space(session: Session, source: str, data: bytes) -> str:
    """Its digest. IntegrityError when another worker was first with this source."""
    digest = hashlib.sha256(data).hexdigest()
    session.add(GateSpace(digest=digest, source=source, created_at=utcnow(), data=data))
    session.flush()
    return digest


def get_prompt(session: Session, prompt_id: str) -> Prompt:
    """Raises NotFound."""
    prompt = session.get(Prompt, prompt_id, populate_existing=True)
    if prompt is None:
        raise NotFound("no such prompt")
    return prompt


def list_prompts(
    session: Session, *, limit: int, cursor: str | None = None, state: str | None = None
) -> tuple[list[Prompt], str | None]:
    """One page, newest first, and the cursor of the next. Raises InvalidInput."""
    query = select(Prompt).options(*set_history.RECORD_ONLY).order_by(Prompt.id.desc()).limit(limit + 1)
    if state is not None:
        if state not in list(PromptState):
            raise InvalidInput("state is not one of " + ", ".join(PromptState), field="state")
        query = query.where(Prompt.state == state)
    if cursor is not None:
        check_cursor(cursor, "prm_")
        query = query.where(Prompt.id < cursor)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def activate(
    session: Session,
    claim: Claim,
    prompt: SealedPrompt,
    *,
    fingerprint: str,
    num_virtual_tokens: int,
    hidden_size: int,
    metrics: dict[str, Any],
    expected_version: int,
) -> Prompt:
    """Put a checked prompt in force and end the training: one short transaction.

    It knows no vault: sealing asks the key store, and everybody's changes would wait behind its locks for an answer.
    Raises LeaseLost (fenced off, or done already), CancelRequested, StaleActiveSet (the set is not the one the prompt
    was checked on), Conflict (another model's prompt, one that waits for an approval, or another than was approved),
    KeyDestroyed (its key was given up: seal it under another).
    """
    request = hold(session, claim)
    if request.cancel_requested:
        raise CancelRequested("the request was cancelled before activation", request_id=request.id)
    if approval.needed(request):
        raise Conflict("nobody has approved the request yet", request_id=request.id)
    if approval.approved_digest(session, request) not in (None, prompt.digest):
        raise Conflict("what was approved is another prompt than this one", request_id=request.id)
    if request.fingerprint != fingerprint:
        raise Conflict("the prompt was trained for another model than the request", request_id=request.id)
    current = lock_active_set(session)
    if current.version != expected_version:
        raise StaleActiveSet("the active set has changed since the checks", version=current.version)
    now, gate = utcnow(), prompt.gate
    shredding.use_key(session, prompt.wrapped_key)
    row = Prompt(
        id=prompt.id,
        request_id=request.id,
        state=PromptState.ACTIVE,
        position=(session.scalar(select(func.max(Prompt.position))) or 0) + 1,
        fingerprint=fingerprint,
        num_virtual_tokens=num_virtual_tokens,
        hidden_size=hidden_size,
        digest=prompt.digest,
        mode=Mode.CONCATENATE if gate is None else Mode.ROUTED,
        gate_digest=gate.digest if gate else None,
        gate_space=gate.space if gate else None,
        wrapped_key=prompt.wrapped_key,
        sealed=prompt.sealed,
        sealed_gate=prompt.sealed_gate,
        sealed_canaries=prompt.sealed_canaries,
        metrics=metrics,
        seconds_to_active=(now - request.created_at).total_seconds(),
        activated_at=now,
    )
    session.add(row)
    request.metrics = metrics
    version = bump(session, current, actor=claim.owner, checks=metrics, now=now)
    detail = {"prompt_id": prompt.id, "prompt_digest": prompt.digest, "active_set_version": version}
    facts = {"active_set_digest": current.digest, **entry_facts.of_prompt(row)}
    move(session, request, RequestState.ACTIVE, actor=claim.owner, detail=detail, now=now, facts=facts)
    return row


def revoke_prompt(session: Session, prompt_id: str, *, actor: str, reason: str | None, code: str = "other") -> Prompt:
    """Take a prompt out of force and shred it and its gate; its request becomes revoked. Raises NotFound, Conflict.

    The reason stays on the prompt's row: free text may be personal data, and the audit log cannot forget.
    """
    current = lock_active_set(session)
    prompt = get_prompt(session, prompt_id)
    if prompt.state == PromptState.REVOKED:
        raise Conflict("the prompt is already revoked", state=prompt.state)
    request = lock_request(session, prompt.request_id)  # before the audit entry, whose lock is global
    now = utcnow()
    was_active = prompt.state == PromptState.ACTIVE
    prompt.state = PromptState.REVOKED
    shredding.destroy_key(session, prompt.wrapped_key)
    prompt.wrapped_key = prompt.sealed = prompt.sealed_gate = prompt.sealed_canaries = None
    evidence.drop(session, request.id)
    prompt.revoked_at = now
    prompt.revoked_by = actor[:40]
    prompt.revoke_code, prompt.revoke_reason = code, reason
    # A suspended prompt is not in force: the set stays what it is.
    version = bump(session, current, actor=actor, now=now) if was_active else current.version
    audit.append(
        session,
        actor=actor,
        action="prompt.revoked",
        subject=prompt.id,
        detail={
            "prompt_digest": prompt.digest,
            "active_set_version": version,
            "active_set_digest": current.digest,
            "code": code,
            "asked_by": prompt.revoke_asked_by,  # who agreed to it before, where two have to
            "revoked_at": iso(now),
        },
    )
    detail = {"prompt_id": prompt.id, "active_set_version": version, "code": code}
    move(session, request, RequestState.REVOKED, actor=actor, detail=detail, now=now)
    return prompt


def forgotten_digests(session: Session) -> set[bytes]:
    """Keyed digests of every text that anyone ever asked to forget: what a retain set must not hold (promise 9).

    Also of requests that failed, were cancelled or revoked: a later request is no occasion to teach those texts.
    """
    return set(session.scalars(select(ForgetDigest.digest)))


def lock_active_set(session: Session) -> ActiveSet:
    """The row as it is now, locked until the transaction ends. Raises NotReady."""
    db.begin_write(session)
    query = select(ActiveSet).where(ActiveSet.id == 1).with_for_update()
    row = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if row is None:
        raise NotReady("the active set has no row; run the migrations")
    return row


def bump(
    session: Session,
    current: ActiveSet,
    *,
    actor: str,
    now: datetime,
    checks: dict[str, Any] | None = None,
    reason: str | None = None,
) -> int:
    """Write the next version and the digest of the set as it now is, and record both for good."""
    session.flush()
    rows = session.execute(select(*_MEMBER).where(Prompt.state == PromptState.ACTIVE).order_by(Prompt.position))
    members = [Member(*row) for row in rows]
    current.version += 1
    current.digest = set_digest(member.name for member in members)
    current.updated_at = now
    set_history.record(session, current, [m.id for m in members], actor=actor, now=now, checks=checks, reason=reason)
    return current.version


def prompt_aad(prompt_id: str, digest: str) -> str:
    return f"{prompt_id}:{digest}"


def canaries_aad(prompt_id: str, digest: str) -> str:
    return f"{prompt_id}:canaries:{digest}"


def gate_aad(prompt_id: str, digest: str) -> str:
    return f"{prompt_id}:gate:{digest}"


def restore(session: Session, version: int, *, mode: str, fingerprint: str, actor: str, reason: str) -> ActiveSetView:
    """Put an earlier set in force, exactly: what came since is suspended, what was suspended comes back.

    The new version has the digest of the old one. Raises NotFound, and Conflict when it is in force already, when one
    of its prompts was revoked since (it is shredded), or when one is of another ``mode`` or model.
    """
    current = lock_active_set(session)
    wanted = set_history.get_version(session, version)
    members = set_history.members_of(session, version)
    in_force = set_history.members_of(session, current.version)
    # By id: two requests for the same texts may end in the same bytes, and so in sets of the same digest.
    if [prompt.id for prompt in members] == [prompt.id for prompt in in_force]:
        raise Conflict("this active set is in force already", version=current.version)
    gone = [prompt.id for prompt in members if prompt.state == PromptState.REVOKED]
    if gone:
        raise Conflict("prompts of this set were revoked since and are gone: " + ", ".join(gone[:10]))
    if any(prompt.mode != mode for prompt in members):
        raise Conflict(f"prompts of this set are of another mode than {mode}, which this service runs in")
    if any(prompt.fingerprint != fingerprint for prompt in members):
        raise Conflict("prompts of this set are of another model than the one that this service runs")
    ids = {prompt.id for prompt in members}
    out = [prompt for prompt in in_force if prompt.id not in ids]
    back = [prompt for prompt in members if prompt.state == PromptState.SUSPENDED]
    # All rows are locked before the first audit entry, whose lock is global.
    requests = {
        request_id: lock_request(session, request_id) for request_id in sorted(p.request_id for p in [*out, *back])
    }
    now = utcnow()
    for prompt in out:
        prompt.state = PromptState.SUSPENDED
    for prompt in back:
        prompt.state = PromptState.ACTIVE
    bump(session, current, actor=actor, now=now, reason=reason)
    if current.digest != wanted.digest:
        raise NotReady("the members of this version do not match its digest")
    detail = {"restored": version, "active_set_version": current.version, "active_set_digest": current.digest}
    audit.append(session, actor=actor, action="active_set.restored", subject=f"version {version}", detail=detail)
    for prompt, to in [(p, RequestState.SUSPENDED) for p in out] + [(p, RequestState.ACTIVE) for p in back]:
        detail = {"prompt_id": prompt.id, "active_set_version": current.version}
        move(session, requests[prompt.request_id], to, actor=actor, detail=detail, now=now)
    return ActiveSetView(current.version, current.digest)
