"""The worker's own threads: the trainer does jobs, a heartbeat keeps a job's lease, the reaper keeps the queue moving.

Jobs do not run inside Celery's task. Seen with Redis: a consumer that is busy for minutes misses that its broker went
away; an acknowledgement fails, counts against the prefetch limit for ever, and the worker is deaf from then on. So the
task only rings a bell, and the trainer looks into the database by itself too: a broker that is down makes work late.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app import db, job_queue
from app.errors import LeaseLost, LetheonError
from app.failpoints import failpoint
from app.lifecycle import Claim
from app.tracebacks import where

log = logging.getLogger("letheon.worker")

TRANSIENT = db.UNANSWERED


class Heartbeat:
    """Extends the lease of a claim while the ``with`` block runs, and listens for a cancellation.

    ``cancelled`` and ``lost`` are what the training loop asks at every step. ``lost`` is also set when the database
    could not be reached for as long as the lease lasts: by then another worker may hold the request.
    """

    def __init__(self, sessions: sessionmaker[Session], claim: Claim, *, lease_seconds: float, every: float) -> None:
        self.cancelled = threading.Event()
        self.lost = threading.Event()
        self._sessions = sessions
        self._claim = claim
        self._lease_seconds = lease_seconds
        self._every = every
        self._held_until = time.monotonic() + lease_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(self._every) and not self.lost.is_set():
                self._beat()
        except Exception as error:  # a bug; without a heartbeat the job must stop
            log.critical("%s: heartbeat died: %s", self._claim.request_id, where(error))
            self.lost.set()

    def _beat(self) -> None:
        sent = time.monotonic()
        try:
            with self._sessions.begin() as session:
                cancelled = job_queue.heartbeat(session, self._claim, lease_seconds=self._lease_seconds)
        except LeaseLost:
            self.lost.set()
        except TRANSIENT as error:
            log.warning("%s: heartbeat failed (%s)", self._claim.request_id, type(error).__name__)
            if time.monotonic() >= self._held_until:
                self.lost.set()
        else:
            self._held_until = sent + self._lease_seconds
            if cancelled:
                self.cancelled.set()


class _Service(threading.Thread):
    """A thread that must not die unnoticed: an error that ``work`` does not expect ends the process.

    ``on_death`` is called for that, and a supervisor starts a sound process. ``bell`` cuts a pause short.
    """

    def __init__(self, name: str, *, every: float, on_death: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.crashed = False
        self._every = every
        self._on_death = on_death
        self._bell = threading.Event()
        self._end = threading.Event()

    def run(self) -> None:
        try:
            while not self._end.is_set():
                self._bell.clear()
                try:
                    self.work()
                except SQLAlchemyError as error:
                    log.warning("%s: the database failed, trying again (%s)", self.name, type(error).__name__)
                self._bell.wait(self._every)
        except Exception as error:
            self.crashed = True
            log.critical("%s: died, ending the process: %s", self.name, where(error))
            self._on_death()

    def work(self) -> None:
        """What is done at every ring and every ``every`` seconds. A SQLAlchemyError is for the next time."""
        raise NotImplementedError

    def ring(self) -> None:
        """There may be something to do."""
        self._bell.set()

    def stop(self) -> None:
        """End the thread once its current ``work`` is done."""
        self._end.set()
        self._bell.set()


class Trainer(_Service):
    """Runs waiting requests one after another, oldest first. ``job`` says whether it got the request it was given.

    ``begin`` is called in the thread, before all else, and ``idle`` when nothing waits any more.
    """

    def __init__(
        self,
        sessions: sessionmaker[Session],
        job: Callable[[str], bool],
        *,
        every: float,
        on_death: Callable[[], None],
        begin: Callable[[], None] = lambda: None,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("trainer", every=every, on_death=on_death)
        self._sessions = sessions
        self._job = job
        self._begin = begin
        self._idle = idle

    def run(self) -> None:
        self._begin()
        super().run()

    def work(self) -> None:
        missed = None
        while not self._end.is_set():
            with self._sessions() as session:
                request_id = job_queue.next_pending(session)
            if request_id is None:
                self._idle()
                return
            if request_id == missed:
                return  # it cannot be had now
            missed = None if self._job(request_id) else request_id


class Reaper(_Service):
    """Reclaims expired leases, then rings for what waits, then does its ``chores`` (``worker.chores``)."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        announce: Callable[[str], object],
        *,
        every: float,
        ring_seconds: float,
        max_attempts: int,
        on_death: Callable[[], None],
        chores: Sequence[Callable[[], None]] = (),
    ) -> None:
        super().__init__("reaper", every=every, on_death=on_death)
        self._chores = chores
        self._sessions = sessions
        self._announce = announce
        self._ring_seconds = ring_seconds
        self._max_attempts = max_attempts

    def work(self) -> None:
        with self._sessions.begin() as session:
            reaped = job_queue.reap(session, max_attempts=self._max_attempts)
            if reaped:
                failpoint("reap.before_commit")
        if reaped:
            failpoint("reap.after_commit")
        for request_id in reaped:
            log.info("%s: lease expired, reclaimed", request_id)
        with self._sessions.begin() as session:
            due = job_queue.ring_due(session, ring_seconds=self._ring_seconds)
            if due:
                failpoint("ring.before_commit")
        if due:
            failpoint("ring.after_commit")
        for request_id in due:  # after the commit: a message must never be ahead of its row
            self._announce(request_id)
        for chore in self._chores:
            try:
                chore()
            except (SQLAlchemyError, LetheonError) as error:  # one that cannot be done now must not keep the rest
                log.warning("%s: a chore failed, trying again (%s)", self.name, type(error).__name__)
