"""Server-sent events out of text as it arrives."""

from __future__ import annotations

import json
from collections.abc import Iterator

from letheon_client.types import Event


class EventReader:
    """Keeps what is not complete yet. A comment comes out as None: a sign of life, which a deadline can be checked at.

    httpx2's own reader swallows comments.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._id = self._type = ""
        self._data: list[str] = []

    def feed(self, text: str) -> Iterator[Event | None]:
        """The events that ``text`` completes; those without a JSON object are left out."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            yield from self._line(line.removesuffix("\r"))

    def _line(self, line: str) -> Iterator[Event | None]:
        if line.startswith(":"):
            yield None
            return
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                self._id = value
            elif name == "event":
                self._type = value
            elif name == "data":
                self._data.append(value)
            return
        try:
            data = json.loads("\n".join(self._data))
        except ValueError:
            data = None
        if isinstance(data, dict):
            yield Event(self._id, self._type, data)
        self._type, self._data = "", []
