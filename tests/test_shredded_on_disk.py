"""SQLite: what was shredded is in no file any more, while the service runs on and its connections stay open."""

from __future__ import annotations

import hashlib
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from databases import migrated_database
from floor import SECRET, activate, must_take, state, submit
from sqlalchemy import Engine, event, select
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import ROOT

from app import active_set, db, job_queue, lifecycle
from app.active_set import TrainedGate
from app.lifecycle import Claim
from app.tables import Checkpoint, Prompt
from app.vault import Vault
from worker import chores

Sessions = sessionmaker[Session]
KILLED = """
import os, signal
from app import active_set, db
db._empty_log = lambda session, engine: os.kill(os.getpid(), signal.SIGKILL)  # its commit is on disk
with db.make_sessions(db.make_engine({url!r})).begin() as session:
    active_set.revoke_prompt(session, {prompt!r}, actor="key_1", reason=None)
"""
PROMPT, GATE = bytes(range(256)) * 40, b"gate" * 3000  # sealed, each of them fills several pages
TEXTS = [f"{SECRET} {number} {'very ' * 200}" for number in range(10)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "letheon.db"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    """With connections in its pool, as after a while of work; another process has one, too."""
    url = migrated_database(path)
    engine, elsewhere = db.make_engine(url), db.make_engine(url)
    with ExitStack() as stack:
        for pool in (engine, engine, engine, elsewhere):
            stack.enter_context(pool.connect()).exec_driver_sql("SELECT count(*) FROM prompts").fetchall()
    yield engine
    engine.dispose()
    elsewhere.dispose()


@pytest.fixture
def checkpoints() -> Iterator[list[str]]:
    """Every checkpoint of a log that was asked for, on whatever connection."""
    found: list[str] = []

    def look(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "checkpoint(" in statement:
            found.append(statement)

    event.listen(Engine, "before_cursor_execute", look)
    yield found
    event.remove(Engine, "before_cursor_execute", look)


def on_disk(path: Path) -> bytes:
    """The database and its log. Read by a child: closing the file here would drop the locks of our connections."""
    files = [path, path.with_name(f"{path.name}-wal")]
    assert all(file.exists() for file in files), "the engine is open, so both are there"
    return subprocess.run(["cat", *files], capture_output=True, check=True).stdout


def left(path: Path, values: dict[str, bytes | None]) -> set[str]:
    """Which of these values the files hold any part of."""
    data = on_disk(path)

    def parts(value: bytes | None) -> Iterator[bytes]:
        assert value is not None and len(value) >= 24
        return (value[at : at + 24] for at in range(0, len(value) - 23, 300))

    return {name for name, value in values.items() if any(part in data for part in parts(value))}


def put(sessions: Sessions, vault: Vault) -> str:
    with sessions.begin() as session:
        space = active_set.find_gate_space(session, "source") or active_set.add_gate_space(session, "source", b"space")
    gate = TrainedGate(GATE, hashlib.sha256(GATE).hexdigest(), space)
    claim = must_take(sessions, submit(sessions, vault))
    with sessions() as session:
        version = active_set.read_active_set(session).version
    return activate(sessions, vault, claim, data=PROMPT + bytes([version]), version=version, gate=gate)


def sealed(sessions: Sessions, prompt_id: str) -> dict[str, bytes | None]:
    with sessions() as session:
        row = active_set.get_prompt(session, prompt_id)
    return {"key": row.wrapped_key, "prompt": row.sealed, "gate": row.sealed_gate}


def revoke(sessions: Sessions, prompt_id: str) -> None:
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)


def test_a_revoked_prompt_is_in_no_file(sessions: Sessions, vault: Vault, path: Path) -> None:
    kept, gone = put(sessions, vault), put(sessions, vault)
    others, values = sealed(sessions, kept), sealed(sessions, gone)
    assert left(path, values) == left(path, others) == set(values)
    revoke(sessions, gone)
    assert left(path, values) == set()
    assert left(path, others) == set(others), "these are in force"


def cancelled(sessions: Sessions, vault: Vault, claim: Claim) -> None:
    with sessions.begin() as session:
        lifecycle.request_cancel(session, claim.request_id, actor="key_1")
    with sessions.begin() as session:
        lifecycle.finish_cancelled(session, claim)


def failed(sessions: Sessions, vault: Vault, claim: Claim) -> None:
    with sessions.begin() as session:
        lifecycle.fail(session, claim, code="diverged", detail="the loss became infinite")


def active(sessions: Sessions, vault: Vault, claim: Claim) -> None:
    activate(sessions, vault, claim, version=0)


@pytest.mark.parametrize("end", [cancelled, failed, active])
def test_the_texts_of_an_ended_request_are_in_no_file(
    sessions: Sessions, vault: Vault, path: Path, end: Callable[[Sessions, Vault, Claim], None]
) -> None:
    waiting = submit(sessions, vault, *TEXTS)
    claim = must_take(sessions, submit(sessions, vault, *TEXTS))
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, claim, step=5, data=PROMPT)
    with sessions() as session:
        rows = [lifecycle.get_request(session, request_id) for request_id in (claim.request_id, waiting)]
        step = session.scalars(select(Checkpoint)).one()
    values, others = ({"key": row.wrapped_key, "texts": row.sealed_texts} for row in rows)
    values["checkpoint"] = step.sealed
    assert left(path, values) == set(values)
    end(sessions, vault, claim)
    assert state(sessions, claim.request_id) == end.__name__
    assert left(path, values) == set()
    assert left(path, others) == set(others)

    with sessions.begin() as session:  # this one never ran
        lifecycle.request_cancel(session, waiting, actor="key_1")
    assert left(path, others) == set()


def test_only_a_commit_that_shreds_empties_the_log(sessions: Sessions, vault: Vault, checkpoints: list[str]) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, claim, step=5, data=b"state")
    with sessions() as session:
        active_set.read_active_set(session)
    assert checkpoints == []
    prompt_id = activate(sessions, vault, claim, version=0)
    assert len(checkpoints) == 1
    submit(sessions, vault)
    with sessions() as session:  # a shredding that never happened
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
        session.rollback()
    assert len(checkpoints) == 1
    with sessions() as session:  # one, and then a commit without, in one session
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
        session.commit()
        assert len(checkpoints) == 2
        lifecycle.request_cancel(session, must_take(sessions, submit(sessions, vault)).request_id, actor="key_1")
        session.commit()
    assert len(checkpoints) == 2


def test_a_reader_in_the_way_holds_no_revoke_up(
    sessions: Sessions, vault: Vault, path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="app.db")
    first, second = put(sessions, vault), put(sessions, vault)
    values, later = sealed(sessions, first), sealed(sessions, second)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM prompts").fetchall()
        began = time.monotonic()
        revoke(sessions, first)
        assert time.monotonic() - began < 5
        assert "emptied later" in caplog.text
        with sessions() as session:
            assert active_set.get_prompt(session, first).state == "revoked"
        assert left(path, values) == set(values), "or this reader was not in the way"
        reader.execute("ROLLBACK")
    revoke(sessions, second)
    assert left(path, {**values, **{f"later {name}": value for name, value in later.items()}}) == set()
    with ExitStack() as stack:  # whoever gets that connection next waits as long as ever
        pooled = [stack.enter_context(engine.connect()) for _ in range(4)]
        waits = [connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() for connection in pooled]
    assert waits == [int(1000 * db.BUSY_SECONDS)] * 4


def test_the_reaper_empties_the_log_once_the_reader_is_gone(
    sessions: Sessions, vault: Vault, path: Path, checkpoints: list[str]
) -> None:
    """Such as a verification of the whole log, which reads as of one moment. Nothing else is ever shredded."""
    gone = put(sessions, vault)
    values = sealed(sessions, gone)
    with sessions() as session, db.snapshot(session) as still:
        still.scalars(select(Prompt.state)).all()
        revoke(sessions, gone)
        checkpoints.clear()
        chores.shred_due(sessions, vault)
        assert left(path, values) == set(values), "or this reader was not in the way"
        assert checkpoints == ["PRAGMA wal_checkpoint(PASSIVE)"], "one that waits for readers has writers wait"
    chores.shred_due(sessions, vault)
    assert left(path, values) == set()
    checkpoints.clear()
    chores.shred_due(sessions, vault)
    assert checkpoints == [], "there is nothing in it"


def test_the_reaper_empties_the_log_that_a_killed_process_left(sessions: Sessions, vault: Vault, path: Path) -> None:
    gone = put(sessions, vault)
    values = sealed(sessions, gone)
    script = KILLED.format(url=f"sqlite:///{path}", prompt=gone)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with sessions() as session:
        assert active_set.get_prompt(session, gone).state == "revoked"
    assert left(path, values) == set(values)
    chores.shred_due(sessions, vault)
    assert left(path, values) == set()


def test_many_at_once_leave_nothing(sessions: Sessions, vault: Vault, path: Path) -> None:
    prompts = [put(sessions, vault) for _ in range(20)]
    values = {f"{i} {name}": v for i, p in enumerate(prompts) for name, v in sealed(sessions, p).items()}
    errors: list[BaseException] = []
    together = threading.Barrier(len(prompts))

    def work(prompt_id: str) -> None:
        try:
            together.wait()
            revoke(sessions, prompt_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(prompt_id,)) for prompt_id in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with sessions() as session:
        assert session.scalars(select(Prompt.state)).all() == ["revoked"] * len(prompts)
    chores.shred_due(sessions, vault)  # one may have been in another's way: the rest is the reaper's
    assert left(path, values) == set()
