"""Training on a full disk and with too little memory: a stated end, a sound database, and no loop."""

from __future__ import annotations

import contextlib
import random
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from app import audit_state
from bench.fault_judge import Outcome
from bench.fault_outages import post, request_body
from bench.fault_processes import Child, wait_for
from bench.fault_site import BACKENDS, LEASE, Bench, Site, ended

KINDS = ("full disk", "full disk at a checkpoint", "memory limit", "out of memory in a step")
ATTEMPTS = 3
DISK_BYTES = 12 * 2**20
ENDS = ("active", "failed")


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """A mounted tmpfs that can be filled; None where this user may not mount one."""
    with tempfile.TemporaryDirectory(prefix="letheon-disk-") as name:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", name]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            yield None
            return
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def run_out(bench: Bench, number: int, draw: random.Random) -> Outcome:
    kind = KINDS[number % len(KINDS)]
    if kind == "full disk":
        return fill_disk(bench, draw)
    backend = BACKENDS[(number + number // len(KINDS)) % 2]
    with bench.site(backend, max_attempts=ATTEMPTS) as site:
        if kind == "memory limit":
            return limit_memory(site, draw)
        failpoint = {
            KINDS[1]: f"checkpoint.before_commit:{draw.randint(1, 3)}=enospc",
            KINDS[3]: f"train.step:{draw.randint(1, 9)}=memory",
        }[kind]
        outcome = Outcome(kind=kind)
        request_id = site.submit()
        worker = site.worker(failpoint, training_deadline_seconds=60)
        history = site.wait_end(request_id)
        outcome.judge(history, ("failed",), where=f"{kind}, ")
        if kind == KINDS[3] and history.failure != "out-of-memory":
            outcome.reasons.append(f"stated as {history.failure}")
        if worker.ended():
            outcome.reasons.append(f"the worker ended with status {worker.status}")
        return sound(site, request_id, outcome)


def fill_disk(bench: Bench, draw: random.Random) -> Outcome:
    """The embedded default on a disk that is full for longer than a lease, in mid-training; then there is room."""
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk())
        if disk is None:
            return Outcome(kind="full disk: no tmpfs could be mounted", reasons=["no disk to fill"])
        outcome = Outcome(kind="full disk (tmpfs)")
        site = stack.enter_context(bench.site("sqlite", home=disk, max_attempts=ATTEMPTS))
        api = site.api()
        request_id = site.submit(texts=40)
        worker = site.worker(training_deadline_seconds=LEASE * 4)
        site.wait_checkpoint(request_id)
        time.sleep(draw.uniform(0, 0.5))
        ballast = disk / "ballast"
        full_at = time.time()
        refused = 0
        while time.time() < full_at + draw.uniform(1.2, 1.6) * LEASE:
            fill(ballast)  # again: a checkpoint that was replaced leaves room
            answer = post(api, "/unlearn-requests", request_body(40))
            if answer is None or answer.status_code not in (202, 503):
                outcome.reasons.append(f"a submit was answered {answer.status_code if answer else 'not at all'}")
            elif answer.status_code == 503:
                refused += 1
                if "retry-after" not in answer.headers:
                    outcome.reasons.append("503 without Retry-After")
            time.sleep(0.1)
        ballast.unlink()
        outcome.figures["refused_max"] = refused
        history = site.wait_end(request_id)
        outcome.judge(history, ENDS, where="full disk, ")
        if worker.ended():
            outcome.reasons.append(f"the worker ended with status {worker.status}")
        if not api.ready():
            outcome.reasons.append("the API is not ready again")
        return sound(site, request_id, outcome)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass


def limit_memory(site: Site, draw: random.Random) -> Outcome:
    """RLIMIT_AS at what a training worker holds, or little more; where it gives up, one without a limit comes."""
    outcome = Outcome(kind="memory limit")
    request_id = site.submit(texts=60)
    worker = site.worker(training_deadline_seconds=1.5)
    wait_for(lambda: site.history(request_id).claims or worker.ended(), "a claim")
    room = draw.choice((0, 2**20, 8 * 2**20))
    with contextlib.suppress(ProcessLookupError):
        limit = virtual_bytes(worker) + room
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, limit))
    deadline = time.time() + 3 * LEASE
    while time.time() < deadline and ended(site.history(request_id)) is None:
        time.sleep(0.05)
    if ended(site.history(request_id)) is None:
        site.worker()
    history = site.wait_end(request_id)
    outcome.kind += f": {history.failure or history.state}"  # what the limit did, which is up to the allocator
    outcome.judge(history, ENDS, where="memory limit, ")
    return sound(site, request_id, outcome)


def virtual_bytes(child: Child) -> int:
    return int(Path(f"/proc/{child.pid}/statm").read_text().split()[0]) * resource.getpagesize()


def sound(site: Site, request_id: str, outcome: Outcome) -> Outcome:
    """No loop: no more attempts than are allowed. And a database without a scratch."""
    history = site.history(request_id)
    if len(history.claims) > ATTEMPTS:
        outcome.reasons.append(f"{len(history.claims)} attempts")
    outcome.figures["attempts_max"] = len(history.claims)
    said: Any = site.read(check_integrity)
    if said != "ok":
        outcome.reasons.append(f"integrity check: {said}")
    site.read(audit_state.verify)
    return site.finish(outcome)


def check_integrity(session: Any) -> str:
    """SQLite's own check; PostgreSQL, whose pages have no say here, is read as a whole by the audit's verification."""
    connection = session.connection()
    if connection.dialect.name != "sqlite":
        return "ok"
    rows = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    return "; ".join(rows)
