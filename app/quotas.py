"""What an API key may ask for in a day and have in force, counted in the transaction that adds a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import db
from app.errors import InvalidInput, QuotaExceeded
from app.settings import Settings
from app.tables import LIVE, ApiKey, UnlearnRequest

DAY = timedelta(hours=24)
ASK_AGAIN_SECONDS = 3600
"""For what no lapse of time makes room: a request has to end or be revoked."""


def limit_of(own: Mapping[str, int] | None, settings: Settings, name: str) -> int:
    """The key's own limit, else the settings'; 0: none."""
    return int((own or {}).get(name, getattr(settings, name)))


def check_request_quota(session: Session, key_id: str, settings: Settings, *, texts: int, now: datetime) -> None:
    """Whether this key may add a request of so many texts. The transaction that adds it has to be this one.

    The key's row stays locked until it ends, so of two at once the second counts the first one's. Raises QuotaExceeded
    (``retry_after``: when enough of the last 24 hours has passed), InvalidInput (more texts than a whole day's).
    """
    own = session.scalars(select(ApiKey.limits).where(ApiKey.id == key_id)).one()
    per_day, texts_per_day, in_force = (
        limit_of(own, settings, name) for name in ("requests_per_day", "texts_per_day", "active_prompts")
    )
    if not (per_day or texts_per_day or in_force):
        return  # nothing to count, so nobody waits for anybody
    if texts_per_day and texts > texts_per_day:
        message = f"has {texts} items, and this API key may send {texts_per_day} in 24 hours"
        errors = [{"field": "forget_texts", "message": message, "limit": texts_per_day}]
        raise InvalidInput(f"forget_texts: {message}", errors=errors)
    db.begin_write(session)
    # Not FOR UPDATE: who adds a row that points to this key does not have to wait, who counts does.
    session.execute(select(ApiKey.id).where(ApiKey.id == key_id).with_for_update(key_share=True)).one()
    mine = UnlearnRequest.api_key_id == key_id
    if in_force:
        live = select(func.count()).select_from(UnlearnRequest).where(mine, UnlearnRequest.state.in_(LIVE))
        used = session.scalars(live).one()
        if used >= in_force:
            raise _exceeded("active_prompts", in_force, used, ASK_AGAIN_SECONDS)
    if not (per_day or texts_per_day):
        return
    recent = [
        (at, num_texts)
        for at, num_texts in session.execute(
            select(UnlearnRequest.created_at, UnlearnRequest.num_texts)
            .where(mine, UnlearnRequest.created_at > now - DAY)
            .order_by(UnlearnRequest.created_at)
        )
    ]
    for name, limit, wanted, sizes in (
        ("requests_per_day", per_day, 1, [(at, 1) for at, _ in recent]),
        ("texts_per_day", texts_per_day, texts, recent),
    ):
        used = sum(size for _, size in sizes)
        if not limit or used + wanted <= limit:
            continue
        over, leaves = used + wanted - limit, now
        for at, size in sizes:  # oldest first: with which one is there room?
            over, leaves = over - size, at + DAY
            if over <= 0:
                break
        raise _exceeded(name, limit, used, math.ceil((leaves - now).total_seconds()))


def _exceeded(name: str, limit: int, used: int, seconds: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"{name}: {used} of {limit} are used", limit=limit, limit_name=name, used=used, retry_after=max(1, seconds)
    )
