"""What ``wait`` keeps in mind between a stream, the next one, and the polls in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from letheon_client.errors import RequestFailed, WaitTimedOut
from letheon_client.types import Event, UnlearnRequest

FINAL_STATES = frozenset({"active", "failed", "cancelled", "suspended", "revoked"})
_HEARTBEAT_SECONDS = 20.0  # a stream shows a sign of life more often than this
_POLL_SECONDS = (0.5, 1.0, 2.0)


class Watch:
    """``last``: the id of the last event, to go on behind."""

    def __init__(self, on_progress: Callable[[Event], None] | None, timeout_seconds: float | None) -> None:
        self.last = ""
        self._tell = on_progress if on_progress is not None else lambda event: None
        self._end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._streams = False  # since the last poll
        self._polls = 0  # since the last stream
        self._state: Any = None  # the last one that a stream told
        self._told: dict[str, Any] = {}  # by kind of event, what polls have told

    def may_stream(self) -> bool:
        """Not when the time could run out between two signs of life: then it is polled."""
        return self._end is None or self._end - time.monotonic() > _HEARTBEAT_SECONDS

    def within(self, seconds: float) -> float:
        """So many, or what is left; a little for an answer in any case."""
        return seconds if self._end is None else min(seconds, max(self._end - time.monotonic(), 1.0))

    def pause(self) -> float:
        """Seconds until the next look; polls alone get rarer."""
        seconds = _POLL_SECONDS[min(self._polls, len(_POLL_SECONDS) - 1)]
        return seconds if self._end is None else max(min(seconds, self._end - time.monotonic()), 0.0)

    def streamed(self, event: Event | None) -> None:
        """Of a stream; None is a sign of life."""
        self._streams = True
        if event is not None:
            self.last = event.id or self.last
            if event.type == "state":
                self._state = event.data.get("state")
            self._tell(event)

    def missed_the_end(self, request: UnlearnRequest) -> bool:
        """Whether events are left of a request that has ended."""
        return request["state"] in FINAL_STATES and self._state != request["state"]

    def ended(self, request: UnlearnRequest, *, check: bool) -> bool:
        """Whether there is nothing more to wait for. Where streams tell nothing, the poll does.

        Raises RequestFailed where ``check`` and it is not active, and WaitTimedOut.
        """
        self._polls = 0 if self._streams else self._polls + 1
        if not self._streams:
            for kind, data in (("state", {"state": request["state"]}), ("progress", request["progress"])):
                if data and self._told.get(kind) != data:
                    self._told[kind] = data
                    self._tell(Event("", kind, data))
        self._streams = False
        if request["state"] in FINAL_STATES:
            if check and request["state"] != "active":
                raise RequestFailed(request)
            return True
        if self._end is not None and time.monotonic() >= self._end:
            raise WaitTimedOut(request)
        return False
