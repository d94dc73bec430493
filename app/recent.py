"""What one replica has answered in the last minutes, in memory: for people who look, where Prometheus is not."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

BUCKET_SECONDS = 5.0
BUCKETS = 60


@dataclass(frozen=True)
class Bucket:
    """Texts that were answered in so many seconds, and those of them that were answered `unknown` for a request."""

    texts: int
    unknown: int


class Recent:
    """The last ``BUCKETS`` stretches of ``BUCKET_SECONDS``. Any thread may add and read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: deque[tuple[int, int, int]] = deque(maxlen=BUCKETS + 1)  # → number, texts, unknown

    def add(self, texts: int, unknown: int) -> None:
        now = int(self._clock() / BUCKET_SECONDS)
        with self._lock:
            if self._buckets and self._buckets[-1][0] == now:
                _, before, before_unknown = self._buckets.pop()
                texts, unknown = texts + before, unknown + before_unknown
            self._buckets.append((now, texts, unknown))

    def read(self) -> list[Bucket]:
        """``BUCKETS`` of them, oldest first; the stretch that is still running is left out."""
        now = int(self._clock() / BUCKET_SECONDS)
        with self._lock:
            known = {number: Bucket(texts, unknown) for number, texts, unknown in self._buckets}
        return [known.get(number, Bucket(0, 0)) for number in range(now - BUCKETS, now)]
