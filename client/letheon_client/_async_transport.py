"""Sends calls: to one address after the other, again where that is safe."""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncGenerator, Sequence

import httpx2

from letheon_client._calls import Call, addresses, client_options, origin, problem, unreachable
from letheon_client._events import EventReader
from letheon_client._retries import Course, Retry, moves_on
from letheon_client.errors import ApiError, ForeignAnswer, Unreachable
from letheon_client.types import Event


class AsyncTransport:
    """Stays with an address for as long as it answers."""

    def __init__(self, urls: str | Sequence[str], api_key: str | None, timeout: float) -> None:
        """Raises InvalidAddress, InvalidArgument."""
        self.urls = addresses(urls)
        self._at = 0
        self._http = httpx2.AsyncClient(**client_options(self.urls, api_key, timeout))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call, retry: Retry, *, stream: bool = False) -> httpx2.Response:
        """The first good answer; with ``stream`` its body is not read, and to be closed.

        Raises ApiError, Unreachable: those of the last attempt.
        """
        course = Course(retry, len(self.urls), repeatable=call.repeatable)
        while True:
            at = self._at
            error: ApiError | Unreachable
            try:
                response = await self._http.send(call.request(self._http, self.urls[at]), stream=True)
                if stream and response.is_success:
                    return response
                try:
                    await response.aread()
                finally:
                    await response.aclose()
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
            await sleep(pause)

    async def chunks(self, call: Call, retry: Retry) -> AsyncGenerator[bytes]:
        """The body as it arrives; not tried again once it has begun. Raises ApiError, Unreachable."""
        response = await self.send(call, retry, stream=True)
        try:
            async for chunk in response.aiter_bytes():
                yield chunk
        except httpx2.RequestError as broken:
            raise unreachable(origin(response), broken) from None
        finally:
            await response.aclose()

    async def events(self, call: Call, retry: Retry) -> AsyncGenerator[Event | None]:
        """Until the server ends the stream; None for its signs of life. Raises ApiError, Unreachable."""
        response = await self.send(call, retry, stream=True)
        try:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise ForeignAnswer(status=response.status_code)
            reader = EventReader()
            async for text in response.aiter_text():
                for found in reader.feed(text):
                    yield found
        except httpx2.RequestError as broken:
            raise unreachable(origin(response), broken) from None
        finally:
            await response.aclose()
