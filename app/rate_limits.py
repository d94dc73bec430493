"""How much one API key may ask of one replica in a minute: token buckets, in memory.

A replica knows its own callers only, so with n of them a key may have n times as much, and a restart fills every
bucket. What must hold across replicas and restarts is counted in the database (``app.quotas``).
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from app.errors import InvalidInput, RateLimited
from app.quotas import limit_of
from app.settings import Settings

MAX_BUCKETS = 10_000
_MINUTE = 60.0
_ROUNDING = 1e-6  # of a token: who has waited as long as it was told must not fall short by a float's last digit


class RateLimits:
    """A bucket for each key and limit: it holds a minute's allowance and fills evenly. Any thread may take from it."""

    def __init__(
        self, settings: Settings, *, clock: Callable[[], float] = time.monotonic, most: int = MAX_BUCKETS
    ) -> None:
        self._settings, self._clock, self._most = settings, clock, most
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # → tokens, and when
        self._lock = threading.Lock()

    def take_call(self, key_id: str, own: Mapping[str, int] | None) -> None:
        """One call, by a key with these limits of its own. Raises RateLimited."""
        self._take(key_id, own, "rate_per_minute", 1)

    def take_texts(self, key_id: str, own: Mapping[str, int] | None, count: int) -> None:
        """Texts to classify. Raises RateLimited, and InvalidInput for more than any minute allows."""
        name = "classify_texts_per_minute"
        limit = limit_of(own, self._settings, name)
        if 0 < limit < count:
            message = f"has {count} items, and this API key may send {limit} in a minute"
            raise InvalidInput(
                f"texts: {message}", errors=[{"field": "texts", "message": message, "limit": limit}], limit_name=name
            )
        self._take(key_id, own, name, count)

    def _take(self, key_id: str, own: Mapping[str, int] | None, name: str, count: int) -> None:
        limit = limit_of(own, self._settings, name)
        if not limit:
            return
        now = self._clock()
        with self._lock:
            tokens, at = self._buckets.get((key_id, name), (float(limit), now))
            tokens = min(float(limit), tokens + (now - at) * limit / _MINUTE)  # the limit may have changed meanwhile
            left = tokens - count
            refused = left < -_ROUNDING
            self._buckets[key_id, name] = (tokens if refused else max(0.0, left), now)
            self._buckets.move_to_end((key_id, name))
            while len(self._buckets) > self._most:  # who has not asked for longest; after a minute its bucket is full
                self._buckets.popitem(last=False)
        if refused:
            raise RateLimited(
                f"{name}: this API key may have {limit} in a minute",
                limit=limit,
                limit_name=name,
                retry_after=max(1, math.ceil(-left * _MINUTE / limit)),
            )
