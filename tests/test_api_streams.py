"""Over real sockets: event streams, bodies that arrive in pieces, and a shutdown that waits for nobody."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from api_kit import (
    MARKER,
    add_prompt,
    assert_problem,
    claim,
    listening,
    new_key,
    server_logs,
    soft_prompt,
    sse,
    wait_until,
)
from sqlalchemy import update

from app import job_queue, keys, lifecycle
from app.deps import Service
from app.settings import Mode
from app.tables import ApiKey, utcnow


@pytest.fixture
def served(database_url: str, tmp_path: Path) -> Iterator[tuple[str, Service]]:
    with listening(database_url, tmp_path, mode=Mode.CONCATENATE) as (url, app, _):
        yield url, app.state.service


def submit(url: str, headers: dict[str, str]) -> str:
    body = {"forget_texts": [f"{MARKER} is bad"]}
    request_id: str = httpx2.post(f"{url}/unlearn-requests", json=body, headers=headers, timeout=60).json()["id"]
    return request_id


def progress(service: Service, held: lifecycle.Claim, step: int) -> None:
    with service.sessions.begin() as session:
        job_queue.record_progress(session, held, {"step": step, "total_steps": 9})


class Follower(threading.Thread):
    """Reads an event stream to its end."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.url, self.headers = url, headers
        self.events: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        with httpx2.stream("GET", self.url, headers=self.headers, timeout=90) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            for event in sse(response.iter_lines()):
                self.events.append(event)

    def ended(self) -> list[dict[str, Any]]:
        self.join(90)
        assert not self.is_alive(), "the stream did not end"
        return self.events


def test_a_stream_follows_a_request_and_ends_with_it(served: tuple[str, Service]) -> None:
    url, service = served
    headers = new_key(service)
    request_id = submit(url, headers)
    follower = Follower(f"{url}/unlearn-requests/{request_id}/events", headers)
    wait_until(lambda: len(follower.events) == 1)
    held = claim(service, request_id)
    progress(service, held, 1)
    wait_until(lambda: len(follower.events) == 3)
    assert follower.is_alive()
    progress(service, held, 2)
    with service.sessions.begin() as session:
        lifecycle.fail(session, held, code="check-failed", detail="retain accuracy fell")
    events = follower.ended()
    assert [(event["event"], event["data"].get("state", event["data"].get("step"))) for event in events] == [
        ("state", "pending"),
        ("state", "training"),
        ("progress", 1),
        ("progress", 2),
        ("state", "failed"),
    ]
    assert all("at" in event["data"] for event in events)
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(ids)
    assert MARKER not in str(events)


def test_a_stream_resumes_behind_the_last_event(served: tuple[str, Service]) -> None:
    url, service = served
    headers = new_key(service)
    request_id = submit(url, headers)
    held = claim(service, request_id)
    for step in range(4):
        progress(service, held, step)
    with service.sessions.begin() as session:
        lifecycle.finish_cancelled(session, held)
    address = f"{url}/unlearn-requests/{request_id}/events"
    everything = Follower(address, headers).ended()
    assert len(everything) == 7
    for position, event in enumerate(everything):
        rest = Follower(address, headers | {"Last-Event-ID": event["id"]}).ended()
        assert rest == everything[position + 1 :], "nothing twice, nothing lost"


def test_a_stream_of_an_active_or_revoked_request_ends(served: tuple[str, Service]) -> None:
    url, service = served
    headers = new_key(service)
    prompt_id = add_prompt(service, soft_prompt(1))
    request_id = httpx2.get(f"{url}/admin/prompts/{prompt_id}", headers=headers, timeout=60).json()["request_id"]
    address = f"{url}/unlearn-requests/{request_id}/events"
    assert Follower(address, headers).ended()[-1]["data"]["state"] == "active"
    httpx2.post(f"{url}/admin/prompts/{prompt_id}/revoke", json={"reason": "withdrawn"}, headers=headers, timeout=60)
    states = [event["data"]["state"] for event in Follower(address, headers).ended()]
    assert states[-2:] == ["active", "revoked"]


def test_a_stream_ends_with_the_key_that_asked_for_it(served: tuple[str, Service]) -> None:
    url, service = served
    owner = new_key(service)
    request_id = submit(url, owner)
    ends: dict[str, dict[str, Any]] = {
        "revoked": {},
        "expired": {"expires_at": utcnow()},
        "narrowed": {"scopes": ["classify"]},
        "another's": {"scopes": ["requests"]},  # it could read all, and may now read its own only
    }
    readers = {end: new_key(service, "requests", "auditor") for end in ends}
    address = f"{url}/unlearn-requests/{request_id}/events"
    followers = {end: Follower(address, key) for end, key in readers.items()}
    stays = Follower(address, owner)
    wait_until(lambda: all(len(follower.events) == 1 for follower in (*followers.values(), stays)))
    for end, change in ends.items():
        key_id = f"key_{readers[end]['Authorization'].split('_')[1]}"
        with service.sessions.begin() as session:
            if end == "revoked":
                keys.revoke_key(session, key_id, actor="test")
            else:
                session.execute(update(ApiKey).where(ApiKey.id == key_id).values(**change))
        assert [event["data"]["state"] for event in followers[end].ended()] == ["pending"], end
    held = claim(service, request_id)
    with service.sessions.begin() as session:
        lifecycle.finish_cancelled(session, held)
    assert [event["data"]["state"] for event in stays.ended()] == ["pending", "training", "cancelled"]


def test_a_bad_last_event_id(served: tuple[str, Service]) -> None:
    url, service = served
    headers = new_key(service)
    address = f"{url}/unlearn-requests/{submit(url, headers)}/events"
    for bad in ("x", "-1", str(2**63)):
        response = httpx2.get(address, headers=headers | {"Last-Event-ID": bad}, timeout=60)
        assert_problem(response, 422, "invalid-input", field="header.Last-Event-ID")


def test_silence_is_filled_with_comments(served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.1)
    url, service = served
    headers = new_key(service)
    address = f"{url}/unlearn-requests/{submit(url, headers)}/events"
    with httpx2.stream("GET", address, headers=headers, timeout=20) as response:
        assert next(line for line in response.iter_lines() if line.startswith(":")) == ": ping"


def test_a_client_that_leaves_ends_its_stream(served: tuple[str, Service], caplog: pytest.LogCaptureFixture) -> None:
    url, service = served
    caplog.set_level(logging.DEBUG)
    headers = new_key(service)
    request_id = submit(url, headers)
    with httpx2.stream("GET", f"{url}/unlearn-requests/{request_id}/events", headers=headers) as response:
        next(sse(response.iter_lines()))
    # The access line is written when the application is done with the request.
    wanted = f"GET /unlearn-requests/{request_id}/events 200"
    wait_until(lambda: any(record.getMessage().startswith(wanted) for record in server_logs(caplog)))
    assert not [record for record in server_logs(caplog) if record.levelno >= logging.ERROR]


def test_a_key_has_a_few_streams_open_at_a_time(database_url: str, tmp_path: Path) -> None:
    with listening(database_url, tmp_path, max_event_streams=2) as (url, app, _):
        service: Service = app.state.service
        headers = new_key(service)
        request_id = submit(url, headers)
        address = f"{url}/unlearn-requests/{request_id}/events"
        with httpx2.stream("GET", address, headers=headers) as leaves:
            lines = leaves.iter_lines()  # held: with it the stream ends
            next(sse(lines))
            followers = [Follower(address, headers)]
            wait_until(lambda: bool(followers[0].events))
            refused = httpx2.get(address, headers=headers, timeout=60)
            problem = assert_problem(refused, 429, "rate-limited")
            assert (problem["limit_name"], problem["limit"]) == ("event_streams", 2)
            assert refused.headers["Retry-After"] == "10"
            followers.append(Follower(address, new_key(service)))  # another key has places of its own
            wait_until(lambda: bool(followers[1].events))
            missing = httpx2.get(address.replace(request_id, "req_" + "0" * 28), headers=new_key(service), timeout=60)
            assert missing.status_code == 404
        # Its client has vanished.
        wait_until(lambda: sum(service.streams._open.values()) == 2)
        followers.append(Follower(address, headers))
        wait_until(lambda: bool(followers[2].events))
        assert httpx2.get(address, headers=headers, timeout=60).status_code == 429
        with service.sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="test")
        assert [follower.ended()[-1]["data"]["state"] for follower in followers] == ["cancelled"] * 3
        wait_until(lambda: not service.streams._open)
        assert httpx2.get(address, headers=headers, timeout=60).status_code == 200


def test_shutdown_ends_open_streams(database_url: str, tmp_path: Path) -> None:
    with listening(database_url, tmp_path) as (url, app, stop):
        headers = new_key(app.state.service)
        followers = [Follower(f"{url}/unlearn-requests/{submit(url, headers)}/events", headers) for _ in range(3)]
        wait_until(lambda: all(follower.events for follower in followers))
        started = time.monotonic()
        stop()
        assert time.monotonic() - started < 15  # not the 30 that open answers have
        for follower in followers:
            follower.ended()


def test_a_body_in_pieces_is_counted_as_it_arrives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A chunked body without end is refused at the limit, and the connection is closed, not drained."""
    caplog.set_level(logging.DEBUG)
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as (url, app, _):
        token = new_key(app.state.service)["Authorization"]
        piece = b"Quillfeather " * 100
        answer, sent = send_for_ever(url, token, b'{"forget_texts": ["', b"%x\r\n%s\r\n" % (len(piece), piece))
        assert b" 413 " in answer.split(b"\r\n")[0]
        assert b"urn:letheon:problem:body-too-large" in answer and b"Quillfeather" not in answer
        assert sent < 5_000_000
        answer, _ = send_for_ever(url, token, b'{"forget_texts": ["', b"3\r\nA\xff\xfe\r\n")
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert b"urn:letheon:problem:malformed-body" in answer
        assert httpx2.get(f"{url}/livez", timeout=60).status_code == 200
        assert "Quillfeather" not in "".join(record.getMessage() for record in server_logs(caplog))


def test_bodies_that_wait_have_a_limit_together(tmp_path: Path) -> None:
    """One client is slow with a large body: another such one has to wait, small ones get in."""
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, max_held_body_bytes=30_000) as (url, app, _):
        headers = new_key(app.state.service)
        parts = urlsplit(url)
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 19000\r\n\r\n"
        body = json.dumps({"text": "a good film", "timeout_seconds": 20.0, "min_version": 0}).encode()
        large = body + b" " * 15_000
        with contextlib.ExitStack() as connections:

            def taken() -> bool:
                """Whether the slow client has the room: where ours came first, it was refused, and tries again."""
                connections.close()
                first = connections.enter_context(socket.create_connection((parts.hostname, parts.port)))
                first.sendall(head.encode() + b" " * 15_000)
                return post(f"{url}/classify", large, headers).status_code == 503

            wait_until(taken)
            refused = post(f"{url}/unlearn-requests", large, headers)
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert refused.headers["Retry-After"] == "1"
            assert post(f"{url}/classify", body, headers).status_code == 200
        wait_until(lambda: post(f"{url}/classify", large, headers).status_code == 200)


def test_nobody_without_a_key_sends_a_body(tmp_path: Path) -> None:
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as (url, app, _):
        for authorization in ("", "Authorization: Bearer lth_0_0\r\n", "Authorization: Basic eDp5\r\n"):
            answer = send_part(url, authorization, "POST /unlearn-requests")
            assert b" 401 " in answer.split(b"\r\n")[0] and b"www-authenticate" in answer.lower()
        key = new_key(app.state.service)["Authorization"]
        answer = send_part(url, f"Authorization: {key}\r\n", "POST /nowhere")
        assert b" 404 " in answer.split(b"\r\n")[0]


def test_a_body_has_a_time_to_arrive(tmp_path: Path) -> None:
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, body_seconds=0.2) as (url, app, _):
        headers = new_key(app.state.service)
        answer = send_part(url, f"Authorization: {headers['Authorization']}\r\n", "POST /classify")
        assert b" 408 " in answer.split(b"\r\n")[0] and b"urn:letheon:problem:body-timeout" in answer
        wait_until(lambda: post(f"{url}/classify", b'{"text": "a good film"}', headers).status_code == 200)


def send_part(url: str, authorization: str, line: str) -> bytes:
    """Headers and half a body, and no more: the answer, which does not wait for the rest."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=20) as connection:
        head = f"{line} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900\r\n"
        connection.sendall(f"{head}{authorization}\r\n".encode() + b'{"text": "a good')
        return connection.recv(65536)


def post(url: str, content: bytes, headers: dict[str, str]) -> httpx2.Response:
    return httpx2.post(url, content=content, headers={**headers, "Content-Type": "application/json"}, timeout=60)


def send_for_ever(url: str, token: str, head: bytes, chunk: bytes) -> tuple[bytes, int]:
    """Send chunks until the server hangs up: what it answered, and how many bytes it took."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    sent = 0
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=10) as connection:
        connection.sendall(
            b"POST /unlearn-requests HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: {token}\r\n".encode()
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"%x\r\n%s\r\n" % (len(head), head)
        )
        answer = b""
        connection.settimeout(0.02)
        end = time.monotonic() + 20
        while b"}" not in answer:
            assert time.monotonic() < end, "no answer"
            try:
                sent += connection.send(chunk)
                answer += connection.recv(65536)
            except TimeoutError:
                continue
        connection.settimeout(10)
        try:
            while more := connection.recv(65536):
                answer += more
        except ConnectionResetError:
            pass  # closed while our bytes were still on their way
    return answer, sent


def test_a_declared_body_over_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as (url, _app, _stop):
        parts = urlsplit(url)
        assert parts.hostname is not None
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=10) as connection:
            connection.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"
            )
            answer = b""
            while more := connection.recv(65536):
                answer += more
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_the_real_server_classifies_many_at_once(tmp_path: Path) -> None:
    """More callers than worker threads: none starves, health answers meanwhile."""
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, classify_deadline_seconds=300) as (url, app, _):
        service: Service = app.state.service
        headers = new_key(service, "classify")
        answers: list[int] = []

        def ask() -> None:
            body = {"texts": ["a good film", "a bad film"]}
            answers.append(httpx2.post(f"{url}/classify", json=body, headers=headers, timeout=300).status_code)

        threads = [threading.Thread(target=ask) for _ in range(60)]
        with service.serving._lock:  # the model thread is held
            first = service.serving.submit(["a film"])
            wait_until(lambda: service.serving._batcher._queued == 0)
            for thread in threads:
                thread.start()
            wait_until(lambda: service.serving._batcher._queued == 120)
            assert httpx2.get(f"{url}/livez", timeout=60).status_code == 200
            assert httpx2.get(f"{url}/admin/prompts", timeout=60).status_code == 401
        for thread in threads:
            thread.join(120)
        assert answers == [200] * 60
        assert len(first.result(0).results) == 1


def test_clients_that_go_away_leave_the_queue(served: tuple[str, Service], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    url, service = served
    key = new_key(service)["Authorization"]
    serving = service.serving
    body = b'{"text": "a good film"}'
    parts = urlsplit(url)
    head = f"POST /classify HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving._lock:  # the model thread stops where it would confirm the active set
        first = serving.submit(serving.encode(["the film"]))
        wait_until(lambda: serving._batcher.running > 0)
        sockets = [socket.create_connection((parts.hostname, parts.port)) for _ in range(5)]
        for connection in sockets:
            connection.sendall(head.encode() + body)
        wait_until(lambda: serving._batcher.queued == 5)
        for connection in sockets[:3]:
            connection.close()
        wait_until(lambda: serving._batcher.queued == 2)
    assert len(first.result(20).results) == 1
    for connection in sockets[3:]:
        connection.settimeout(20)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()
    wait_until(lambda: caplog.text.count("POST /classify 499") == 3)
