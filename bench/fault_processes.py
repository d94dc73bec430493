"""The processes that ``bench.faults`` breaks, each its own: workers, APIs, a PostgreSQL cluster, a Redis server."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import redis

from bench.demo import free_port
from bench.site import fresh_database

START_SECONDS = 300.0
T = TypeVar("T")


class FaultFailed(Exception):
    """What was to be broken did not even run; the message says what was waited for."""


def wait_for(probe: Callable[[], T | None], what: str, *, seconds: float = 180.0, pause: float = 0.02) -> T:
    """The first true answer of ``probe``. Raises FaultFailed."""
    end = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            raise FaultFailed(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)


@dataclass
class Child:
    """A process of the launcher's, leader of a group of its own."""

    pid: int
    log: Path
    launcher: Launcher
    died: float | None = None  # time.time() when its end was seen
    status: int | None = None
    _fd: int = field(init=False)

    def __post_init__(self) -> None:
        self._fd = os.pidfd_open(self.pid)  # the launcher reaps it only when told to, so the number is still its own

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, or does within so many seconds."""
        if self.status is None:
            if not select.select([self._fd], [], [], seconds)[0]:
                return False
            self.died = time.time()
            self.status = self.launcher.reap(self.pid)
            os.close(self._fd)
        return True

    def signal(self, number: int) -> None:
        if not self.ended():
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """kill -9, with whatever it started."""
        self.signal(signal.SIGKILL)
        if not self.ended(30):
            raise FaultFailed(f"process {self.pid} survived SIGKILL")

    def stopped(self) -> bool:
        """Whether a SIGSTOP holds it."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state == "T"
        return False


class Launcher:
    """``bench.fault_launcher`` as a child of this process. Safe to use from several threads."""

    def __init__(self, model: Path, log: Path) -> None:
        """Raises FaultFailed."""
        environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.fault_launcher", str(model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env=environment,
            )
        self._lock = threading.Lock()
        self._log = log
        if self._read() != {"ready": True}:
            raise FaultFailed(f"the launcher did not start: {log}")

    def start(self, arguments: Sequence[str], *, home: Path, log: Path, environment: Mapping[str, str]) -> Child:
        """``letheon`` with these arguments; a worker without any."""
        order = {"arguments": arguments, "home": str(home), "log": str(log), "environment": dict(environment)}
        return Child(int(self._ask(order)["pid"]), log, self)

    def reap(self, pid: int) -> int:
        return int(self._ask({"reap": pid})["status"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FaultFailed(f"the launcher is gone: {self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def clean_environment() -> dict[str, str]:
    """Ours, without what says where a service is."""
    ours = ("LETHEON_", "DATABASE_URL", "BROKER_URL", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


# --- Redis -----------------------------------------------------------------------------------------------------------


class Redis:
    """A server of our own on a free port, with a folder of its own. Ready when made."""

    def __init__(self, folder: Path) -> None:
        """Raises FaultFailed, also without a ``redis-server``."""
        self.port = free_port()
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._start()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        program = shutil.which("redis-server")
        if program is None:
            raise FaultFailed("redis-server is not installed")
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self._process = subprocess.Popen(
            [*command, "--appendonly", "yes", "--logfile", "redis.log"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers, "redis-server")

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def kill_and_flush(self) -> None:
        """kill -9, and everything that it had written is gone."""
        self.stop()
        shutil.rmtree(self.folder)

    def start_again(self) -> None:
        self._start()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def postgres_programs() -> Path | None:
    """The folder of the newest ``initdb`` there is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


class Postgres:
    """A cluster of our own on a free port. As root it runs as the user ``postgres``, since it refuses to be root."""

    def __init__(self) -> None:
        """Raises FaultFailed."""
        programs = postgres_programs()
        if programs is None:
            raise FaultFailed("PostgreSQL's programs are not installed")
        self._programs = programs
        self.port = free_port()
        folder = Path(
            tempfile.mkdtemp(prefix="letheon-postgres-")
        )  # not in a folder of ours that its user cannot enter
        self.data = folder / "data"
        self.admin_url = f"postgresql://letheon@127.0.0.1:{self.port}/postgres"
        self._user: list[str] = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            group = str(owner.pw_gid)
            self._user = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={group}", "--clear-groups", "--"]
        self._run("initdb", "-D", str(self.data), "-U", "letheon", "-A", "trust", "-E", "UTF8", "--locale=C")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=80"
        log = self.data.parent / "postgres.log"
        self._run("pg_ctl", "-D", str(self.data), "-l", str(log), "-o", options, "-w", "start")

    def stop_at_once(self) -> None:
        """As by a crash: no checkpoint, connections cut."""
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop")

    def close(self) -> None:
        with contextlib.suppress(FaultFailed):
            self.stop_at_once()
        shutil.rmtree(self.data.parent, ignore_errors=True)

    def dump(self, url: str) -> bytes:
        return self._run("pg_dump", "--dbname", url)

    def _run(self, program: str, *arguments: str) -> bytes:
        # pg_ctl's server would inherit a pipe and keep it open
        quiet = program == "pg_ctl"
        done = subprocess.run(
            [*self._user, str(self._programs / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
            cwd="/",
            timeout=120,
        )
        if done.returncode:
            raise FaultFailed(f"{program} ended with status {done.returncode}: {(done.stderr or b'')[-500:]!r}")
        return done.stdout or b""


@contextmanager
def database(kind: str, home: Path, postgres: Postgres | None) -> Iterator[str]:
    """The URL of an empty database; in ``home`` where it is SQLite."""
    if kind == "sqlite":
        yield f"sqlite:///{home / 'letheon.db'}"
        return
    assert postgres is not None
    with fresh_database(postgres.admin_url) as url:
        yield url
