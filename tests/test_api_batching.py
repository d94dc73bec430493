"""The batcher: what waits together runs together, and every caller hears back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future

import pytest
from api_kit import wait_until

from app import batching
from app.batching import Batcher
from app.errors import DeadlineExceeded, NotReady, Overloaded


class Gate:
    """A run() that records its batches and can be held."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.error: BaseException | None = None

    def __call__(self, jobs: list[list[int]]) -> Sequence[int]:
        self.batches.append(jobs)
        self.entered.release()
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        return [sum(job) for job in jobs]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def batcher(gate: Gate) -> Iterator[Batcher[list[int], int]]:
    batcher: Batcher[list[int], int] = Batcher(gate, weigh=len, max_batch=4, max_queued=6)
    yield batcher
    gate.open.set()
    batcher.close(60)
    assert not batcher.alive


def hold(gate: Gate, batcher: Batcher[list[int], int]) -> Future[int]:
    """Keep the thread busy with a first job."""
    gate.open.clear()
    first = batcher.submit([0])
    assert gate.entered.acquire(timeout=60)
    return first


def test_results_reach_their_own_callers(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    futures = [batcher.submit([n, n]) for n in (1, 2, 3)]
    gate.open.set()
    assert first.result(60) == 0
    assert [future.result(60) for future in futures] == [2, 4, 6]
    assert gate.batches == [[[0]], [[1, 1], [2, 2]], [[3, 3]]], "4 by weight, and no job is split"


def test_the_oldest_is_a_callers_and_not_our_own(gate: Gate) -> None:
    """What has no weight is our own question, and what teaches nothing another kind of work: nobody waits for more."""
    batcher: Batcher[list[int], int] = Batcher(
        gate, weigh=len, teaches=lambda job: job != [9], max_batch=4, max_queued=40
    )
    first = hold(gate, batcher)
    ours = [batcher.submit([]), batcher.submit([9])]
    wait_until(lambda: batcher.running > 0.05)
    assert batcher.oldest == 0.0
    theirs = batcher.submit([1])
    wait_until(lambda: batcher.oldest > 0)
    assert batcher.oldest < batcher.running
    gate.open.set()
    assert [future.result(60) for future in (first, *ours, theirs)] == [0, 0, 9, 1]
    batcher.close()


def test_a_job_heavier_than_a_batch_or_the_queue_runs_alone(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    heavy = batcher.submit([1] * 10)
    with pytest.raises(Overloaded):
        batcher.submit([1])
    gate.open.set()
    assert (first.result(60), heavy.result(60)) == (0, 10)
    assert gate.batches == [[[0]], [[1] * 10]]


def test_a_full_queue_refuses_and_recovers(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    assert batcher.submit([5]).result(60) == 5  # so that a rate is known
    assert gate.entered.acquire(timeout=60)
    first = hold(gate, batcher)
    futures = [batcher.submit([1]) for _ in range(6)]
    with pytest.raises(Overloaded) as refused:
        batcher.submit([1])
    assert 1 <= refused.value.extra["retry_after"] <= 60
    gate.open.set()
    assert [future.result(60) for future in [first, *futures]] == [0] + [1] * 6
    assert batcher.submit([7]).result(60) == 7


def test_an_exception_reaches_every_caller_and_the_loop_goes_on(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    futures = [batcher.submit([1]) for _ in range(3)]
    gate.error = NotReady("no active set")
    gate.open.set()
    for future in [first, *futures]:
        with pytest.raises(NotReady, match="no active set"):
            future.result(60)
    gate.error = None
    assert batcher.alive
    assert batcher.submit([4]).result(60) == 4


def test_too_few_results_are_an_error_not_a_wait() -> None:
    batcher: Batcher[list[int], int] = Batcher(lambda jobs: [], weigh=len, max_batch=4, max_queued=4)
    with pytest.raises(RuntimeError, match="one result per item"):
        batcher.submit([1]).result(60)
    batcher.close(60)


def test_the_thread_dying_fails_all_and_is_seen(
    gate: Gate, batcher: Batcher[list[int], int], caplog: pytest.LogCaptureFixture
) -> None:
    first = hold(gate, batcher)
    waiting = [batcher.submit([1] * 3) for _ in range(2)]
    gate.error = SystemExit("a text")
    gate.open.set()
    for future in [first, *waiting]:
        with pytest.raises(NotReady, match="died"):
            future.result(60)
    assert not batcher.alive
    with pytest.raises(NotReady, match="died"):
        batcher.submit([1])
    assert "SystemExit" in caplog.text and "a text" not in caplog.text


def test_a_caller_that_left_is_skipped(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    left, stays = batcher.submit([1]), batcher.submit([2])
    assert left.cancel()
    gate.open.set()
    assert (first.result(60), stays.result(60)) == (0, 2)
    assert gate.batches == [[[0]], [[2]]]
    with pytest.raises(CancelledError):
        left.result(0)


def test_a_place_in_the_queue_is_free_when_its_caller_leaves(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    assert batcher.oldest == 0.0 < batcher.running
    waiting = [batcher.submit([n]) for n in range(6)]
    assert batcher.queued == 6 and batcher.oldest > 0
    with pytest.raises(Overloaded):
        batcher.submit([6])
    assert waiting[0].cancel() and waiting[3].cancel()
    assert batcher.queued == 4
    late = batcher.submit([6, 0])
    assert not first.cancel(), "it runs already"
    gate.open.set()
    assert (first.result(60), late.result(60)) == (0, 6)
    assert [waiting[n].result(60) for n in (1, 2, 4, 5)] == [1, 2, 4, 5]
    assert gate.batches == [[[0]], [[1], [2], [4], [5]], [[6, 0]]]
    assert (batcher.queued, batcher.oldest) == (0, 0.0)


def test_leaving_while_batches_are_taken_never_loses_count() -> None:
    def run(jobs: list[list[int]]) -> list[int]:
        time.sleep(0.0002)
        return [sum(job) for job in jobs]

    batcher: Batcher[list[int], int] = Batcher(run, weigh=len, max_batch=4, max_queued=10_000)
    answered = []
    for n in range(3000):
        future = batcher.submit([n] * (1 + n % 3))
        if n % 2 and future.cancel():
            continue
        answered.append((future, n * (1 + n % 3)))
    assert [future.result(20) for future, _ in answered] == [wanted for _, wanted in answered]
    assert len(answered) < 3000
    assert batcher.queued == 0
    batcher.close(60)


def test_callers_that_come_back_share_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait they would take turns in two groups, each of which finds the other one running."""
    sizes: list[int] = []
    entered, may_end = threading.Semaphore(0), threading.Semaphore(0)

    def run(jobs: list[list[int]]) -> list[int]:
        sizes.append(len(jobs))
        entered.release()
        assert may_end.acquire(timeout=20)
        return [sum(job) for job in jobs]

    def linger(seconds: float) -> None:
        """After batches that end from now on."""
        monkeypatch.setattr(batching, "LINGER", 1e9)
        monkeypatch.setattr(batching, "MAX_LINGER_SECONDS", seconds)

    batcher: Batcher[list[int], int] = Batcher(run, weigh=len, max_batch=16, max_queued=100)

    def ask(number: int) -> list[Future[int]]:
        return [batcher.submit([1]) for _ in range(number)]

    def end(running: list[Future[int]]) -> None:
        may_end.release()
        assert [future.result(60) for future in running] == [1] * len(running)

    def begins() -> None:
        assert entered.acquire(timeout=60)

    linger(0.0)
    alone = ask(1)
    begins()
    one = ask(4)
    end(alone)
    begins()
    other = ask(4)  # they find the first group running
    linger(60.0)  # longer than anything here waits
    end(one)
    together = other + ask(4)
    for _ in range(3):
        begins()
        assert sizes[-1] == 8, sizes
        end(together)
        together = ask(8)
    begins()
    linger(0.0)
    end(together)
    for _ in range(4):
        alone = ask(1)
        begins()
        linger(60.0)
        end(alone)
    assert sizes == [1, 4, 8, 8, 8, 8, 1, 1, 1, 1], "who comes one at a time waits for nobody"
    batcher.close(60)


def test_close_finishes_the_running_batch_and_refuses_the_rest(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    waiting = batcher.submit([1])
    closer = threading.Thread(target=batcher.close, args=(10,))
    closer.start()
    with pytest.raises(NotReady, match="shutting down"):
        waiting.result(60)
    gate.open.set()
    closer.join(10)
    assert first.result(60) == 0
    with pytest.raises(NotReady, match="shutting down"):
        batcher.submit([1])


def test_nothing_is_lost_under_load() -> None:
    def run(jobs: list[list[int]]) -> list[int]:
        time.sleep(0.0005)
        return [sum(job) for job in jobs]

    batcher: Batcher[list[int], int] = Batcher(run, weigh=len, max_batch=16, max_queued=10_000)
    results: dict[int, int] = {}

    def ask(start: int) -> None:
        futures = [(n, batcher.submit([n])) for n in range(start, start + 100)]
        results.update({n: future.result(20) for n, future in futures})

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 800, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close(60)
    assert results == {n: n for n in range(800)}


class Clock:
    """A clock that stands."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paced(gate: Gate, clock: Clock) -> Iterator[Batcher[list[int], int]]:
    """Eight to a batch, forty in the queue; known to answer two a second."""
    batcher: Batcher[list[int], int] = Batcher(gate, weigh=len, max_batch=8, max_queued=40, clock=clock)
    gate.open.clear()
    first = batcher.submit([1] * 8)
    assert gate.entered.acquire(timeout=60)
    clock.now += 4
    gate.open.set()
    assert first.result(60) == 8
    yield batcher
    gate.open.set()
    batcher.close(60)


def test_who_would_be_answered_too_late_is_refused_at_once(
    gate: Gate, paced: Batcher[list[int], int], clock: Clock
) -> None:
    first = hold(gate, paced)  # of weight 1: half a second
    waiting = [paced.submit([1] * 4, deadline=clock.now + 10) for _ in range(3)]
    # 1 + 12 + 3 at two a second: 8 s, which are four fifths of 10 s
    waiting.append(paced.submit([1] * 3, deadline=clock.now + 10))
    with pytest.raises(Overloaded) as refused:
        paced.submit([1] * 2, deadline=clock.now + 10)
    assert refused.value.extra["retry_after"] == 1  # 9 s are one more than 8
    with pytest.raises(Overloaded) as refused:
        paced.submit([1], deadline=clock.now + 2)
    assert refused.value.extra["retry_after"] == 7  # 8.5 s and 1.6 s, rounded up
    with pytest.raises(DeadlineExceeded):  # whatever waits: fewer would be answered
        paced.submit([1] * 5, deadline=clock.now + 2)
    assert paced.queued == 15
    waiting.append(paced.submit([1] * 2))  # has time
    clock.now += 0.25  # of the half second
    with pytest.raises(Overloaded):
        paced.submit([1] * 2, deadline=clock.now + 12)  # 9.75 s; 9.6 s are four fifths
    waiting.append(paced.submit([1] * 2, deadline=clock.now + 12.25))
    gate.open.set()
    assert [future.result(60) for future in [first, *waiting]] == [0, 4, 4, 4, 3, 2, 2]


def test_an_idle_server_tries_whatever_the_estimate(gate: Gate, paced: Batcher[list[int], int], clock: Clock) -> None:
    assert paced.submit([1] * 6, deadline=clock.now + 1).result(60) == 6
    assert gate.batches[-1] == [[1] * 6]


def test_who_got_too_late_is_left_out_and_nobody_waits_for_it(
    gate: Gate, paced: Batcher[list[int], int], clock: Clock
) -> None:
    first = hold(gate, paced)
    late, long, last = (paced.submit([n] * 2, deadline=clock.now + wait) for n, wait in ((1, 6), (2, 60), (3, 60)))
    clock.now += 5.5  # the first took that much longer: half a second is left for the second, which takes one
    gate.open.set()
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    assert (first.result(60), long.result(60), last.result(60)) == (0, 4, 6)
    assert gate.batches[1:] == [[[0]], [[2, 2], [3, 3]]]


def test_a_batch_is_no_longer_than_its_first_can_wait(gate: Gate, paced: Batcher[list[int], int], clock: Clock) -> None:
    first = hold(gate, paced)
    urgent = paced.submit([1] * 2, deadline=clock.now + 6)
    rest = [paced.submit([2] * 2, deadline=clock.now + 60) for _ in range(3)]
    clock.now += 4  # two seconds are left: four of the eight texts
    gate.open.set()
    assert [future.result(60) for future in [first, urgent, *rest]] == [0, 2, 4, 4, 4]
    assert gate.batches[2:] == [[[1, 1], [2, 2]], [[2, 2], [2, 2]]]


def test_a_batch_is_given_up_at_a_step_once_nobody_waits_for_it(clock: Clock) -> None:
    silent: list[float] = []
    lasts = 0.0

    def run(jobs: list[list[int]]) -> list[int]:
        for _ in range(3):
            clock.now += lasts
            silent.append(batcher.silent)
            batcher.step()
        return [sum(job) for job in jobs]

    batcher: Batcher[list[int], int] = Batcher(run, weigh=len, max_batch=4, max_queued=6, clock=clock)
    assert batcher.silent == 0
    assert batcher.submit([1], deadline=clock.now + 10).result(60) == 1
    lasts, silent = 4.0, []
    assert batcher.submit([1] * 6, deadline=clock.now + 12).result(60) == 6  # to the last moment
    assert silent == [4, 4, 4]
    late = batcher.submit([1] * 6, deadline=clock.now + 7)
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    assert len(silent) == 5
    assert batcher.submit([1] * 6).result(60) == 6  # without a deadline, and the thread goes on
    batcher.close(60)


def test_a_batch_that_was_given_up_tells_the_pace(gate: Gate, clock: Clock) -> None:
    def run(jobs: list[list[int]]) -> Sequence[int]:
        found = gate(jobs)
        batcher.step()
        return found

    batcher: Batcher[list[int], int] = Batcher(run, weigh=len, max_batch=4, max_queued=100, clock=clock)
    gate.open.clear()
    late = batcher.submit([1] * 8, deadline=clock.now + 3)
    assert gate.entered.acquire(timeout=60)
    clock.now += 4
    gate.open.set()
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    first = hold(gate, batcher)
    with pytest.raises(Overloaded):  # two a second, at the most: half a second for the first, and 1.5
        batcher.submit([1] * 3, deadline=clock.now + 2)
    gate.open.set()
    assert first.result(60) == 0
    batcher.close(60)


def test_light_batches_say_nothing_of_the_pace_unless_they_are_quicker(
    gate: Gate, paced: Batcher[list[int], int], clock: Clock
) -> None:
    def light(seconds: float) -> None:
        future = hold(gate, paced)
        clock.now += seconds
        gate.open.set()
        assert future.result(60) == 0

    light(3600)
    first = hold(gate, paced)
    with pytest.raises(Overloaded):  # 1 + 8 at two a second: 4.5 s
        paced.submit([1] * 8, deadline=clock.now + 5)
    gate.open.set()
    assert first.result(60) == 0
    light(0.25)  # 2.4 a second: 3.75 s
    first = hold(gate, paced)
    waiting = paced.submit([1] * 8, deadline=clock.now + 5)
    gate.open.set()
    assert (first.result(60), waiting.result(60)) == (0, 8)


def test_a_place_is_held_while_its_item_is_made(gate: Gate, batcher: Batcher[list[int], int]) -> None:
    first = hold(gate, batcher)
    with batcher.place(4) as put:
        with pytest.raises(Overloaded):
            batcher.submit([1] * 3)
        small = batcher.submit([1] * 2)
        future = put([5] * 4)
        assert batcher.queued == 6
    with pytest.raises(Overloaded):
        batcher.submit([1])
    assert future.cancel()
    with pytest.raises(KeyError), batcher.place(4):
        raise KeyError
    again = batcher.submit([1] * 4)
    gate.open.set()
    assert (first.result(60), small.result(60), again.result(60)) == (0, 2, 4)
