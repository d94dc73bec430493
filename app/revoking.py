"""Who may un-forget, and why: coded reasons, and two persons where the deployment asks for them. Nothing here commits.

With two persons the first one's call is an ask, kept on the prompt's row; a call with another API key carries it out.
The prompt is in force until then, and any admin may take the ask back, since that un-forgets nothing. An ask counts as
long as the key that asked is in force.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app import audit, keys, set_history
from app.active_set import get_prompt, lock_active_set, revoke_prompt
from app.errors import Conflict
from app.tables import ApiKey, Prompt, PromptState, utcnow


def revoke(
    session: Session, prompt_id: str, *, actor: str, code: str, reason: str, needs_two: bool
) -> tuple[Prompt, bool]:
    """Revoke, or ask for it where ``needs_two`` and nobody else has yet; True when it is done.

    Raises NotFound, and Conflict when it is revoked already or when this key is the one that asked.
    """
    prompt = _locked(session, prompt_id)
    asked_by = _who_asks(session, prompt)
    if not needs_two or asked_by not in (None, actor):
        return revoke_prompt(session, prompt_id, actor=actor, code=code, reason=reason), True
    if asked_by is not None:
        raise Conflict("this key has asked for it already; another admin's has to agree", revoke_asked_by=asked_by)
    prompt.revoke_asked_by, prompt.revoke_asked_at = actor[:40], utcnow()
    prompt.revoke_code, prompt.revoke_reason = code, reason
    audit.append(session, actor=actor, action="prompt.revoke_asked", subject=prompt.id, detail={"code": code})
    return prompt, False


def withdraw(session: Session, prompt_id: str, *, actor: str) -> Prompt:
    """Take back what was asked for. Raises NotFound, and Conflict when nobody asks or it is revoked."""
    prompt = _locked(session, prompt_id)
    if prompt.revoke_asked_by is None:
        raise Conflict("nobody has asked to revoke this prompt", state=prompt.state)
    detail = {"asked_by": prompt.revoke_asked_by}
    prompt.revoke_asked_by = prompt.revoke_asked_at = prompt.revoke_code = prompt.revoke_reason = None
    audit.append(session, actor=actor, action="prompt.revoke_withdrawn", subject=prompt.id, detail=detail)
    return prompt


def refuse_unforgetting(session: Session, version: int) -> None:
    """Raises Conflict when restoring ``version`` would take prompts out of force, which is a revoke by another name."""
    current = lock_active_set(session)
    kept = {prompt.id for prompt in set_history.members_of(session, version)}
    out = [prompt.id for prompt in set_history.members_of(session, current.version) if prompt.id not in kept]
    if out:
        raise Conflict(
            "LETHEON_REVOKE_NEEDS_TWO is on, and restoring this set would take prompts out of force by one person's "
            "word: have two revoke them instead: " + ", ".join(out[:10])
        )


def _who_asks(session: Session, prompt: Prompt) -> str | None:
    key = session.get(ApiKey, prompt.revoke_asked_by, populate_existing=True) if prompt.revoke_asked_by else None
    if key is not None and not keys.is_in_force(key, utcnow()):
        return None  # nobody stands behind it any more
    return prompt.revoke_asked_by


def _locked(session: Session, prompt_id: str) -> Prompt:
    lock_active_set(session)  # of two that ask at once, one sees the other's
    prompt = get_prompt(session, prompt_id)
    if prompt.state == PromptState.REVOKED:
        raise Conflict("the prompt is already revoked", state=prompt.state)
    return prompt
