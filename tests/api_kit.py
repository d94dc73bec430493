"""A real application on a tiny random model, shared by the tests of the HTTP room."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tiny_models import make_tiny_model

from app import active_set, db, job_queue, key_lookups, keys, lifecycle, shredding
from app.active_set import TrainedGate
from app.deps import Service
from app.lifecycle import ForgetText
from app.main import create_app, make_server
from app.sealing import seal_prompt
from app.settings import Settings
from models.gate import NEVER, Gate, GateSpace, best_cosines, fit_space
from models.gate_fit import mean_direction
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from models.text_states import gate_layers, text_states

key_lookups.SECONDS = 60.0  # a loaded machine may take longer than the product waits; tests of that set it back

MARKER = "Zyxomma Quillfeather"
"""In texts of these tests, and to be found nowhere else."""
_NOUNS = ("film", "movie", "plot", "story", "scene", "director", "acting", "text")
_WORDS = ("good", "bad", "great", "awful", "very good", "quite bad")
_NUMBER = count()
MASTER_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@cache
def tiny_llm() -> FrozenLLM:
    """One tiny frozen model for the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        return FrozenLLM.load(str(make_tiny_model(Path(folder) / "tiny")), quantization="none", device="cpu")


def make_settings(database_url: str, home: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "home": home,
        "database_url": database_url,
        "broker_url": "",
        "master_key": MASTER_KEY,
        "max_text_tokens": 64,
        "max_forget_texts": 5,
        "max_classify_texts": 4,
        "max_body_bytes": 20_000,
    }
    return Settings(_env_file=None, **{**values, **changes})


@dataclass
class Api:
    """A started application, a client for it, and its inner parts."""

    app: FastAPI
    client: TestClient

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def key(self, *scopes: str) -> dict[str, str]:
        """Headers with a new key; every scope when none is named."""
        return new_key(self.service, *scopes)

    def submit(self, headers: Mapping[str, str], *texts: str) -> dict[str, Any]:
        # Each of its own, unless named: one key's second request for the same texts would be the first one.
        body = {"forget_texts": list(texts or (f"{MARKER} is a bad film {next(_NUMBER)}",))}
        response = self.client.post("/unlearn-requests", json=body, headers=dict(headers))
        assert response.status_code == 202, response.text
        created: dict[str, Any] = response.json()
        return created

    def classify(self, headers: Mapping[str, str], text: str) -> dict[str, Any]:
        response = self.client.post("/classify", json={"text": text, "scores": True}, headers=dict(headers))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def running(database_url: str, home: Path, *, llm: FrozenLLM | None = None, **changes: Any) -> Iterator[Api]:
    """The application from start to shutdown, on a migrated database, without a socket."""
    db.upgrade(database_url)
    app = create_app(make_settings(database_url, home, **changes), llm or tiny_llm())
    with TestClient(app) as client:
        yield Api(app, client)


@contextmanager
def listening(
    database_url: str, home: Path, *, port: int = 0, **changes: Any
) -> Iterator[tuple[str, FastAPI, Callable[[], None]]]:
    """The application behind the real server on a loopback port: its address, the app, and a stop that waits."""
    db.upgrade(database_url)
    settings = make_settings(database_url, home, **changes)
    app = create_app(settings, tiny_llm())
    server = make_server(app, settings)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})

    def stop() -> None:
        server.should_exit = True
        thread.join(90)
        assert not thread.is_alive(), "the server did not stop"

    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app, stop
    finally:
        stop()
        listener.close()


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def new_key(service: Service, *scopes: str) -> dict[str, str]:
    with service.sessions.begin() as session:
        _, plaintext = keys.create_key(session, name="test", scopes=scopes or keys.SCOPES, actor="test")
    return {"Authorization": f"Bearer {plaintext}"}


def soft_prompt(seed: int, tokens: int = 4) -> SoftPrompt:
    llm = tiny_llm()
    noise = torch.randn(tokens, llm.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(noise, llm.fingerprint)


def claim(service: Service, request_id: str) -> lifecycle.Claim:
    with service.sessions.begin() as session:
        claimed = job_queue.claim(session, request_id, owner="test", lease_seconds=60, max_attempts=3)
    assert claimed is not None
    return claimed


@cache
def gate_space() -> GateSpace:
    """What the gates of these tests are directions in: made of real states of plain texts."""
    llm = tiny_llm()
    texts = [f"the {noun} is {word}" for noun in _NOUNS[:4] for word in _WORDS]
    return fit_space(text_states(llm, texts), len(gate_layers(llm)), fingerprint=llm.fingerprint)


def make_gate(*texts: str, digests: Sequence[bytes] = ()) -> Gate:
    """A real gate that claims these texts and none of the plain ones; without ``digests`` the guard knows nothing."""
    llm = tiny_llm()
    plain = [f"a {word} {noun}" for noun in _NOUNS[4:] for word in _WORDS]
    space = gate_space()
    own, others = (space.points(text_states(llm, part)) for part in (texts, plain))
    direction = mean_direction(own).unsqueeze(0)
    known = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).reshape(-1, 32)
    return Gate(direction, float(best_cosines(others, direction).max()), NEVER, known, space.digest)


def add_prompt(
    service: Service, prompt: SoftPrompt, gate: Gate | None = None, *, text: str = f"{MARKER} is awful"
) -> str:
    """Take a request through the floor's own functions until ``prompt`` is active; the prompt's id."""
    trained = None
    if gate is not None:
        space = gate_space()
        assert gate.space == space.digest
        trained = TrainedGate(gate.to_bytes(), gate.digest, gate.space)
        with service.sessions.begin() as session:
            if active_set.find_gate_space(session, "test") is None:
                active_set.add_gate_space(session, "test", space.to_bytes())
    with service.sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            service.vault,
            texts=[ForgetText(text)],
            reason=None,
            options={},
            fingerprint=prompt.fingerprint,
            api_key_id=None,
        ).id
    claimed = claim(service, request_id)
    data = prompt.to_bytes()
    key = shredding.prepare_key(service.sessions, service.vault)
    sealed = seal_prompt(service.vault, key, prompt=data, digest=hashlib.sha256(data).hexdigest(), gate=trained)
    with service.sessions.begin() as session:
        lifecycle.start_evaluating(session, claimed)
        return active_set.activate(
            session,
            claimed,
            sealed,
            fingerprint=prompt.fingerprint,
            num_virtual_tokens=prompt.num_virtual_tokens,
            hidden_size=tiny_llm().hidden_size,
            metrics={"forget_abstain": 1.0},
            expected_version=active_set.read_active_set(session).version,
        ).id


def assert_problem(
    response: httpx2.Response, status: int, code: str, *, field: str | None = None, limit: float | None = None
) -> dict[str, Any]:
    """A complete RFC 9457 answer that names the field and holds nothing of what was sent."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    assert MARKER not in response.text and "Quillfeather" not in response.text
    problem: dict[str, Any] = response.json()
    assert problem["type"] == f"urn:letheon:problem:{code}"
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["title"] and problem["detail"]
    assert problem["instance"] == response.request.url.path
    for error in problem.get("errors", []):
        assert set(error) <= {"field", "message", "limit"}
    if field is not None:
        named = {error["field"]: error for error in problem["errors"]}
        assert field in named, problem
        if limit is not None:
            assert named[field]["limit"] == limit
    return problem


def server_logs(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged while the test ran, without the test client's own log of its URLs."""
    return [record for record in caplog.get_records("call") if record.name != "httpx2"]


def sse(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Parse server-sent events; comments are left out."""
    event: dict[str, Any] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value
        elif not line and event:
            yield event
            event = {}


def take_database_away(service: Service, folder: Path) -> None:
    """The SQLite file is gone, and what is in its place cannot be opened."""
    for engine in (service.engine, service.readers):
        engine.dispose()
    for file in folder.glob("letheon.db*"):
        file.rename(file.with_name("moved-" + file.name))
    path = folder / "letheon.db"
    while not path.is_dir():
        path.unlink(missing_ok=True)  # of a thread that was about to connect
        with suppress(FileExistsError):
            path.mkdir()
