"""A bounded queue in front of one thread: jobs that wait together run together.

There is no waiting for a batch to fill. While the thread works, jobs collect, and the next batch takes them: an idle
server answers at once and a busy one batches by itself.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from app.errors import NotReady, Overloaded

log = logging.getLogger(__name__)

J = TypeVar("J")
R = TypeVar("R")


@dataclass(eq=False)
class _Job(Generic[J, R]):
    item: J
    weight: int
    future: Future[R] = field(default_factory=Future)


class Batcher(Generic[J, R]):
    """Runs ``run(items)`` in its own thread; every submitted item gets its result or the batch's exception.

    An item is never split over batches, so one answer comes from one batch. Weights (``weigh(item)``) are counted
    against ``max_batch`` and ``max_queued``; a single heavier item is still taken, alone.
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
        self._rate = 0.0  # weight per second, smoothed
        self._stopped: str | None = None  # why no job is taken any more
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the thread has ended, for whatever reason."""
        return self._stopped is None and self._thread.is_alive()

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
        return job.future

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
                if self._stopped is not None:
                    return []
                while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_batch):
                    job = self._waiting.popleft()
                    self._queued -= job.weight
                    if job.future.set_running_or_notify_cancel():  # the caller may have gone
                        batch.append(job)
                        weight += job.weight
        return batch

    def _answer(self, batch: list[_Job[J, R]]) -> None:
        started = time.perf_counter()
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
        if weight := sum(job.weight for job in batch):
            rate = weight / max(time.perf_counter() - started, 1e-6)
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        for job, result in zip(batch, results, strict=True):
            job.future.set_result(result)
