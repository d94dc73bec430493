"""Progress of a job, written to the database often enough to be watched."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

from sqlalchemy.orm import Session, sessionmaker

from app import job_queue
from app.lifecycle import Claim
from models.training import Progress
from worker.threads import TRANSIENT

log = logging.getLogger("letheon.worker")

PROGRESS_SECONDS = 1.0


class Reporter:
    """Writes progress rows: the first and the last of a phase, and at most one a second between."""

    def __init__(self, sessions: sessionmaker[Session], claim: Claim, *, cancelled: threading.Event) -> None:
        """``cancelled`` is set when the client has asked for it."""
        self._sessions, self._claim, self._cancelled = sessions, claim, cancelled
        self._written_at: float | None = None
        self._last: Progress | None = None
        self._unwritten: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._last = self._unwritten = progress
        if self._written_at is None or time.monotonic() - self._written_at >= PROGRESS_SECONDS:
            self.flush()

    def phase(self, name: str) -> None:
        """Announce a phase that has no steps of its own."""
        if self._last is not None:
            self._unwritten = replace(self._last, phase=name)
            self.flush()

    def flush(self) -> None:
        """Write what is held back. Raises LeaseLost."""
        if self._unwritten is None:
            return
        row = {**self._unwritten.as_dict(), "attempt": self._claim.attempt}
        self._unwritten = None
        self._written_at = time.monotonic()
        try:
            with self._sessions.begin() as session:
                if job_queue.record_progress(session, self._claim, row):
                    self._cancelled.set()
        except TRANSIENT as error:
            log.warning("%s: progress not stored (%s)", self._claim.request_id, type(error).__name__)
