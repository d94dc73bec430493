"""The key shares, in a database of their own that no backup of the main one holds.

A data key is wrapped under the master key and a share together. Destroying the share therefore reaches every copy of
what the key sealed: an old backup and the master key open nothing without it. A destroyed share leaves its row behind
(``share`` NULL), so that it can be told from one that was never here.

Every call is one short transaction on a connection of its own, so it can wait for nothing that waits for it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Engine, LargeBinary, MetaData, Table, func, insert, make_url, select, text, update
from sqlalchemy.exc import OperationalError

from app import db
from app.errors import NotReady
from app.tables import UtcDateTime, utcnow

log = logging.getLogger(__name__)

ID_BYTES = 16
SHARE_BYTES = 32
CONNECT_SECONDS = 5
CHUNK = 500  # ids per statement
_CREATE_LOCK = 0x1E7E0003  # PostgreSQL advisory lock
_LOG_MILLISECONDS = 500

_METADATA = MetaData()
_SHARES = Table(
    "shares",
    _METADATA,
    Column("id", LargeBinary(ID_BYTES), primary_key=True),
    Column("share", LargeBinary(SHARE_BYTES)),
    Column("created_at", UtcDateTime(), nullable=False),
    Column("destroyed_at", UtcDateTime()),
)


class KeyStore:
    """Shares by id. The database is opened, and its table made, when it is first needed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._opened: Engine | None = None

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        return make_url(self._url).render_as_string(hide_password=True)

    def check(self, *, make: bool = True) -> None:
        """Raises NotReady when it cannot be reached. With ``make`` its table is there afterwards."""
        try:
            if make:
                self._engine()
            else:
                engine = _make_engine(self._url)
                with engine.connect():
                    pass
                engine.dispose()
        except OperationalError as error:
            raise NotReady(f"the key store cannot be reached ({self.place})") from error

    def add(self, share_id: bytes, share: bytes) -> None:
        """Store a new share, durably: whatever is wrapped under it must not come first."""
        with self._engine().begin() as connection:
            connection.execute(insert(_SHARES).values(id=share_id, share=share, created_at=utcnow()))

    def read(self, share_id: bytes) -> tuple[bool, bytes | None]:
        """Whether it is known, and the share, which is None when it was destroyed."""
        with self._engine().connect() as connection:
            row = connection.execute(select(_SHARES.c.share).where(_SHARES.c.id == share_id)).one_or_none()
        return (False, None) if row is None else (True, row.share)

    def destroyed(self, ids: Iterable[bytes]) -> dict[bytes, datetime | None]:
        """When each was destroyed, None where it was not; those that are unknown here are missing."""
        found: dict[bytes, datetime | None] = {}
        for chunk in _chunks(ids):
            with self._engine().connect() as connection:
                rows = connection.execute(
                    select(_SHARES.c.id, _SHARES.c.share.is_(None), _SHARES.c.destroyed_at, _SHARES.c.created_at).where(
                        _SHARES.c.id.in_(chunk)
                    )
                )
                found |= {row[0]: (row[2] or row[3]) if row[1] else None for row in rows}
        return found

    def destroy(self, ids: Iterable[bytes]) -> set[bytes]:
        """Destroy these shares, in the log as well; the ones that are gone by now. Twice is the same as once."""
        gone: set[bytes] = set()
        for chunk in _chunks(ids):
            with self._engine().begin() as connection:
                connection.execute(
                    update(_SHARES)
                    .where(_SHARES.c.id.in_(chunk), _SHARES.c.share.is_not(None))
                    .values(share=None, destroyed_at=utcnow())
                )
                gone |= set(connection.scalars(select(_SHARES.c.id).where(_SHARES.c.id.in_(chunk))))
        return gone if not gone or self._empty_log() else set()

    def counts(self) -> tuple[int, int]:
        """Shares, and tombstones of destroyed ones."""
        with self._engine().connect() as connection:
            rows = connection.execute(select(func.count(), func.count(_SHARES.c.share)).select_from(_SHARES))
            every, live = rows.one()
        return live, every - live

    def live_ids(self) -> set[bytes]:
        with self._engine().connect() as connection:
            return set(connection.scalars(select(_SHARES.c.id).where(_SHARES.c.share.is_not(None))))

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.dispose()
                self._opened = None

    def _engine(self) -> Engine:
        with self._lock:
            if self._opened is None:
                engine = _make_engine(self._url)
                with engine.begin() as connection:  # two processes may be here for the first time
                    if engine.dialect.name == "sqlite":
                        connection.exec_driver_sql("BEGIN IMMEDIATE")
                    else:
                        connection.execute(text(f"SELECT pg_advisory_xact_lock({_CREATE_LOCK})"))
                    _METADATA.create_all(connection)
                self._opened = engine
                weakref.finalize(self, engine.dispose)
            return self._opened

    def _empty_log(self) -> bool:
        """SQLite's write-ahead log holds the pages that the shares were written with. False: it is in use."""
        engine = self._engine()
        if engine.dialect.name != "sqlite":
            return True
        with engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {_LOG_MILLISECONDS}").fetchall()
            busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
        if busy:
            log.info("the key store's write-ahead log is in use and is emptied later")
        return not busy


def _make_engine(url: str) -> Engine:
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 1}  # calls are short
    if make_url(url).get_backend_name() != "sqlite":
        options["connect_args"] = {"connect_timeout": CONNECT_SECONDS}  # a revoke waits for it, and need not
    return db.make_engine(url, **options)


def _chunks(ids: Iterable[bytes]) -> Iterator[Sequence[bytes]]:
    every = list(ids)
    return (every[start : start + CHUNK] for start in range(0, len(every), CHUNK))
