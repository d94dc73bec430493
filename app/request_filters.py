"""What a list of requests is narrowed to. Every condition is one that the database can find rows by, or look at while
it walks an index; none needs more than a page of rows in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app.tables import OPEN, ApiKey, RequestState, UnlearnRequest

ID_PREFIX = r"^req_[0-9a-f]{0,28}$"
_PREFIX = re.compile(ID_PREFIX)
_BEHIND = "g"  # any hex digit comes before it, in every collation


@dataclass(frozen=True)
class RequestFilter:
    """All that is given must hold. ``keys``: asked by one of these; none of them, where it is empty.

    ``received_from`` ≤ when the person asked < ``received_before``. ``due_before``: still owed to somebody, and due
    before that. ``id_prefix``: of the form ``ID_PREFIX``.
    """

    states: Sequence[RequestState] = ()
    id_prefix: str | None = None
    keys: Sequence[str] | None = None
    received_from: datetime | None = None
    received_before: datetime | None = None
    due_before: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        row = UnlearnRequest
        found: list[ColumnElement[bool]] = []
        if self.states:
            found.append(row.state.in_(self.states))
        if self.id_prefix is not None:
            assert _PREFIX.fullmatch(self.id_prefix)
            # A range and no LIKE, for which SQLite and most collations of PostgreSQL would read every id.
            found += [row.id >= self.id_prefix, row.id < self.id_prefix + _BEHIND]
        if self.keys is not None:
            found.append(row.api_key_id.in_(self.keys))
        if self.received_from is not None:
            found.append(row.received_at >= self.received_from)
        if self.received_before is not None:
            found.append(row.received_at < self.received_before)
        if self.due_before is not None:
            found += [row.due_at < self.due_before, row.state.in_(OPEN)]
        return found


EVERYTHING = RequestFilter()


def keys_called(session: Session, wanted: str) -> list[str]:
    """Ids of the API keys with this id or this name, revoked ones too: what they asked for is still there."""
    query = select(ApiKey.id).where((ApiKey.id == wanted) | (ApiKey.name == wanted)).order_by(ApiKey.id)
    return list(session.scalars(query))


def key_names(session: Session, ids: Sequence[str]) -> dict[str, str]:
    """What API keys are called."""
    return dict(session.execute(select(ApiKey.id, ApiKey.name).where(ApiKey.id.in_(ids))).all())
