"""What a batch takes, and whom the batcher answers and refuses by it; on a clock that stands while nothing runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress

import pytest
from api_kit import wait_until
from test_api_batching import Clock

from app.batching import Batcher
from app.errors import DeadlineExceeded, LetheonError, Overloaded
from app.pace import Pace

Item = list[int] | str  # texts, or the name of a piece of work


class Model:
    """A run() that takes ``seconds(texts)`` by the clock, half before its step and half after, and can be held."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds: Callable[[int], float] = lambda texts: 0.0
        self.ran: list[int] = []
        self.go, self.entered = threading.Semaphore(0), threading.Semaphore(0)
        self.batcher: Batcher[Item, int] = Batcher(
            self.run,
            weigh=lambda item: 64 if isinstance(item, str) else len(item),
            teaches=lambda item: not isinstance(item, str),
            max_batch=64,
            max_queued=2048,
            clock=self.clock,
        )

    def run(self, items: list[Item]) -> list[int]:
        self.entered.release()
        assert self.go.acquire(timeout=20)
        texts = sum(len(item) for item in items)
        self.clock.now += self.seconds(texts) / 2
        self.batcher.step()
        self.clock.now += self.seconds(texts) / 2
        self.ran.append(texts)
        return [0 for _ in items]

    def ask(self, texts: int, wait: float = 30.0) -> Future[int]:
        return self.batcher.submit([1] * texts, deadline=self.clock.now + wait)

    def begin(self, texts: int = 1, wait: float = 30.0) -> Future[int]:
        """Keep the thread busy with so many texts."""
        future = self.ask(texts, wait)
        assert self.entered.acquire(timeout=20)
        return future

    def end(self, *futures: Future[int]) -> None:
        """Let batches run until these are over."""
        while not all(future.done() for future in futures):
            self.go.release()
            wait_until(lambda: all(future.done() for future in futures) or self.entered.acquire(blocking=False), 20)

    def moments(self, futures: list[Future[int]]) -> list[float]:
        """When those of them were answered that are."""
        found: list[float] = []
        for future in futures:
            future.add_done_callback(lambda done: found.append(self.clock.now) if done.exception() is None else None)
        return found

    def answer(self, texts: int, wait: float = 30.0) -> None:
        """A call by the only caller there is; it may be too late."""
        self.end(self.begin(texts, wait))

    def taken(self, texts: int, wait: float = 30.0) -> bool:
        """Whether a call is taken while another one of a single text runs."""
        running = self.begin()
        try:
            future = self.ask(texts, wait)
        except (Overloaded, DeadlineExceeded):
            self.end(running)
            return False
        assert future.cancel()
        self.end(running)
        return True


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    yield made
    made.go.release(1000)
    made.batcher.close(20)


def flat(texts: int) -> float:
    """A device that takes 64 texts as quickly as one."""
    return 0.1 * -(-texts // 64)


def slow(texts: int) -> float:
    return 4.0 * texts


def too_many(model: Model, known: Callable[[], None]) -> tuple[int, int]:
    """Rounds of ten callers who come while a batch runs, with 30 seconds each after it: answered in the last, asked."""
    known()
    answered = asked = 0
    for _ in range(6):
        answered = asked = 0
        running = model.begin(wait=1e9)
        deadline = model.clock.now + 34
        waiting: list[Future[int]] = []
        for _ in range(10):
            asked += 1
            with suppress(LetheonError):
                waiting.append(model.ask(1, 34))
        ends = model.moments(waiting)
        model.end(running, *waiting)
        answered = sum(end <= deadline for end in ends)
    return answered, asked


def test_light_batches_that_are_too_late_for_all_make_the_next_ones_lighter(model: Model) -> None:
    """Ten texts take forty seconds, and their callers wait for thirty: they would come again for ever."""
    model.seconds = slow
    answered, _ = too_many(model, lambda: None)
    assert answered >= 4
    assert max(model.ran[-2:]) <= 7, "as many as there is time for"


def test_a_server_that_becomes_slow_is_found_out(model: Model) -> None:
    def quick() -> None:
        model.seconds = flat
        for texts in (64, 10, 1):
            model.answer(texts)
        model.seconds = slow

    answered, _ = too_many(model, quick)
    assert answered >= 4


def test_who_gives_a_text_too_little_time_gets_nobody_else_refused(model: Model) -> None:
    model.seconds = flat
    for _ in range(5):
        model.answer(64)
    for _ in range(20):
        future = model.begin(1, 0.04)  # the step comes after 0.05 s
        model.end(future)
        assert isinstance(future.exception(), DeadlineExceeded)
        late = model.begin(1, 0.08)  # ends after 0.1 s
        model.end(late)
    assert model.taken(500), "8 batches of 0.1 s"
    assert not model.taken(500, 0.5), "and not quicker"


def test_nor_where_nothing_is_known_yet(model: Model) -> None:
    model.seconds = flat
    for _ in range(5):
        model.answer(1, 0.04)
    assert model.taken(500)


@pytest.mark.parametrize("texts", [3, 8, 16, 33, 64])
def test_what_a_stall_has_taught_is_forgotten_within_a_few_batches(model: Model, texts: int) -> None:
    """The heaviest batch took as long as its callers waited, and then the model is quick again."""
    model.seconds = lambda _: 40.0
    model.answer(64)
    assert not model.taken(500), "64 took half of 40 s, at the least"
    model.seconds = flat
    for _ in range(5):
        model.answer(texts)
    assert model.taken(500, 60.0)


def test_one_stall_is_not_what_the_model_takes() -> None:
    pace = Pace(64)
    pace.learn(64, 0.1, late=False)
    pace.learn(64, 30.0, late=True)
    assert pace.seconds(64) == pytest.approx(0.8)
    for _ in range(5):
        pace.learn(64, 30.0, late=True)
    assert pace.seconds(64) == pytest.approx(30.0), "but several are"


def test_work_teaches_nothing(model: Model) -> None:
    model.seconds = lambda texts: 32.0  # two a second
    for _ in range(3):
        model.answer(64, 100.0)
    seen, until = model.batcher._seen, model.batcher._linger_until
    model.seconds = lambda texts: 0.003  # a look at a version
    for _ in range(10):
        look = model.batcher.submit("look", deadline=model.clock.now + 30)
        assert model.entered.acquire(timeout=20)
        model.end(look)
    model.seconds = lambda texts: 3600.0  # and one that is given up
    look = model.batcher.submit("look", deadline=model.clock.now + 30)
    assert model.entered.acquire(timeout=20)
    model.end(look)
    assert isinstance(look.exception(), DeadlineExceeded)
    assert model.batcher._pace.seconds(64) == 32.0
    assert (model.batcher._seen, model.batcher._linger_until) == (seen, until)


# --- the rule by hand ------------------------------------------------------------------------------------------------


def test_nothing_takes_any_time_before_something_is_known() -> None:
    assert Pace(64).seconds(1000) == Pace(64).seconds(0) == 0.0


def test_a_lighter_batch_is_no_quicker_for_its_weight() -> None:
    pace = Pace(64)
    pace.learn(64, 6.4, late=False)
    assert [pace.seconds(n) for n in (1, 10, 64, 74)] == pytest.approx([0.1, 1.0, 6.4, 7.4])
    pace.learn(1, 1.1, late=False)  # 1/1.1 a second, of which a fifth counts
    assert pace.seconds(1) == pytest.approx(1 / (0.8 * 10 + 0.2 / 1.1))
    assert [pace.seconds(n) for n in (2, 64)] == pytest.approx([0.2, 6.4]), "of others it says nothing"


def test_a_heavier_batch_takes_no_less() -> None:
    pace = Pace(64)
    pace.learn(7, 28.0, late=False)
    assert pace.seconds(7) == 28.0
    assert pace.seconds(64) == 20.0, "5 texts, of the same size as 7, take that"
    assert pace.seconds(130) == 48.0, "two such, and two texts at a quarter a second"


def test_a_size_is_within_a_factor_of_two() -> None:
    for most in (1, 2, 3, 8, 48, 64, 100):
        pace = Pace(most)
        sizes = [pace._size(weight) for weight in range(1, most + 1)]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 == pace._size(10 * most)
        for size in set(sizes):
            own = [weight for weight in range(1, most + 1) if sizes[weight - 1] == size]
            assert own[-1] <= 2 * own[0] and own[0] == most // 2**size + 1


def test_quick_light_batches_count_for_heavier_ones() -> None:
    pace = Pace(8)
    pace.learn(8, 4.0, late=False)
    pace.learn(1, 0.25, late=False)
    assert pace.seconds(8) == pytest.approx(8 / 2.4)
    pace.learn(1, 0.01, late=True)  # perhaps it was given up
    assert pace.seconds(8) == pytest.approx(8 / 2.4)


def test_a_batch_that_was_given_up_at_once_is_no_measure() -> None:
    pace = Pace(64)
    pace.learn(10, 0.0, late=True, ended=False)
    assert pace.seconds(10) == pytest.approx(0.0, abs=1e-4)
    pace.learn(10, 40.0, late=True)
    assert pace.seconds(10) == 40.0
    pace.learn(10, 41.0, late=True, ended=False)
    assert pace.seconds(10) == 41.0
    pace.learn(10, 0.0, late=True, ended=False)
    assert pace.seconds(10) == 41.0
