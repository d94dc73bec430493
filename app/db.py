"""Engines, sessions and migrations, for SQLite (embedded) and PostgreSQL.

Both databases behave alike: a read sees what is committed when its statement starts, and a write waits for its turn.
On SQLite that is the driver's own transaction control with ``isolation_level="IMMEDIATE"``: a SELECT outside a write
takes no lock, the first INSERT/UPDATE/DELETE issues BEGIN IMMEDIATE. A transaction never has to turn a read lock
into a write lock, which is the case that SQLite answers with "database is locked" without waiting.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from app.errors import NotReady

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).resolve().parent.parent / "alembic"
UNANSWERED = (OperationalError, InterfaceError, PoolTimeout)
"""What a database says when it restarts, is locked, is full or cannot be reached."""
BUSY_SECONDS = 30.0
LOCK_SECONDS = 2.0
"""For a lock, of reads that calls and probes wait for: a migration's may last for minutes."""
SILENCE_SECONDS = 3.0
"""Of the server, for the same reads: longer, so that it ends by itself what it can."""
_RETRY_SECONDS = 0.01
_EMPTY_LOG_SECONDS = 0.5
KEEP_TEXTS = "keep_texts"
"""In ``Session.info``: what ``make_sessions`` was told."""
_SHREDDED = "shredded"
_MIGRATION_LOCK = 0x1E7E0001  # PostgreSQL advisory lock


def make_engine(url: str, *, busy_seconds: float = BUSY_SECONDS, **pool: Any) -> Engine:
    """An engine for a ``sqlite:///`` or ``postgresql://`` URL. Raises ValueError for another database."""
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    # hide_parameters: a failing statement would otherwise put its values into the exception's message.
    options: dict[str, Any] = {"hide_parameters": True, **pool}
    if backend in ("postgresql", "postgres"):
        from app import pg

        options["connect_args"] = pg.connect_args(parsed) | options.get("connect_args", {})
        engine = create_engine(parsed, pool_pre_ping=True, **options)
        pg.listen(engine)
        return engine
    if backend != "sqlite":
        raise ValueError(f"unsupported database {backend!r}: use sqlite or postgresql")
    if parsed.database and parsed.database != ":memory:":
        path = Path(parsed.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # SQLite gives its -wal and -shm files the same mode
    engine = create_engine(parsed, connect_args={"isolation_level": "IMMEDIATE", "timeout": busy_seconds}, **options)
    event.listen(engine, "connect", _sqlite_pragmas)
    return engine


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    _use_wal(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}").fetchall()
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Two processes may make the file at once, and a change of journal mode does not wait as all else does: SQLite
    answers SQLITE_BUSY at once."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(_RETRY_SECONDS)


def make_sessions(engine: Engine, *, keep_texts: timedelta = timedelta()) -> sessionmaker[Session]:
    """``keep_texts``: for how long forget texts stay sealed after their request is active or ended."""
    sessions = sessionmaker(engine, expire_on_commit=False, info={KEEP_TEXTS: keep_texts})
    if engine.dialect.name == "sqlite":
        own = _apart(engine)
        event.listen(sessions, "after_commit", lambda session: _empty_log(session, own))
    return sessions


def note_shredding(session: Session) -> None:
    """What this transaction overwrites is to be gone from the disk once it commits."""
    session.info[_SHREDDED] = True


def _empty_log(session: Session, engine: Engine) -> None:
    """SQLite's write-ahead log keeps the old pages, keys included, until something else happens to overwrite them.

    A reader that is in the way leaves it to the next shredding, to the last connection's end, or to ``empty_log``.
    """
    if not session.info.pop(_SHREDDED, False):
        return
    try:
        with engine.connect() as connection:
            if _checkpoint(connection, "TRUNCATE"):
                log.info("the write-ahead log is in use and is emptied later")
    except DBAPIError as error:  # the commit itself has happened
        log.warning("the write-ahead log was not emptied (%s)", type(error).__name__)


def empty_log(sessions: sessionmaker[Session]) -> bool:
    """Empty SQLite's write-ahead log, whoever left something in it: whether nothing is left.

    For the reaper: a reader may have been in the way of a shredding, or the process died behind its commit. Writers
    wait for a checkpoint that waits for readers, so it is not begun while one still reads what was before.
    """
    engine: Engine = sessions.kw["bind"]
    file = engine.url.database
    if engine.dialect.name != "sqlite" or not file or not _has_content(Path(f"{file}-wal")):
        return True
    with _apart(engine).connect() as connection:
        return not _checkpoint(connection, "PASSIVE") and not _checkpoint(connection, "TRUNCATE")


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False


def _checkpoint(connection: Connection, mode: str) -> bool:
    """Whether something was in the way."""
    busy, pages, copied = connection.exec_driver_sql(f"PRAGMA wal_checkpoint({mode})").one()
    return bool(busy) or copied < pages


def _apart(engine: Engine) -> Engine:
    """For checkpoints. Not from the engine's pool: who commits still holds one of its connections, and others wait."""
    return create_engine(engine.url, poolclass=NullPool, connect_args={"timeout": _EMPTY_LOG_SECONDS})


def begin_write(session: Session) -> None:
    """SQLite: take the write lock now, so that what is read next is still true when it is written.

    PostgreSQL has row locks (``with_for_update``) for that, so nothing happens there.
    """
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def impatient(session: Session) -> None:
    """What this transaction reads, calls and probes wait for: it ends within seconds, with one of ``UNANSWERED``,
    where the database hangs.

    By default PostgreSQL waits for ever: for a lock, and for a server that says nothing. SQLite has a busy timeout.
    """
    hurry(session.connection())


def hurry(connection: Connection) -> None:
    """The same for the transaction that a connection is in, or begins with this."""
    if connection.dialect.name != "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.silence = SILENCE_SECONDS  # until the connection is back in the pool
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(1000 * LOCK_SECONDS)}")


@contextmanager
def snapshot(session: Session) -> Iterator[Session]:
    """A session beside this one whose statements all read as of one moment; nothing that is not committed yet."""
    with session.get_bind().engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")  # deferred: it takes no lock, and from the first read on nothing moves
        else:
            connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with Session(connection) as still:
            yield still


@contextmanager
def migrating(url: str) -> Iterator[Connection]:
    """A connection in a transaction of its own that holds the migration lock, so that two starts cannot collide."""
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                # Batch migrations drop and rename tables; with foreign keys on, the drop would cascade to the rows
                # of others. The pragma is ignored inside a transaction, and this engine serves nothing else.
                connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            yield connection
            if engine.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
                raise RuntimeError("the migration left rows that point to nothing; it was rolled back")
            connection.commit()
    finally:
        engine.dispose()


def _config() -> Any:
    from alembic.config import Config

    config = Config()
    # set_main_option would read a % in the path as an interpolation
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Migrate up. Safe when two processes start at once: the second waits, then finds nothing to do."""
    from alembic import command

    config = _config()
    with migrating(url) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def downgrade(url: str, revision: str) -> None:
    """Migrate down to ``revision`` ("base" drops everything)."""
    from alembic import command

    config = _config()
    with migrating(url) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def check_schema(engine: Engine) -> None:
    """Raises NotReady when the database cannot be reached or is not at the newest migration."""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    wanted = set(ScriptDirectory.from_config(_config()).get_heads())
    try:
        with engine.connect() as connection:
            present = set(MigrationContext.configure(connection).get_current_heads())
    except OperationalError as error:
        raise NotReady("the database cannot be reached") from error
    if present != wanted:
        raise NotReady(
            f"the database schema is at {', '.join(sorted(present)) or 'nothing'}, "
            f"this version needs {', '.join(sorted(wanted))}: run `alembic upgrade head`"
        )
