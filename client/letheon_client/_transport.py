"""Made of _async_transport.py by ``python client/make_sync.py``: change that one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from time import sleep

import httpx2

from letheon_client._calls import Call, addresses, client_options, origin, problem, unreachable
from letheon_client._events import EventReader
from letheon_client._retries import Course, Retry, moves_on
from letheon_client.errors import ApiError, ForeignAnswer, Unreachable
from letheon_client.types import Event


class Transport:
    """Stays with an address for as long as it answers."""

    def __init__(self, urls: str | Sequence[str], api_key: str | None, timeout: float) -> None:
        """Raises InvalidAddress, InvalidArgument."""
        self.urls = addresses(urls)
        self._at = 0
        self._http = httpx2.Client(**client_options(self.urls, api_key, timeout))

    def close(self) -> None:
        self._http.close()

    def send(self, call: Call, retry: Retry, *, stream: bool = False) -> httpx2.Response:
        """The first good answer; with ``stream`` its body is not read, and to be closed.

        Raises ApiError, Unreachable: those of the last attempt.
        """
        course = Course(retry, len(self.urls), repeatable=call.repeatable)
        while True:
            at = self._at
            error: ApiError | Unreachable
            try:
                response = self._http.send(call.request(self._http, self.urls[at]), stream=True)
                if stream and response.is_success:
                    return response
                try:
                    response.read()
                finally:
                    response.close()
                if response.is_success:
                    return response
                error = problem(response)
            except httpx2.RequestError as broken:
                error = unreachable(self.urls[at], broken)
            if moves_on(error):
                self._at = (at + 1) % len(self.urls)
            pause = course.pause(error)
            if pause is None:
                raise error
            sleep(pause)

    def chunks(self, call: Call, retry: Retry) -> Generator[bytes]:
        """The body as it arrives; not tried again once it has begun. Raises ApiError, Unreachable."""
        response = self.send(call, retry, stream=True)
        try:
            yield from response.iter_bytes()
        except httpx2.RequestError as broken:
            raise unreachable(origin(response), broken) from None
        finally:
            response.close()

    def events(self, call: Call, retry: Retry) -> Generator[Event | None]:
        """Until the server ends the stream; None for its signs of life. Raises ApiError, Unreachable."""
        response = self.send(call, retry, stream=True)
        try:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise ForeignAnswer(status=response.status_code)
            reader = EventReader()
            for text in response.iter_text():
                yield from reader.feed(text)
        except httpx2.RequestError as broken:
            raise unreachable(origin(response), broken) from None
        finally:
            response.close()
