"""Classifying any number of rows: a bounded window of calls in flight, answers in the order of the rows."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from app.bulk_rows import MAX_TEXT_BYTES, Row
from app.errors import InvalidInput
from letheon_client import ApiError, ForeignAnswer, Unreachable

CONCURRENCY = 4
"""Calls in flight. Two keep the server's model busy; the others cover for one that is slow or waits."""
PATIENCE_SECONDS = 600.0
"""A call that meets a server which is full, restarts or is gone is tried again for this long."""
MAX_CALL_BYTES = MAX_TEXT_BYTES  # of input; a row that is larger goes alone

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 30.0
_LEAVE_SECONDS = 1.0
_STEADY_CALLS = 16  # that got through in a row, before more is asked for again
_TEXT_FIELD = re.compile(r"texts\[(\d{1,9})\]")

Answer = dict[str, Any]
"""What an output adds to a row: some of ``bulk_rows.ANSWER_FIELDS``."""
Call = Callable[[Sequence[str]], Mapping[str, Any]]
"""One call to /classify: raises ApiError, Unreachable."""


class Stopped(Exception):
    """Nobody waits for the answers any more."""


class _Pace:
    """How much to ask for at once: half where no answer comes in time, more again once a while of calls got through.

    ``batch``: texts of a call. ``calls``: that may be in flight, which matters once a single text is too slow.
    """

    def __init__(self, batch: int, stop: threading.Event) -> None:
        self.batch = self._most = batch
        self.calls: int | None = None  # None: as many as come
        self._flying = self._through = 0
        self._needed, self._grown = _STEADY_CALLS, False
        self._stop = stop
        self._change = threading.Condition()

    def limit(self, batch: int) -> None:
        """The server takes no more than this, ever."""
        with self._change:
            self._most = min(self._most, batch)
            self.batch = min(self.batch, batch)

    @contextmanager
    def turn(self) -> Generator[None]:
        """Waits until a call may go."""
        with self._change:
            self._change.wait_for(lambda: self.calls is None or self._flying < self.calls or self._stop.is_set())
            self._flying += 1
        try:
            yield
        finally:
            with self._change:
                self._flying -= 1
                self._change.notify_all()

    def wake(self) -> None:
        with self._change:
            self._change.notify_all()

    def too_slow(self, count: int) -> None:
        """No answer came in time to ``count`` texts. Called within its turn."""
        with self._change:
            if count > 1:
                self.batch = min(self.batch, (count + 1) // 2)
            else:
                self.calls = max(min(self.calls or self._flying, self._flying) // 2, 1)
            if self._grown:  # not once more for each of the calls that were refused together
                self._grown = False
                self._needed = min(2 * self._needed, 64 * _STEADY_CALLS)  # a try that fails costs a deadline
            self._through = 0

    def got_through(self) -> None:
        with self._change:
            self._through += 1
            if self._through >= self._needed and (self.calls is not None or self.batch < self._most):
                self._through, self._grown = 0, True
                if self.calls is not None:
                    # Once more are allowed than the window holds, it is no limit.
                    self.calls = 2 * self.calls if self._flying >= self.calls else None
                else:
                    self.batch = min(2 * self.batch, self._most)
                self._change.notify_all()


class Asker:
    """Gets batches answered, from any thread: splits what is too large, singles out bad rows, waits for the server."""

    def __init__(
        self,
        call: Call,
        *,
        batch: int,
        min_version: int = 0,
        patience: float = PATIENCE_SECONDS,
        on_wait: Callable[[str | None], None] = lambda why: None,
    ) -> None:
        """``on_wait`` hears why a call waits, and None when one got through again; from the calls' threads."""
        self.bytes = MAX_CALL_BYTES
        self._call, self._min_version = call, min_version
        self._patience, self._on_wait = patience, on_wait
        self._waiting = False
        self._stop = threading.Event()
        self._pace = _Pace(batch, self._stop)

    @property
    def batch(self) -> int:
        """Rows of a call: less once the server has named its limits, or is slow."""
        return self._pace.batch

    def stop(self) -> None:
        """Calls that wait end with Stopped."""
        self._stop.set()
        self._pace.wake()

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """One answer or fault for each row. Raises ApiError and Unreachable for what is no row's fault; Stopped."""
        found = {i: _fault(row, row.fault) for i, row in enumerate(rows) if row.fault is not None}
        parts = [[i for i in range(len(rows)) if i not in found]]
        while parts:
            part = parts.pop()
            if not part:
                continue
            if len(part) > (most := self.batch):  # which may have become less since these rows were put together
                parts.append(part[most:])
                part = part[:most]
            try:
                answers = self._patiently([rows[i].text or "" for i in part])
            except ApiError as refusal:
                if bad := _bad_texts(refusal, len(part)):
                    found |= {part[at]: _fault(rows[part[at]], f"the text {why}") for at, why in bad.items()}
                    parts.append([i for at, i in enumerate(part) if at not in bad])
                elif size := self._smaller(refusal, len(part)):
                    parts += [part[start : start + size] for start in range(0, len(part), size)]
                elif refusal.status == 413:
                    found[part[0]] = _fault(rows[part[0]], "the text is over the server's limit of body bytes")
                else:
                    raise
            else:
                found.update(zip(part, answers, strict=True))
        return [found[i] for i in range(len(rows))]

    def _smaller(self, refusal: ApiError, count: int) -> int:
        """How many texts to send at once instead of ``count``; 0 when the refusal is not about that."""
        limits = {error.get("field"): error.get("limit") for error in refusal.errors}
        if refusal.status == 413 and count > 1:
            limit = limits.get("body")  # a proxy names none
            named = 3 * limit // 4 if isinstance(limit, int) else self.bytes // 2
            self.bytes = max(min(self.bytes, named), 1)
            return (count + 1) // 2
        limit = limits.get("texts")
        if refusal.status == 422 and isinstance(limit, int) and 0 < limit < count:
            self._pace.limit(limit)
            return limit
        if _too_slow(refusal) and count > 1:
            return (count + 1) // 2
        return 0

    def _patiently(self, texts: Sequence[str]) -> list[Answer]:
        since: float | None = None
        delay = _FIRST_DELAY
        while not self._stop.is_set():
            try:
                answers = self._once(texts)
            except (ApiError, Unreachable) as error:
                if _too_slow(error) and len(texts) > 1:
                    self._wait_is_told(str(error))
                    raise
                since = since if since is not None else time.monotonic()
                left = since + self._patience - time.monotonic()
                if not _may_pass(error) or not left > 0 or self._stop.is_set():
                    raise
                self._wait_is_told(str(error))
                pause = error.retry_after if isinstance(error, ApiError) and error.retry_after is not None else delay
                # Calls that were refused together do not come back together.
                self._stop.wait(min(pause * random.uniform(1.0, 1.25), left))
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                if self._waiting:
                    self._waiting = False
                    self._on_wait(None)
                return answers
        raise Stopped

    def _once(self, texts: Sequence[str]) -> list[Answer]:
        with self._pace.turn():
            if self._stop.is_set():
                raise Stopped
            try:
                answers = _answers(self._call(texts), len(texts), self._min_version)
            except ApiError as error:
                if _too_slow(error):
                    self._pace.too_slow(len(texts))
                raise
            self._pace.got_through()
            return answers

    def _wait_is_told(self, why: str) -> None:
        self._waiting = True
        self._on_wait(why)


def classify_rows(
    rows: Iterable[Row], asker: Asker, *, window: int = CONCURRENCY
) -> Generator[list[tuple[Row, Answer]]]:
    """The rows with their answers, a batch at a time and in order; at most ``window`` batches are held.

    Raises what ``Asker.answer`` raises for the first batch that fails, behind the answers of all batches before it.
    """
    flying: deque[tuple[list[Row], Future[list[Answer]]]] = deque()

    def landed() -> list[tuple[Row, Answer]]:
        batch, answers = flying.popleft()
        return list(zip(batch, answers.result(), strict=True))

    try:
        for batch in _batches(rows, asker):
            flying.append((batch, _in_thread(asker.answer, batch)))
            while flying and (len(flying) >= window or flying[0][1].done()):
                yield landed()
        while flying:
            yield landed()
    finally:
        asker.stop()
        # What is in flight ends in peace, unless the server is silent: then its thread is left behind.
        wait([future for _, future in flying], timeout=_LEAVE_SECONDS)


def until_fault(
    name: str, batches: Iterable[list[tuple[Row, Answer]]], *, strict: bool
) -> Iterator[list[tuple[Row, Answer]]]:
    """The batches; raises InvalidInput behind the last row before one that ends the run.

    That is where the input cannot be read on and, if ``strict``, the first row with a fault.
    """
    for batch in batches:
        for place, (row, answer) in enumerate(batch):
            if row.broken or (strict and "letheon_error" in answer):
                yield batch[:place]
                raise InvalidInput(f"{name}, {answer['letheon_error']}")
        yield batch


def _batches(rows: Iterable[Row], asker: Asker) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        if batch and (len(batch) >= asker.batch or size + row.size > asker.bytes):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row.size
    if batch:
        yield batch


def _in_thread(answer: Callable[[list[Row]], list[Answer]], batch: list[Row]) -> Future[list[Answer]]:
    """In a daemon thread: a silent server must not keep an interrupted command from ending."""
    future: Future[list[Answer]] = Future()

    def run() -> None:
        try:
            future.set_result(answer(batch))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="classify", daemon=True).start()
    return future


def _may_pass(error: ApiError | Unreachable) -> bool:
    return isinstance(error, Unreachable) or error.status in (408, 429) or error.status >= 500


def _too_slow(error: ApiError | Unreachable) -> bool:
    """Whether fewer texts might have been answered in time. The same ones again are as slow, and start over."""
    return isinstance(error, ApiError) and (error.code == "deadline-exceeded" or error.status == 504)


def _bad_texts(refusal: ApiError, count: int) -> dict[int, str]:
    """Place in the call → what is wrong, of the texts that a 422 names. It names some; others may turn up later."""
    bad: dict[int, str] = {}
    for error in refusal.errors if refusal.status == 422 else ():
        place = _TEXT_FIELD.fullmatch(str(error.get("field")))
        if place and int(place[1]) < count:
            bad[int(place[1])] = str(error.get("message") or "was refused")
    return bad


def _fault(row: Row, why: str | None) -> Answer:
    return {"letheon_error": f"{row.place}: {why}"}


def _answers(body: Mapping[str, Any], count: int, min_version: int) -> list[Answer]:
    """Raises ApiError for what is no answer to ``count`` texts, or one by an older active set than was asked for."""
    results, version = body.get("results"), body.get("active_set_version")
    if not isinstance(results, list) or len(results) != count or not isinstance(version, int):
        raise ForeignAnswer(status=200)
    if version < min_version:
        detail = f"the server answered by active set {version}, --min-version asks for {min_version}"
        raise ApiError(detail, status=503, code="not-ready")
    answers = []
    for result in results:
        if not isinstance(result, dict) or not isinstance(result.get("label"), str):
            raise ForeignAnswer(status=200)
        answer = {f"letheon_{name}": result[name] for name in ("label", "abstained") if name in result}
        answer |= {f"letheon_{name}": result[name] for name in ("confidence", "scores") if name in result}
        answers.append(answer | {"letheon_active_set_version": version})
    return answers
