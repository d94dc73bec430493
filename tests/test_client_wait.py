"""Following a request: streams that break, servers that go away, and streams that there are none of."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, claim, listening, wait_until
from client_kit import KINDS, connect, plain_key, scripted, server

from app import job_queue, lifecycle
from app.settings import Mode
from letheon_client import Event, RequestFailed, Unreachable, WaitTimedOut
from letheon_client._events import EventReader

NOBODY = "http://127.0.0.1:9"
STREAM = {"Content-Type": "text/event-stream"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("letheon_client._waiting._POLL_SECONDS", (0.05, 0.1))


def event(number: int) -> bytes:
    return f"id: {number}\nevent: progress\ndata: {json.dumps({'step': number})}\n\n".encode()


END = b'id: 4\nevent: state\ndata: {"state": "active"}\n\n'


def request(state: str, **more: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"id": "req_1", "state": state, "progress": None, "failure": None, **more}
    return 200, {}, json.dumps(body).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_stream_is_taken_up_behind_the_last_event(kind: str) -> None:
    torn = {**STREAM, "Content-Length": "999"}
    answers = [
        (200, torn, event(1)),
        request("training"),
        (200, torn, event(2)),
        (502, {}, b"restarting"),  # waited for
        request("training"),
        (503, {}, b"restarting"),  # no stream
        request("active"),  # which it became meanwhile
        (200, STREAM, event(3) + END),
    ]
    told: list[Event] = []
    with scripted(answers) as (url, asked), connect(kind, url, "key") as client:
        assert client.wait("req_1", told.append)["state"] == "active"
    assert [line.rpartition("/events")[2] for line in asked if "/events" in line] == ["", " 1", " 2", " 2"]
    assert [found.id for found in told if found.id] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_streams_it_is_polled(kind: str) -> None:
    none = (404, {}, b"no such path")
    answers = [
        none,
        request("training", progress={"step": 1}),
        (200, {"Content-Type": "text/html"}, b"<html>"),
        request("failed", progress={"step": 1}, failure={"code": "checks-failed", "detail": "it forgets too much"}),
        none,
    ]
    told: list[Event] = []
    ends = pytest.raises(RequestFailed, match="checks-failed: it forgets too much")
    with scripted(answers) as (url, _), connect(kind, url, "key") as client, ends as failed:
        client.wait("req_1", told.append, check=True)
    assert failed.value.request["state"] == "failed"
    assert told == [
        Event("", "state", {"state": "training"}),
        Event("", "progress", {"step": 1}),
        Event("", "state", {"state": "failed"}),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_up_on_a_server_that_stays_away(kind: str) -> None:
    with connect(kind, NOBODY, "key") as client, pytest.raises(Unreachable):
        client.wait("req_1", give_up_seconds=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_when_its_time_is_up(kind: str, tmp_path: Path) -> None:
    with server(tmp_path) as (url, app, _), connect(kind, url, plain_key(app)) as client:
        made = client.submit(f"{MARKER} is bad")
        with pytest.raises(WaitTimedOut) as late:
            client.wait(made["id"], timeout_seconds=0.2)
        assert late.value.request["state"] == "pending"
        client.cancel(made["id"])
        assert client.wait(made["id"], timeout_seconds=60)["state"] == "cancelled"
        with pytest.raises(RequestFailed, match="cancelled"):
            client.wait(made["id"], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_started_anew_goes_on_telling(kind: str, tmp_path: Path) -> None:
    """Real servers, real progress: each event comes once, in order, though the first server ends in between."""
    told: list[Event] = []
    ended: list[Any] = []

    def step(app: Any, held: Any, number: int) -> None:
        with app.state.service.sessions.begin() as session:
            job_queue.record_progress(session, held, {"step": number, "total_steps": 3})

    with server(tmp_path) as (url, app, stop), connect(kind, url, plain_key(app)) as client:
        request_id = client.submit(f"{MARKER} is bad")["id"]
        held = claim(app.state.service, request_id)
        step(app, held, 1)
        follower = threading.Thread(
            target=lambda: ended.append(client.wait(request_id, told.append, give_up_seconds=120)), daemon=True
        )
        follower.start()
        wait_until(lambda: any(found.data.get("step") == 1 for found in told), 60)
        stop()
        port = int(url.rpartition(":")[2])
        with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path, port=port, mode=Mode.CONCATENATE) as (_, app, _):
            step(app, held, 2)
            with app.state.service.sessions.begin() as session:
                lifecycle.fail(session, held, code="checks-failed", detail="it forgets too much")
            follower.join(60)
    assert [found["state"] for found in ended] == ["failed"]
    streamed = [found for found in told if found.id]
    assert [int(found.id) for found in streamed] == sorted({int(found.id) for found in streamed})
    assert [found.data["step"] for found in streamed if found.type == "progress"] == [1, 2]
    assert streamed[-1].data["state"] == "failed"


def test_events_are_read_however_they_are_cut() -> None:
    text = ': hello\n\nid: 1\nevent: state\ndata: {"state":\ndata: "training"}\n\nid: 2\r\ndata: [1]\r\n\r\nid: 3\n\n'
    text += 'event: progress\ndata:{"step": 1, "text": "a\u2028b"}\n\n: bye\n\ndata: {"cut'
    wanted = [
        None,
        Event("1", "state", {"state": "training"}),
        Event("3", "progress", {"step": 1, "text": "a\u2028b"}),
        None,
    ]
    for size in (1, 2, 7, len(text)):
        reader = EventReader()
        found = [e for start in range(0, len(text), size) for e in reader.feed(text[start : start + size])]
        assert found == wanted, size
