"""The worker's threads: what a dead database, a lost lease or a bug does to them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from floor import must_take, state, submit
from sqlalchemy.orm import Session, sessionmaker
from worker_kit import wait_for

from app import db, lifecycle
from app.vault import Vault
from worker.threads import Heartbeat, Reaper, Trainer

Sessions = sessionmaker[Session]


def dead_database(folder: Path) -> Sessions:
    """Nobody answers there."""
    return db.make_sessions(db.make_engine("postgresql://nobody@127.0.0.1:9/none?connect_timeout=1"))


def make_reaper(sessions: Sessions, rung: list[str], died: threading.Event, *, attempts: int = 3) -> Reaper:
    return Reaper(sessions, rung.append, every=0.05, ring_seconds=0.2, max_attempts=attempts, on_death=died.set)


def test_the_heartbeat_keeps_a_lease(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault), lease=60)

    def until() -> float:
        with sessions() as session:
            at = lifecycle.get_request(session, claim.request_id).lease_expires_at
        assert at is not None
        return at.timestamp()

    first = until()
    with Heartbeat(sessions, claim, lease_seconds=60, every=0.1) as heartbeat:
        wait_for(lambda: until() > first + 0.5, "a longer lease")
        with sessions.begin() as session:
            lifecycle.hold(session, claim)
        assert not heartbeat.lost.is_set() and not heartbeat.cancelled.is_set()


def test_the_heartbeat_hears_a_cancellation(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with Heartbeat(sessions, claim, lease_seconds=5, every=0.05) as heartbeat:
        with sessions.begin() as session:
            lifecycle.request_cancel(session, claim.request_id, actor="test")
        assert heartbeat.cancelled.wait(60) and not heartbeat.lost.is_set()


def test_the_heartbeat_notices_a_successor(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    claim = must_take(sessions, request_id, lease=0.01)
    time.sleep(0.05)
    must_take(sessions, request_id, owner="w2")
    with Heartbeat(sessions, claim, lease_seconds=5, every=0.05) as heartbeat:
        assert heartbeat.lost.wait(60)


def test_a_dead_database_is_borne_until_the_lease_would_have_run_out(tmp_path: Path) -> None:
    claim = lifecycle.Claim("req_x", 1, "w1#1")
    began = time.monotonic()
    with Heartbeat(dead_database(tmp_path), claim, lease_seconds=3, every=0.1) as heartbeat:
        assert not heartbeat.lost.wait(0.5)
        assert heartbeat.lost.wait(60)
    assert time.monotonic() - began >= 3


def test_the_reaper_rings_and_reclaims(sessions: Sessions, vault: Vault) -> None:
    waiting, stuck, spent = (submit(sessions, vault) for _ in range(3))
    must_take(sessions, stuck, lease=0.1)
    must_take(sessions, spent, lease=0.1, attempts=1)
    rung: list[str] = []
    died = threading.Event()
    reaper = make_reaper(sessions, rung, died)
    reaper.start()
    wait_for(lambda: rung.count(waiting) >= 2 and stuck in rung, "rings")
    reaper.stop()
    reaper.join(60)
    assert not died.is_set() and not reaper.crashed
    assert state(sessions, stuck) == "pending"


def test_the_reaper_ends_what_is_out_of_attempts(sessions: Sessions, vault: Vault) -> None:
    spent = submit(sessions, vault)
    must_take(sessions, spent, lease=0.01, attempts=1)
    time.sleep(0.05)
    make_reaper(sessions, [], threading.Event(), attempts=1).work()
    with sessions() as session:
        row = lifecycle.get_request(session, spent)
    assert row.state == "failed" and row.failure is not None and row.failure["code"] == "attempts-exhausted"


def test_a_failing_round_is_not_the_end_of_the_reaper(tmp_path: Path) -> None:
    died = threading.Event()
    reaper = make_reaper(dead_database(tmp_path), [], died)
    reaper.start()
    time.sleep(0.5)
    assert reaper.is_alive() and not died.is_set()
    reaper.stop()
    reaper.join(60)


def test_a_bug_in_the_reaper_is_announced(sessions: Sessions, vault: Vault, caplog: pytest.LogCaptureFixture) -> None:
    submit(sessions, vault)
    died = threading.Event()

    def broken(request_id: str) -> None:
        raise ValueError(f"a message that must not be logged: {request_id}")

    reaper = Reaper(sessions, broken, every=0.05, ring_seconds=1, max_attempts=3, on_death=died.set)
    reaper.start()
    assert died.wait(60) and reaper.crashed
    reaper.join(60)
    assert "ValueError <" in caplog.text and "must not be logged" not in caplog.text


def test_the_trainer_takes_the_oldest_first_and_goes_on_without_a_ring(sessions: Sessions, vault: Vault) -> None:
    done: list[str] = []

    def job(request_id: str) -> bool:
        must_take(sessions, request_id)
        done.append(request_id)
        return True

    first, second = submit(sessions, vault), submit(sessions, vault)
    trainer = Trainer(sessions, job, every=60, on_death=lambda: None)
    trainer.start()
    wait_for(lambda: done == [first, second], "both jobs")
    third = submit(sessions, vault)
    trainer.ring()
    wait_for(lambda: done == [first, second, third], "the bell to be heard")
    trainer.stop()
    trainer.join(60)
    assert not trainer.is_alive()


def test_the_trainer_does_not_spin_on_a_request_it_cannot_have(sessions: Sessions, vault: Vault) -> None:
    tried: list[str] = []

    def job(request_id: str) -> bool:
        tried.append(request_id)
        return False

    submit(sessions, vault)
    trainer = Trainer(sessions, job, every=0.2, on_death=lambda: None)
    began = time.monotonic()
    trainer.start()
    wait_for(lambda: len(tried) >= 3, "tries")
    trainer.stop()
    trainer.join(60)
    assert not trainer.is_alive()
    assert len(tried) <= 2 + (time.monotonic() - began) / 0.2
