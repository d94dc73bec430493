"""The prompts in force. One row names the set; every activation and every revocation moves its version.

The row is locked first, so activations and revocations happen one after another. Nothing here commits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import audit, db
from app.errors import Conflict, InvalidInput, NotFound, NotReady, StaleActiveSet
from app.lifecycle import CancelRequested, Claim, check_cursor, hold, lock_request, move
from app.tables import (
    ActiveSet,
    ForgetDigest,
    Prompt,
    PromptState,
    RequestState,
    new_id,
    utcnow,
)
from app.vault import Vault


@dataclass(frozen=True)
class ActiveSetView:
    version: int
    digest: str


def set_digest(prompt_digests: Iterable[str]) -> str:
    """The digest of a stack: SHA-256 over the ordered prompt digests."""
    return hashlib.sha256(json.dumps(list(prompt_digests), separators=(",", ":")).encode()).hexdigest()


def read_active_set(session: Session) -> ActiveSetView:
    """One indexed query. Raises NotReady when the row is missing."""
    row = session.execute(select(ActiveSet.version, ActiveSet.digest).where(ActiveSet.id == 1)).one_or_none()
    if row is None:
        raise NotReady("the active set has no row; run the migrations")
    return ActiveSetView(row.version, row.digest)


def read_stack(session: Session) -> tuple[ActiveSetView, list[Prompt]]:
    """The active set and its prompts as of one moment: a single statement, so they always agree. Raises NotReady."""
    query = (
        select(ActiveSet.version, ActiveSet.digest, Prompt)
        .outerjoin(Prompt, Prompt.state == PromptState.ACTIVE)
        .where(ActiveSet.id == 1)
        .order_by(Prompt.position)
        .execution_options(populate_existing=True)
    )
    rows = session.execute(query).all()
    if not rows:
        raise NotReady("the active set has no row; run the migrations")
    view = ActiveSetView(rows[0].version, rows[0].digest)
    prompts = [row.Prompt for row in rows if row.Prompt is not None]
    if set_digest(prompt.digest for prompt in prompts) != view.digest:
        raise NotReady("the active prompts do not match the active set's digest")
    return view, prompts


def active_prompts(session: Session) -> list[Prompt]:
    """The prompts in force, in order of concatenation."""
    return list(session.scalars(select(Prompt).where(Prompt.state == PromptState.ACTIVE).order_by(Prompt.position)))


def open_prompt(vault: Vault, prompt: Prompt) -> bytes:
    """The safetensors bytes. Raises VaultError, also when they are not the bytes that were activated."""
    return vault.open(prompt.wrapped_key, prompt.sealed, aad=prompt_aad(prompt.id, prompt.digest))


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
    query = select(Prompt).order_by(Prompt.id.desc()).limit(limit + 1)
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
    vault: Vault,
    claim: Claim,
    *,
    prompt: bytes,
    digest: str,
    fingerprint: str,
    num_virtual_tokens: int,
    hidden_size: int,
    metrics: dict[str, Any],
    expected_version: int,
) -> Prompt:
    """Put a checked prompt in force and end the training: one short transaction.

    Raises LeaseLost (fenced off, or done already), CancelRequested, StaleActiveSet (the set is not the one the prompt
    was checked on), Conflict (another model's prompt).
    """
    if hashlib.sha256(prompt).hexdigest() != digest:
        raise ValueError("digest is not the SHA-256 of the prompt's bytes")
    request = hold(session, claim)
    if request.cancel_requested:
        raise CancelRequested("the request was cancelled before activation", request_id=request.id)
    if request.fingerprint != fingerprint:
        raise Conflict("the prompt was trained for another model than the request", request_id=request.id)
    current = lock_active_set(session)
    if current.version != expected_version:
        raise StaleActiveSet("the active set has changed since the checks", version=current.version)
    now = utcnow()
    prompt_id = new_id("prm")
    wrapped = vault.new_key()
    row = Prompt(
        id=prompt_id,
        request_id=request.id,
        state=PromptState.ACTIVE,
        position=(session.scalar(select(func.max(Prompt.position))) or 0) + 1,
        fingerprint=fingerprint,
        num_virtual_tokens=num_virtual_tokens,
        hidden_size=hidden_size,
        digest=digest,
        wrapped_key=wrapped,
        sealed=vault.seal(wrapped, prompt, aad=prompt_aad(prompt_id, digest)),
        metrics=metrics,
        seconds_to_active=(now - request.created_at).total_seconds(),
        activated_at=now,
    )
    session.add(row)
    request.metrics = metrics
    version = bump(session, current)
    detail = {"prompt_id": prompt_id, "prompt_digest": digest, "active_set_version": version}
    move(session, request, RequestState.ACTIVE, actor=claim.owner, detail=detail, now=now)
    return row


def revoke_prompt(session: Session, prompt_id: str, *, actor: str, reason: str | None) -> Prompt:
    """Take a prompt out of force; its request becomes revoked. Raises NotFound, Conflict.

    The reason stays on the prompt's row: free text may be personal data, and the audit log cannot forget.
    """
    current = lock_active_set(session)
    prompt = get_prompt(session, prompt_id)
    if prompt.state == PromptState.REVOKED:
        raise Conflict("the prompt is already revoked", state=prompt.state)
    request = lock_request(session, prompt.request_id)  # before the audit entry, whose lock is global
    now = utcnow()
    prompt.state = PromptState.REVOKED
    prompt.revoked_at = now
    prompt.revoked_by = actor[:40]
    prompt.revoke_reason = reason
    version = bump(session, current)
    audit.append(
        session,
        actor=actor,
        action="prompt.revoked",
        subject=prompt.id,
        detail={"prompt_digest": prompt.digest, "active_set_version": version, "active_set_digest": current.digest},
    )
    detail = {"prompt_id": prompt.id, "active_set_version": version}
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


def bump(session: Session, current: ActiveSet) -> int:
    """Write the next version and the digest of the stack as it now is."""
    session.flush()
    current.version += 1
    current.digest = set_digest(
        session.scalars(select(Prompt.digest).where(Prompt.state == PromptState.ACTIVE).order_by(Prompt.position))
    )
    current.updated_at = utcnow()
    return current.version


def prompt_aad(prompt_id: str, digest: str) -> str:
    return f"{prompt_id}:{digest}"
