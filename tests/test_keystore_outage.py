"""The key store is away for a while: what goes on, what waits, and that nothing is lost by it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, add_prompt, assert_problem, make_gate, running, soft_prompt, tiny_llm, wait_until
from databases import database_kinds, fresh_database, migrated_database
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select, text
from sqlalchemy.orm import Session, sessionmaker
from vault_kit import away, pending, sharing, texts_open
from webhook_kit import add_key, add_webhook, deliveries, make_due, receiving, sender
from webhook_kit import submit as submit_for
from worker_kit import ask, write_retain

import worker.deliveries
from app import db, keystore, shredding
from app.errors import KeyStoreAway
from app.keystore import KeyStore
from app.settings import Settings
from app.tables import UnlearnRequest, Webhook
from models.examples import read_examples
from worker.context import Context
from worker.job import Job
from worker.tasks import run_job

Sessions = sessionmaker[Session]
FOREVER = 3600.0


@pytest.fixture(autouse=True)
def asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystore, "AWAY_SECONDS", 0.0)


@pytest.fixture(params=database_kinds())
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with fresh_database(request.param, tmp_path, empty=True) as url:
        yield url


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Sessions]:
    engine = db.make_engine(migrated_database(tmp_path / "main.db"))
    yield db.make_sessions(engine)
    engine.dispose()


def gauge(api: Api, name: str) -> float | None:
    scraped = api.client.get("/metrics", headers=api.key("metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(scraped)}
    return float(families[name].samples[0].value) if name in families else None


def up(api: Api) -> float | None:
    return gauge(api, "letheon_keystore_up")


@pytest.mark.parametrize("name", ["keystore.db", None])
def test_whether_there_is_one_is_told(name: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{tmp_path / name}" if name else ""
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, keystore_url=url) as api:
        assert (gauge(api, "letheon_keystore_configured"), up(api)) == ((1, 1) if name else (0, None))
    assert ("there is no key store" in caplog.text) is (name is None)


def ready(api: Api) -> tuple[int, list[str] | None]:
    answer = api.client.get("/readyz")
    return answer.status_code, answer.json().get("degraded")


def test_the_service_goes_on_with_what_it_has_and_refuses_the_rest(store_url: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/letheon.db"
    changes: dict[str, Any] = {"keystore_url": store_url, "active_set_poll_seconds": FOREVER}
    with running(url, tmp_path, **changes) as api:
        headers, store = api.key(), api.service.vault.keystore
        assert store is not None and (ready(api), up(api)) == ((200, []), 1)
        request = api.submit(headers)
        assert api.client.post(f"/unlearn-requests/{request['id']}/cancel", headers=headers).status_code == 200
        receipt = f"/unlearn-requests/{request['id']}/receipt"
        first, second = (add_prompt(api.service, soft_prompt(seed), make_gate(f"text {seed}")) for seed in (1, 2))

        with away(store):
            body = {"text": "a good film"}
            for method, path, sent in (
                ("POST", "/classify", body),  # what is in force was never read: nothing is answered without it
                ("POST", "/unlearn-requests", {"forget_texts": ["a bad film"]}),
                ("POST", "/webhooks", {"url": "https://hooks.example/"}),
                ("GET", receipt, None),
                ("GET", "/admin/audit/export", None),
                ("GET", "/admin/audit/checkpoint", None),
                ("GET", "/admin/audit/public-key", None),
            ):
                answer = api.client.request(method, path, json=sent, headers=headers)
                assert int(answer.headers["retry-after"]) >= 1
                problem = assert_problem(answer, 503, "keystore-away")
                assert "keystore.db" not in str(problem) and str(tmp_path) not in str(problem)
            assert_problem(api.client.get("/readyz"), 503, "keystore-away")
            assert up(api) == 0
            with api.service.sessions() as session:
                assert len(session.scalars(select(UnlearnRequest)).all()) == 3, "those of before"
                assert session.scalars(select(Webhook)).all() == []

        assert api.classify(headers, "a good film")["active_set_version"] == 2
        assert (ready(api), up(api)) == ((200, []), 1)

        with away(store):
            refused = api.client.post("/unlearn-requests", json={"forget_texts": ["x"]}, headers=headers)
            assert_problem(refused, 503, "keystore-away")
            assert (ready(api), up(api)) == ((200, ["key-store"]), 0)
            assert api.classify(headers, "a good film")["active_set_version"] == 2
            gone = api.client.post(f"/admin/prompts/{first}/revoke", json={"reason": "test"}, headers=headers)
            assert gone.status_code == 200, "what shreds does not wait"
            assert len(pending(api.service.sessions)) == 1
            assert api.classify(headers, "a good film")["active_set_version"] == 3
            back = api.client.post("/admin/active-sets/1/restore", json={"reason": "test"}, headers=headers)
            assert_problem(back, 409, "conflict")
            assert ready(api) == (200, ["key-store"])

        assert shredding.finish(api.service.sessions, api.service.vault) == 1, "the reaper's chore"
        assert store.counts()[1] == 4, "of three requests' texts and of the first prompt"
        assert api.client.get(receipt, headers=headers).status_code == 200
        assert api.submit(headers)["state"] == "pending" and ready(api) == (200, [])
        assert api.client.get(f"/admin/prompts/{second}", headers=headers).json()["state"] == "active"


@pytest.mark.skipif("postgresql" not in database_kinds(), reason="SQLite has no lock that a read waits for")
def test_a_key_store_that_hangs_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_database("postgresql", tmp_path, empty=True) as url:
        store, other = KeyStore(url), db.make_engine(url)
        store.check()
        with other.begin() as connection:
            connection.execute(text("LOCK TABLE shares IN ACCESS EXCLUSIVE MODE"))
            monkeypatch.setattr(keystore, "CONNECT_SECONDS", 0.1)
            stop = store.watch(0.01)
            wait_until(lambda: not store.answers)
        monkeypatch.setattr(keystore, "CONNECT_SECONDS", 20)
        wait_until(lambda: store.answers)
        stop()
        store.close()
        other.dispose()


@pytest.mark.skipif("postgresql" not in database_kinds(), reason="SQLite has no lock that a read waits for")
def test_nobody_waits_for_a_lock_in_the_key_store_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `VACUUM FULL` takes it: the model's thread may be who asks, for a prompt that came into force meanwhile."""
    monkeypatch.setattr(db, "LOCK_SECONDS", 0.2)
    with fresh_database("postgresql", tmp_path, empty=True) as url:
        store, other = KeyStore(url), db.make_engine(url)
        store.check()
        with other.begin() as connection:
            connection.execute(text("LOCK TABLE shares IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(KeyStoreAway):
                store.read(bytes(16))
        store.close()
        other.dispose()


class Clock:
    """A clock that stands still, and what happens whenever somebody looks at it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        self.meanwhile()
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keystore, "time", clock)
    return clock


def test_a_look_that_gets_no_answer_counts_as_none_in_time(clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = KeyStore(f"postgresql://letheon@127.0.0.1:{listener.getsockname()[1]}/keys?sslmode=disable")
        looking = threading.Thread(target=store.look)
        assert store.answers, "before the first look"
        looking.start()
        connection, _ = listener.accept()  # it has asked, and nobody answers
        clock.now = keystore.CONNECT_SECONDS - 0.001
        assert store.answers, "not yet"
        clock.now = keystore.CONNECT_SECONDS
        assert not store.answers
        connection.close()
        looking.join()
        assert not store.answers, "an error is no answer either"
        store.close()


def test_a_look_that_ends_while_somebody_asks_how_it_stands(clock: Clock, tmp_path: Path) -> None:
    store = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    clock.meanwhile = lambda: setattr(store, "_asked", None)
    store._asked = 0.0
    assert store.answers


def test_looks_before_during_and_after_an_outage(store_url: str) -> None:
    store = KeyStore(store_url)
    seen = []
    for _ in range(2):
        store.look()
        seen.append(store.answers)
        with away(store):
            store.look()
            seen.append(store.answers)
        assert not store.answers, "nobody has asked since"
    store.look()
    assert [*seen, store.answers] == [True, False, True, False, True]
    store.close()


def test_a_running_service_notices_by_itself(store_url: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"keystore_url": store_url, "active_set_poll_seconds": 0.01}
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, **changes) as api:
        store = api.service.vault.keystore
        assert store is not None
        for _ in range(3):
            with away(store):
                wait_until(lambda: ready(api) == (200, ["key-store"]))
            wait_until(lambda: ready(api) == (200, []))
    assert "key-store-watch" not in {thread.name for thread in threading.enumerate()}


def test_a_host_that_is_down_is_not_asked_by_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        calls: list[int] = []

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                calls.append(1)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setattr(keystore, "AWAY_SECONDS", FOREVER)
        store = KeyStore(f"postgresql://letheon@127.0.0.1:{listener.getsockname()[1]}/keys?sslmode=disable")
        for _ in range(3):
            with pytest.raises(KeyStoreAway) as caught:
                store.ping()
            assert caught.value.extra["retry_after"] >= 1 and caught.value.status == 503
        assert len(calls) == 1 and not store.answers
        monkeypatch.setattr(store, "_away_until", 0.0)
        with pytest.raises(KeyStoreAway):
            store.ping()
        assert len(calls) == 2
        listener.shutdown(socket.SHUT_RDWR)
        store.close()


# --- the worker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(embedded: Sessions, store_url: str, tmp_path: Path) -> Iterator[Context]:
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        num_virtual_tokens=4,
        max_steps=6,
        max_tries=1,
        max_attempts=1,
        lease_seconds=2,
        heartbeat_seconds=0.2,
        checkpoint_seconds=0.001,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
        max_neighbour_drop=1,
    )
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    store = KeyStore(store_url)
    yield Context(settings=settings, sessions=embedded, vault=sharing(store), llm=tiny_llm(), retain=retain)
    store.close()


def request(context: Context) -> UnlearnRequest:
    with context.sessions() as session:
        return session.scalars(select(UnlearnRequest)).one()


def test_a_request_waits_and_loses_no_attempt(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    store, request_id = context.vault.keystore, ask(context)
    assert store is not None
    with away(store):
        assert not run_job(context, request_id)
        row = request(context)
        assert (row.state, row.attempt, row.started_at) == ("pending", 0, None), "not even claimed"

    outage = away(store)
    report = Job.step_done

    def leave(job: Job, progress: Any) -> None:
        if progress.step == 3:
            outage.__enter__()
        report(job, progress)

    monkeypatch.setattr(Job, "step_done", leave)
    assert not run_job(context, request_id)
    row = request(context)
    assert (row.state, row.attempt) == ("pending", 0), "trained, could not be sealed, and handed back"
    outage.__exit__(None, None, None)
    assert texts_open(context.sessions, context.vault, request_id)
    monkeypatch.setattr(Job, "step_done", report)
    assert run_job(context, request_id)
    assert (request(context).state, request(context).attempt) == ("active", 1)


def test_a_webhook_message_waits_and_loses_no_attempt(
    embedded: Sessions, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KeyStore(store_url)
    vault, key = sharing(store), add_key(embedded)
    with receiving() as receiver:
        add_webhook(embedded, vault, key, receiver.url())
        submit_for(embedded, vault, key)
        for _ in range(3):
            with away(store):
                make_due(embedded)
                sender(embedded, vault, webhook_attempts=1).work()
            [row] = deliveries(embedded)
            assert (row.state, row.attempts, row.last_error) == ("pending", 0, "key-store")
            assert row.next_at is not None and row.next_at > row.created_at, "and not at once"
        opened = worker.deliveries.open_secret
        in_the_loop: list[bool] = []

        def notice(*arguments: Any) -> str:
            in_the_loop.append(asyncio._get_running_loop() is not None)
            return opened(*arguments)

        monkeypatch.setattr(worker.deliveries, "open_secret", notice)
        make_due(embedded)
        sender(embedded, vault, webhook_attempts=1).work()
    [row] = deliveries(embedded)
    assert (row.state, row.attempts, row.last_error) == ("delivered", 1, None)
    assert len(receiver.received) == 1 and in_the_loop == [False], "a slow key store holds up no other message"
    store.close()
