"""Fresh databases for tests, on every kind of server there is."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from app import db

MOST_BYTES = 64 * 2**20
"""Of a database that is emptied and not dropped."""


def listens(port: int) -> bool:
    """Whether a server listens on this port of the local machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """Below those that the kernel gives out: it is bound later, and nobody is to get it by chance meanwhile."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = 20_000 + secrets.randbelow(12_000)
            probe.bind(("127.0.0.1", port))
            return port


@lru_cache
def postgres_admin_url() -> str | None:
    """Where databases can be made: LETHEON_TEST_POSTGRES, else a local server that trusts us, else None."""
    if given := os.environ.get("LETHEON_TEST_POSTGRES"):
        return given
    if not listens(5432):
        return None
    for user in ("postgres", "root"):
        url = f"postgresql://{user}@127.0.0.1:5432/postgres"
        try:
            psycopg.connect(url, connect_timeout=30).close()
        except psycopg.OperationalError:
            continue
        return url
    return None


@contextmanager
def fresh_database(kind: str, folder: Path, *, empty: bool = False) -> Iterator[str]:
    """A database that did not exist before, migrated unless ``empty``; dropped afterwards. No other one is touched."""
    if kind == "sqlite":
        path = folder / f"{_name()}.db"
        yield f"sqlite:///{path}" if empty else migrated_database(path)
        return
    name = _create("template0") if empty else _spares().take()
    try:
        yield _url(name)
    finally:
        if empty:
            _drop(name)
        else:
            _spares().give_back(name)


class _Spares:
    """Migrated PostgreSQL databases that go from test to test. To make and drop one takes the server ten times as long
    as to empty it. That is done beside the next test, and the schema is looked at: a test may have changed it."""

    def __init__(self) -> None:
        self._template = _create("template0")
        db.upgrade(_url(self._template))
        with psycopg.connect(_url(self._template).replace("+psycopg", ""), autocommit=True) as connection:
            self._schema = _schema(connection)
            self._first = {table: _copied(connection, table) for table in _tables(connection)}
            self._sequences = connection.execute(
                "SELECT format('%I.%I', schemaname, sequencename), coalesce(last_value, start_value), "
                "last_value IS NOT NULL FROM pg_sequences"
            ).fetchall()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="databases")
        self._free: list[str] = []
        self._all = {self._template}

    def take(self) -> str:
        with suppress(IndexError):  # the thread adds to it
            return self._free.pop()
        name = _create(self._template)
        self._all.add(name)
        return name

    def give_back(self, name: str) -> None:
        self._thread.submit(self._empty_or_drop, name)

    def _empty_or_drop(self, name: str) -> None:
        try:
            self._empty(name)
        except psycopg.Error:  # whatever it is, no other test gets it
            self._discard(name)

    def _discard(self, name: str) -> None:
        _drop(name)
        self._all.discard(name)

    def _empty(self, name: str) -> None:
        with psycopg.connect(_url(name).replace("+psycopg", ""), autocommit=True) as connection:
            # Closed first: what an earlier test left running comes back in the blink after its session is ended.
            _open(name, False)
            _end_sessions(connection, name)
            (size,) = connection.execute("SELECT pg_database_size(current_database())").fetchone() or (0,)
            fits = _schema(connection) == self._schema and size <= MOST_BYTES
            if fits:
                self._fill(connection)
        if not fits:
            self._discard(name)
            return
        # Under another name: what an earlier test left running must not write into a later one's.
        again = _name()
        with _admin() as admin:
            _end_sessions(admin, name)  # one that was let in just before it was closed
            admin.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(*map(sql.Identifier, (name, again))))
        self._all ^= {name, again}
        _open(again, True)
        self._free.append(again)

    def _fill(self, connection: psycopg.Connection) -> None:
        with connection.transaction():
            connection.execute("SET LOCAL session_replication_role = replica")  # in whatever order
            used = [table for table in self._first if self._first[table] or _has_rows(connection, table)]
            # Not deleted: what came into the holes would not be read in the order in which it was written.
            connection.execute(sql.SQL("TRUNCATE {} CASCADE").format(sql.SQL(", ").join(map(sql.Identifier, used))))
            for table, rows in self._first.items():
                if not rows:
                    continue
                with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(table))) as copy:
                    copy.write(rows)
            for sequence in self._sequences:
                connection.execute("SELECT setval(%s::regclass, %s, %s)", sequence)

    def end(self) -> None:
        self._thread.shutdown()
        for name in self._all:
            _drop(name)


@lru_cache
def _spares() -> _Spares:
    return _Spares()


def end_databases() -> None:
    """For the end of a session: a process of pytest-xdist has no time left at its own."""
    if _spares.cache_info().currsize:
        _spares().end()
        _spares.cache_clear()


def _tables(connection: psycopg.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]


def _has_rows(connection: psycopg.Connection, table: str) -> bool:
    return connection.execute(sql.SQL("SELECT 1 FROM {} LIMIT 1").format(sql.Identifier(table))).fetchone() is not None


def _copied(connection: psycopg.Connection, table: str) -> bytes:
    with connection.cursor().copy(sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(table))) as copy:
        return b"".join(bytes(part) for part in copy)


def _schema(connection: psycopg.Connection) -> list[tuple[Any, ...]]:
    """Columns, indices, constraints, triggers and sequences."""
    return connection.execute(
        "SELECT c.relname, c.relkind, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull "
        "FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped "
        "WHERE c.relnamespace = 'public'::regnamespace "
        "UNION ALL SELECT conname, contype, pg_get_constraintdef(oid), '', false FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace "
        "UNION ALL SELECT tgname, tgenabled, tgrelid::regclass::text, '', false FROM pg_trigger "
        "ORDER BY 1, 2, 3"
    ).fetchall()


def _create(template: str) -> str:
    name = _name()
    with _admin() as admin:
        names = [sql.Identifier(name), sql.Identifier(template)]
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {} ENCODING 'UTF8'").format(*names))
        # No test pulls the plug on this server, so none has to wait for its disk.
        admin.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit TO off").format(names[0]))
    return name


def _open(name: str, to_new_sessions: bool) -> None:
    with _admin() as admin:
        admin.execute(
            sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {}").format(
                sql.Identifier(name), sql.Literal(to_new_sessions)
            )
        )


def _end_sessions(connection: psycopg.Connection, name: str) -> None:
    """All in this database but the caller's; gone when this returns."""
    connection.execute(
        "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
        [name],
    )


def _drop(name: str) -> None:
    with _admin() as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _admin() -> psycopg.Connection:
    admin_url = postgres_admin_url()
    assert admin_url is not None
    return psycopg.connect(admin_url, autocommit=True)


def _url(name: str) -> str:
    url = make_url(postgres_admin_url() or "").set(drivername="postgresql", database=name)
    return url.render_as_string(hide_password=False)


def _name() -> str:
    return f"letheon_test_{secrets.token_hex(8)}"


@lru_cache
def _template() -> Path:
    folder = Path(mkdtemp(prefix="letheon-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    db.upgrade(f"sqlite:///{folder / 'template.db'}")
    return folder / "template.db"


def migrated_database(path: Path) -> str:
    """A migrated SQLite file at ``path``, copied: a migration for each example would take longer than the test."""
    shutil.copy(_template(), path)
    return f"sqlite:///{path}"


@lru_cache
def redis_url() -> str | None:
    """LETHEON_TEST_REDIS, else the local server, else None."""
    return os.environ.get("LETHEON_TEST_REDIS") or ("redis://127.0.0.1:6379/0" if listens(6379) else None)


def database_kinds() -> list[str]:
    return ["sqlite", "postgresql"] if postgres_admin_url() else ["sqlite"]
