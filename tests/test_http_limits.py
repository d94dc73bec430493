"""What comes before a request is one, over real sockets: a head has a size and a time, and connections a number."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from api_kit import listening, new_key, wait_until

from app import http_limits
from app.http_limits import HEAD_BYTES

MOST_SENT = 64 * 2**20  # the sockets' own buffers take some, too
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, int]]:
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_connections=4) as (url, _app, _stop):
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        yield parts.hostname, parts.port


def connect(address: tuple[str, int]) -> closing[socket.socket]:
    return closing(socket.create_connection(address, timeout=60))


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up, which it may do while bytes of ours are still on their way."""
    answer = b""
    try:
        while more := connection.recv(65536):
            answer += more
    except ConnectionError:
        pass
    return answer


def send_for_ever(connection: socket.socket, chunk: bytes) -> int:
    """How many bytes are taken before the server hangs up."""
    sent = 0
    try:
        while sent < MOST_SENT:
            connection.sendall(chunk)
            sent += len(chunk)
    except ConnectionError:
        pass
    return sent


def code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head and b"connection: close" in head
    problem = json.loads(body)
    assert head.split()[1] == str(problem["status"]).encode()
    return problem["status"], problem["code"]


@pytest.mark.parametrize(
    ("begin", "chunk"),
    [
        (GET, b"ab: cd\r\n" * 8192),
        (GET + b"ab: ", b"c" * 65536),
        (GET, b"d" * 65536),
        (b"GET /livez?", b"q" * 65536),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"ab: cd\r\n" * 8192),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"e" * 65536),
        (GET + b"\r\n", b"\r\n" * 32768),
    ],
    ids=["headers", "value", "name", "url", "trailers", "chunk-extension", "blank-lines"],
)
def test_what_never_ends_is_ended(address: tuple[str, int], begin: bytes, chunk: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(begin)
        assert send_for_ever(connection, chunk) < MOST_SENT
    with connect(address) as connection:  # the server goes on
        connection.sendall(GET + b"Connection: close\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("head", [b"ab: " + b"c" * HEAD_BYTES, b"ab: cd\r\n" * 20000, b"d" * HEAD_BYTES])
def test_a_head_that_is_too_large_is_told_so(address: tuple[str, int], head: bytes) -> None:
    with connect(address) as connection:
        connection.sendall((GET + head)[: HEAD_BYTES + 1])  # no more, or the answer is lost with what is not read
        assert code(rest(connection)) == (431, "head-too-large")


def test_a_head_just_below_the_limit_is_read_and_so_are_requests_in_a_row(address: tuple[str, int]) -> None:
    with connect(address) as connection:
        connection.sendall((GET + b"ab: " + b"c" * (HEAD_BYTES - 1000) + b"\r\n\r\n") * 3)
        connection.sendall(GET + b"Connection: close\r\n\r\n")
        assert rest(connection).count(b"HTTP/1.1 200") == 4


def test_a_large_body_is_no_head(tmp_path: Path) -> None:
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_body_bytes=2**20) as (url, app, _stop):
        token = new_key(app.state.service)["Authorization"]
        parts = urlsplit(url)
        body = json.dumps({"texts": ["x" * 1000] * 200}).encode()
        with connect((parts.hostname or "", parts.port or 0)) as connection:
            head = f"POST /classify HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 422") and b"has 200 items" in answer


def test_a_head_has_a_time_to_arrive(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.5)
    with connect(address) as connection:
        connection.sendall(GET)
        assert code(rest(connection)) == (408, "head-timeout")
    with connect(address) as connection:  # who asks nothing is told nothing
        assert rest(connection) == b""
    with connect(address) as connection:  # uvicorn's own timer ends with the first byte after an answer
        connection.sendall(GET + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        rest(connection)


def test_an_answer_may_take_longer_than_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.3)
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, body_seconds=1.5) as (url, app, _stop):
        token = new_key(app.state.service)["Authorization"]
        parts = urlsplit(url)
        with connect((parts.hostname or "", parts.port or 0)) as connection:
            head = f"POST /classify HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Connection: close\r\nContent-Length: 100\r\n\r\n".encode() + b"{")
            assert b"body-timeout" in rest(connection)


def test_idle_connections_keep_nobody_out(address: tuple[str, int]) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(connect(address))
            connection.sendall(GET + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_one_connection_too_many_is_told_when_to_come_back(tmp_path: Path) -> None:
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_connections=4) as (url, app, _stop):
        token, parts = new_key(app.state.service)["Authorization"], urlsplit(url)
        address = (parts.hostname or "", parts.port or 0)
        begin = f"POST /classify HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
        body = b'{"text": "good"}'
        with ExitStack() as stack:
            held = [stack.enter_context(connect(address)) for _ in range(4)]
            for connection in held:  # each has its answer under way
                connection.sendall(f"{begin}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
                assert connection.recv(65536).startswith(b"HTTP/1.1 100")
            answer = rest(stack.enter_context(connect(address)))
            assert code(answer) == (503, "overloaded") and b"retry-after: 1" in answer
            for connection in held:
                connection.sendall(body)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")

        def answered() -> bool:
            with connect(address) as connection:
                connection.sendall(GET + b"Connection: close\r\n\r\n")
                return rest(connection).startswith(b"HTTP/1.1 200")

        wait_until(answered)


def test_requests_in_a_row_do_not_pile_up(address: tuple[str, int]) -> None:
    with connect(address) as connection:
        assert send_for_ever(connection, GET + b"\r\n" + (GET + b"\r\n") * 5000) < MOST_SENT
    with connect(address) as connection:  # as many as a client may send without waiting
        connection.sendall((GET + b"\r\n") * 10 + GET + b"Connection: close\r\n\r\n")
        assert rest(connection).count(b"HTTP/1.1 200") == 11


def test_who_takes_nothing_of_an_answer_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "TAKE_SECONDS", 0.5)
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as (url, _app, _stop):
        parts = urlsplit(url)
        with closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect((parts.hostname, parts.port))
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 12)  # more than buffers hold
            end = time.monotonic() + 90
            with pytest.raises(ConnectionError):
                while time.monotonic() < end:
                    connection.send(b"\r\n")
                    time.sleep(0.1)


def test_nonsense_behind_a_request_does_not_get_into_its_answer(address: tuple[str, int]) -> None:
    with connect(address) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n\0nonsense")
        assert rest(connection).count(b"HTTP/1.1") <= 1
