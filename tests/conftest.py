"""Databases for the tests: SQLite always, PostgreSQL too where one listens. Each test gets a fresh one of its own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from databases import database_kinds, end_databases, fresh_database, postgres_admin_url, redis_url
from sqlalchemy import Engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from app import db
from app.keystore import KeyStore
from app.vault import Vault

# Tiny models gain nothing from a second thread, and lose much to waiting for it on a machine that has other work.
torch.set_num_threads(1)

# Hypothesis would draw the same examples in every run where CI is set. How long one takes is the machine's affair.
hypothesis.settings.register_profile("letheon", hypothesis.settings.get_profile("default"), deadline=None)
hypothesis.settings.load_profile("letheon")

# No test pulls the plug, so none has to wait for a disk: temporary files go to memory where there is room.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# A shell's background job starts without it, and so would all that tests start and then end by Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Minutes of waiting for real processes, in modules of few tests: last, they would leave all other workers idle.
LONGEST = (
    "test_tutorial",
    "test_durability",
    "test_ray_serve",
    "test_processes",
    "test_cli_serve",
    "test_gateway",
    "test_bench_replicas",
    "test_bench_attacks",
    "test_cli_bulk",
    "test_bench_faults",
    "test_webhook_deliveries",
    "test_tracing",
    "test_watchdog",
    "test_broker",
    "test_bench_quality",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # stable: the rest stays as it was


def pytest_sessionfinish() -> None:
    end_databases()


def pytest_report_header() -> list[str]:
    """What a run covers depends on the servers it finds; say which."""
    postgres, redis = postgres_admin_url(), redis_url()
    return [
        f"postgresql: {make_url(postgres).render_as_string()}"
        if postgres
        else "postgresql: none listens on 127.0.0.1:5432 (LETHEON_TEST_POSTGRES names another): SQLite only",
        f"redis: {make_url(redis).render_as_string()}"
        if redis
        else "redis: none listens on 127.0.0.1:6379 (LETHEON_TEST_REDIS names another): filesystem broker only",
    ]


@pytest.fixture(params=database_kinds())
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated database, on every kind there is."""
    with fresh_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture(params=database_kinds())
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same, without a table."""
    with fresh_database(request.param, tmp_path, empty=True) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = db.make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    return db.make_sessions(engine)


@pytest.fixture
def vault() -> Vault:
    return Vault(bytes(range(32)))


@pytest.fixture
def keystore(database_url: str, tmp_path: Path) -> Iterator[KeyStore]:
    """A key store beside the database, of the same kind."""
    with fresh_database("sqlite" if database_url.startswith("sqlite") else "postgresql", tmp_path, empty=True) as url:
        store = KeyStore(url)
        yield store
        store.close()
