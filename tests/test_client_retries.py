"""What the client sends again: on killed replicas, lost answers, limits; what it must not; what it never tells."""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, MASTER_KEY, add_prompt, listening, soft_prompt, wait_until
from client_kit import KINDS, QUICK, connect, plain_key, proxy, scripted, server
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tiny_model
from worker_kit import Process, Site, wait_for

from app import keys, lifecycle
from app.tables import RequestState
from letheon_client import (
    ONCE,
    ApiError,
    BadRequest,
    Conflict,
    Forbidden,
    ForeignAnswer,
    InvalidAddress,
    InvalidArgument,
    Letheon,
    LetheonClientError,
    NotFound,
    QuotaExceeded,
    RateLimited,
    Retry,
    ServerError,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from letheon_client._calls import post
from letheon_client._retries import Course, may_repeat

NOBODY = "http://127.0.0.1:9"  # discard: nobody listens


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    with server(tmp_path_factory.mktemp("server")) as (url, app, _):
        yield url, app


def pending(app: Any) -> list[str]:
    with app.state.service.sessions() as session:
        items, _ = lifecycle.list_requests(session, limit=100_000, state=RequestState.PENDING)
    return [item.id for item in items]


def served(url: str, key: str) -> int:
    """Classifications that this replica has answered."""
    with Letheon(url, key) as client:
        counts = re.findall(r'_count\{method="POST",route="/classify",status="200"\} (\d+)', client.metrics())
    return int(counts[0]) if counts else 0


# --- replicas --------------------------------------------------------------------------------------------------------


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[tuple[Process, str, str, Any]]:
    """Two on one database: a process to be killed and its address, another's address and app."""
    knobs = {
        "model": str(make_tiny_model(tmp_path / "model")),
        "quantization": "none",
        "device": "cpu",
        "master_key": MASTER_KEY,
        "max_text_tokens": "64",
    }
    site = Site(tmp_path / "home", knobs)
    process = site.start_api("--port", "0")

    def address() -> str | None:
        assert process.popen.poll() is None, process.output()
        found = re.search(r"listens on (http://[0-9.:]+)", process.output())
        return found[1] if found else None

    try:
        with listening(site.settings.effective_database_url, site.home) as (other, app, _):
            url = wait_for(address, "the address")
            with Letheon(url) as probe:
                wait_for(probe.ready, "the replica")
            yield process, url, other, app
    finally:
        site.close()


def test_a_killed_replica_costs_a_retry_and_no_error(replicas: tuple[Process, str, str, Any]) -> None:
    """kill -9 while four callers submit, classify and read without a pause: nothing fails, is lost or doubled."""
    process, doomed, other, app = replicas
    key = plain_key(app)
    rounds = [0] * 4
    made: list[str] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def call(number: int, client: Any) -> None:
        try:
            while not stop.is_set():
                request = client.submit(f"{MARKER} is bad {number} {rounds[number]}")
                made.append(request["id"])
                assert len(client.classify(["a good film"])["results"]) == 1
                assert client.get_request(request["id"])["state"] == "pending"
                rounds[number] += 1
        except BaseException as error:
            errors.append(error)
            raise

    def until(more: int) -> None:
        aim = [count + more for count in rounds]
        wait_until(lambda: bool(errors) or all(n >= a for n, a in zip(rounds, aim, strict=True)), 120)
        assert errors == []

    with ExitStack() as stack:
        shared = stack.enter_context(connect("sync", [doomed, other], key))  # by two threads
        clients = [shared, shared, *(stack.enter_context(connect("async", [doomed, other], key)) for _ in range(2))]
        threads = [threading.Thread(target=call, args=found, daemon=True) for found in enumerate(clients)]
        for thread in threads:
            thread.start()
        try:
            until(3)
            assert served(other, key) == 0  # they stay with the one that answers
            process.kill()
            until(5)
            assert served(other, key) >= 16  # of each caller's five, one may have been answered before
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
    assert errors == []
    assert len(set(made)) == len(made)
    assert sorted(pending(app)) == sorted(made)


@pytest.mark.parametrize("kind", KINDS)
def test_addresses_are_tried_in_turn(kind: str, live: tuple[str, Any]) -> None:
    url, app = live
    with connect(kind, [NOBODY, url], plain_key(app), retry=ONCE) as client:
        assert client.ready() is True
        assert len(client.classify("a good film")["results"]) == 1
        client.create_webhook("https://example.com/hook")  # unsafe, and never sent to who does not listen
    with connect(kind, [NOBODY, NOBODY], plain_key(app)) as client:
        with pytest.raises(Unreachable, match=NOBODY) as gone:
            client.classify("a good film")
        assert gone.value.sent is False
        assert client.ready() is False


# --- lost answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_lost_after_the_commit_makes_no_second_request(kind: str, live: tuple[str, Any]) -> None:
    url, app = live
    before = pending(app)
    with proxy(url) as way, connect(kind, way.url, plain_key(app)) as client:
        way.cuts = 2
        made = client.submit(f"{MARKER} {kind}")
        assert way.lost == [b"HTTP/1.1 202 Accepted"] * 2  # it was carried out, and again
        assert (made["replayed"], made["duplicate"]) == (True, False)
        assert set(pending(app)) - set(before) == {made["id"]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_safe_is_not_sent_again(kind: str, live: tuple[str, Any]) -> None:
    url, app = live
    prompt = add_prompt(app.state.service, soft_prompt(3))
    with proxy(url) as way, connect(kind, way.url, plain_key(app)) as client:
        way.cuts = 1
        with pytest.raises(Unreachable) as broken:
            client.revoke(prompt, reason="once")
        assert broken.value.sent is True
        assert way.lost == [b"HTTP/1.1 200 OK"]
        assert client.get_prompt(prompt)["state"] == "revoked"
        hook = client.create_webhook("https://example.com/x")["id"]
        way.cuts = 1
        assert client.disable_webhook(hook)["disabled_at"]  # twice is once
        assert len(way.lost) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_that_breaks_off_is_asked_for_again(kind: str) -> None:
    answers = [(200, {"Content-Length": "99"}, b'{"id": "req_1"'), (200, {}, b'{"id": "req_1"}')]
    with scripted(answers) as (url, asked), connect(kind, url, "key") as client:
        assert client.get_request("req_1") == {"id": "req_1"}
    assert len(asked) == 2


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_limit_is_waited_for(live: tuple[str, Any]) -> None:
    url, app = live
    own = {"classify_texts_per_minute": 30}
    with app.state.service.sessions.begin() as session:
        row, key = keys.create_key(session, name="slow", scopes=keys.SCOPES, actor="test", limits=own)
        app.state.service.rates.take_texts(row.id, own, 30)  # all of this minute's
    with connect("async", url, key) as client:
        assert len(client.classify(["a good film", "a bad film"])["results"]) == 2  # four seconds' worth
        assert re.search(r'route="/classify",status="429"\} [1-9]', client.metrics())


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_that_lasts_longer_is_told(kind: str, tmp_path: Path) -> None:
    with server(tmp_path, rate_per_minute=1) as (url, app, _), connect(kind, url, plain_key(app)) as client:
        client.list_requests()
        with pytest.raises(RateLimited) as limited:
            client.list_requests()
    assert limited.value.retry_after is not None and limited.value.retry_after > QUICK.longest_delay


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_server_is_asked_again_and_a_foreign_one_is_not(kind: str) -> None:
    busy = (503, {"Retry-After": "0"}, b'{"code": "overloaded", "detail": "full"}')
    refused = (429, {"Retry-After": "0"}, b'{"code": "rate-limited", "detail": "full"}')
    for first in (busy, refused, (502, {}, b"<html>"), (504, {}, b"")):
        with scripted([first, (200, {}, b'{"id": "req_1"}')]) as (url, asked), connect(kind, url, "key") as client:
            assert client.get_request("req_1") == {"id": "req_1"}
            assert len(asked) == 2
    late = (503, {}, b'{"code": "deadline-exceeded", "detail": "late"}')
    for only, error in (
        ((200, {}, b"<html>hello</html>"), ForeignAnswer),
        ((200, {}, b"[1]"), ForeignAnswer),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), ForeignAnswer),
        ((418, {}, b"teapot"), BadRequest),
        ((500, {}, b""), ServerError),
        (late, Unavailable),
    ):
        with scripted([only]) as (url, asked), connect(kind, url, "key") as client:
            with pytest.raises(error):
                client.get_request("req_1")
            assert len(asked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsafe_call_is_repeated_only_where_nothing_was_done(kind: str) -> None:
    done = (200, {}, b'{"id": "prm_1"}')
    with scripted([(503, {}, b'{"code": "overloaded"}'), done]) as (url, _), connect(kind, url, "key") as client:
        client.revoke("prm_1", reason="x")
    for answer in ((503, {}, b'{"code": "unavailable"}'), (502, {}, b"")):
        with scripted([answer, done]) as (url, asked), connect(kind, url, "key") as client:
            with pytest.raises(Unavailable):
                client.revoke("prm_1", reason="x")
            assert len(asked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_refusal_has_its_exception(kind: str, live: tuple[str, Any]) -> None:
    url, app = live
    with connect(kind, url, None) as nobody, pytest.raises(Unauthenticated) as refused:
        nobody.list_requests()
    assert (refused.value.status, refused.value.code) == (401, "unauthenticated")
    assert refused.value.request_id and refused.value.problem is not None
    with connect(kind, url, plain_key(app, "classify")) as weak, pytest.raises(Forbidden, match="'admin'"):
        weak.list_prompts()
    with connect(kind, url, plain_key(app)) as client:
        with pytest.raises(NotFound):
            client.get_request("req_019aa5b0c2d41f2e3d4c5b6a7988")
        request = client.submit(f"{MARKER} {kind} again")["id"]
        client.cancel(request)
        with pytest.raises(Conflict):
            client.cancel(request)
        with pytest.raises(BadRequest) as wrong:
            client.submit(["fine", f"{MARKER} " * 200])
        assert [(e["field"], e["limit"]) for e in wrong.value.errors] == [("forget_texts[1].text", 64)]
        with pytest.raises(BadRequest) as large:
            client.classify("x" * 30_000)
        assert (large.value.status, large.value.code) == (413, "body-too-large")
        with connect(kind, url, plain_key(app), retry=ONCE) as once, pytest.raises(Unavailable) as behind:
            once.classify("a good film", min_version=2**30)
        assert (behind.value.code, behind.value.status) == ("not-ready", 503)
        with app.state.service.sessions.begin() as session:
            own = keys.create_key(session, name="q", scopes=["requests"], actor="test", limits={"requests_per_day": 1})
    with connect(kind, url, own[1]) as client:
        client.submit(f"{MARKER} {kind} quota 1")
        with pytest.raises(QuotaExceeded):
            client.submit(f"{MARKER} {kind} quota 2")


# --- before anything is sent, and what is never told -----------------------------------------------------------------


def test_what_cannot_be_sent_is_refused_here() -> None:
    for url in ("", "127.0.0.1:8600", "http://[::1", "http://127.0.0.1:abc", "ftp://a", "http://", "http://u:pw@h"):
        with pytest.raises(InvalidAddress) as wrong:
            Letheon(["http://127.0.0.1:1", url])
        assert "pw" not in str(wrong.value).replace("password", "")
    with pytest.raises(InvalidAddress):
        Letheon([])
    with pytest.raises(InvalidArgument) as wrong_key:
        Letheon(NOBODY, "lth_secret\nX-Other: 1")
    assert "secret" not in repr(wrong_key.value)
    with Letheon(NOBODY, "lth_secret \n") as client:
        for call in (
            lambda: client.get_request("../admin/prompts"),
            lambda: client.get_request(""),
            lambda: client.submit("half \ud800"),
            lambda: client.submit("x", options={"alpha": float("nan")}),
            lambda: client.submit("x", received_at=datetime(2026, 1, 1)),  # noqa: DTZ001
        ):
            with pytest.raises(InvalidArgument) as refused:
                call()
            assert "\ud800" not in repr(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_key_nor_text_is_ever_shown(kind: str, live: tuple[str, Any]) -> None:
    url, app = live
    key = plain_key(app, "classify")
    shown = []
    with connect(kind, url, key) as client, connect(kind, NOBODY, key, retry=ONCE) as lost:
        shown += [repr(client.client if kind == "async" else client), repr(post("/classify", {"text": MARKER}))]
        for call in (
            lambda: client.submit(MARKER),
            lambda: client.classify(f"{MARKER} " * 200),
            lambda: lost.classify(MARKER),
        ):
            with pytest.raises(LetheonClientError) as error:
                call()
            shown += [repr(error.value), str(error.value), repr(vars(error.value))]
            shown += traceback.format_exception(error.value)
    assert url in shown[0]
    for text in shown:
        assert MARKER not in text and key not in text and "Bearer" not in text


# --- the course of a call --------------------------------------------------------------------------------------------

_errors = st.one_of(
    st.builds(Unreachable, st.just("gone"), sent=st.booleans()),
    st.builds(
        ApiError,
        st.just("no"),
        status=st.sampled_from([400, 404, 408, 409, 422, 429, 500, 502, 503, 504]),
        code=st.sampled_from(["x", "overloaded", "rate-limited", "deadline-exceeded", "unavailable", "not-ready"]),
        retry_after=st.none() | st.floats(0, 60),
    ),
)


@given(
    st.lists(_errors, min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
)
def test_no_course_is_endless_and_every_pause_is_kept_to(
    errors: list[ApiError | Unreachable], addresses: int, attempts: int, repeatable: bool
) -> None:
    retry = Retry(attempts=attempts, first_delay=0.5, longest_delay=20, give_up_seconds=1e9)
    course = Course(retry, addresses, repeatable=repeatable)
    for count, error in enumerate(errors, start=1):
        pause = course.pause(error)
        if pause is None:
            break
        assert may_repeat(error, repeatable=repeatable)
        assert count < attempts * addresses
        assert 0 <= pause <= 25
        if isinstance(error, ApiError) and error.retry_after is not None and (addresses == 1 or error.status == 429):
            assert pause >= error.retry_after
    assert count <= attempts * addresses


def test_pauses_double_and_the_longest_retry_after_of_a_round_counts() -> None:
    gone = Unreachable("gone", sent=False)
    course = Course(Retry(attempts=9, first_delay=1, longest_delay=4), 1, repeatable=True)
    for least, most in ((0.5, 1), (1, 2), (2, 4), (2, 4)):
        pause = course.pause(gone)
        assert pause is not None and least <= pause <= most
    full = ApiError("full", status=503, code="overloaded", retry_after=3)
    course = Course(Retry(attempts=9, first_delay=0.1), 3, repeatable=True)
    assert [course.pause(full), course.pause(gone)] == [0.0, 0.0]
    pause = course.pause(gone)
    assert pause is not None and 3 <= pause <= 3.75
    assert Course(Retry(give_up_seconds=0.001), 1, repeatable=True).pause(gone) is None
