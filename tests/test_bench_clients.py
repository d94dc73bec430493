"""The clients of the benches, against servers that answer well, late, wrongly and not at all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from bench import clients
from bench.clients import LEFT, Connection, NotHttp, Sample, drive, encode, parse

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"said": "hi"}'[:-1]
BUSY = b"HTTP/1.1 503 Busy\r\nretry-after: 2\r\ncontent-length: 2\r\n\r\n{}"
BODIES = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def read_body(reader: asyncio.StreamReader) -> dict[str, str]:
    """One request's body. Raises IncompleteReadError when the client has gone."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    assert fields[b"Authorization"] == b"Bearer key"
    body: dict[str, str] = json.loads(await reader.readexactly(int(fields[b"Content-Length"])))
    return body


def answering(answer: bytes, *, once: bool = False) -> Handler:
    """Gives every request this answer; ``once``: and closes the connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await read_body(reader)
                writer.write(answer)
                if once:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    return handle


def ask_all(handler: Handler, *, clients: int = 2, seconds: float = 0.3, leave: float = 0.0) -> list[Sample]:
    async def run() -> list[Sample]:
        async with serving(handler) as url:
            return await drive(url, "key", BODIES, clients=clients, seconds=seconds, leave=leave)

    return asyncio.run(run())


def test_an_answer_is_whole_or_none() -> None:
    for cut in range(len(OK)):
        assert parse(OK[:cut]) is None
    reply = parse(OK)
    assert reply is not None and (reply.status, reply.body, reply.retry_after) == (200, OK[-13:], None)
    busy = parse(BUSY)
    assert busy is not None and (busy.status, busy.retry_after) == (503, 2.0)
    for wrong in (OK + b"x", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"):
        with pytest.raises(NotHttp):
            parse(wrong)


def test_bodies_are_asked_in_turn_and_every_request_is_noted() -> None:
    seen: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                seen.append((await read_body(reader))["text"])
                await asyncio.sleep(0.01)
                for byte in OK:  # as slowly as TCP may
                    writer.write(bytes([byte]))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    samples = ask_all(handle, clients=3, seconds=2.0)
    assert len(samples) == len(seen) >= 6 and seen[:6] == [*"abcabc"]
    assert all(s.status == 200 and not s.failed and s.end - s.start >= 0.01 for s in samples)
    assert [s.end for s in samples] == sorted(s.end for s in samples)
    assert sum(s.body == 0 for s in samples) == seen.count("a")


def test_who_is_told_to_come_back_later_does() -> None:
    samples = ask_all(answering(BUSY), clients=2, seconds=0.3)
    assert [(s.status, s.retry_after, s.refused, s.failed) for s in samples] == [(503, 2.0, True, False)] * 2


def test_what_is_no_answer_is_a_failure() -> None:
    bare = b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}"
    broken = b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\n{}"
    for handler, error, status in (
        (answering(b"", once=True), "ConnectionResetError", 0),
        (answering(OK[:-1], once=True), "ConnectionResetError", 0),
        (answering(b"SMTP\r\n\r\n"), "NotHttp", 0),
        (answering(broken), None, 500),
        (answering(bare), None, 503),  # without Retry-After
    ):
        samples = ask_all(handler)
        assert {(s.error, s.status, s.failed) for s in samples} == {(error, status, True)}
        assert len(samples) < 20  # not as fast as it can

    async def nobody() -> list[Sample]:
        async with serving(answering(OK)) as url:
            pass
        return await drive(url, "key", BODIES, clients=1, seconds=0.2)

    assert {s.error for s in asyncio.run(nobody())} == {"ConnectionRefusedError"}


def test_a_server_that_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "PATIENCE", 0.2)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    began = time.perf_counter()
    samples = ask_all(hang, clients=3, seconds=0.1)
    assert [(s.error, s.failed) for s in samples] == [("no answer", True)] * 3
    assert all(s.end - began > 0.25 for s in samples)


def test_some_clients_leave_before_the_answer() -> None:
    gone = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal gone
        try:
            while True:
                await read_body(reader)
                waiting = asyncio.ensure_future(reader.read(1))
                done, _ = await asyncio.wait({waiting}, timeout=0.02)
                if done:
                    gone += 1
                    return
                waiting.cancel()
                await asyncio.wait({waiting})
                writer.write(OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    samples = ask_all(handle, clients=8, seconds=1.0, leave=0.3)
    left = [s for s in samples if s.error == LEFT]
    assert 0.1 < len(left) / len(samples) < 0.5
    assert 0 < gone <= len(left) and not any(s.failed for s in samples)


def test_it_ends_when_it_is_told_to() -> None:
    async def run() -> list[Sample]:
        until = asyncio.Event()
        async with serving(answering(OK)) as url:
            task = asyncio.create_task(drive(url, "key", BODIES, clients=2, seconds=60, until=until))
            await asyncio.sleep(0.1)
            until.set()
            return await asyncio.wait_for(task, 30)  # not the 60 s it was given

    assert asyncio.run(run())


def test_a_connection_is_not_used_after_its_end() -> None:
    async def run() -> None:
        closing = OK.replace(b"200 OK\r\n", b"200 OK\r\nconnection: close\r\n")
        async with serving(answering(closing)) as url:
            connection = await Connection.open(url)
            request = encode(url, "key", {"text": "a"})
            assert (await connection.ask(request)).status == 200
            assert not connection.usable
            with pytest.raises(ConnectionResetError):
                await connection.ask(request)

    asyncio.run(run())


def test_what_they_cost_is_measured_beside_a_general_client() -> None:
    found = clients.cost(clients=4, seconds=1.0)
    assert set(found) == {"drive_us", "httpx2_us"} and min(found.values()) > 0
