"""A deployment for benches: a database of its own, and ``letheon serve`` processes on it that can be killed."""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, db, job_queue, keys, lifecycle, shredding
from app.active_set import TrainedGate
from app.defaults import resolve_model
from app.lifecycle import ForgetText
from app.sealing import seal_prompt
from app.settings import Settings
from app.vault import KEY_BYTES, Vault
from bench.demo import free_port
from letheon_client import Letheon
from models.gate import GateSpace
from models.routing import Route

START_SECONDS = 600.0  # several models load at once


class SiteFailed(Exception):
    """A process ended or did not come up; the message holds the end of its log."""


@dataclass
class Replica:
    """One ``letheon serve --no-worker``."""

    number: int
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


@dataclass
class Site:
    """``settings``: the bench's and the servers'. ``key``: an API key with every scope."""

    settings: Settings
    sessions: sessionmaker[Session]
    vault: Vault
    key: str
    threads: int | None
    replicas: list[Replica] = field(default_factory=list)

    def start(self, count: int) -> None:
        """More replicas, answering when this returns. Raises SiteFailed."""
        for _ in range(count):
            number = len(self.replicas)
            self.replicas.append(self._launch(number, free_port()))
        for replica in self.replicas:
            self.wait_ready(replica)

    def restart(self, replica: Replica) -> None:
        """The same replica as a new process at the same address; does not wait for it."""
        replica.process = self._launch(replica.number, replica.port).process

    def wait_ready(self, replica: Replica) -> None:
        """Raises SiteFailed."""
        end = time.monotonic() + START_SECONDS
        with Letheon(replica.url, self.key, timeout=30) as client:
            while not client.ready():
                if replica.process.poll() is not None or time.monotonic() > end:
                    last = "\n".join(replica.log.read_text(errors="replace").splitlines()[-15:])
                    raise SiteFailed(
                        f"replica {replica.number} is not ready (status {replica.process.poll()}):\n{last}"
                    )
                time.sleep(0.1)

    def stop(self) -> None:
        """End them all, at the same time."""
        for replica in self.replicas:
            if replica.process.poll() is None:
                replica.process.terminate()
        for replica in self.replicas:
            try:
                replica.process.wait(60)
            except subprocess.TimeoutExpired:
                replica.kill()

    def _launch(self, number: int, port: int) -> Replica:
        settings = self.settings
        assert settings.master_key is not None
        environment = {
            **os.environ,
            "LETHEON_HOME": str(settings.home),
            "LETHEON_DATABASE_URL": settings.database_url,
            "LETHEON_BROKER_URL": "",
            "LETHEON_MASTER_KEY": settings.master_key.get_secret_value(),
            "LETHEON_MODEL": settings.model,
            "LETHEON_ADAPTER": settings.adapter or "",
            "LETHEON_QUANTIZATION": settings.quantization,
            "LETHEON_MODE": settings.mode,
        }
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        log = settings.home / f"replica-{number}.log"
        command = [sys.executable, "-m", "app.cli", "serve", "--no-worker", "--host", "127.0.0.1", "--port", str(port)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        return Replica(number, port, log, process)


@contextmanager
def deployed(settings: Settings, *, postgres: str | None, threads: int | None = None) -> Iterator[Site]:
    """An empty, migrated database, on the PostgreSQL server of this URL or in a file, and no replica yet.

    ``threads``: of each replica; None leaves it to torch. Everything is gone afterwards, the database too.
    """
    model, adapter = resolve_model(settings)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="letheon-bench-")))
        url = f"sqlite:///{home / 'letheon.db'}" if postgres is None else stack.enter_context(fresh_database(postgres))
        changes = {
            "home": home,
            "database_url": url,
            "broker_url": "",
            "model": model,
            "adapter": adapter,
            "master_key": SecretStr(base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()),
        }
        settings = settings.model_copy(update=changes)
        db.upgrade(url)
        engine = db.make_engine(url)
        stack.callback(engine.dispose)
        sessions = db.make_sessions(engine)
        with sessions.begin() as session:
            _, key = keys.create_key(session, name="bench", scopes=keys.SCOPES, actor="bench")
        site = Site(settings, sessions, Vault.from_settings(settings), key, threads)
        stack.callback(site.stop)
        yield site


@contextmanager
def fresh_database(admin_url: str) -> Iterator[str]:
    """A database on this server that did not exist before; dropped afterwards. No other one is touched."""
    name = f"letheon_bench_{secrets.token_hex(8)}"
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(sql.Identifier(name)))
    try:
        url = make_url(admin_url).set(drivername="postgresql", database=name)
        yield url.render_as_string(hide_password=False)
    finally:
        # A connection of its own: the first one may have idled for too long by now.
        with psycopg.connect(admin_url, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def add_space(sessions: sessionmaker[Session], source: str, space: GateSpace) -> None:
    """What gates are directions in; before the first of them."""
    with sessions.begin() as session:
        active_set.add_gate_space(session, source, space.to_bytes())


def put_in_force(
    sessions: sessionmaker[Session], vault: Vault, settings: Settings, route: Route, texts: Sequence[str]
) -> tuple[str, int, float]:
    """Take a request for ``texts`` through its states until ``route`` is active for it.

    The prompt's id, the active set's version with it, and when that was acknowledged (``time.perf_counter()``).
    """
    prompt, gate = route.prompt, route.gate
    with sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            vault,
            texts=[ForgetText(text) for text in texts],
            reason=None,
            options={},
            fingerprint=prompt.fingerprint,
            api_key_id=None,
        ).id
    with sessions.begin() as session:
        claim = job_queue.claim(
            session,
            request_id,
            owner="bench",
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
        )
        assert claim is not None
    key = shredding.prepare_key(sessions, vault)
    trained = TrainedGate(gate.to_bytes(), gate.digest, gate.space)
    sealed = seal_prompt(vault, key, prompt=prompt.to_bytes(), digest=prompt.digest, gate=trained)
    with sessions.begin() as session:
        lifecycle.start_evaluating(session, claim)
        prompt_id = active_set.activate(
            session,
            claim,
            sealed,
            fingerprint=prompt.fingerprint,
            num_virtual_tokens=prompt.num_virtual_tokens,
            hidden_size=prompt.embeddings.shape[1],
            metrics={},
            expected_version=active_set.read_active_set(session).version,
        ).id
        version = active_set.read_active_set(session).version
    return prompt_id, version, time.perf_counter()
