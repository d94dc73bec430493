"""Prompts in force and revoked ones."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from app import active_set
from app.auth import AdminCaller
from app.deps import Cursor, Limit, PromptId, ServiceDep
from app.errors import BodyTooLarge, Conflict, Forbidden, InvalidInput, MalformedBody, NotFound, Unauthenticated
from app.problems import UnsupportedMediaType, problems
from app.schemas import PromptOut, PromptPage, RevokeIn
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
    response_model=PromptOut,
    responses=problems(MalformedBody, NotFound, Conflict, BodyTooLarge, UnsupportedMediaType),
)
def revoke_prompt(caller: AdminCaller, prompt_id: PromptId, body: RevokeIn, service: ServiceDep) -> Any:
    """Take a prompt out of force, on every replica: a classification that starts after this answer goes without it."""
    with service.sessions.begin() as session:
        return active_set.revoke_prompt(session, prompt_id, actor=caller.key_id, reason=body.reason)
