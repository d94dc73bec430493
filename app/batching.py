"""A bounded queue in front of one thread: jobs that wait together run together.

While the thread works, jobs collect, and the next batch takes them: an idle server answers at once and a busy one
batches by itself. Callers that ask again as soon as they have an answer would so fall into two groups that take turns,
in batches of half the size. So after a batch the thread waits, as long as callers keep coming and a fifth of that
batch's time at most, until as many are there as were there before: callers that come one at a time never wait for it.

A queue that is longer than its callers wait would be worked off for nobody, each answer a little too late. So what a
batch takes is learned (``app.pace``), who would be answered too late is refused at once, and who got too late is left
out. A batch that is itself too late for all of its callers is given up at its next step.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from app.errors import DeadlineExceeded, NotReady, Overloaded
from app.pace import Pace

log = logging.getLogger(__name__)

LINGER = 0.2  # of the last batch's time, but no longer than
MAX_LINGER_SECONDS = 0.5
QUIET = 0.25  # of that: when nobody has come for so long, nobody will
SLACK = 0.2  # of the time that a caller allows: an estimate is no promise

J = TypeVar("J")
R = TypeVar("R")


@dataclass(eq=False)
class _Job(Generic[J, R]):
    item: J
    weight: int
    since: float
    deadline: float
    future: Future[R] = field(default_factory=Future)


class Batcher(Generic[J, R]):
    """Runs ``run(items)`` in its own thread; every submitted item gets its result or the batch's exception.

    An item is never split over batches, so one answer comes from one batch. Weights (``weigh(item)``) are counted
    against ``max_batch`` and ``max_queued``; a single heavier item is still taken, alone. A future that its caller
    cancels leaves the queue, and its place is free at once; in a running batch it is computed for nobody. The thread
    has done ``begin()`` before anything is submitted.

    Deadlines are moments of ``clock``. What batches take is learned from those of which every item ``teaches``, as
    ``Pace`` says; one that ended, or was given up, too late for all of its callers counts for more. Until something is
    known, and when nothing else is there, an item is taken whatever the estimate.
    """

    def __init__(
        self,
        run: Callable[[list[J]], Sequence[R]],
        *,
        weigh: Callable[[J], int],
        max_batch: int,
        max_queued: int,
        teaches: Callable[[J], bool] = lambda item: True,
        name: str = "model",
        begin: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._weigh, self._clock, self._begin = run, weigh, clock, begin
        self._teaches = teaches
        self._max_batch, self._max_queued = max_batch, max_queued
        self._condition = threading.Condition()
        self._waiting: deque[_Job[J, R]] = deque()
        self._queued = 0  # weight of what waits
        self._reserved = 0  # weight of what will
        self._running_since: float | None = None
        self._stepped = self._running_until = 0.0  # of the running batch: its last step, and the last of its deadlines
        self._running_weight = 0
        self._seen = 0  # weight of the last batch that teaches and of what waited when it ended: as much may come again
        self._linger = self._linger_until = 0.0  # how long, and until when
        self._last_came = 0.0
        self._pace = Pace(max_batch)
        self._stopped: str | None = None  # why no job is taken any more
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()
        self._begun.wait()

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
        """Seconds that the first in the queue of those that teach and have a weight has waited; 0 when none does."""
        with self._condition:
            since = (job.since for job in self._waiting if job.weight and self._teaches(job.item))
            first = next(since, None)
            return 0.0 if first is None else self._clock() - first

    @property
    def running(self) -> float:
        """Seconds that the batch of the moment has taken so far; 0 between batches."""
        since = self._running_since
        return self._clock() - since if since is not None else 0.0

    @property
    def silent(self) -> float:
        """Seconds since the batch of the moment began or made its last step; 0 between batches."""
        return self._clock() - self._stepped if self._running_since is not None else 0.0

    def step(self) -> None:
        """For ``run``, between its parts. Raises DeadlineExceeded when nobody waits for the batch any more."""
        self._stepped = self._clock()
        if self._stepped > self._running_until:
            raise DeadlineExceeded("so many texts take longer here than the time allowed")

    def submit(self, item: J, *, deadline: float = math.inf) -> Future[R]:
        """Queue an item; its future may carry DeadlineExceeded. Raises as ``place``."""
        with self.place(self._weigh(item), deadline=deadline) as put:
            return put(item)

    @contextmanager
    def place(self, weight: int, *, deadline: float = math.inf) -> Iterator[Callable[[J], Future[R]]]:
        """A place in the queue, held while its item is made; yields what queues that item.

        Raises Overloaded (the queue is full, or too long for the deadline), DeadlineExceeded (the item alone takes
        longer) and NotReady (the thread is gone or closing).
        """
        since = self._clock()
        with self._condition:
            self._admit(weight, deadline - since)
            self._reserved += weight
        reserved = weight

        def put(item: J) -> Future[R]:
            nonlocal reserved
            job: _Job[J, R] = _Job(item, weight, since, deadline)
            with self._condition:
                if self._stopped is not None:
                    raise NotReady(self._stopped)
                self._reserved -= reserved
                reserved = 0
                self._waiting.append(job)
                self._queued += weight
                self._last_came = self._clock()
                self._condition.notify()
            job.future.add_done_callback(lambda future: self._leave(job) if future.cancelled() else None)
            return job.future

        try:
            yield put
        finally:
            with self._condition:
                self._reserved -= reserved

    def _admit(self, weight: int, allowed: float) -> None:
        """With the condition held. ``allowed``: seconds until the answer has to be there."""
        if self._stopped is not None:
            raise NotReady(self._stopped)
        ahead = self._queued + self._reserved
        if ahead and ahead + weight > self._max_queued:
            raise Overloaded("too many texts are waiting", retry_after=_seconds(self._pace.seconds(ahead)))
        busy = self._running_since is not None
        if not (ahead or busy):
            return
        if self._pace.seconds(weight) > allowed:
            raise DeadlineExceeded("so many texts take longer here than the time allowed", retry_after=1)
        rest = max(0.0, self._pace.seconds(self._running_weight) - self.running) if busy else 0.0
        late = rest + self._pace.seconds(ahead + weight) - (1 - SLACK) * allowed
        if weight and late > 0:
            raise Overloaded(
                "more texts are waiting than can be answered in the time allowed", retry_after=_seconds(late)
            )

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
            self._begin()
            self._begun.set()
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException as death:  # the thread's last words; its message might quote a text
            log.critical("the model thread died: %s", type(death).__name__)
        finally:
            self._stop("the model thread has died")
            self._begun.set()

    def _next_batch(self) -> list[_Job[J, R]]:
        """What waits, up to ``max_batch``; blocks for the first job. Empty: time to end."""
        batch: list[_Job[J, R]] = []
        weight = 0
        with self._condition:
            while not batch:
                self._condition.wait_for(lambda: self._waiting or self._stopped is not None)
                self._wait_for_callers()
                if self._stopped is not None:
                    return []
                urgent = math.inf  # seconds until the first of the batch must have its answer
                while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_batch):
                    job = self._waiting[0]
                    left = min(urgent, job.deadline - self._clock())
                    in_time = left > 0 and self._pace.seconds(weight + job.weight) <= left
                    if batch and not in_time:
                        break  # for the next batch, if there is time for that
                    self._waiting.popleft()
                    self._queued -= job.weight
                    if not job.future.set_running_or_notify_cancel():  # the caller has gone
                        continue
                    if in_time or (left > 0 and not self._waiting):
                        batch.append(job)
                        weight, urgent = weight + job.weight, left
                    else:
                        job.future.set_exception(DeadlineExceeded("the server is too busy for the time allowed"))
        return batch

    def _wait_for_callers(self) -> None:
        """Until as many wait as before, nobody comes any more, or it takes too long; with the condition held."""
        while self._queued < min(self._seen, self._max_batch) and self._stopped is None:
            left = min(self._linger_until, self._last_came + QUIET * self._linger) - self._clock()
            if left <= 0 or not self._condition.wait(left):
                return

    def _answer(self, batch: list[_Job[J, R]]) -> None:
        weight = sum(job.weight for job in batch)
        teaches = weight > 0 and all(self._teaches(job.item) for job in batch)
        started = self._clock()
        self._stepped, self._running_until = started, max((j.deadline for j in batch if j.weight), default=math.inf)
        self._running_weight, self._running_since = weight, started
        try:
            results = self._run([job.item for job in batch])
            if len(results) != len(batch):
                raise RuntimeError("run() must return one result per item")
        except Exception as error:  # reaches every caller; the loop goes on
            if isinstance(error, DeadlineExceeded) and teaches:  # it would have taken longer
                self._learn(weight, self._clock() - started, late=True, ended=False)
            for job in batch:
                job.future.set_exception(error)
            return
        except BaseException:
            for job in batch:
                job.future.set_exception(NotReady("the model thread has died"))
            raise
        finally:
            self._running_since = None
        if teaches:
            ended = self._clock()
            self._learn(weight, ended - started, late=ended > self._running_until)
            self._seen = weight + self._queued
            self._linger = min(LINGER * (ended - started), MAX_LINGER_SECONDS)
            self._linger_until, self._last_came = ended + self._linger, ended
        for job, result in zip(batch, results, strict=True):
            job.future.set_result(result)

    def _learn(self, weight: int, seconds: float, *, late: bool, ended: bool = True) -> None:
        with self._condition:
            self._pace.learn(weight, seconds, late=late, ended=ended)


def _seconds(wait: float) -> int:
    """As a Retry-After."""
    return min(max(math.ceil(wait), 1), 60)
