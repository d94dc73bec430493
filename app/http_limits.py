"""What a client may send before its request is one: uvicorn's parser with limits on the head, its time and connections.

``app.middleware`` bounds bodies, and only once there is a head. Until then httptools keeps whatever comes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app.errors import HeadTimeout, HeadTooLarge, LetheonError, Overloaded
from app.problems import MEDIA_TYPE, URN

log = logging.getLogger(__name__)

HEAD_BYTES = 64 * 2**10
HEAD_SECONDS = 30.0
IN_A_ROW = 16  # requests that may wait behind one whose answer is under way
TAKE_SECONDS = 30.0  # in which a client takes something of what it is sent
FILES = 512  # that a server has open besides its connections


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Request line and headers may have 64 KiB (431) and take 30 s (408).

    What else is no body (trailers, chunk extensions, blank lines) may have 64 KiB as well. Sixteen requests may wait
    behind one that is being answered, and who takes nothing of an answer for a minute is let go. With
    ``max_connections`` open an idle one makes room; where none is, the new one is answered 503 and closed. Subclassed
    by ``bounded``, which sets that.
    """

    max_connections: int

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._kept = 0  # bytes of URL and headers, of this request
        self._unread = 0  # bytes since the parser last had a whole part of one
        self._timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._left = 0  # bytes that the client had not taken when that was last looked at
        self._refused: LetheonError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()
        if len(self.connections) > self.max_connections and not self._make_room():
            self._refuse(Overloaded("too many connections are open"))
            return
        self._await_head()

    def _make_room(self) -> bool:
        """Close a connection without an answer under way: whoever holds many must not keep out who has a question."""
        for other in self.connections:
            assert isinstance(other, BoundedProtocol)
            if other is not self and not other._answering and not other.transport.is_closing():
                other.transport.close()
                return True
        return False

    def _look(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left and left == self._left:  # whoever writes waits, too
            self.transport.abort()
            return
        self._left = left
        self._look_timer = self.loop.call_later(TAKE_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._look_timer is not None:
            self._look_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            return
        if self._timer is None and not self._answering:
            self._await_head()  # uvicorn's own timer, of an idle connection, ends with the first byte
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES:
            self._refuse(_too_large())

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, after what one of the methods below raised, too."""
        self._stop_timer()
        if self._answering:
            self.transport.abort()  # it would come in the middle of the answer
        elif max(self._kept, self._unread) > HEAD_BYTES:
            self._refuse(_too_large())
        elif self._refused is None:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._kept = 0

    def on_url(self, url: bytes) -> None:
        self._keep(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._keep(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._stop_timer()
        if len(self.pipeline) >= IN_A_ROW:  # uvicorn reads on while they wait
            raise ValueError("too many requests in a row")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    def _keep(self, count: int) -> None:
        self._kept += count
        if self._kept > HEAD_BYTES:
            raise ValueError("the head is too large")  # ends the parser; uvicorn then calls send_400_response

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _too_late(self) -> None:
        self._timer = None
        if self._unread:
            self._refuse(HeadTimeout("the request line and the headers took too long", limit=HEAD_SECONDS))
        else:
            self.transport.close()  # nothing was asked

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: LetheonError) -> None:
        """Answer where no answer is under way, and end the connection."""
        self._stop_timer()
        if self._refused is not None or self.transport.is_closing():
            return
        self._refused = error
        if self._answering:
            self.transport.abort()
            return
        problem = {"type": URN + error.code, "title": error.title, "status": error.status, "detail": error.detail}
        body = json.dumps({**problem, "code": error.code, **error.extra}).encode()
        head = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        if error.status == Overloaded.status:
            head += "retry-after: 1\r\n"
        self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + body)
        self.transport.close()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request line and the headers have more than {HEAD_BYTES} bytes", limit=HEAD_BYTES)


def bounded(max_connections: int) -> type[BoundedProtocol]:
    """For ``uvicorn.Config(http=…)``. Raises the limit of open files where it is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            log.warning("%d files may be open, which is less than %d connections want", most, max_connections)
    return type("Bounded", (BoundedProtocol,), {"max_connections": max_connections})
