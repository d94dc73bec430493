"""Connections to PostgreSQL that do not wait for ever for a server that says nothing.

What a server can end by itself it ends by ``lock_timeout`` (``db.impatient``), and a host that is gone is found by TCP.
Neither helps where the host lives and the server hangs, on a disk for one: then a read would wait as long as that does.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from sqlalchemy import URL, Engine, event

RV = TypeVar("RV")

CONNECT_SECONDS = 5
"""For a connection to be there, for what is sent to be taken, and for a kept connection to show that it lives."""
_KEEPALIVE = {"keepalives_idle": CONNECT_SECONDS, "keepalives_interval": 2, "keepalives_count": 3}


class Silent(psycopg.OperationalError):
    """The server has said nothing for too long; the connection is closed."""


class Connection(psycopg.Connection[Any]):
    """One whose server may be silent for ``silence`` seconds at a time. None: for ever."""

    silence: float | None = CONNECT_SECONDS

    def wait(self, gen: Generator[Any, Any, RV], *args: Any, **kwargs: Any) -> RV:
        # Not psycopg's own timeout, which counts the whole answer: a large one may take its time while it comes.
        if self.silence is None:
            return super().wait(gen, *args, **kwargs)
        try:
            return super().wait(_heard(gen, self.silence), *args, **kwargs)
        except Silent:
            self.pgconn.finish()  # its answer may come yet: nobody else must get this connection
            raise


def _heard(gen: Generator[Any, Any, RV], seconds: float) -> Generator[Any, Any, RV]:
    """The same; ``wait`` sends in what it has heard, and nothing (0) ten times a second. Raises Silent."""
    heard = time.monotonic()
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > seconds:
                raise Silent(f"the server has said nothing for {seconds:g} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        found: RV = end.value
        return found


def connect_args(url: URL) -> dict[str, Any]:
    """How long to wait for a host; what the URL says itself stands."""
    own = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": 1000 * CONNECT_SECONDS, **_KEEPALIVE}
    return {name: value for name, value in own.items() if name not in url.query}


def listen(engine: Engine) -> None:
    """Its connections are of the class above: impatient in the pool, where they are tried before they are handed out,
    and patient with whoever has one, unless ``db.impatient`` says otherwise."""

    def connect(dialect: object, record: object, args: list[Any], named: dict[str, Any]) -> Connection:
        return Connection.connect(*args, **named)

    def out(connection: Connection, *_: object) -> None:
        connection.silence = None

    def back(connection: Connection | None, *_: object) -> None:
        if connection is not None:  # one that broke
            connection.silence = CONNECT_SECONDS

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "checkout", out)
    event.listen(engine, "checkin", back)
