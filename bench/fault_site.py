"""A deployment to break: a database, a broker, and the workers and APIs on them, with short leases."""

from __future__ import annotations

import base64
import secrets
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
from celery import Celery
from pydantic import SecretStr
from sqlalchemy import select, text
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, broker, db, job_queue, keys, lifecycle
from app.defaults import load_arguments
from app.failpoints import VARIABLE
from app.lifecycle import ForgetText
from app.reconcile import make_ready
from app.settings import Settings
from app.tables import Checkpoint, utcnow
from app.terms import Terms
from app.vault import KEY_BYTES, Vault, share_id
from bench.demo import free_port
from bench.fault_judge import ENDED, History, Outcome, doubled_anywhere, read_history
from bench.fault_model import make_model, write_retain
from bench.fault_processes import Child, FaultFailed, Launcher, Postgres, Redis, clean_environment, database, wait_for
from models.llm import FrozenLLM

BACKENDS = ("postgresql", "sqlite")
LEASE = 2.0
TAKE_UP = LEASE + 15.0
END_SECONDS = 180.0
QUICKLY = 0.25
"""A training deadline in seconds: enough for a few dozen steps of the tiny model."""
_ONE_MIGRATION = threading.Lock()  # Alembic's context is one for the whole process
KNOBS: dict[str, Any] = {
    "quantization": "none",
    "device": "cpu",
    "num_virtual_tokens": 4,
    "max_steps": 1_000_000,  # a deadline, or a fault, ends a training
    "checkpoint_seconds": 0.03,
    "check_retain_rows": 16,
    "min_forget_abstain": 0,
    "max_retain_drop": 1,
    "max_class_drop": 1,
    "max_neighbour_drop": 1,
    "lease_seconds": LEASE,
    "heartbeat_seconds": 0.4,
    "reaper_seconds": 0.3,
    "ring_seconds": 3,
    "max_attempts": 8,
    "webhook_private": True,  # the receiver is on this machine
    "first_key": False,
}


@dataclass
class Api:
    child: Child
    client: httpx2.Client

    def ready(self) -> bool:
        if self.child.ended():
            raise FaultFailed(f"the API ended with status {self.child.status}: {self.child.output()[-1000:]}")
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False


@dataclass
class Site:
    kind: str
    settings: Settings
    launcher: Launcher
    sessions: sessionmaker[Session]
    vault: Vault
    fingerprint: str
    key: str  # the client's, and whose requests they are
    key_id: str
    second_key: str  # another person's; both have all scopes
    redis: Redis | None
    postgres: Postgres | None
    knobs: dict[str, Any]
    children: list[Child] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)  # what a fault keeps from one trial to the next
    environment: dict[str, str] = field(default_factory=dict)  # of its processes, beside the knobs
    clients: list[httpx2.Client] = field(default_factory=list)
    shares: dict[str, bytes] = field(default_factory=dict)  # of requests' texts, in the key store
    stack: ExitStack = field(default_factory=ExitStack)  # what a fault opened
    celery: Celery | None = None
    senders: ThreadPoolExecutor | None = None

    @property
    def home(self) -> Path:
        return self.settings.home

    # --- processes ---------------------------------------------------------------------------------------------------

    def worker(self, failpoint: str = "", **knobs: Any) -> Child:
        """A worker that dies at ``failpoint``. Trainings are quick unless the knobs say otherwise."""
        return self._start("worker", failpoint, {"training_deadline_seconds": QUICKLY, **knobs})

    def api(self, failpoint: str = "", **knobs: Any) -> Api:
        """Ready when this returns. Raises FaultFailed."""
        port = free_port()
        child = self._start("api", failpoint, knobs, port=port)
        headers = {"Authorization": f"Bearer {self.key}"}
        client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False)
        self.clients.append(client)
        api = Api(child, client)
        wait_for(api.ready, "the API")
        return api

    def command(self, failpoint: str, *arguments: str, **knobs: Any) -> Child:
        """``letheon`` with these arguments."""
        return self._start("command", failpoint, knobs, arguments=arguments)

    def _start(
        self, what: str, failpoint: str, knobs: dict[str, Any], port: int = 0, arguments: tuple[str, ...] = ()
    ) -> Child:
        environment = clean_environment() | {
            f"LETHEON_{name.upper()}": str(value) for name, value in {**self.knobs, **knobs}.items()
        }
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.environment}
        if failpoint:
            environment[VARIABLE] = failpoint
        log = self.home / f"{what}-{len(self.children)}.log"
        if what == "api":
            arguments = ("serve", "--no-worker", "--port", str(port))
        child = self.launcher.start(arguments, home=self.home, log=log, environment=environment)
        self.children.append(child)
        return child

    def close(self) -> None:
        for child in self.children:
            child.kill()
        for client in self.clients:
            client.close()
        if self.senders is not None:
            self.senders.shutdown()
        if self.celery is not None:
            self.celery.pool.force_close_all()  # connections, the lent ones too, which a killed Redis left behind
            self.celery.close()
        self.stack.close()

    def locked(self) -> bool:
        """Whether somebody is within a write."""
        if self.kind == "sqlite":
            with closing(sqlite3.connect(self.home / "letheon.db", timeout=0.2, isolation_level=None)) as connection:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    return True
                connection.execute("ROLLBACK")
                return False
        query = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
        )
        return bool(self.read(lambda session: session.scalar(query)))

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(
        self, *, ring: bool = True, fingerprint: str = "", texts: int = 6, approval: bool = False, **options: Any
    ) -> str:
        """As the API does it: store, commit, ring. With ``approval`` a second key has to agree."""
        now = utcnow()
        with self.sessions.begin() as session:
            request = lifecycle.create_request(
                session,
                self.vault,
                texts=[ForgetText(text, label) for text, label in forget_texts(texts)],
                reason=None,
                options={"check_every": 1_000_000, **options},
                fingerprint=fingerprint or self.fingerprint,
                api_key_id=self.key_id,
                terms=Terms(now, now + timedelta(days=30), None, approval),
            )
            share = share_id(request.wrapped_key)
        assert share is not None
        self.shares[request.id] = share
        if ring:
            self.ring(request.id)
        return request.id

    def ring(self, request_id: str) -> bool:
        if self.celery is None:
            self.celery = broker.make_celery(self.settings)
        return broker.enqueue_training(self.celery, request_id, expires=60)

    def read(self, work: Callable[[Session], Any]) -> Any:
        with self.sessions() as session:
            return work(session)

    def history(self, request_id: str) -> History:
        found: History = self.read(lambda session: read_history(session, request_id))
        return found

    def checkpoint_step(self, request_id: str) -> int | None:
        query = select(Checkpoint.step).where(Checkpoint.request_id == request_id)
        step: int | None = self.read(lambda session: session.scalar(query))
        return step

    def wait_checkpoint(self, request_id: str) -> None:
        wait_for(lambda: self.checkpoint_step(request_id), "a checkpoint")

    def wait_end(self, request_id: str, *, seconds: float = END_SECONDS) -> History:
        """How it ended, or how far it came: that it did not end is for the judge to say."""
        try:
            return wait_for(lambda: ended(self.history(request_id)), "the end", seconds=seconds)
        except FaultFailed:
            return self.history(request_id)

    def finish(self, outcome: Outcome) -> Outcome:
        """Look at the whole database once more, and leave nothing in force for the next trial."""
        twice = self.read(doubled_anywhere)
        outcome.doubled += len(twice)
        outcome.reasons += [f"{request_id} came into force more than once" for request_id in twice]
        with self.sessions() as session:
            in_force = [prompt.id for prompt in active_set.active_prompts(session)]
        for prompt_id in in_force:
            with self.sessions.begin() as session:
                active_set.revoke_prompt(session, prompt_id, actor="bench", reason=None)
        return outcome

    def abandoned(self, request_id: str) -> None:
        """A claim whose worker is gone and whose lease has run out."""
        with self.sessions.begin() as session:
            held = job_queue.claim(session, request_id, owner="bench", lease_seconds=0.01, max_attempts=8)
        assert held is not None


def ended(history: History) -> History | None:
    return history if history.state in ENDED else None


def taken_up_after(history: History, moment: float) -> float | None:
    """From ``moment`` to the next claim; None where there was none."""
    later = [at for at, _ in history.claims if at > moment]
    return min(later) - moment if later else None


def forget_texts(count: int) -> list[tuple[str, str]]:
    """Different ones each time: what was ever to be forgotten leaves the retain set."""
    words = ("great", "awful", "quite good", "very bad", "slow", "bright")
    salt = secrets.token_hex(4)
    return [
        (f"the acting of {salt} is {words[i % len(words)]} {i}", ("positive", "negative")[i % 2]) for i in range(count)
    ]


@dataclass
class Bench:
    """What all faults share. Servers are started when a site needs them first."""

    work: Path
    model: Path
    launcher: Launcher
    fingerprint: str
    stack: ExitStack
    _postgres: Postgres | None = None

    @property
    def postgres(self) -> Postgres:
        if self._postgres is None:
            self._postgres = Postgres()
            self.stack.callback(self._postgres.close)
        return self._postgres

    @contextmanager
    def site(self, kind: str, *, home: Path | None = None, **knobs: Any) -> Iterator[Site]:
        """An empty deployment: PostgreSQL with Redis, or SQLite with a folder."""
        with ExitStack() as stack:
            if home is None:
                home = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.work))
                stack.callback(shutil.rmtree, home, ignore_errors=True)
            postgres = self.postgres if kind == "postgresql" else None
            url = stack.enter_context(database(kind, home, postgres))
            redis = None
            if kind == "postgresql":
                redis = Redis(home / "redis")
                stack.callback(redis.stop)
            given = {
                **KNOBS,
                "model": str(self.model),
                "retain": str(write_retain(home / "retain.jsonl")),
                "home": home,
                "keystore_url": f"sqlite:///{home / 'keystore.db'}",
                "master_key": base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode(),
                **knobs,
            }
            named = {"database_url": url, "broker_url": redis.url if redis else ""}
            settings = Settings(**without_env_file({**given, **named, "master_key": SecretStr(given["master_key"])}))
            with _ONE_MIGRATION:
                db.upgrade(url)
            engine = db.make_engine(url)
            stack.callback(engine.dispose)
            sessions = db.make_sessions(engine)
            with sessions.begin() as session:
                row, key = keys.create_key(session, name="client", scopes=keys.SCOPES, actor="bench")
                _, second_key = keys.create_key(session, name="second", scopes=keys.SCOPES, actor="bench")
            vault = Vault.from_settings(settings)
            stack.callback(vault.close)
            make_ready(sessions, vault)
            site = Site(
                kind=kind,
                settings=settings,
                launcher=self.launcher,
                sessions=sessions,
                vault=vault,
                fingerprint=self.fingerprint,
                key=key,
                key_id=row.id,
                second_key=second_key,
                redis=redis,
                postgres=postgres,
                knobs={**given, **named},
            )
            stack.callback(site.close)
            yield site


def without_env_file(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "_env_file": None}


@contextmanager
def open_bench(model: Path | None = None) -> Iterator[Bench]:
    """A tiny model and a launcher that has loaded it. Everything is gone afterwards."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="letheon-faults-")))
        model = model or make_model(work / "model")
        settings = Settings(**without_env_file({"model": str(model), "quantization": "none", "device": "cpu"}))
        fingerprint = FrozenLLM.load(**load_arguments(settings)).fingerprint
        launcher = Launcher(model, work / "launcher.log")
        stack.callback(launcher.close)
        yield Bench(work, model, launcher, fingerprint, stack)


def in_force(session: Session) -> list[str]:
    """Ids of the prompts in force."""
    return [prompt.id for prompt in active_set.active_prompts(session)]
