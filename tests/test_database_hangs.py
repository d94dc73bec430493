"""PostgreSQL hangs: it refuses nothing and answers nothing. Whoever waits for it hears so, and nobody piles up."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from api_kit import Api, assert_problem, listening, new_key, running, wait_until
from databases import fresh_database, postgres_admin_url
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError
from test_key_lookups import held_up, make_key

from app import db, key_lookups, pg
from app.errors import Busy, NotReady, Overloaded
from app.key_lookups import TRIPS, KeyLookups
from app.problems import Unavailable
from app.tables import ApiKey

pytestmark = pytest.mark.skipif(postgres_admin_url() is None, reason="no PostgreSQL listens")
BODY = {"text": "good", "timeout_seconds": 1}
FOREVER = 600.0


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lookups, "SECONDS", 3.0)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with fresh_database("postgresql", tmp_path) as found:
        yield found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes less: nothing here depends on how long."""
    monkeypatch.setattr(db, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(db, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(pg, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(pg.Connection, "silence", 1)


@contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """As by a change of the schema that waits for its own turn, or takes long."""
    with psycopg.connect(url) as lock:
        lock.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield
        lock.rollback()


class Freezer:
    """Stands between a client and its PostgreSQL; frozen, it passes on nothing, and its host goes on taking bytes."""

    def __init__(self, url: str) -> None:
        real = make_url(url)
        self._real = (real.host or "127.0.0.1", real.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        behind = real.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.url = behind.render_as_string(hide_password=False)
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self.thaw()
        for one in (self._listener, *self._sockets):
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._real)
                self._sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                self._flows.wait()
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def freezer(url: str) -> Iterator[Freezer]:
    found = Freezer(url)
    yield found
    found.close()


class Asked:
    """A call in a thread of its own, which must end while the database still hangs."""

    def __init__(self, api: Api, method: str, path: str, **more: Any) -> None:
        self._answers: list[httpx2.Response] = []
        self._thread = threading.Thread(target=self._ask, args=(api, method, path, more), daemon=True)
        self._thread.start()

    def _ask(self, api: Api, method: str, path: str, more: dict[str, Any]) -> None:
        self._answers.append(api.client.request(method, path, **more))

    def answer(self) -> httpx2.Response:
        self._thread.join(60)
        assert self._answers, "no answer"
        return self._answers[0]


def log_in(api: Api, headers: dict[str, str]) -> Asked:
    form = {"key": headers["Authorization"].removeprefix("Bearer ")}
    return Asked(api, "POST", "/console/login", data=form, headers={"Sec-Fetch-Site": "same-origin"})


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("table", ["api_keys", "active_set"])
def test_a_lock_leaves_nobody_without_an_answer(url: str, tmp_path: Path, table: str) -> None:
    with running(url, tmp_path, classify_deadline_seconds=1.0, active_set_poll_seconds=FOREVER) as api:
        headers = api.key()
        wait_until(lambda: api.client.post("/classify", json=BODY, headers=headers).status_code == 200)
        with locked(url, table):
            probes = [Asked(api, "GET", "/readyz") for _ in range(4)]  # more than there are threads for them
            call = Asked(api, "POST", "/classify", json=BODY, headers=headers)
            listed = Asked(api, "GET", "/admin/prompts", headers=headers)
            in_console = log_in(api, headers)
            if table == "api_keys":
                for one in (call, listed):
                    assert_problem(one.answer(), 503, "unavailable")
                    assert one.answer().headers["retry-after"] == "1"
                in_console.answer()
            else:
                assert call.answer().status_code == 503
                assert call.answer().json()["code"] in ("deadline-exceeded", "not-ready")
                assert listed.answer().status_code == 200
            for probe in probes:  # whether anybody's key is known is not what they ask
                assert probe.answer().status_code == (200 if table == "api_keys" else 503)
        assert in_console.answer().status_code == (503 if table == "api_keys" else 200)
        wait_until(lambda: api.client.get("/readyz").status_code == 200)
        wait_until(lambda: api.client.post("/classify", json=BODY, headers=headers).status_code == 200)


@pytest.mark.usefixtures("hasty")
def test_routes_that_wait_for_a_lock_take_nobody_with_them(url: str, tmp_path: Path) -> None:
    """They may hold all the connections that there are for routes."""
    with running(url, tmp_path, active_set_poll_seconds=FOREVER) as api:
        headers = api.key()
        with locked(url, "unlearn_requests"):
            lists = [Asked(api, "GET", "/unlearn-requests", headers=headers) for _ in range(20)]
            pool: Any = api.service.engine.pool
            wait_until(lambda: pool.checkedout() == 15)  # all of them
            assert api.client.post("/classify", json=BODY | {"timeout_seconds": 30}, headers=headers).status_code == 200
            assert api.client.get("/readyz").status_code == 200
        assert {one.answer().status_code for one in lists} == {200}


@pytest.mark.usefixtures("hasty")
def test_the_model_thread_gives_up_and_lives(url: str, tmp_path: Path) -> None:
    with running(url, tmp_path, active_set_poll_seconds=FOREVER) as api:
        serving = api.service.serving
        texts = serving.encode(["good"])
        with locked(url, "active_set"):
            for _ in range(4):  # more than the batches that make a model unready: this is no fault of its
                error = serving.submit(texts).exception(60)
                assert isinstance(error, NotReady) and "OperationalError" in error.detail
            with pytest.raises(Busy, match="hangs"):
                serving.check()
        serving.check()
        assert len(serving.submit(texts).result(60).results) == 1


def test_a_probe_does_not_wait_for_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.CHECK_SECONDS", 0.1)
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, active_set_poll_seconds=FOREVER) as api:
        with api.service.serving._lock:
            answer = Asked(api, "GET", "/readyz").answer()
        assert_problem(answer, 503, "not-ready")
        assert "takes too long" in answer.json()["detail"]
        assert api.client.get("/readyz").status_code == 200


def test_a_probe_answers_whatever_its_thread_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.CHECK_SECONDS", 90.0)
    monkeypatch.setattr("app.routes.health.READY_SECONDS", 0.2)
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, active_set_poll_seconds=FOREVER) as api:
        with api.service.serving._lock:
            probes = [Asked(api, "GET", "/readyz") for _ in range(4)]
            for probe in probes:
                assert_problem(probe.answer(), 503, "not-ready")
                assert "in time" in probe.answer().json()["detail"]
        wait_until(lambda: api.client.get("/readyz").status_code == 200)


@pytest.mark.usefixtures("hasty")
def test_a_server_that_says_nothing_is_given_up(freezer: Freezer, tmp_path: Path) -> None:
    """Neither its own timeouts end anything here, nor TCP's: its host takes every byte."""
    with running(freezer.url, tmp_path, classify_deadline_seconds=1.0, active_set_poll_seconds=FOREVER) as api:
        headers = api.key("classify")
        wait_until(lambda: api.client.post("/classify", json=BODY, headers=headers).status_code == 200)
        texts = api.service.serving.encode(["good"])
        freezer.freeze()
        try:
            probes = [Asked(api, "GET", "/readyz") for _ in range(4)]
            future = api.service.serving.submit(texts)
            call = Asked(api, "POST", "/classify", json=BODY, headers=headers)
            assert_problem(call.answer(), 503, "unavailable")
            assert {probe.answer().status_code for probe in probes} == {503}
            assert isinstance(future.exception(60), NotReady)
            # The next ones make new connections, which nobody answers either.
            assert_problem(Asked(api, "GET", "/readyz").answer(), 503, "not-ready")
            assert isinstance(api.service.serving.submit(texts).exception(60), NotReady)
            assert api.client.get("/livez").status_code == 200
        finally:
            freezer.thaw()
        wait_until(lambda: api.client.post("/classify", json=BODY, headers=headers).status_code == 200)
        assert api.client.get("/readyz").status_code == 200


@pytest.mark.usefixtures("hasty")
def test_impatience_ends_with_its_transaction(url: str) -> None:
    engine = db.make_engine(url, pool_size=1, max_overflow=0)
    sessions = db.make_sessions(engine)
    try:
        with locked(url, "api_keys"), pytest.raises(OperationalError, match="lock"), sessions() as session:
            db.impatient(session)
            session.get(ApiKey, "key_0")
        with sessions() as session:
            assert session.scalar(text("SHOW lock_timeout")) == "0"
            session.execute(text("SELECT pg_sleep(2)"))  # silent for longer than impatience lasts
        with sessions() as session:
            db.impatient(session)
            # Rows that come one by one, each larger than what a server keeps back: slow, and never silent for long.
            rows = session.execute(text("SELECT pg_sleep(0.3), repeat('x', 20000) FROM generate_series(1, 6)"))
            assert len(rows.all()) == 6
            with pytest.raises(OperationalError, match="said nothing"):
                session.execute(text("SELECT pg_sleep(60)"))
        with sessions() as session:  # on another connection
            assert session.scalar(text("SELECT 1")) == 1
    finally:
        engine.dispose()


def test_connections_find_out_that_a_host_is_gone(url: str) -> None:
    wanted = {"connect_timeout": "5", "tcp_user_timeout": "5000", "keepalives_idle": "5", "keepalives_interval": "2"}
    for query, own in (("", {}), ("?connect_timeout=2&keepalives_idle=60", {"connect_timeout": "2"})):
        engine = db.make_engine(url + query)
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            found = driver.info.get_parameters()
        engine.dispose()
        expected = {**wanted, **own, **({"keepalives_idle": "60"} if query else {})}
        assert {name: found[name] for name in wanted} == expected


@pytest.mark.usefixtures("hasty")
def test_those_who_left_are_not_kept(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(key_lookups, "MOST", 20)
    with listening(url, tmp_path) as (address, app, _):
        lookups = app.state.service.key_lookups
        key = new_key(app.state.service, "classify")["Authorization"]
        host, port = address.removeprefix("http://").split(":")
        request = (
            f"POST /classify HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n"
            'Content-Length: 16\r\n\r\n{"text": "good"}'
        ).encode()
        with locked(url, "api_keys"):
            for _ in range(60):
                with socket.create_connection((host, int(port)), timeout=30) as caller:
                    caller.sendall(request)
                assert lookups._callers <= 20
            wait_until(lambda: caplog.text.count("POST /classify 503") == 60)  # while the lock is held
            assert lookups._callers == 0 and not lookups._waiting


async def under_way(lookups: KeyLookups, key: str, begun: threading.Semaphore) -> list[asyncio.Task[ApiKey]]:
    """As many look-ups as there are at a time, each held up."""
    tasks = []
    for _ in range(TRIPS):
        tasks.append(asyncio.create_task(lookups.find(key)))
        assert await asyncio.to_thread(begun.acquire, True, 30)
    return tasks


def test_more_callers_than_may_wait_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lookups, "MOST", 5)
    engine = db.make_engine(url)
    sessions = db.make_sessions(engine)
    _, good = make_key(sessions, "good")

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        with held_up(engine) as (begun, go):
            tasks = await under_way(lookups, good, begun)
            tasks += [asyncio.create_task(lookups.find(good)) for _ in range(5 - TRIPS)]
            await asyncio.sleep(0)
            assert lookups._waiting
            with pytest.raises(Overloaded) as refused:
                await lookups.find(good)
            assert refused.value.extra["retry_after"] == 1
            for task in tasks[TRIPS:]:
                task.cancel()
            await asyncio.wait(tasks[TRIPS:])
            assert not lookups._waiting, "those who left"
            again = asyncio.create_task(lookups.find(good))  # there is room
            await asyncio.sleep(0)
            go.set()
            found = await asyncio.gather(*tasks[:TRIPS], again)
        assert [key.name for key in found] == ["good"] * (TRIPS + 1)
        assert lookups._callers == 0

    asyncio.run(ask())
    engine.dispose()


def test_a_caller_waits_for_so_long_and_the_next_is_answered(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lookups, "SECONDS", 0.1)
    engine = db.make_engine(url)
    sessions = db.make_sessions(engine)
    _, good = make_key(sessions, "good")

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        with held_up(engine) as (begun, go):
            early = await under_way(lookups, good, begun)
            late = (lookups.find(good) for _ in range(20 - TRIPS))  # no look-up takes them up
            found = await asyncio.gather(*early, *late, return_exceptions=True)
            assert [type(one) for one in found] == [Unavailable] * 20
            assert lookups._callers == 0 and not lookups._waiting
            go.set()
        monkeypatch.setattr(key_lookups, "SECONDS", 30.0)
        assert (await lookups.find(good)).name == "good"

    asyncio.run(ask())
    engine.dispose()


def test_the_time_that_a_call_allows_counts_its_key(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, active_set_poll_seconds=FOREVER) as api:
        headers = api.key("classify")
        with held_up(api.service.readers) as (begun, go):
            call = Asked(api, "POST", "/classify", json={"text": "good", "timeout_seconds": 0.2}, headers=headers)
            assert begun.acquire(timeout=30)
            time.sleep(0.5)
            go.set()
            assert_problem(call.answer(), 503, "deadline-exceeded")
        assert api.client.post("/classify", json={"text": "good"}, headers=headers).status_code == 200
