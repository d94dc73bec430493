"""Sessions of the console that were ended by a logout: on every replica, whoever holds a copy of the cookie.

A session itself is no row (``app.console.session``), only its early end is, and only until it would have ended anyway.
Nothing here commits.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from app.tables import EndedSession

KEPT = timedelta(hours=1)  # longer than the session: a replica whose clock is behind takes its cookie for a while yet


def end(session: Session, session_id: str, *, expires_at: datetime, now: datetime) -> None:
    """Raises IntegrityError at the flush where another logout of the same session was first."""
    session.execute(
        delete(EndedSession).where(EndedSession.expires_at <= now - KEPT),
        execution_options={"synchronize_session": False},
    )
    session.add(EndedSession(id=session_id, expires_at=expires_at))
    session.flush()


def has_ended(session: Session, session_id: str) -> bool:
    return session.get(EndedSession, session_id, populate_existing=True) is not None
