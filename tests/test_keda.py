"""What KEDA asks for the workers: the SQL on a real PostgreSQL, by a role that may read no more than that."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from databases import fresh_database, postgres_admin_url
from floor import must_take, submit
from manifests import find
from psycopg import sql
from sqlalchemy import make_url, update
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import ROOT

from app import db, lifecycle
from app.tables import UnlearnRequest, utcnow
from app.vault import Vault

TRIGGERS = {t.get("name", ""): t["metadata"] for t in find("ScaledObject", "letheon-worker")["spec"]["triggers"]}
WAITING = TRIGGERS["oldest-waiting-seconds"]["query"]
IN_TRAINING = TRIGGERS["requests-in-training"]["query"]

pytestmark = pytest.mark.skipif(postgres_admin_url() is None, reason="KEDA's queries are PostgreSQL's; none listens")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with fresh_database("postgresql", tmp_path) as made:
        yield made


@pytest.fixture
def sessions(url: str) -> Iterator[sessionmaker[Session]]:
    engine = db.make_engine(url)
    yield db.make_sessions(engine)
    engine.dispose()


def ask(connection: psycopg.Connection[Any], query: str) -> float:
    (row,) = connection.execute(query.encode()).fetchall()
    (value,) = row
    assert isinstance(value, float)  # what KEDA scans it into
    return value


def test_the_queries_count_what_waits_and_what_runs(url: str, sessions: sessionmaker[Session], vault: Vault) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        assert (ask(connection, WAITING), ask(connection, IN_TRAINING)) == (0, 0)
        first, second, third = (submit(sessions, vault, f"text {i}") for i in range(3))
        with sessions.begin() as session:
            for request, seconds in ((first, 900), (second, 60)):
                earlier = utcnow() - timedelta(seconds=seconds)
                session.execute(
                    update(UnlearnRequest)
                    .where(UnlearnRequest.id == request)
                    .values(updated_at=earlier, created_at=earlier)
                )
        assert 900 <= ask(connection, WAITING) < 960
        claim = must_take(sessions, first)
        assert 60 <= ask(connection, WAITING) < 120
        assert ask(connection, IN_TRAINING) == 1
        with sessions.begin() as session:
            lifecycle.start_evaluating(session, claim)
        must_take(sessions, second)
        assert ask(connection, IN_TRAINING) == 2
        # Handed back, a request waits since then, however long it was trained before.
        with sessions.begin() as session:
            lifecycle.release(session, claim)
        assert ask(connection, WAITING) < 30
        assert ask(connection, IN_TRAINING) == 1
        must_take(sessions, third)


def role_statements() -> list[str]:
    """What docs/deployment.md tells to run."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    (block,) = re.findall(r"```sql\n(.*?)```", page, flags=re.DOTALL)
    return [statement.strip() for statement in block.split(";") if statement.strip()]


def test_the_role_of_the_page_may_ask_that_and_nothing_else(
    url: str, sessions: sessionmaker[Session], vault: Vault
) -> None:
    submit(sessions, vault)
    name = f"letheon_keda_{secrets.token_hex(4)}"
    statements = [statement.replace("letheon_keda", name) for statement in role_statements()]
    database = make_url(url).database
    with psycopg.connect(url, autocommit=True) as admin:
        try:
            for statement in statements:
                assert name in statement
                admin.execute(statement.replace("DATABASE letheon ", f"DATABASE {database} ").encode())
            admin.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(name)))
            assert ask(admin, WAITING) >= 0
            assert ask(admin, IN_TRAINING) == 0
            for forbidden in (
                "SELECT sealed_texts FROM unlearn_requests",
                "SELECT reason FROM unlearn_requests",
                "SELECT * FROM prompts",
                "SELECT digest FROM api_keys",
                "UPDATE unlearn_requests SET state = 'failed'",
                "DELETE FROM unlearn_requests",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    admin.execute(forbidden)
        finally:
            admin.execute("RESET SESSION AUTHORIZATION")
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_the_queries_stay_cheap_with_many_requests(url: str) -> None:
    """Twenty thousand ended requests, a few that wait: an index finds those few."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            """INSERT INTO unlearn_requests
                   (id, state, created_at, updated_at, num_texts, options, fingerprint, attempt, cancel_requested)
               SELECT 'req_' || lpad(i::text, 28, '0'), (ARRAY['active', 'revoked', 'failed'])[i % 3 + 1],
                      now(), now(), 1, '{}', repeat('f', 64), 1, false
               FROM generate_series(1, 20000) AS i"""
        )
        connection.execute(
            "UPDATE unlearn_requests SET state = 'pending' WHERE id IN (SELECT id FROM unlearn_requests LIMIT 5)"
        )
        connection.execute("ANALYZE unlearn_requests")
        for query in (WAITING, IN_TRAINING):
            (row,) = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode()).fetchall()
            (plan,) = row[0]
            text = json.dumps(plan)
            assert "ix_unlearn_requests_state_id" in text and "Seq Scan" not in text, text
            assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 50
