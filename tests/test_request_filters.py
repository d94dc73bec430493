"""Lists of requests, narrowed: what they hold, page by page, among ten thousand; and that an index finds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import unescape
from typing import Any
from urllib.parse import urlencode

import pytest
from api_kit import Api, running
from console_kit import log_in
from databases import database_kinds, fresh_database
from sqlalchemy import Engine, event, insert, text

from app import lifecycle
from app.request_filters import RequestFilter, keys_called
from app.tables import OPEN, ApiKey, RequestState, UnlearnRequest, utcnow

ROWS = 10_000
STATES = ("active", "pending", "revoked", "failed", "active")
KEYS = [f"key_{i:016x}" for i in range(3)]


@dataclass
class Full:
    """A database with ten thousand requests, newest first in ``rows``."""

    api: Api
    rows: list[dict[str, Any]]
    now: datetime

    @property
    def engine(self) -> Engine:
        return self.api.service.engine


@pytest.fixture(scope="module", params=database_kinds())
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Full]:
    folder = tmp_path_factory.mktemp("filters")
    with fresh_database(request.param, folder) as url, running(url, folder) as api:
        now = utcnow()
        rows = [
            {
                # As ids are: digits of the time, one request a minute.
                "id": f"req_{0x19AA5B0C2D4 + 60_000 * i:012x}{i:016x}",
                "state": STATES[i % len(STATES)],
                "api_key_id": KEYS[i % len(KEYS)] if i % 7 else None,
                "created_at": now,
                "updated_at": now,
                # Older requests of an older version have neither.
                "received_at": now - timedelta(hours=ROWS - i) if i >= 50 else None,
                "due_at": now - timedelta(hours=ROWS - i) + timedelta(days=30) if i >= 50 else None,
                "num_texts": 1,
                "options": {},
                "fingerprint": "0" * 64,
                "reason": "x" * 200,
            }
            for i in range(ROWS)
        ]
        named = {"name": "support desk", "scopes": ["requests"], "digest": bytes(32), "created_at": now}
        with api.service.sessions.begin() as session:
            session.execute(insert(ApiKey), [{"id": key_id, **named} for key_id in KEYS])
        with api.service.sessions.begin() as session:
            session.execute(insert(UnlearnRequest), rows)
        if request.param == "postgresql":  # as its autovacuum does by and by
            with api.service.engine.begin() as connection:
                connection.execute(text("ANALYZE unlearn_requests"))
        yield Full(api, rows[::-1], now)


def hours(number: float) -> Callable[[datetime], datetime]:
    return lambda now: now + timedelta(hours=number)


NARROW: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any], datetime], bool]]] = {
    "everything": ({}, lambda row, now: True),
    "id": ({"id_prefix": "req_019aa5c"}, lambda row, now: row["id"].startswith("req_019aa5c")),
    "one id": ({"id_prefix": f"req_{0x19AA5B0C2D4:012x}{0:016x}"}, lambda row, now: row["id"].endswith("0" * 16)),
    "state": ({"states": (RequestState.FAILED,)}, lambda row, now: row["state"] == "failed"),
    "key": ({"keys": KEYS[:1]}, lambda row, now: row["api_key_id"] == KEYS[0]),
    "nobody": ({"keys": ()}, lambda row, now: False),
    "received": (
        {"received_from": hours(-500), "received_before": hours(-300)},
        lambda row, now: (
            row["received_at"] is not None
            and now - timedelta(hours=500) <= row["received_at"] < now - timedelta(hours=300)
        ),
    ),
    "overdue": (
        {"due_before": hours(0)},
        lambda row, now: row["due_at"] is not None and row["due_at"] < now and row["state"] in OPEN,
    ),
    "due within a week, of one key": (
        {"due_before": hours(168), "keys": KEYS[1:2]},
        lambda row, now: (
            row["due_at"] is not None
            and row["due_at"] < now + timedelta(hours=168)
            and row["state"] in OPEN
            and row["api_key_id"] == KEYS[1]
        ),
    ),
}


def narrowed(name: str, now: datetime) -> RequestFilter:
    return RequestFilter(**{key: value(now) if callable(value) else value for key, value in NARROW[name][0].items()})


@pytest.mark.parametrize("name", NARROW)
def test_pages_hold_what_was_asked_for_and_no_more_is_read(full: Full, name: str) -> None:
    where, wanted = narrowed(name, full.now), [r["id"] for r in full.rows if NARROW[name][1](r, full.now)]
    assert name == "nobody" or wanted
    fetched: list[int] = []
    seen: list[str] = []
    with full.api.service.sessions() as session:
        event.listen(UnlearnRequest, "load", lambda *_: fetched.append(1))
        cursor, pages = None, 0
        while pages == 0 or (cursor is not None and pages < 4):
            rows, cursor = lifecycle.list_requests(session, limit=50, cursor=cursor, where=where)
            seen += [row.id for row in rows]
            pages += 1
            session.expunge_all()
    assert seen == wanted[: 50 * pages] and (cursor is not None) == (len(wanted) > 50 * pages)
    assert len(fetched) <= 51 * pages


@pytest.mark.parametrize("name", [name for name in NARROW if name != "nobody"])
def test_an_index_finds_it(full: Full, name: str) -> None:
    statements: list[tuple[str, Any]] = []
    event.listen(full.engine, "before_cursor_execute", lambda *a: statements.append((a[2], a[3])))
    with full.api.service.sessions() as session:
        lifecycle.list_requests(session, limit=50, where=narrowed(name, full.now))
    [(statement, values)] = [one for one in statements if "unlearn_requests" in one[0]]
    assert "sealed_texts" not in statement, "a page of rows is not a page of everybody's texts"
    plan = check_plan(full.engine, statement, values)
    if full.engine.dialect.name == "sqlite" and name in ("received", "one id", "id", "state", "key"):
        assert any("SEARCH" in line for line in plan), plan


def check_plan(engine: Engine, statement: str, values: Any) -> list[str]:
    """That an index answers it, which is what the database says itself; its plan."""
    sqlite = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        explained = connection.exec_driver_sql(f"EXPLAIN {'QUERY PLAN ' if sqlite else ''}{statement}", values)
        plan = [str(row[3 if sqlite else 0]) for row in explained]
    if sqlite:
        assert all("INDEX" in line or "USE TEMP B-TREE" in line for line in plan), plan
    else:
        assert not any("Seq Scan" in line for line in plan), plan
        assert any("Index" in line for line in plan), plan
    return plan


def day(now: datetime, hours: float) -> str:
    return f"{now + timedelta(hours=hours):%Y-%m-%d}"


ON_THE_PAGE: dict[str, tuple[Callable[[datetime], dict[str, str]], Callable[[dict[str, Any], datetime], bool]]] = {
    "all": (lambda now: {}, lambda row, now: True),
    "state": (lambda now: {"show": "active"}, lambda row, now: row["state"] == "active"),
    "key": (lambda now: {"key": KEYS[1]}, lambda row, now: row["api_key_id"] == KEYS[1]),
    "name of keys": (lambda now: {"key": "support desk"}, lambda row, now: row["api_key_id"] is not None),
    "received": (
        lambda now: {"from": day(now, -2000), "to": day(now, -1000)},
        lambda row, now: (
            row["received_at"] is not None and day(now, -2000) <= f"{row['received_at']:%Y-%m-%d}" <= day(now, -1000)
        ),
    ),
    "due": (
        lambda now: {"due": "7"},
        lambda row, now: (
            row["due_at"] is not None and row["due_at"] <= now + timedelta(days=7) and row["state"] in OPEN
        ),
    ),
    "id": (lambda now: {"id": "req_019aa6"}, lambda row, now: row["id"].startswith("req_019aa6")),
    "state, key and due": (
        lambda now: {"show": "open", "key": KEYS[0], "due": "0"},
        lambda row, now: (
            row["due_at"] is not None and row["due_at"] < now and row["state"] in OPEN and row["api_key_id"] == KEYS[0]
        ),
    ),
}
"""What the console's list may be narrowed by: the form's fields, and the rows that it is to show."""


@pytest.mark.parametrize("name", ON_THE_PAGE)
def test_every_page_of_the_list_is_one_query_by_an_index(full: Full, name: str) -> None:
    person = log_in(full.api, "auditor")
    fields, wanted = ON_THE_PAGE[name]
    ids = [row["id"] for row in full.rows if wanted(row, full.now)]
    statements: list[tuple[str, Any]] = []

    def note(*arguments: Any) -> None:
        statements.append((arguments[2], arguments[3]))

    event.listen(full.engine, "before_cursor_execute", note)
    try:
        address, seen = f"/console/requests?{urlencode(fields(full.now))}", list[str]()
        for _ in range(3):
            statements.clear()
            page = person.get(address)
            assert page.status_code == 200 and len(page.content) < 100_000
            seen += re.findall(r'href="console/requests/(req_\w+)"', page.text)
            [(statement, values)] = [one for one in statements if "unlearn_requests" in one[0]]
            assert "LIMIT" in statement and "count(" not in statement and "sealed_texts" not in statement
            check_plan(full.engine, statement, values)
            older = re.search(r'href="(console/requests\?[^"]+)" rel="next"', page.text)
            if older is None:
                break
            address = "/" + unescape(older[1])
    finally:
        event.remove(full.engine, "before_cursor_execute", note)
    assert len(ids) > 150 and seen == ids[:150]


def test_keys_are_found_by_id_and_by_name(full: Full) -> None:
    with full.api.service.sessions() as session:
        assert keys_called(session, KEYS[1]) == [KEYS[1]]
        assert keys_called(session, "support desk") == KEYS
        assert keys_called(session, "support") == [] == keys_called(session, "")


def test_the_api_takes_them_and_keeps_to_ones_own(full: Full) -> None:
    client, auditor, nobody = full.api.client, full.api.key("auditor"), full.api.key("requests")
    params = {"api_key_id": KEYS[2], "due_before": full.now.isoformat(), "limit": "200"}
    answer = client.get("/unlearn-requests", params=params, headers=auditor).json()
    wanted = [
        row["id"]
        for row in full.rows
        if row["api_key_id"] == KEYS[2] and row["state"] in OPEN and row["due_at"] and row["due_at"] < full.now
    ]
    assert [item["id"] for item in answer["items"]] == wanted[:200] and len(wanted) > 200
    older = client.get("/unlearn-requests", params={**params, "cursor": answer["next_cursor"]}, headers=auditor).json()
    assert [item["id"] for item in older["items"]] == wanted[200:400]
    assert client.get("/unlearn-requests", params=params, headers=nobody).json()["items"] == []
