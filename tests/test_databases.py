"""The databases that go from test to test."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psycopg
import pytest
from api_kit import wait_until
from databases import fresh_database, postgres_admin_url


@pytest.mark.skipif(postgres_admin_url() is None, reason="of PostgreSQL's databases")
def test_who_keeps_coming_back_is_shut_out_when_the_test_is_over(tmp_path: Path) -> None:
    """A server that a test left running: it must not keep its database, nor find itself in a later test's."""
    sessions, last = 0, []

    def come_back() -> None:
        nonlocal sessions
        while True:
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    sessions += 1
                    connection.execute("SELECT pg_sleep(60)")
            except psycopg.Error as error:
                if "does not exist" in str(error):
                    last.append(str(error))
                    return
                time.sleep(0.001)

    with fresh_database("postgresql", tmp_path) as url:
        guest = threading.Thread(target=come_back, daemon=True)
        guest.start()
        wait_until(lambda: sessions > 0)
    guest.join(90)
    assert len(last) == 1 and url.rpartition("/")[2] in last[0]
