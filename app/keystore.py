"""The key shares, in a database of their own that no backup of the main one holds.

A data key is wrapped under the master key and a share together. Destroying the share therefore reaches every copy of
what the key sealed: an old backup and the master key open nothing without it. A destroyed share leaves its row behind
(``share`` NULL), so that it can be told from one that was never here. What else a backup must not bring back is kept
beside the shares, by its id.

Every call is one short transaction on a connection of its own, so it can wait for nothing that waits for it. Whatever
goes wrong in one is a ``KeyStoreAway``: that a share could not be had says nothing of whether it is there.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    LargeBinary,
    MetaData,
    String,
    Table,
    func,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from app import db
from app.errors import KeyStoreAway
from app.tables import UtcDateTime, utcnow
from app.tracebacks import where

log = logging.getLogger(__name__)

ID_BYTES = 16
SHARE_BYTES = 32
CONNECT_SECONDS = 5
AWAY_SECONDS = 1.0
"""After a call that failed others fail at once for so long: or all threads would wait for a host that is down."""
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
_ENDED = Table(
    # For good: ids of API keys that were revoked, of webhooks that were disabled, and of requests that were cancelled
    # and whose texts were kept for a while (``app.ended``).
    "ended",
    _METADATA,
    Column("id", String(40), primary_key=True),
    Column("at", UtcDateTime(), nullable=False),
)


class KeyStore:
    """Shares by id. The database is opened, and its table made, when it is first needed.

    What asks it raises KeyStoreAway.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._opened: Engine | None = None
        self._answered, self._away_until = True, 0.0  # the last call; time.monotonic()
        self._asked: float | None = None  # since when ``watch`` waits for an answer

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        return make_url(self._url).render_as_string(hide_password=True)

    def check(self, *, make: bool = True) -> None:
        """For a start: the error says where it is. With ``make`` its table is there afterwards."""
        try:
            with self._answering():
                if make:
                    self._engine()
                else:
                    engine = _make_engine(self._url)
                    with engine.connect():
                        pass
                    engine.dispose()
        except KeyStoreAway as error:
            raise KeyStoreAway(f"the key store cannot be reached ({self.place})") from error

    def ping(self) -> None:
        """Whether a share could be had now."""
        with self._connect() as connection:
            connection.execute(select(_SHARES.c.id).limit(1)).all()

    @property
    def answers(self) -> bool:
        """Whether it answered when it was last asked; asks nothing itself, so nobody waits."""
        asked = self._asked  # read once: the watch may be done with it a moment later
        return self._answered and (asked is None or time.monotonic() - asked < CONNECT_SECONDS)

    def look(self) -> None:
        """Ask it now, for ``answers``: while that takes too long, it does not."""
        self._asked = time.monotonic()
        try:
            self.ping()
        except KeyStoreAway:
            pass
        except Exception as error:  # a bug must not end the watch, which would say the same for ever
            self._answered = False
            log.error("the key store cannot be asked: %s", where(error))
        self._asked = None

    def watch(self, every: float) -> Callable[[], None]:
        """``look`` every so many seconds, in a thread. Returns what ends that."""
        end = threading.Event()

        def run() -> None:
            while not end.wait(every):
                self.look()

        def stop() -> None:
            end.set()
            thread.join(CONNECT_SECONDS)

        thread = threading.Thread(target=run, name="key-store-watch", daemon=True)
        thread.start()
        return stop

    def add(self, share_id: bytes, share: bytes) -> None:
        """Store a new share, durably: whatever is wrapped under it must not come first."""
        with self._begin() as connection:
            connection.execute(insert(_SHARES).values(id=share_id, share=share, created_at=utcnow()))

    def read(self, share_id: bytes) -> tuple[bool, bytes | None]:
        """Whether it is known, and the share, which is None when it was destroyed."""
        with self._connect() as connection:
            row = connection.execute(select(_SHARES.c.share).where(_SHARES.c.id == share_id)).one_or_none()
        return (False, None) if row is None else (True, row.share)

    def destroyed(self, ids: Iterable[bytes]) -> dict[bytes, datetime | None]:
        """When each was destroyed, None where it was not; those that are unknown here are missing."""
        found: dict[bytes, datetime | None] = {}
        for chunk in _chunks(ids):
            with self._connect() as connection:
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
            with self._begin() as connection:
                connection.execute(
                    update(_SHARES)
                    .where(_SHARES.c.id.in_(chunk), _SHARES.c.share.is_not(None))
                    .values(share=None, destroyed_at=utcnow())
                )
                gone |= set(connection.scalars(select(_SHARES.c.id).where(_SHARES.c.id.in_(chunk))))
        return gone if not gone or self._empty_log() else set()

    def add_ended(self, ids: Iterable[str]) -> None:
        """Remember that these have ended. Twice is the same as once, also at once in two processes."""
        with self._begin() as connection:
            dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
            statement = dialect.insert(_ENDED).on_conflict_do_nothing()
            connection.execute(statement, [{"id": ended, "at": utcnow()} for ended in ids])

    def ended(self) -> set[str]:
        with self._connect() as connection:
            return set(connection.scalars(select(_ENDED.c.id)))

    def counts(self) -> tuple[int, int]:
        """Shares, and tombstones of destroyed ones."""
        with self._connect() as connection:
            rows = connection.execute(select(func.count(), func.count(_SHARES.c.share)).select_from(_SHARES))
            every, live = rows.one()
        return live, every - live

    def live_ids(self) -> set[bytes]:
        with self._connect() as connection:
            return set(connection.scalars(select(_SHARES.c.id).where(_SHARES.c.share.is_not(None))))

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.dispose()
                self._opened = None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if time.monotonic() < self._away_until:
            raise KeyStoreAway("the key store did not answer a moment ago", retry_after=CONNECT_SECONDS)
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            if self._answered:  # once for each outage
                log.warning("the key store does not answer: %s", type(error).__name__)
            self._answered, self._away_until = False, time.monotonic() + AWAY_SECONDS
            raise KeyStoreAway("the key store does not answer", retry_after=CONNECT_SECONDS) from error
        if not self._answered:
            log.warning("the key store answers again")
        self._answered = True

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        with self._answering(), self._engine().connect() as connection:
            db.hurry(connection)  # the model's thread may wait for it, and a revoke need not
            yield connection

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self._answering(), self._engine().begin() as connection:
            db.hurry(connection)
            yield connection

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
        if make_url(self._url).get_backend_name() != "sqlite":
            return True
        with self._connect() as connection:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {_LOG_MILLISECONDS}").fetchall()
            busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            # The connection goes back to the pool, where others wait longer.
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(1000 * db.BUSY_SECONDS)}").fetchall()
        if busy:
            log.info("the key store's write-ahead log is in use and is emptied later")
        return not busy


def _make_engine(url: str) -> Engine:
    return db.make_engine(url, pool_size=2, max_overflow=1)  # calls are short


def _chunks(ids: Iterable[bytes]) -> Iterator[Sequence[bytes]]:
    every = list(ids)
    return (every[start : start + CHUNK] for start in range(0, len(every), CHUNK))
