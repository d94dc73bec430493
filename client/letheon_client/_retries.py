"""Which call is sent again, where to, and after how long."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from letheon_client.errors import ApiError, Unreachable


@dataclass(frozen=True)
class Retry:
    """``attempts``: of a call at each address. Delays double from ``first_delay`` to ``longest_delay`` seconds.

    A Retry-After is kept to; one that is longer than ``longest_delay`` ends it, as does a pause that would end later
    than ``give_up_seconds`` after the call began.
    """

    attempts: int = 5
    first_delay: float = 0.25
    longest_delay: float = 30.0
    give_up_seconds: float = 120.0


ONCE = Retry(attempts=1)
"""Every address is asked once."""


def may_repeat(error: ApiError | Unreachable, *, repeatable: bool) -> bool:
    """Whether the same call may do better later, and does no harm if the first one was carried out after all."""
    if isinstance(error, Unreachable):
        return repeatable or not error.sent
    if error.code in ("rate-limited", "overloaded", "idempotency-in-flight"):
        return True  # refused before anything was done
    if error.code in ("deadline-exceeded", "quota-exceeded"):
        return False  # the caller's own time is up; nothing changes for hours
    return error.status == 429 or (repeatable and error.status in (502, 503, 504))


def moves_on(error: ApiError | Unreachable) -> bool:
    """Whether it is this server's affair, so that another one may answer. 429 is about the key."""
    return isinstance(error, Unreachable) or error.status in (502, 503, 504)


class Course:
    """The attempts of one call."""

    def __init__(self, retry: Retry, addresses: int, *, repeatable: bool) -> None:
        self._retry, self._addresses, self._repeatable = retry, addresses, repeatable
        self._began = time.monotonic()
        self._sent = self._asked = self._rounds = 0
        self._wanted = 0.0  # the longest Retry-After of this round

    def pause(self, error: ApiError | Unreachable) -> float | None:
        """Seconds until the next attempt; None when there is none. Other addresses are asked at once."""
        retry = self._retry
        self._sent += 1
        if not may_repeat(error, repeatable=self._repeatable) or self._sent >= retry.attempts * self._addresses:
            return None
        if isinstance(error, ApiError):
            self._wanted = max(self._wanted, error.retry_after or 0.0)
        self._asked += 1
        if moves_on(error) and self._asked < self._addresses:
            return 0.0
        if self._wanted > retry.longest_delay:
            return None
        backoff = min(retry.longest_delay, retry.first_delay * 2.0 ** min(self._rounds, 30))
        # Those that were refused together do not come back together.
        pause = max(backoff * random.uniform(0.5, 1.0), self._wanted * random.uniform(1.0, 1.25))
        self._asked, self._wanted, self._rounds = 0, 0.0, self._rounds + 1
        return pause if time.monotonic() - self._began + pause <= retry.give_up_seconds else None
