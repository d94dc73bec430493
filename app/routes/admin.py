"""Prompts in force and revoked ones, and the active sets that they make."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from app import active_set, set_history
from app.auth import AdminCaller
from app.deps import Cursor, Limit, PromptId, ServiceDep
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    Forbidden,
    InvalidInput,
    MalformedBody,
    NotFound,
    Overloaded,
    Unauthenticated,
)
from app.problems import UnsupportedMediaType, problems
from app.schemas import ActiveSetOut, ActiveSetPage, PromptOut, PromptPage, RestoreIn, RevokedOut, RevokeIn
from app.tables import PromptState

router = APIRouter(tags=["admin"], responses=problems(Unauthenticated, Forbidden, InvalidInput))


@router.get("/admin/prompts", response_model=PromptPage)
def list_prompts(
    caller: AdminCaller,
    service: ServiceDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[PromptState | None, Query()] = None,
) -> Any:
    """Prompts, newest first."""
    with service.sessions() as session:
        items, next_cursor = active_set.list_prompts(session, limit=limit, cursor=cursor, state=state)
    return {"items": items, "next_cursor": next_cursor}


@router.get("/admin/prompts/{prompt_id}", response_model=PromptOut, responses=problems(NotFound))
def get_prompt(caller: AdminCaller, prompt_id: PromptId, service: ServiceDep) -> Any:
    """One prompt's record."""
    with service.sessions() as session:
        return active_set.get_prompt(session, prompt_id)


@router.post(
    "/admin/prompts/{prompt_id}/revoke",
    response_model=RevokedOut,
    responses=problems(MalformedBody, NotFound, Conflict, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType),
)
def revoke_prompt(caller: AdminCaller, prompt_id: PromptId, body: RevokeIn, service: ServiceDep) -> Any:
    """Take a prompt out of force, on every replica: a classification that starts after this answer goes without it."""
    with service.sessions.begin() as session:
        prompt = active_set.revoke_prompt(session, prompt_id, actor=caller.key_id, reason=body.reason)
        found = PromptOut.model_validate(prompt).model_dump()
        return {**found, "active_set_version": active_set.read_active_set(session).version}


Version = Annotated[int, Path(ge=0, le=2**31 - 1, description="Of the active set.")]


@router.get("/admin/active-sets", response_model=ActiveSetPage)
def list_active_sets(
    caller: AdminCaller,
    service: ServiceDep,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="Versions below this one.")] = None,
) -> Any:
    """The active set in force, first, and those before it. No entry ever changes."""
    with service.sessions() as session:
        items, next_before = set_history.list_versions(session, limit=limit, before=before)
    return {"items": items, "next_before": next_before}


@router.get("/admin/active-sets/{version}", response_model=ActiveSetOut, responses=problems(NotFound))
def get_active_set(caller: AdminCaller, version: Version, service: ServiceDep) -> Any:
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
    prompt which was revoked since cannot be restored: that prompt is gone.
    """
    with service.sessions.begin() as session:
        view = active_set.restore(
            session,
            version,
            mode=service.settings.mode,
            fingerprint=service.serving.llm.fingerprint,
            actor=caller.key_id,
            reason=body.reason,
        )
        return set_history.get_version(session, view.version)
