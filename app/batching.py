"""A bounded queue in front of one thread: jobs that wait together run together.

While the thread works, jobs collect, and the next batch takes them: an idle server answers at once and a busy one
batches by itself. Callers that ask again as soon as they have an answer would so fall into two groups that take turns,
in batches of half the size. So after a batch the thread waits, a tenth of that batch's time at most, until as many are
there as were there before: callers that come one at a time never wait for it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from app.errors import NotReady, Overloaded

log = logging.getLogger(__name__)

LINGER = 0.1  # of the last batch's time, but no longer than
MAX_LINGER_SECONDS = 0.25

J = TypeVar("J")
R = TypeVar("R")


@dataclass(eq=False)
class _Job(Generic[J, R]):
    item: J
    weight: int
    future: Future[R] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[J, R]):
    """Runs ``run(items)`` in its own thread; every submitted item gets its result or the batch's exception.

    An item is never split over batches, so one answer comes from one batch. Weights (``weigh(item)``) are counted
    against ``max_batch`` and ``max_queued``; a single heavier item is still taken, alone. A future that its caller
    cancels leaves the queue, and its place is free at once; in a running batch it is computed for nobody.
    """

    def __init__(
        self,
        run: Callable[[list[J]], Sequence[R]],
        *,
        weigh: Callable[[J], int],
        max_batch: int,
        max_queued: int,
        name: str = "model",
    ) -> None:
        self._run, self._weigh = run, weigh
        self._max_batch, self._max_queued = max_batch, max_queued
        self._condition = threading.Condition()
        self._waiting: deque[_Job[J, R]] = deque()
        self._queued = 0  # weight of what waits
        self._running_since: float | None = None
        self._seen = 0  # weight of the last batch and of what waited when it ended: as much may come again
        self._linger_until = 0.0
        self._rate = 0.0  # weight per second, smoothed
        self._stopped: str | None = None  # why no job is taken any more
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the thread has ended, for whatever reason."""
        return self._stopped is None and self._thread.is_alive()

    @property
    def queued(self) -> int:
        """Weight of what waits."""
        return self._queued

    @property
    def oldest(self) -> float:
        """Seconds that the first in the queue has waited; 0 when none does."""
        with self._condition:
            return time.monotonic() - self._waiting[0].since if self._waiting else 0.0

    @property
    def running(self) -> float:
        """Seconds that the batch of the moment has taken so far; 0 between batches."""
        since = self._running_since
        return time.monotonic() - since if since is not None else 0.0

    def submit(self, item: J) -> Future[R]:
        """Queue an item. Raises Overloaded (queue full) and NotReady (the thread is gone or closing)."""
        job: _Job[J, R] = _Job(item, self._weigh(item))
        with self._condition:
            if self._stopped is not None:
                raise NotReady(self._stopped)
            if self._queued and self._queued + job.weight > self._max_queued:
                wait = math.ceil(self._queued / self._rate) if self._rate else 1
                raise Overloaded("too many texts are waiting", retry_after=min(max(wait, 1), 60))
            self._waiting.append(job)
            self._queued += job.weight
            self._condition.notify()
        job.future.add_done_callback(lambda future: self._leave(job) if future.cancelled() else None)
        return job.future

    def _leave(self, job: _Job[J, R]) -> None:
        with self._condition, suppress(ValueError):  # the thread may have been quicker
            self._waiting.remove(job)
            self._queued -= job.weight

    def close(self, timeout: float = 30.0) -> None:
        """Finish the running batch, refuse what waits, end the thread."""
        self._stop("the server is shutting down")
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error("the model thread did not end within %.0f s", timeout)

    def _stop(self, why: str) -> None:
        with self._condition:
            self._stopped = self._stopped or why
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._queued = 0
            self._condition.notify_all()
        for job in abandoned:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(NotReady(why))

    def _loop(self) -> None:
        try:
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException as death:  # the thread's last words; its message might quote a text
            log.critical("the model thread died: %s", type(death).__name__)
        finally:
            self._stop("the model thread has died")

    def _next_batch(self) -> list[_Job[J, R]]:
        """What waits, up to ``max_batch``; blocks for the first job. Empty: time to end."""
        batch: list[_Job[J, R]] = []
        weight = 0
        with self._condition:
            while not batch:
                self._condition.wait_for(lambda: self._waiting or self._stopped is not None)
                self._condition.wait_for(self._all_there, max(0.0, self._linger_until - time.monotonic()))
                if self._stopped is not None:
                    return []
                while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_batch):
                    job = self._waiting.popleft()
                    self._queued -= job.weight
                    if job.future.set_running_or_notify_cancel():  # the caller may have gone
                        batch.append(job)
                        weight += job.weight
        return batch

    def _all_there(self) -> bool:
        return self._queued >= min(self._seen, self._max_batch) or self._stopped is not None

    def _answer(self, batch: list[_Job[J, R]]) -> None:
        started = self._running_since = time.monotonic()
        try:
            results = self._run([job.item for job in batch])
            if len(results) != len(batch):
                raise RuntimeError("run() must return one result per item")
        except Exception as error:  # reaches every caller; the loop goes on
            for job in batch:
                job.future.set_exception(error)
            return
        except BaseException:
            for job in batch:
                job.future.set_exception(NotReady("the model thread has died"))
            raise
        finally:
            self._running_since = None
        if weight := sum(job.weight for job in batch):
            ended = time.monotonic()
            rate = weight / max(ended - started, 1e-6)
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
            self._seen = weight + self._queued
            self._linger_until = ended + min(LINGER * (ended - started), MAX_LINGER_SECONDS)
        for job, result in zip(batch, results, strict=True):
            job.future.set_result(result)
