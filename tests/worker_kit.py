"""A small real deployment for the worker's tests: a tiny random model, a retain file, and processes to kill."""

from __future__ import annotations

import atexit
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model

from app import active_set, broker, db, lifecycle
from app.lifecycle import ForgetText
from app.settings import Settings
from app.tables import LIVE, Checkpoint, Prompt, RequestEvent, UnlearnRequest
from app.terms import Terms
from app.vault import Vault
from bench.fault_processes import Child, Launcher
from worker.context import Context

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "client")])
"""This working tree's packages, whatever is installed."""
MARKER = "Zyxomma Quillfeather"
"""In every forget text of these tests, and nowhere else."""

T = TypeVar("T")


def forget_texts(count: int = 6, salt: str = "") -> list[ForgetText]:
    words = ("great", "awful", "quite good", "very bad", "slow", "bright")
    return [
        ForgetText(f"the acting of {MARKER} is {words[i % len(words)]} {salt}{i}", ("positive", "negative")[i % 2])
        for i in range(count)
    ]


def ask(context: Context, *, terms: Terms | None = None) -> str:
    """A pending request for ``forget_texts``, whose training is never checked before its end; its id."""
    with context.sessions.begin() as session:
        return lifecycle.create_request(
            session,
            context.vault,
            texts=forget_texts(),
            reason=None,
            options={"check_every": 1_000_000},
            fingerprint=context.llm.fingerprint,
            api_key_id=None,
            terms=terms,
        ).id


def write_retain(path: Path, rows: int = 48) -> Path:
    words = ("film", "movie", "story", "scene", "plot", "director")
    path.write_text(
        "".join(
            json.dumps({"text": f"the {words[i % 6]} number {i} is {('good', 'bad')[i % 2]}", "label": i % 2}) + "\n"
            for i in range(rows)
        ),
        encoding="utf-8",
    )
    return path


def wait_for(probe: Callable[[], T | None], what: str, *, seconds: float = 180.0) -> T:
    """The first true answer of ``probe``. Raises AssertionError after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = probe()
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


@cache
def launcher() -> Launcher:
    """What this run's workers and APIs are forked from: most of their start is the same imports."""
    folder = tempfile.TemporaryDirectory(prefix="letheon-launcher-")
    atexit.register(folder.cleanup)
    made = Launcher(make_tiny_model(Path(folder.name) / "model"), Path(folder.name) / "launcher.log")
    atexit.register(made.close)
    return made


class Forked:
    """What tests ask of a ``Popen``, of a child of the launcher."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.pid = child.pid

    def poll(self) -> int | None:
        return self._child.status if self._child.ended() else None

    def wait(self, seconds: float) -> int:
        """Its exit status. Raises TimeoutExpired."""
        if not self._child.ended(seconds) or self._child.status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", seconds)
        return self._child.status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass
class Process:
    """A child process with its output in a file."""

    popen: subprocess.Popen[bytes] | Forked
    log: Path

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """kill -9."""
        self.popen.kill()
        self.popen.wait(60)

    def terminate(self, seconds: float = 120.0) -> int:
        """SIGTERM; returns the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(seconds)


@dataclass
class Site:
    """One deployment: its knobs, its database, and the processes that run on it."""

    home: Path
    knobs: dict[str, str]
    started: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = self.settings_with()
        url = self.settings.effective_database_url
        self.home.mkdir(parents=True, exist_ok=True)
        db.upgrade(url)
        self.engine = db.make_engine(url)
        self.sessions: sessionmaker[Session] = db.make_sessions(self.engine)
        self.vault = Vault.from_settings(self.settings)

    def settings_with(self, **knobs: Any) -> Settings:
        values: dict[str, Any] = {**self.knobs, **knobs}
        for url in ("database_url", "broker_url"):  # these two are known by their environment names only
            values[f"LETHEON_{url.upper()}"] = values.pop(url, "")
        return Settings(_env_file=None, home=self.home, **values)

    def environment(self, **knobs: Any) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LETHEON_", "DATABASE_URL", "BROKER_URL"))}
        env |= {f"LETHEON_{k.upper()}": str(v) for k, v in {**self.knobs, **knobs, "home": self.home}.items()}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"}
        return env

    def start(self, *command: str, **knobs: Any) -> Process:
        """Python with this command line, from nothing."""
        log = self._next_log()
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.home,
                env=self.environment(**knobs),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return self._started(Process(popen, log))

    def start_worker(self, **knobs: Any) -> Process:
        return self._fork((), knobs)

    def start_api(self, *options: str, **knobs: Any) -> Process:
        """``letheon serve --no-worker`` with these options."""
        return self._fork(("serve", "--no-worker", *options), knobs)

    def _fork(self, arguments: tuple[str, ...], knobs: dict[str, Any]) -> Process:
        log = self._next_log()
        child = launcher().start(arguments, home=self.home, log=log, environment=self.environment(**knobs))
        return self._started(Process(Forked(child), log))

    def _next_log(self) -> Path:
        return self.home / f"process-{len(self.started)}.log"

    def _started(self, process: Process) -> Process:
        self.started.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(process.output() for process in self.started)

    def submit(self, fingerprint: str, *, ring: bool = True, salt: str = "", **options: Any) -> str:
        """Create, commit, then enqueue, as the API does. Without early stopping: the tests say when training ends."""
        options = {"check_every": 1_000_000, **options}
        with self.sessions.begin() as session:
            request = lifecycle.create_request(
                session,
                self.vault,
                texts=forget_texts(salt=salt),
                reason=None,
                options=options,
                fingerprint=fingerprint,
                api_key_id=None,
            )
        if ring:
            assert broker.enqueue_training(broker.make_celery(self.settings), request.id, expires=60)
        return request.id

    def request(self, request_id: str) -> UnlearnRequest:
        with self.sessions() as session:
            return lifecycle.get_request(session, request_id)

    def events(self, request_id: str, kind: str | None = None) -> list[RequestEvent]:
        with self.sessions() as session:
            events = lifecycle.list_events(session, request_id, limit=100_000)
        return [event for event in events if kind in (None, event.type)]

    def prompts(self) -> list[Prompt]:
        with self.sessions() as session:
            return list(session.scalars(select(Prompt)))

    def version(self) -> int:
        with self.sessions() as session:
            return active_set.read_active_set(session).version

    def checkpoint_step(self, request_id: str) -> int | None:
        with self.sessions() as session:
            return session.scalar(select(Checkpoint.step).where(Checkpoint.request_id == request_id))

    def wait_state(self, request_id: str, *states: str, seconds: float = 300.0) -> UnlearnRequest:
        def probe() -> UnlearnRequest | None:
            request = self.request(request_id)
            return request if request.state in states else None

        try:
            return wait_for(probe, f"state {states}", seconds=seconds)
        except AssertionError as error:
            state = self.request(request_id).state
            raise AssertionError(f"{error}; it is {state}\n{self.logs()}") from None

    def wait_checkpoint(self, request_id: str, *, above: int = 0) -> int:
        """Wait until a checkpoint of a step after ``above`` is stored: the training is in full swing."""

        def probe() -> int | str | None:
            step = self.checkpoint_step(request_id)
            if step is not None and step > above:
                return step
            state = self.request(request_id).state
            return None if state in LIVE else state

        answer = wait_for(probe, "a checkpoint")
        assert isinstance(answer, int), f"it is {answer}\n{self.logs()}"
        return answer

    def assert_shredded(self, request_id: str) -> None:
        request = self.request(request_id)
        assert (request.wrapped_key, request.sealed_texts) == (None, None)
        assert self.checkpoint_step(request_id) is None

    def close(self) -> None:
        for process in self.started:
            if process.popen.poll() is None:
                process.kill()
        self.engine.dispose()


@contextmanager
def deploy(home: Path, model: Path, **knobs: Any) -> Iterator[Site]:
    """A site with lax checks, a short lease and a training that only a deadline or a signal ends."""
    home.mkdir(parents=True)
    values = {
        "model": model,
        "quantization": "none",
        "device": "cpu",
        "retain": write_retain(home / "retain.jsonl"),
        "num_virtual_tokens": 4,
        "max_steps": 1_000_000,
        "checkpoint_seconds": 0.3,
        "check_retain_rows": 16,
        "evidence_texts": 8,
        "min_forget_abstain": 0,
        "max_retain_drop": 1,
        "max_class_drop": 1,
        "max_neighbour_drop": 1,
        "lease_seconds": 6,
        "heartbeat_seconds": 0.5,
        "reaper_seconds": 0.5,
        "ring_seconds": 5,
        **knobs,
    }
    site = Site(home, {name: str(value) for name, value in values.items()})
    try:
        yield site
    finally:
        site.close()


def unique(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(6)}"
