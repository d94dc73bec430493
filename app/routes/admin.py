"""Prompts in force and revoked ones, and the active sets that they make."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from app import active_set, revoking, set_history
from app.auth import AdminCaller, AuditorCaller
from app.deps import Limit, PromptCursor, PromptId, ServiceDep
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    Forbidden,
    InvalidInput,
    MalformedBody,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthenticated,
)
from app.failpoints import failpoint
from app.problems import UnsupportedMediaType, problems
from app.schemas import ActiveSetOut, ActiveSetPage, PromptOut, PromptPage, RestoreIn, RevokedOut, RevokeIn
from app.tables import PromptState

router = APIRouter(tags=["admin"], responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited))


@router.get("/admin/prompts", response_model=PromptPage)
def list_prompts(
    caller: AuditorCaller,
    service: ServiceDep,
    limit: Limit = 50,
    cursor: PromptCursor = None,
    state: Annotated[PromptState | None, Query()] = None,
) -> Any:
    """Prompts, newest first."""
    with service.sessions() as session:
        items, next_cursor = active_set.list_prompts(session, limit=limit, cursor=cursor, state=state)
    return {"items": items, "next_cursor": next_cursor}


@router.get("/admin/prompts/{prompt_id}", response_model=PromptOut, responses=problems(NotFound))
def get_prompt(caller: AuditorCaller, prompt_id: PromptId, service: ServiceDep) -> Any:
    """One prompt's record."""
    with service.sessions() as session:
        return active_set.get_prompt(session, prompt_id)


@router.post(
    "/admin/prompts/{prompt_id}/revoke",
    response_model=RevokedOut,
    responses={
        202: {"model": RevokedOut, "description": "Asked for; another admin's key has to agree."},
        **problems(MalformedBody, NotFound, Conflict, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType),
    },
)
def revoke_prompt(
    caller: AdminCaller, prompt_id: PromptId, body: RevokeIn, service: ServiceDep, response: Response
) -> Any:
    """Take a prompt out of force, on every replica: a classification that starts after this answer goes without it.

    Where two persons are needed (`LETHEON_REVOKE_NEEDS_TWO`) the first call is answered 202 and changes nothing yet;
    the same call with another admin's key carries it out.
    """
    with service.sessions.begin() as session:
        prompt, done = revoking.revoke(
            session,
            prompt_id,
            actor=caller.key_id,
            code=body.code,
            reason=body.reason,
            needs_two=service.settings.revoke_needs_two,
        )
        found = PromptOut.model_validate(prompt).model_dump()
        version = active_set.read_active_set(session).version
        failpoint("revoke.before_commit")
    failpoint("revoke.after_commit")
    response.status_code = 200 if done else 202
    return {**found, "active_set_version": version}


@router.post(
    "/admin/prompts/{prompt_id}/revoke/withdraw",
    response_model=PromptOut,
    responses=problems(NotFound, Conflict),
)
def withdraw_revoke(caller: AdminCaller, prompt_id: PromptId, service: ServiceDep) -> Any:
    """Take back a revoke that was asked for and that nobody has agreed to; any admin may."""
    with service.sessions.begin() as session:
        return revoking.withdraw(session, prompt_id, actor=caller.key_id)


Version = Annotated[int, Path(ge=0, le=2**31 - 1, description="Of the active set.")]


@router.get("/admin/active-sets", response_model=ActiveSetPage)
def list_active_sets(
    caller: AuditorCaller,
    service: ServiceDep,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="Versions below this one.")] = None,
) -> Any:
    """The active set in force, first, and those before it. No entry ever changes."""
    with service.sessions() as session:
        items, next_before = set_history.list_versions(session, limit=limit, before=before)
    return {"items": items, "next_before": next_before}


@router.get("/admin/active-sets/{version}", response_model=ActiveSetOut, responses=problems(NotFound))
def get_active_set(caller: AuditorCaller, version: Version, service: ServiceDep) -> Any:
    """One version."""
    with service.sessions() as session:
        return set_history.get_version(session, version)


@router.post(
    "/admin/active-sets/{version}/restore",
    response_model=ActiveSetOut,
    responses=problems(MalformedBody, NotFound, Conflict, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType),
)
def restore_active_set(caller: AdminCaller, version: Version, body: RestoreIn, service: ServiceDep) -> Any:
    """Put an earlier set in force, on every replica, as a new version with the old one's digest.

    Prompts that came since are suspended: they can come back the same way, until they are revoked. A set that holds a
    prompt which was revoked since cannot be restored: that prompt is gone. Where a revoke needs two persons, one
    cannot restore a set that lacks prompts which are in force.
    """
    with service.sessions.begin() as session:
        if service.settings.revoke_needs_two:
            revoking.refuse_unforgetting(session, version)
        view = active_set.restore(
            session,
            version,
            mode=service.settings.mode,
            fingerprint=service.serving.llm.fingerprint,
            actor=caller.key_id,
            reason=body.reason,
        )
        made = set_history.get_version(session, view.version)
        failpoint("restore.before_commit")
    failpoint("restore.after_commit")
    return made
