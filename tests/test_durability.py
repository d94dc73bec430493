"""What survives kill -9: real worker processes on the embedded default (SQLite, a folder as broker)."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select
from tiny_models import make_tiny_model
from worker_kit import MARKER, ROOT, Site, deploy, wait_for

from app import audit, lifecycle
from app.defaults import load_arguments
from app.settings import Settings
from app.tables import AuditEntry
from models.llm import FrozenLLM

SOON = 0.5
"""A training deadline that lets a successor finish at once; the first worker of a test has none to speak of."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fingerprint(model: Path) -> str:
    settings = Settings(_env_file=None, model=str(model), quantization="none", device="cpu")
    return FrozenLLM.load(**load_arguments(settings)).fingerprint


@pytest.fixture
def site(tmp_path: Path, model: Path) -> Iterator[Site]:
    with deploy(tmp_path / "site", model) as site:
        yield site


def files_with_marker(site: Site) -> list[str]:
    """Database, write-ahead log, broker messages, teacher cache, logs: whatever is on disk.

    Read by a child: closing a database file in this process would drop the locks that its SQLite connections hold.
    """
    script = (
        "import pathlib, sys\n"
        "count = 0\n"
        "for path in pathlib.Path(sys.argv[1]).rglob('*'):\n"
        "    try:\n"
        "        data = path.read_bytes() if path.is_file() else b''\n"
        "    except FileNotFoundError:\n"  # a message was taken, a temporary file was renamed
        "        continue\n"
        "    count += 1\n"
        "    if sys.argv[2].encode() in data:\n"
        "        print(path.name)\n"
        "assert count > 3"
    )
    command = [sys.executable, "-c", script, str(site.home), MARKER]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def write_lock_is_free(site: Site) -> bool:
    connection = sqlite3.connect(site.home / "letheon.db", timeout=0.2, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
        return True
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()


def test_kill_9_in_mid_training_is_resumed_and_activated_once(site: Site, fingerprint: str) -> None:
    request_id = site.submit(fingerprint)
    messages = [path.read_text() for path in (site.settings.broker_dir / "messages").iterdir()]
    assert len(messages) == 1 and files_with_marker(site) == []
    version = site.version()

    first = site.start_worker()
    step = site.wait_checkpoint(request_id)
    assert files_with_marker(site) == []
    first.kill()
    step = site.checkpoint_step(request_id) or step
    seen = site.events(request_id)[-1].id

    second = site.start_worker(training_deadline_seconds=SOON)
    row = site.wait_state(request_id, "active", "failed")
    assert row.state == "active" and row.attempt == 2
    assert row.metrics is not None and row.metrics["resumed_from"] == step > 0
    resumed = [event.data["step"] for event in site.events(request_id, "progress") if event.id > seen]
    assert resumed[0] == step + 1
    assert len(site.prompts()) == 1 and site.version() == version + 1
    states = [event.data["state"] for event in site.events(request_id, "state")]
    assert states.count("active") == 1 and states[-1] == "active"
    site.assert_shredded(request_id)
    # What stays are the shares of the prompt, of the two digest keys and of the signing key; the texts' is destroyed.
    store = site.vault.keystore
    assert store is not None
    wait_for(lambda: store.counts() == (4, 1), "the share to be destroyed")

    assert second.terminate() == 0  # an idle worker stops on SIGTERM
    assert files_with_marker(site) == [] and request_id in second.output()
    with site.sessions() as session:
        audit.verify(session)
        actions = session.execute(select(AuditEntry.action).where(AuditEntry.subject == request_id)).scalars().all()
    assert actions.count("request.active") == 1


def test_a_request_whose_api_died_before_enqueueing_is_trained(site: Site, fingerprint: str) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from app import db, lifecycle
from app.settings import get_settings
from app.vault import Vault
from worker_kit import forget_texts
settings = get_settings()
with db.make_sessions(db.make_engine(settings.effective_database_url)).begin() as session:
    lifecycle.create_request(session, Vault.from_settings(settings), texts=forget_texts(), reason=None,
        options={{}}, fingerprint={fingerprint!r}, api_key_id=None)
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", script], cwd=site.home, env=site.environment(), check=False)
    assert died.returncode == -signal.SIGKILL
    assert not site.settings.broker_dir.exists()  # nobody was ever told
    with site.sessions() as session:
        (row,), _ = lifecycle.list_requests(session, limit=2)

    worker = site.start_worker(training_deadline_seconds=SOON)
    assert site.wait_state(row.id, "active", "failed").state == "active"

    # The same worker, and a message that is lost on its way.
    lost = site.submit(fingerprint, ring=False, salt="lost ")
    assert site.wait_state(lost, "active", "failed").state == "active"
    assert worker.popen.poll() is None and len(site.prompts()) == 2


def test_sigterm_hands_back_a_checkpoint_and_a_cancelled_request_is_shredded(site: Site, fingerprint: str) -> None:
    cancelled, request_id = site.submit(fingerprint, salt="first "), site.submit(fingerprint)
    worker = site.start_worker()
    site.wait_checkpoint(cancelled)
    with site.sessions.begin() as session:
        lifecycle.request_cancel(session, cancelled, actor="test")
    site.wait_state(cancelled, "cancelled")
    site.assert_shredded(cancelled)

    site.wait_checkpoint(request_id)  # the same worker went on to the next request
    last = site.events(request_id, "progress")[-1].data["step"]
    assert worker.terminate() == 0
    row = site.request(request_id)
    assert (row.state, row.attempt, row.lease_owner) == ("pending", 0, None)
    step = site.checkpoint_step(request_id)
    assert step is not None and step >= last  # taken at the signal, not the one before

    # SIGINT, as Ctrl-C sends it, is as cooperative as SIGTERM.
    second = site.start_worker()
    step = site.wait_checkpoint(request_id, above=step)
    wait_for(lambda: "ready." in second.output(), "a worker that hears signals")
    second.popen.send_signal(signal.SIGINT)
    second.popen.wait(120)
    row = site.request(request_id)
    assert (row.state, row.attempt) == ("pending", 0)
    step = site.checkpoint_step(request_id)

    site.start_worker(training_deadline_seconds=SOON)
    row = site.wait_state(request_id, "active", "failed")
    assert row.state == "active" and row.attempt == 1
    assert row.metrics is not None and row.metrics["resumed_from"] == step
    assert site.prompts()[0].request_id == request_id and len(site.prompts()) == 1


def test_a_stopped_worker_that_wakes_up_writes_nothing(site: Site, fingerprint: str) -> None:
    request_id = site.submit(fingerprint)
    zombie = site.start_worker()
    site.wait_checkpoint(request_id)
    while True:
        zombie.popen.send_signal(signal.SIGSTOP)
        if write_lock_is_free(site):
            break  # otherwise it was stopped inside a write, and with SQLite nobody else could go on
        zombie.popen.send_signal(signal.SIGCONT)
        time.sleep(0.05)

    site.start_worker(training_deadline_seconds=SOON)
    assert site.wait_state(request_id, "active", "failed").state == "active"
    row, count, version = site.request(request_id), len(site.events(request_id)), site.version()

    zombie.popen.send_signal(signal.SIGCONT)
    wait_for(lambda: "lost its lease" in zombie.output(), "the zombie to notice")
    after = site.request(request_id)
    assert (after.updated_at, after.attempt, after.progress) == (row.updated_at, row.attempt, row.progress)
    assert len(site.events(request_id)) == count and site.version() == version and len(site.prompts()) == 1
    assert site.checkpoint_step(request_id) is None
    assert zombie.popen.poll() is None  # it lost a job, not its mind: it works on
    assert zombie.terminate() == 0


def test_a_request_that_kills_every_worker_ends(site: Site, fingerprint: str) -> None:
    request_id = site.submit(fingerprint)
    for attempt in (1, 2):
        worker = site.start_worker(max_attempts=2)
        wait_for(partial(lambda wanted: site.request(request_id).attempt == wanted, attempt), "the attempt")
        worker.kill()
    site.start_worker(max_attempts=2)
    row = site.wait_state(request_id, "failed")
    assert row.failure is not None and row.failure["code"] == "attempts-exhausted"
    site.assert_shredded(request_id)
    assert site.prompts() == []


def test_a_broker_that_is_down_for_good_delays_and_stops_nothing(site: Site, fingerprint: str) -> None:
    request_id = site.submit(fingerprint, ring=False)
    worker = site.start_worker(training_deadline_seconds=SOON, broker_url="redis://127.0.0.1:9/0")
    assert site.wait_state(request_id, "active", "failed").state == "active"
    assert "Cannot connect" in worker.output()
    assert worker.terminate() == 0
