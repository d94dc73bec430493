"""The two threads of a worker: a heartbeat that keeps one job's lease, and the reaper that keeps the queue moving."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from app import job_queue
from app.errors import LeaseLost
from app.lifecycle import Claim
from app.tracebacks import where

log = logging.getLogger("letheon.worker")

TRANSIENT = (OperationalError, InterfaceError, PoolTimeout)
"""What a database says when it restarts, is locked, is full or cannot be reached."""


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


class Reaper(threading.Thread):
    """Every ``every`` seconds: reclaim expired leases, then ring for what waits.

    A round that fails because of the database is logged and the next one tries again. Any other error is a bug:
    ``on_death`` is called, so that the process ends and its supervisor starts a sound one.
    """

    def __init__(
        self,
        sessions: sessionmaker[Session],
        *,
        ring: Callable[[str], object],
        every: float,
        ring_seconds: float,
        max_attempts: int,
        on_death: Callable[[], None],
    ) -> None:
        super().__init__(name="reaper", daemon=True)
        self.crashed = False
        self._sessions = sessions
        self._ring = ring
        self._every = every
        self._ring_seconds = ring_seconds
        self._max_attempts = max_attempts
        self._on_death = on_death
        self._end = threading.Event()

    def run(self) -> None:
        try:
            while True:
                try:
                    self.round()
                except SQLAlchemyError as error:
                    log.warning("reaper: round failed, trying again (%s)", type(error).__name__)
                if self._end.wait(self._every):
                    return
        except Exception as error:
            self.crashed = True
            log.critical("reaper: died, ending the process: %s", where(error))
            self._on_death()

    def round(self) -> None:
        """One pass over the queue. Raises SQLAlchemyError."""
        with self._sessions.begin() as session:
            reaped = job_queue.reap(session, max_attempts=self._max_attempts)
        for request_id in reaped:
            log.info("%s: lease expired, reclaimed", request_id)
        with self._sessions.begin() as session:
            due = job_queue.ring_due(session, ring_seconds=self._ring_seconds)
        for request_id in due:  # after the commit: a message must never be ahead of its row
            self._ring(request_id)

    def stop(self) -> None:
        """End the thread after its current round."""
        self._end.set()
