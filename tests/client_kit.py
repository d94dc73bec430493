"""Both clients with one face, and what their tests need beside a real server."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from api_kit import listening, new_key
from databases import migrated_database
from fastapi import FastAPI

from app.settings import Mode
from letheon_client import AsyncLetheon, Letheon, Retry

KINDS = ("sync", "async")
QUICK = Retry(attempts=4, first_delay=0.01, longest_delay=5.0)


class Blocking:
    """AsyncLetheon, called as Letheon is: the same test for both."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = AsyncLetheon(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            answer = found(*arguments, **options)
            if inspect.iscoroutine(answer):
                return self._runner.run(answer)
            return self._items(answer) if hasattr(answer, "__aiter__") else answer

        return call

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def step() -> Any:
            return await anext(items)

        try:
            while True:
                try:
                    item = self._runner.run(step())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._runner.run(items.aclose())  # type: ignore[attr-defined]

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self.client.aclose())
        self._runner.close()


def connect(kind: str, url: str | list[str], key: str | None, **options: Any) -> Any:
    """Letheon, or what looks like it."""
    options = {"retry": QUICK, **options}
    return Letheon(url, key, **options) if kind == "sync" else Blocking(url, key, **options)


def record(client: Any, calls: list[httpx2.Request]) -> None:
    """Keep every request that this client sends."""
    transport = (client.client if isinstance(client, Blocking) else client)._transport
    if isinstance(client, Blocking):

        async def hook(request: httpx2.Request) -> None:
            calls.append(request)

    else:
        hook = calls.append  # type: ignore[assignment]
    transport._http.event_hooks = {"request": [hook]}


def plain_key(app: FastAPI, *scopes: str) -> str:
    return new_key(app.state.service, *scopes)["Authorization"].removeprefix("Bearer ")


@contextmanager
def server(folder: Path, *, name: str = "letheon", **changes: Any) -> Iterator[tuple[str, FastAPI, Callable[[], None]]]:
    """A real server on the SQLite database of this name: its address, the app, and a stop."""
    path = folder / f"{name}.db"
    url = f"sqlite:///{path}" if path.exists() else migrated_database(path)
    with listening(url, folder, mode=Mode.CONCATENATE, **changes) as found:
        yield found


class Proxy:
    """Passes connections on to a server. ``cuts``: so many of the next answers are lost on their way back."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self.lost: list[bytes] = []  # status lines
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(client,), daemon=True))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target, timeout=60) as upstream:
            threading.Thread(target=_pump, args=(client, upstream), daemon=True).start()
            while data := upstream.recv(65536):
                if self.cuts > 0:
                    self.cuts -= 1
                    self.lost.append(data.split(b"\r\n")[0])  # so the call was carried out
                    for end in (client, upstream):  # closing alone says nothing while the other thread reads
                        with suppress(OSError):  # it may have gone by itself
                            end.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of them is gone


@contextmanager
def proxy(url: str) -> Iterator[Proxy]:
    found = Proxy(url)
    try:
        yield found
    finally:
        found.close()


Scripted = tuple[int, dict[str, str], bytes]


@contextmanager
def scripted(answers: list[Scripted]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers, one after the other: its address, and what it was asked."""
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"{self.path} {self.headers.get('Last-Event-ID', '')}".strip())
            status, headers, body = left.pop(0)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}", asked
    finally:
        found.shutdown()
        thread.join()
        found.server_close()
