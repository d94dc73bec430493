"""The active sets that are or were in force: immutable, and each can be put back in one step. Nothing here commits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session, defer

from app.errors import NotFound
from app.tables import ActiveSet, ActiveSetMember, ActiveSetVersion, Prompt

RECORD_ONLY = (defer(Prompt.sealed), defer(Prompt.sealed_gate), defer(Prompt.sealed_canaries))
"""Leaves a prompt's sealed bytes, megabytes for a large model, in the database."""


def record(
    session: Session,
    current: ActiveSet,
    members: Sequence[str],
    *,
    actor: str,
    now: datetime,
    checks: dict[str, Any] | None,
    reason: str | None,
) -> None:
    """Write the version that ``current`` has just become, and from when to when each prompt is in force."""
    before = set(session.scalars(select(ActiveSetMember.prompt_id).where(ActiveSetMember.to_version.is_(None))))
    session.add(
        ActiveSetVersion(
            version=current.version,
            digest=current.digest,
            size=len(members),
            created_at=now,
            created_by=actor[:100],
            reason=reason,
            checks=checks,
        )
    )
    gone = before.difference(members)
    if gone:
        session.execute(
            update(ActiveSetMember)
            .where(ActiveSetMember.to_version.is_(None), ActiveSetMember.prompt_id.in_(gone))
            .values(to_version=current.version)
            .execution_options(synchronize_session=False)
        )
    for prompt_id in members:
        if prompt_id not in before:
            session.add(ActiveSetMember(prompt_id=prompt_id, from_version=current.version, to_version=None))
    session.flush()


def get_version(session: Session, version: int) -> ActiveSetVersion:
    """Raises NotFound."""
    row = session.get(ActiveSetVersion, version, populate_existing=True)
    if row is None:
        raise NotFound("no such version of the active set")
    return row


def members_of(session: Session, version: int) -> list[Prompt]:
    """The prompts that were in force under a version, in order, as they are now (perhaps shredded)."""
    query = (
        select(Prompt)
        .join(ActiveSetMember, ActiveSetMember.prompt_id == Prompt.id)
        .where(
            ActiveSetMember.from_version <= version,
            or_(ActiveSetMember.to_version.is_(None), ActiveSetMember.to_version > version),
        )
        .order_by(Prompt.position)
        .options(*RECORD_ONLY)
        .execution_options(populate_existing=True)
    )
    return list(session.scalars(query))


def list_versions(
    session: Session, *, limit: int, before: int | None = None
) -> tuple[list[ActiveSetVersion], int | None]:
    """One page, newest first, and the ``before`` of the next."""
    query = select(ActiveSetVersion).order_by(ActiveSetVersion.version.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(ActiveSetVersion.version < before)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].version if len(rows) > limit else None


def save_checks(session: Session, version: int, checks: dict[str, Any]) -> None:
    """What the checks of a set that is in force already have found. Raises NotFound."""
    get_version(session, version).checks = checks
