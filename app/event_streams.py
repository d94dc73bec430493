"""How many event streams one API key has open at this replica. Each holds a connection and asks twice a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import RateLimited

NAME = "event_streams"
RETRY_SECONDS = 10
"""When one of them ends nobody knows; so soon it may be tried again."""


class EventStreams:
    """For one event loop. Within a dependency that ends after the answer, however that ends."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()  # by key

    def full(self, key_id: str) -> bool:
        return self._open.get(key_id, 0) >= self._most

    @contextmanager
    def one(self, key_id: str) -> Iterator[None]:
        """While it is open. Raises RateLimited."""
        if self.full(key_id):
            raise RateLimited(
                f"{NAME}: this API key may have {self._most} open at a time",
                limit=self._most,
                limit_name=NAME,
                retry_after=RETRY_SECONDS,
            )
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]
