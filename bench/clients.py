"""Clients for benches that share their cores with the server: ``drive(url, key, bodies, clients=64, seconds=300)``.

Plain HTTP/1.1 with keep-alive on asyncio, no more than the service's own answers need: what a general HTTP client
spends on a request (``python -m bench.clients`` measures it) would be taken from the server that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

LEFT = "left"
PATIENCE = 60.0  # seconds for what is still open when the time is up
PAUSE = 0.05  # seconds after a failed connection: a server that is gone must not keep a core busy


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. ``start``: just before its first byte went out, ``end``: with its last; ``time.perf_counter()``.

    ``body``: which of the bodies. ``status`` is 0 where no answer came, and ``error`` says why (``LEFT``: the client
    went away by itself). ``retry_after``: seconds, where the answer names them.
    """

    start: float
    end: float
    body: int
    status: int
    retry_after: float | None = None
    raw: bytes = b""
    error: str | None = None

    @property
    def answer(self) -> Any:
        """The JSON document, parsed with every call: while the clients run it would cost the server."""
        return json.loads(self.raw) if self.raw else None

    @property
    def refused(self) -> bool:
        """503 with Retry-After: the one refusal that a client of an overloaded or starting server is to expect."""
        return self.status == 503 and self.retry_after is not None

    @property
    def failed(self) -> bool:
        """Neither answered nor refused as it should be, nor left alone by the client."""
        return self.error != LEFT and not self.refused and self.status != 200


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[bytes, bytes]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        value = self.headers.get(b"retry-after", b"")
        return float(value) if value.isdigit() else None


class NotHttp(ConnectionError):
    """Bytes that are no answer as the service gives them."""


def encode(url: str, key: str, body: Mapping[str, Any] | None, path: str = "/classify") -> bytes:
    """A whole request: POST with a JSON ``body``, GET without one."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + data


def parse(data: bytes) -> Reply | None:
    """The answer that ``data`` holds; None while it is not whole. Raises NotHttp."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    if not blank:
        return None
    first, *lines = head.split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    length = headers.get(b"content-length", b"")
    if not (first.startswith(b"HTTP/1.1 ") and first[9:12].isdigit() and length.isdigit()):
        raise NotHttp("not an HTTP/1.1 answer with a Content-Length")
    if len(rest) < int(length):
        return None
    if len(rest) > int(length):
        raise NotHttp("more bytes than one answer")
    return Reply(int(first[9:12]), headers, rest)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._waiter: asyncio.Future[Reply] | None = None

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Raises OSError."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, parts.hostname or "", parts.port or 80)
        return connection

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Reply:
        """Raises ConnectionError when no whole answer comes back. Cancelled, it closes the connection."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            reply = await self._waiter
        except BaseException:
            self.close()
            raise
        if reply.headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return reply

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            reply = parse(self._received)
        except NotHttp as error:
            self._end(error)
            return
        if reply is not None:
            self._received = b""
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc if isinstance(exc, ConnectionError) else ConnectionResetError("closed without an answer"))

    def _end(self, error: ConnectionError) -> None:
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


async def drive(
    url: str,
    key: str,
    bodies: Sequence[Mapping[str, Any]],
    *,
    clients: int,
    seconds: float,
    until: asyncio.Event | None = None,
    leave: float = 0.0,
    seed: int = 0,
) -> list[Sample]:
    """Every client asks again as soon as it has an answer, for ``seconds`` or ``until`` it is set; by order of ``end``.

    They take the bodies in turn. Who is told to come back later does, on a new connection. A share ``leave`` of the
    requests is left by its client before the answer. What is open at the end is waited for, PATIENCE seconds at most.
    """
    stop = asyncio.Event()
    requests = [encode(url, key, body) for body in bodies]
    turns: Iterator[int] = itertools.cycle(range(len(bodies)))
    samples: list[Sample] = []
    draws = [random.Random(f"{seed}/{number}") for number in range(clients)]
    tasks = [asyncio.create_task(_client(url, requests, turns, samples, stop, leave, draw)) for draw in draws]
    told = asyncio.create_task((until or stop).wait())
    try:
        await asyncio.wait({told}, timeout=seconds)
        stop.set()
        await asyncio.wait(tasks, timeout=PATIENCE)
    finally:
        for task in (*tasks, told):
            task.cancel()
        await asyncio.wait((*tasks, told))
    for task in tasks:
        task.result()  # a client ends by itself, or says why not
    return sorted(samples, key=lambda sample: sample.end)


async def _client(
    url: str,
    requests: Sequence[bytes],
    turns: Iterator[int],
    samples: list[Sample],
    stop: asyncio.Event,
    leave: float,
    draw: random.Random,
) -> None:
    connection: Connection | None = None
    last = 0.1  # seconds that the latest answer took
    while not stop.is_set():
        body = next(turns)
        patience = draw.random() * last if leave and draw.random() < leave else None
        start = time.perf_counter()
        pause = 0.0
        try:
            if connection is None or not connection.usable:
                connection = await Connection.open(url)
                start = time.perf_counter()
            if patience is None:
                reply = await connection.ask(requests[body])
            else:
                async with asyncio.timeout(patience):
                    reply = await connection.ask(requests[body])
        except OSError as error:
            left = patience is not None and isinstance(error, TimeoutError)
            samples.append(Sample(start, time.perf_counter(), body, 0, error=LEFT if left else type(error).__name__))
            pause = 0.0 if left else PAUSE
        except asyncio.CancelledError:
            samples.append(Sample(start, time.perf_counter(), body, 0, error="no answer"))
            break
        else:
            done = time.perf_counter()
            samples.append(Sample(start, done, body, reply.status, reply.retry_after, reply.body))
            if reply.status == 200:
                last = done - start
            elif reply.retry_after is not None:
                connection.close()  # a server drops a connection that idles for seconds, maybe under the next request
                pause = reply.retry_after
            else:
                pause = PAUSE
        if pause:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
    if connection is not None:
        connection.close()


# --- what it costs ---------------------------------------------------------------------------------------------------

_BODY = b'{"results":[{"label":"positive","abstained":false}],"active_set_version":4}'
_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ncontent-type: application/json\r\nx-request-id: 0123456789abcdef\r\n\r\n"
    % len(_BODY)
) + _BODY


class _Trivial(asyncio.Protocol):
    """Answers every packet with the same answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(_ANSWER)


async def _serve_trivial() -> None:
    server = await asyncio.get_running_loop().create_server(_Trivial, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _general(url: str, body: Mapping[str, Any], *, clients: int, seconds: float) -> int:
    """Requests that a general HTTP client makes in ``seconds``."""
    done = 0

    async def one(client: httpx2.AsyncClient) -> None:
        nonlocal done
        while time.perf_counter() < end:
            (await client.post("/classify", json=body, headers={"Authorization": "Bearer x"})).json()
            done += 1

    async with httpx2.AsyncClient(base_url=url, trust_env=False) as client:
        end = time.perf_counter() + seconds  # to make a client takes a while
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return done


def cost(*, clients: int = 64, seconds: float = 3.0) -> dict[str, float]:
    """Microseconds of this process per request, against a server that answers at once: these clients, and httpx2."""
    text = {"text": "the film is a rather good story about people who leave and come back"}
    command = [sys.executable, "-m", "bench.clients", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            began = time.process_time()
            samples = asyncio.run(drive(url, "x", [text], clients=clients, seconds=seconds))
            own = (time.process_time() - began) / len(samples)
            if any(sample.failed for sample in samples):
                raise RuntimeError("the trivial server did not answer every request")
            began = time.process_time()
            made = asyncio.run(_general(url, text, clients=clients, seconds=seconds))
            general = (time.process_time() - began) / made
        finally:
            server.terminate()
    return {"drive_us": round(1e6 * own, 1), "httpx2_us": round(1e6 * general, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each kind of client")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(_serve_trivial())
    else:
        print(
            json.dumps(
                {"bench": "clients", "clients": args.clients, **cost(clients=args.clients, seconds=args.seconds)}
            )
        )


if __name__ == "__main__":
    main()
