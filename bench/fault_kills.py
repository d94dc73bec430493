"""Workers that die or stop: at every named failpoint, at random moments, and for three leases."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from app import audit_state, lifecycle
from app.failpoints import COMMITS
from bench.fault_judge import Outcome, written_late
from bench.fault_processes import Child, FaultFailed, wait_for
from bench.fault_site import END_SECONDS, LEASE, QUICKLY, TAKE_UP, Site, ended, taken_up_after

WORKER_COMMITS = COMMITS[: COMMITS.index("ring") + 1]  # fault_changes and fault_outages have the rest
POINTS = (
    "texts.read",
    "train.step",  # at a random step: before the first checkpoint, or between two
    "train.step",
    "train.done",
    "prompt.sealed",
    *(f"{name}.{side}" for name in WORKER_COMMITS for side in ("before_commit", "after_commit")),
)
STOPS = (
    "claim.after_commit",
    "texts.read",
    "train.step",
    "checkpoint.after_commit",
    "train.done",
    "evaluating.after_commit",
)
"""Outside of transactions: a process that is stopped within one holds its locks, whatever it is."""
ENDLESS = 600.0
STRICT = {
    "mode": "concatenate",
    "min_forget_abstain": 1,
    "max_tries": 3,
    "max_steps": 12,
    "training_deadline_seconds": ENDLESS,
}
"""The first try fails its checks, and there is time for another."""
LAX = {**STRICT, "min_forget_abstain": 0}


def kill_at_point(site: Site, number: int, draw: random.Random) -> Outcome:
    """kill -9 by the process itself, at one named point; then another worker comes."""
    point = POINTS[number // 2 % len(POINTS)]
    outcome = Outcome(kind=point)
    step = point.split(".")[0]
    failpoint, expected = point, "active"
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    if point == "train.step":
        failpoint, first = f"{point}:{draw.randint(1, 60)}", {"training_deadline_seconds": ENDLESS}
    elif step == "checkpoint":
        failpoint, first = f"{point}:{draw.randint(1, 4)}", {"training_deadline_seconds": ENDLESS}
    elif step in ("cancel", "release"):
        first = {"training_deadline_seconds": ENDLESS}
        expected = "cancelled" if step == "cancel" else "active"
    elif step == "again":
        first, second = STRICT, LAX
    elif step == "fail":
        expected = "failed"
    # A reaper rings for what waits, so the trainer has to be busy with another one.
    before = site.submit(ring=False) if step == "ring" else None
    request_id = site.submit(fingerprint="0" * 64 if step == "fail" else "", ring=step != "ring")
    if step == "reap":
        site.abandoned(request_id)
    victim = site.worker(failpoint, **first)
    if step in ("cancel", "release"):
        prompted(site, victim, request_id, step)
    die(victim, outcome)
    history = site.history(request_id)
    if ended(history) is None:
        successor = site.worker(**second)
        if before is not None:
            outcome.judge(site.wait_end(before), where=f"{failpoint}, the one before, ")
        history = site.wait_end(request_id)
        successor.kill()
        if before is None:  # else it had to wait for its turn
            outcome.take_up(taken_up_after(history, victim.died or time.time()), TAKE_UP)
    outcome.judge(history, (expected,), where=f"{failpoint}, ")
    return site.finish(outcome)


def prompted(site: Site, victim: Child, request_id: str, step: str) -> None:
    """The client cancels, or the operator stops the worker, in mid-training."""
    wait_for(lambda: "ready." in victim.output() or victim.ended(), "a worker that hears signals")
    site.wait_checkpoint(request_id)
    if step == "cancel":
        with site.sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="bench")
    else:
        victim.signal(signal.SIGTERM)


def die(victim: Child, outcome: Outcome) -> None:
    """It must come to its point, or nothing was tested."""
    if not victim.ended(END_SECONDS):
        outcome.reasons.append(f"the point was not reached within {END_SECONDS:.0f} s")
        victim.kill()
    elif victim.status != -signal.SIGKILL:
        outcome.reasons.append(f"the worker ended with status {victim.status}: {victim.output()[-400:]}")


def kill_whenever(site: Site, number: int, draw: random.Random) -> Outcome:
    """kill -9 of a worker's whole process group at a random moment, from its start to after its last write."""
    outcome = Outcome(kind=site.kind)
    request_id = site.submit(ring=draw.random() < 0.5)
    victim = site.worker(training_deadline_seconds=draw.choice((QUICKLY, 1.0)))
    # How long a start takes depends on the machine, so the moments are spread over what the last one took.
    whole = site.shared.get("whole", 3.0)
    began = time.monotonic()
    moment = draw.uniform(0, whole)
    if victim.ended(moment):
        outcome.reasons.append(f"the worker ended by itself with status {victim.status}")
    victim.kill()
    history = site.history(request_id)
    if ended(history) is None:
        began = time.monotonic()
        successor = site.worker()
        history = site.wait_end(request_id)
        successor.kill()
        outcome.take_up(taken_up_after(history, victim.died or time.time()), TAKE_UP)
        site.shared["whole"] = min(10.0, max(2.0, time.monotonic() - began - LEASE * (len(history.claims) > 1)))
    outcome.judge(history)
    return site.finish(outcome)


def stop_and_continue(site: Site, number: int, draw: random.Random) -> Outcome:
    """A worker is stopped for three leases while another one takes its request; then it wakes up and tries to go on."""
    point = STOPS[number // 2 % len(STOPS)]
    outcome = Outcome(kind=point)
    hit = draw.randint(1, 30) if point == "train.step" else 1
    request_id = site.submit()
    zombie = site.worker(
        f"{point}:{hit}=stop", training_deadline_seconds=ENDLESS if point in ("train.step", STOPS[3]) else QUICKLY
    )
    try:
        wait_for(lambda: zombie.stopped() or zombie.ended(), "the worker to stop")
        while site.locked() and not zombie.ended():  # another thread of it was within a write
            zombie.signal(signal.SIGCONT)
            time.sleep(0.02)
            zombie.signal(signal.SIGSTOP)
            wait_for(zombie.stopped, "the worker to stop")
        stopped = time.time()
        successor = site.worker()
        history = site.wait_end(request_id)
        outcome.take_up(taken_up_after(history, stopped), TAKE_UP)
        time.sleep(max(0.0, stopped + 3 * LEASE - time.time()))
        zombie.signal(signal.SIGCONT)
        wait_for(lambda: "lost its lease" in zombie.output() or zombie.ended(), "the zombie to notice")
        if zombie.ended():
            outcome.reasons.append(f"the zombie ended with status {zombie.status}: it lost a job, not its mind")
        successor.kill()
    except FaultFailed as error:
        outcome.reasons.append(f"{point}: {error}")
    zombie.kill()
    late = site.read(lambda session: written_late(session, request_id))
    if late:
        outcome.doubled += 1
        outcome.reasons.append(f"{point}: {late} writes of the stopped worker came after its successor's claim")
    outcome.judge(site.history(request_id), where=f"{point}, ")
    site.read(audit_state.verify)
    return site.finish(outcome)
