"""The window of calls: order, limits, bad rows, and servers that are full, restart or go away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bulk import Answer, Asker, Call, Stopped, classify_rows, until_fault
from app.bulk_rows import Row
from app.errors import InvalidInput
from letheon_client import ApiError, Unreachable

MARKER = "Zyxomma Quillfeather"


def rows_of(texts: Iterable[str | None]) -> Iterator[Row]:
    for number, text in enumerate(texts, start=1):
        fault = None if text is not None else "not JSON"
        yield Row(f"line {number}", text, fault, {}, len(text or "") + 1, number)


def body(texts: Sequence[str], version: int = 1) -> dict[str, Any]:
    results = [{"label": text, "abstained": text == "unknown"} for text in texts]
    return {"results": results, "active_set_version": version}


def problem(status: int, *errors: dict[str, Any], code: str = "x", retry_after: float | None = None) -> ApiError:
    return ApiError("refused", status=status, code=code, errors=errors, retry_after=retry_after)


SLOW = [problem(503, code="deadline-exceeded"), problem(504)]  # the server's, and that of a proxy before it


class Server:
    """The rules of /classify as a function: limits on texts and bytes, 20 errors named at most, full now and then."""

    def __init__(self, *, max_texts: int = 256, max_bytes: int = 10_000, full: Sequence[int] = ()) -> None:
        self.max_texts, self.max_bytes, self.full = max_texts, max_bytes, set(full)
        self.calls = 0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        with self.lock:
            self.calls += 1
            call = self.calls
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(0.0005 * (call % 3))  # answers do not come in the order of the calls
            if call in self.full:
                raise problem(503, retry_after=0.001)
            if sum(len(text.encode()) + 3 for text in texts) > self.max_bytes:
                raise problem(413, {"field": "body", "message": "over the limit", "limit": self.max_bytes})
            if len(texts) > self.max_texts:
                raise problem(422, {"field": "texts", "message": "too many", "limit": self.max_texts})
            bad = [{"field": f"texts[{i}]", "message": "has 99 tokens"} for i, t in enumerate(texts) if "bad" in t]
            if bad:
                raise problem(422, *bad[:20])
            return body(texts, version=call)
        finally:
            with self.lock:
                self.at_once -= 1


def answers(call: Call, texts: Iterable[str | None], *, batch: int = 64, window: int = 4, **more: Any) -> list[Answer]:
    asker = Asker(call, batch=batch, **{"patience": 30.0, **more})
    return [answer for done in classify_rows(rows_of(texts), asker, window=window) for _, answer in done]


text_lists = st.lists(st.none() | st.text(max_size=30) | st.sampled_from(["bad", "so bad", "x" * 200]), max_size=60)


@settings(deadline=None)
@given(
    texts=text_lists,
    batch=st.integers(1, 40),
    window=st.integers(1, 5),
    max_texts=st.integers(1, 50),
    max_bytes=st.integers(50, 400),
    full=st.lists(st.integers(1, 30), max_size=4),
)
def test_every_row_has_its_own_answer_in_its_place(
    texts: list[str | None], batch: int, window: int, max_texts: int, max_bytes: int, full: list[int]
) -> None:
    server = Server(max_texts=max_texts, max_bytes=max_bytes, full=full)
    found = answers(server, texts, batch=batch, window=window)
    assert len(found) == len(texts)
    for number, (text, answer) in enumerate(zip(texts, found, strict=True), start=1):
        if text is None:
            assert answer == {"letheon_error": f"line {number}: not JSON"}
        elif len(text.encode()) + 3 > max_bytes:
            assert answer == {"letheon_error": f"line {number}: the text is over the server's limit of body bytes"}
        elif "bad" in text:
            assert answer == {"letheon_error": f"line {number}: the text has 99 tokens"}
        else:
            assert answer["letheon_label"] == text
            assert 0 < answer["letheon_active_set_version"] <= server.calls
    assert server.most_at_once <= window


def test_a_limit_is_learned_once() -> None:
    server = Server(max_texts=10)
    answers(server, (f"film {i}" for i in range(1000)), batch=256, window=1)
    assert server.calls <= 1 + 26 + 75  # refused once; that batch in tens; the rest in tens
    small = Server(max_bytes=300)
    answers(small, (f"film number {i:04}" for i in range(1000)), batch=256, window=1)
    assert small.calls <= 63 + 58  # halved down to 8 texts; the rest in 13s, of the 15 that would fit


def test_a_call_holds_one_mebibyte_or_one_row() -> None:
    sizes: list[int] = []

    def call(texts: Sequence[str]) -> dict[str, Any]:
        sizes.append(sum(map(len, texts)))
        return body(texts)

    answers(call, ["x" * 400_000] * 7 + ["y" * 1_000_000, "z"], window=1)
    assert sizes == [800_000, 800_000, 800_000, 400_000, 1_000_001]


def test_the_input_is_read_no_further_than_the_window() -> None:
    read = count(1)
    latest = 0

    def texts() -> Iterator[str]:
        nonlocal latest
        for latest in read:
            yield f"film {latest}"

    asker = Asker(body, batch=10)
    done = 0
    for found in classify_rows(rows_of(texts()), asker, window=3):
        done += len(found)
        assert latest - done <= 3 * 10 + 1
        if done > 2000:
            break


def test_waiting_is_told_and_retry_after_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = [
        problem(503, retry_after=0.4),
        Unreachable("gone", sent=False),
        problem(502),
        problem(429),
    ]
    times: list[float] = []
    told: list[str | None] = []

    def call(texts: Sequence[str]) -> dict[str, Any]:
        times.append(time.monotonic())
        if failures:
            raise failures.pop(0)
        return body(texts)

    monkeypatch.setattr("app.bulk._FIRST_DELAY", 0.01)
    assert answers(call, ["a"], on_wait=told.append)[0]["letheon_label"] == "a"
    assert told == ["x (503): refused", "gone", "x (502): refused", "x (429): refused", None]
    assert times[1] - times[0] >= 0.4
    assert len(times) == 5


@pytest.mark.parametrize("refusal", SLOW)
@pytest.mark.parametrize("fast_enough_for", [1, 3, 40])
def test_a_call_that_gets_no_answer_in_time_is_made_smaller(
    refusal: ApiError, fast_enough_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    told: list[str | None] = []

    def call(texts: Sequence[str]) -> dict[str, Any]:
        sizes.append(len(texts))
        if len(texts) > fast_enough_for:
            raise refusal
        return body(texts)

    monkeypatch.setattr("app.bulk._STEADY_CALLS", 10_000)
    texts = [f"film {i}" for i in range(300)]
    found = answers(call, texts, window=1, patience=0.0, on_wait=told.append)
    assert [answer["letheon_label"] for answer in found] == texts
    halves = [64, 32, 16, 8, 4, 2, 1]
    refused = [size for size in halves if size > fast_enough_for]
    assert sizes[: len(refused)] == refused, "halved, and each size is tried once"
    assert set(sizes[len(refused) :]) <= set(range(1, halves[len(refused)] + 1))
    assert told == [str(refusal)] * len(refused) + [None]


def test_a_single_text_that_is_too_slow_is_asked_by_fewer_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    lock = threading.Lock()
    calls = at_once = most = 0

    def call(texts: Sequence[str]) -> dict[str, Any]:
        nonlocal calls, at_once, most
        with lock:
            calls += 1
            first = calls <= 4
        if first:
            together.wait(10)  # so that four are in flight
            raise SLOW[0]
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.002)  # others would come in between
        with lock:
            at_once -= 1
        return body(texts)

    monkeypatch.setattr("app.bulk._FIRST_DELAY", 0.001)
    texts = [f"film {i}" for i in range(15)]  # of 16 that get through more would come of it
    assert [answer["letheon_label"] for answer in answers(call, texts, batch=1)] == texts
    assert (calls, most) == (19, 1)


def test_a_server_that_was_slow_for_a_while_gets_full_calls_again() -> None:
    sizes: list[int] = []

    def call(texts: Sequence[str]) -> dict[str, Any]:
        sizes.append(len(texts))
        if len(sizes) <= 3:
            raise SLOW[0]
        return body(texts)

    answers(call, (f"film {i}" for i in range(2000)), window=1)
    assert sizes[:4] == [64, 32, 16, 8]
    assert sizes[-2:-1] == [64]


def test_a_try_that_is_too_slow_is_made_ever_more_rarely() -> None:
    sizes: list[int] = []

    def call(texts: Sequence[str]) -> dict[str, Any]:
        sizes.append(len(texts))
        if len(texts) > 4:
            raise SLOW[0]
        return body(texts)

    answers(call, (f"film {i}" for i in range(4000)), window=1)
    assert 2 < sum(size == 8 for size in sizes) < 10


def test_leaving_ends_what_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, second = threading.Event(), threading.Event()
    seen = count()

    def call(texts: Sequence[str]) -> dict[str, Any]:
        if next(seen) == 0:
            raise SLOW[0]  # so that one call goes at a time
        second.set()
        assert silent.wait(20)
        return body(texts)

    monkeypatch.setattr("app.bulk._FIRST_DELAY", 0.001)
    asker = Asker(call, batch=1)
    ended: list[str] = []

    def ask(text: str) -> None:
        try:
            asker.answer(list(rows_of([text])))
        except Stopped:
            ended.append(text)

    threads = [threading.Thread(target=ask, args=(text,)) for text in "abc"]
    threads[0].start()
    assert second.wait(10)
    for thread in threads[1:]:
        thread.start()
    asker.stop()
    for thread in threads[1:]:
        thread.join(10)
    assert sorted(ended) == ["b", "c"] and next(seen) == 2, "without a call, while the first is still in flight"
    silent.set()
    threads[0].join(10)
    assert ended[2:] == []


@pytest.mark.parametrize("error", [problem(503, retry_after=60.0), Unreachable("gone", sent=False), problem(500)])
def test_patience_ends(error: Exception) -> None:
    calls = count()

    def call(texts: Sequence[str]) -> dict[str, Any]:
        next(calls)
        raise error

    with pytest.raises(type(error)):
        answers(call, ["a"], patience=0.2)
    assert next(calls) >= 2  # at once, and when the time is up
    with pytest.raises(type(error)):
        answers(call, ["a"], patience=0.0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 415, 422])
def test_what_waiting_cannot_mend_stops_at_once_behind_the_answers_before_it(status: int) -> None:
    def call(texts: Sequence[str]) -> dict[str, Any]:
        if "stop" in texts:
            raise problem(status, {"field": "min_version", "message": "Extra inputs are not permitted"})
        return body(texts)

    done: list[Answer] = []
    asker = Asker(call, batch=1)
    with pytest.raises(ApiError) as refused:
        for batch in classify_rows(rows_of(["a", "b", "c", "stop", "d", "e"]), asker, window=4):
            done += [answer for _, answer in batch]
    assert refused.value.status == status
    assert [answer["letheon_label"] for answer in done] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"results": [], "active_set_version": 1},
        {"results": [{"label": "a"}, {"label": "b"}], "active_set_version": 1},
        {"results": [{"label": 7}], "active_set_version": 1},
        {"results": ["a"], "active_set_version": 1},
        {"results": [{"label": "a"}], "active_set_version": None},
    ],
)
def test_an_answer_of_another_shape_is_no_answer(answer: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="not Letheon's"):
        answers(lambda texts: answer, ["a"])


def test_a_server_behind_the_version_asked_for_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk._FIRST_DELAY", 0.01)
    versions = iter([3, 4, 5])
    (answer,) = answers(lambda texts: body(texts, next(versions)), ["a"], min_version=5)
    assert answer["letheon_active_set_version"] == 5


def test_scores_are_kept() -> None:
    result = {"label": "a", "abstained": False, "confidence": 0.5, "scores": {"a": 0.5}}
    (answer,) = answers(lambda texts: {"results": [result], "active_set_version": 2}, ["a"])
    assert answer == {f"letheon_{name}": value for name, value in result.items()} | {"letheon_active_set_version": 2}


def test_leaving_early_ends_the_calls_that_wait() -> None:
    def call(texts: Sequence[str]) -> dict[str, Any]:
        if "first" in texts:
            return body(texts)
        raise problem(503, retry_after=60.0)

    running = classify_rows(rows_of(["first", *"abc"]), Asker(call, batch=1), window=2)
    assert len(next(running)) == 1
    running.close()
    end = time.monotonic() + 10
    while any(thread.name == "classify" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("strict", "told", "rows"), [(True, "in.x, line 2: not JSON", 1), (False, "in.x, line 4: torn", 3)]
)
def test_where_a_run_ends(strict: bool, told: str, rows: int) -> None:
    given_rows = [*rows_of(["a", None, "c"]), Row("line 4", None, "torn", {}, 0, 4, broken=True)]
    done: list[Answer] = []
    with pytest.raises(InvalidInput) as stopped:
        for batch in until_fault("in.x", classify_rows(given_rows, Asker(body, batch=3)), strict=strict):
            done += [answer for _, answer in batch]
    assert stopped.value.detail == told
    assert len(done) == rows


def test_no_message_of_ours_holds_a_text() -> None:
    call: Callable[..., dict[str, Any]] = Server(max_bytes=100)
    for answer in answers(call, [f"bad {MARKER}", MARKER * 9]):
        assert MARKER not in answer["letheon_error"]
