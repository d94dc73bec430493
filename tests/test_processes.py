"""Two API processes and the workers as processes of their own, on PostgreSQL and Redis and on the embedded default."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
import redis
from databases import free_port, fresh_database, postgres_admin_url
from psycopg import sql
from tiny_models import make_tiny_model
from worker_kit import MARKER, Process, Site, deploy, forget_texts, wait_for

from app import audit, keys
from app.defaults import load_arguments
from models.inference import Classifier
from models.llm import FrozenLLM

REDIS = "redis://127.0.0.1:6379"
QUERY = "the film is a good story"


@dataclass
class Redis:
    """A numbered database of the local server that was empty when this test took it."""

    client: redis.Redis
    url: str

    def content(self) -> bytes:
        parts = []
        for key in self.client.scan_iter():
            kind = self.client.type(key)
            parts.append(key)
            if kind == b"list":
                parts += self.client.lrange(key, 0, -1)
            elif kind == b"hash":
                parts += [item for pair in self.client.hgetall(key).items() for item in pair]
            elif kind == b"set":
                parts += self.client.smembers(key)
        return b"\n".join(parts)


@contextmanager
def own_redis() -> Iterator[Redis]:
    """Take an empty database by a lock key of its own, and leave it empty."""
    for number in range(1, 16):
        client = redis.Redis(host="127.0.0.1", port=6379, db=number)
        name = "letheon-test-lock"
        mine = client.set(name, 1, ex=600, nx=True)  # of two that come at once one gets it
        if mine and client.keys() == [name.encode()]:
            try:
                yield Redis(client, f"{REDIS}/{number}")
            finally:
                client.flushdb()
                client.close()
            return
        if mine:
            client.delete(name)
        client.close()
    raise AssertionError("every database of the local Redis is in use")


def redis_listens() -> bool:
    try:
        socket.create_connection(("127.0.0.1", 6379), timeout=1).close()
    except OSError:
        return False
    return True


DEPLOYMENTS = ["embedded", *(["postgresql+redis"] if postgres_admin_url() and redis_listens() else [])]


@dataclass
class Api:
    """One API process and a client with every scope."""

    process: Process
    client: httpx2.Client

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def classify(self, text: str = QUERY) -> tuple[dict[str, float], int]:
        answer = self.post("/classify", {"text": text, "scores": True})
        (result,) = answer["results"]
        return result["scores"], answer["active_set_version"]

    def submit(self, salt: str) -> str:
        texts = [{"text": item.text, "label": item.label} for item in forget_texts(salt=salt)]
        answer = self.post("/unlearn-requests", {"forget_texts": texts}, 202)
        assert MARKER not in json.dumps(answer)
        return str(answer["id"])

    def events(self, request_id: str, last: str = "0") -> list[tuple[str, str, dict[str, Any]]]:
        """The event stream until it ends: (id, type, data)."""
        found = []
        headers = {"Last-Event-ID": last}
        with self.client.stream("GET", f"/unlearn-requests/{request_id}/events", headers=headers) as stream:
            fields: dict[str, str] = {}
            for line in stream.iter_lines():
                name, _, value = line.partition(":")
                if line:
                    fields[name] = value.strip()
                elif "data" in fields:
                    found.append((fields["id"], fields["event"], json.loads(fields["data"])))
                    fields = {}
        return found


def start_api(site: Site, secret: str, stack: ExitStack) -> Api:
    """Without waiting until it is ready, so that several start at the same time."""
    port = free_port()
    process = site.start_api("--port", str(port))
    client = httpx2.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {secret}"}, timeout=30, trust_env=False
    )
    return Api(process, stack.enter_context(client))


def wait_ready(api: Api) -> None:
    def probe() -> bool:
        assert api.process.popen.poll() is None, api.process.output()
        try:
            return api.client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    wait_for(probe, "the API")


def dump(url: str) -> bytes:
    """Every row of every table of a PostgreSQL database, as COPY writes it."""
    parts = []
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (table,) in tables:
            query = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(table))
            with connection.cursor().copy(query) as copy:
                parts += [bytes(block) for block in copy]
    return b"".join(parts)


@pytest.fixture(params=DEPLOYMENTS)
def deployed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Site, Redis | None]]:
    model = make_tiny_model(tmp_path / "model")
    with ExitStack() as stack:
        knobs: dict[str, Any] = {}
        broker = None
        if request.param != "embedded":
            broker = stack.enter_context(own_redis())
            url = stack.enter_context(fresh_database("postgresql", tmp_path))
            knobs = {"database_url": url, "broker_url": broker.url}
        yield stack.enter_context(deploy(tmp_path / "site", model, lease_seconds=120, **knobs)), broker


def test_two_apis_and_two_workers_are_one_service(deployed: tuple[Site, Redis | None]) -> None:
    site, broker = deployed
    llm = FrozenLLM.load(**load_arguments(site.settings))
    with site.sessions.begin() as session:
        _, secret = keys.create_key(session, name="test", scopes=keys.SCOPES, actor="test")
    with ExitStack() as stack:
        one, two = (start_api(site, secret, stack) for _ in range(2))
        wait_ready(one)
        wait_ready(two)
        # Bit for bit within a process; another process may compute with buffers that are aligned otherwise.
        first, second = (forget_texts(salt=salt)[0].text for salt in ("first ", "second "))
        bases = {(id(api), text): api.classify(text)[0] for api in (one, two) for text in (QUERY, first, second)}
        version = two.classify()[1]
        for (_, text), base in bases.items():
            assert base == pytest.approx(Classifier(llm).classify([text])[0].probabilities, rel=1e-5)

        # Accepted while no worker runs; the broker loses everything it holds.
        request_id = one.submit("first ")
        if broker is None:
            messages = list((site.settings.broker_dir / "messages").glob("*.msg"))
            held = b"".join(path.read_bytes() for path in messages)
            for path in messages:
                path.unlink()
        else:
            held = broker.content()
            broker.client.flushdb()
        assert held and MARKER.encode() not in held
        assert two.get(f"/unlearn-requests/{request_id}")["state"] == "pending"

        workers = [site.start_worker(max_steps=20) for _ in range(2)]
        events = two.events(request_id)  # the stream of the other API, until the request is active
        states = [data["state"] for _, kind, data in events if kind == "state"]
        assert states == ["pending", "training", "evaluating", "active"]
        steps = [data["step"] for _, kind, data in events if kind == "progress"]
        assert len(steps) >= 3 and steps == sorted(steps) and steps[0] == 1
        assert two.events(request_id, last=events[2][0]) == events[3:]

        # A revoke through one is obeyed by the very next call to the other, and the old behaviour is back to the bit.
        for revoking, asked, text in ((one, two, first), (two, one, second)):
            version += 1
            suppressed, now = asked.classify(text)
            assert (suppressed["unknown"], now) == (1.0, version) and bases[id(asked), text]["unknown"] < 1.0
            assert asked.classify() == (bases[id(asked), QUERY], version)  # a text of no request is answered as ever
            prompt = revoking.get("/admin/prompts?state=active")["items"][0]
            assert prompt["request_id"] == request_id
            revoking.post(f"/admin/prompts/{prompt['id']}/revoke", {"reason": "test"})
            version += 1
            assert asked.classify(text) == (bases[id(asked), text], version)
            if revoking is one:
                request_id = two.submit("second ")
                assert site.wait_state(request_id, "active", "failed").state == "active"

        # Several at once: each is trained by one of the workers, once.
        ids = [api.submit(f"batch {i} ") for i, api in enumerate((one, two, one))]
        for request_id in ids:
            row = site.wait_state(request_id, "active", "failed")
            assert (row.state, row.attempt) == ("active", 1)
        assert sorted(p.request_id for p in site.prompts() if p.request_id in ids) == sorted(ids)
        assert site.version() == version + len(ids)
        (ours, our_version), (theirs, their_version) = one.classify(), two.classify()
        assert our_version == their_version and ours == pytest.approx(theirs, rel=1e-5)

        if site.settings.database_url:
            content = dump(site.settings.database_url)
            assert ids[0].encode() in content
            assert MARKER.encode() not in content and MARKER.encode().hex().encode() not in content
        for process in (one.process, two.process, *workers):
            assert process.terminate() == 0
    assert MARKER not in site.logs()
    with site.sessions() as session:
        audit.verify(session)


def test_kill_9_of_the_embedded_server_takes_the_worker_along_and_loses_nothing(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    with deploy(tmp_path / "site", model, lease_seconds=600) as site:
        request_id = site.submit(FrozenLLM.load(**load_arguments(site.settings)).fingerprint)
        server = site.start("-m", "app.cli", "serve", "--port", "0")
        site.wait_checkpoint(request_id)
        server.kill()
        row = site.wait_state(request_id, "pending", seconds=180)  # by the worker itself: the lease is longer
        assert row.attempt == 0
        step = site.checkpoint_step(request_id)
        wait_for(lambda: "worker: Warm shutdown" in server.output() or None, "the worker's farewell")

        again = site.start("-m", "app.cli", "serve", "--port", "0", training_deadline_seconds=0.5)
        row = site.wait_state(request_id, "active", "failed")
        assert row.state == "active" and row.metrics is not None and row.metrics["resumed_from"] == step
        again.popen.send_signal(signal.SIGTERM)
        assert again.popen.wait(120) == 0
        assert len(site.prompts()) == 1 and MARKER not in site.logs()
