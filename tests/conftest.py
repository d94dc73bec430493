"""Databases for the tests: SQLite always, PostgreSQL too where one listens. Each test gets a fresh one of its own."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from app import db
from app.vault import Vault

DatabaseFactory = Callable[[str], AbstractContextManager[str]]


@lru_cache
def postgres_admin_url() -> str | None:
    """Where databases can be made: LETHEON_TEST_POSTGRES, else a local server that trusts us, else None."""
    if given := os.environ.get("LETHEON_TEST_POSTGRES"):
        return given
    try:
        socket.create_connection(("127.0.0.1", 5432), timeout=1).close()
    except OSError:
        return None
    for user in ("postgres", "root"):
        url = f"postgresql://{user}@127.0.0.1:5432/postgres"
        try:
            psycopg.connect(url, connect_timeout=3).close()
        except psycopg.OperationalError:
            continue
        return url
    return None


def pytest_report_header() -> str:
    url = postgres_admin_url()
    where = make_url(url).render_as_string(hide_password=True) if url else None
    return f"databases: sqlite and {where}" if where else "databases: sqlite only (no PostgreSQL at 127.0.0.1:5432)"


@contextmanager
def fresh_database(kind: str, folder: Path) -> Iterator[str]:
    """An empty database that did not exist before; dropped afterwards. No other database is touched."""
    name = f"letheon_test_{secrets.token_hex(8)}"
    if kind == "sqlite":
        yield f"sqlite:///{folder / name}.db"
        return
    admin_url = postgres_admin_url()
    assert admin_url is not None
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(sql.Identifier(name)))
        try:
            url = make_url(admin_url).set(drivername="postgresql", database=name)
            yield url.render_as_string(hide_password=False)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(params=["sqlite", "postgresql"] if postgres_admin_url() else ["sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, on every kind there is."""
    with fresh_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a migrated database."""
    db.upgrade(database_url)
    engine = db.make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    return db.make_sessions(engine)


@pytest.fixture
def vault() -> Vault:
    return Vault(bytes(range(32)))
