"""How many requests and prompts there are, and what is due next. Nothing here commits."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.tables import OPEN, Prompt, PromptState, RequestState, UnlearnRequest


def count_requests(session: Session, *, owner: str | None = None) -> dict[str, int]:
    """How many there are in each state, also where there is none; with ``owner``, of what this API key asked for."""
    query = select(UnlearnRequest.state, func.count()).group_by(UnlearnRequest.state)
    if owner is not None:
        query = query.where(UnlearnRequest.api_key_id == owner)
    found = dict(session.execute(query).all())
    return {state.value: found.get(state, 0) for state in RequestState}


def count_prompts(session: Session) -> dict[str, int]:
    """The same of prompts."""
    found = dict(session.execute(select(Prompt.state, func.count()).group_by(Prompt.state)).all())
    return {state.value: found.get(state, 0) for state in PromptState}


def list_deadlines(session: Session, *, limit: int, owner: str | None = None) -> list[UnlearnRequest]:
    """What is still owed to somebody, what is due first in front; ``owner`` as in ``count_requests``."""
    query = select(UnlearnRequest).where(UnlearnRequest.state.in_(OPEN), UnlearnRequest.due_at.is_not(None))
    if owner is not None:
        query = query.where(UnlearnRequest.api_key_id == owner)
    return list(session.scalars(query.order_by(UnlearnRequest.due_at, UnlearnRequest.id).limit(limit)))
