"""Fresh databases for tests, on every kind of server there is."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from app import db


def listens(port: int) -> bool:
    """Whether a server listens on this port of the local machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


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
            psycopg.connect(url, connect_timeout=3).close()
        except psycopg.OperationalError:
            continue
        return url
    return None


@contextmanager
def fresh_database(kind: str, folder: Path, *, empty: bool = False) -> Iterator[str]:
    """A database that did not exist before, migrated unless ``empty``; dropped afterwards. No other one is touched."""
    name = f"letheon_test_{secrets.token_hex(8)}"
    if kind == "sqlite":
        path = folder / f"{name}.db"
        yield f"sqlite:///{path}" if empty else migrated_database(path)
        return
    with _postgres(name, "template0" if empty else _postgres_template()) as url:
        yield url


@contextmanager
def _postgres(name: str, template: str) -> Iterator[str]:
    admin_url = postgres_admin_url()
    assert admin_url is not None
    with psycopg.connect(admin_url, autocommit=True) as admin:
        names = [sql.Identifier(name), sql.Identifier(template)]
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {} ENCODING 'UTF8'").format(*names))
        # No test pulls the plug on this server, so none has to wait for its disk.
        admin.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit TO off").format(names[0]))
        try:
            url = make_url(admin_url).set(drivername="postgresql", database=name)
            yield url.render_as_string(hide_password=False)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@lru_cache
def _postgres_template() -> str:
    """One of this process, copied for each test: a migration takes ten times as long as a copy."""
    name = f"letheon_test_template_{secrets.token_hex(8)}"
    stack = ExitStack()
    url = stack.enter_context(_postgres(name, "template0"))
    atexit.register(stack.close)
    db.upgrade(url)
    return name


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
