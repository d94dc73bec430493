"""The terms of a request: when it was received, by when it is due, when it runs out, whether a second person agrees."""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from app.errors import InvalidInput

CLOCKS_DIFFER = timedelta(minutes=5)
LONGEST = timedelta(days=36_525)  # a hundred years: nobody means more, and the calendar ends somewhere


@dataclass(frozen=True)
class Terms:
    received_at: datetime
    due_at: datetime
    expires_at: datetime | None
    approval_required: bool


def agree(
    *,
    received_at: datetime | None,
    expires_at: datetime | None,
    approval_required: bool,
    months: int,
    now: datetime,
) -> Terms:
    """What was asked, checked. Raises InvalidInput for a time that cannot be meant.

    The month is counted in the calendar of the zone that ``received_at`` is given in, else in UTC.
    """
    received_at = received_at or now
    if received_at > now + CLOCKS_DIFFER:
        raise InvalidInput("received_at is in the future", field="received_at")
    if months_later(received_at, 12) < now:
        raise InvalidInput("received_at is more than a year ago", field="received_at")
    if expires_at is not None and expires_at <= now:
        raise InvalidInput("expires_at is not in the future", field="expires_at")
    if expires_at is not None and expires_at > now + LONGEST:
        raise InvalidInput("expires_at is more than a hundred years ahead", field="expires_at")
    return Terms(
        received_at=received_at.astimezone(UTC),
        due_at=months_later(received_at, months).astimezone(UTC),
        expires_at=None if expires_at is None else expires_at.astimezone(UTC),
        approval_required=approval_required,
    )


def months_later(moment: datetime, months: int) -> datetime:
    """The same day and time so many calendar months on; the month's last day where it has no such day."""
    years, index = divmod(moment.month - 1 + months, 12)
    year, month = moment.year + years, index + 1
    return moment.replace(year=year, month=month, day=min(moment.day, calendar.monthrange(year, month)[1]))
