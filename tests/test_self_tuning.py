"""The schedule of tries, by hand and as properties."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from models.self_tuning import next_try
from models.training import TrainingConfig

FIRST = TrainingConfig(alpha=0.4, beta=0.5, learning_rate=0.02, num_virtual_tokens=30, seed=7)
misses = st.lists(st.sets(st.sampled_from(["forget", "retain", "norm"]), min_size=1), max_size=6)


def test_by_hand() -> None:
    def after(*missed: str) -> tuple[float, float, int, int, bool] | None:
        found = next_try(FIRST, [part.split("+") for part in missed], max_tries=4)
        if found is None:
            return None
        config = found.config
        return config.alpha, config.beta, config.num_virtual_tokens, config.seed, found.goes_on

    assert after() == (0.4, 0.5, 30, 7, False)
    assert after("forget") == (0.2, 0.25, 30, 8, True)
    assert after("retain") == (0.8, 1.0, 30, 8, True)
    assert after("forget", "retain") == (0.4, 0.5, 30, 9, True)
    assert after("forget+retain") == (0.4, 0.5, 45, 8, False)
    assert after("forget+retain", "retain") == (0.8, 1.0, 45, 9, True)
    assert after("forget", "forget+retain") == (0.4, 0.5, 45, 9, False), "from where the first one began"
    assert after("forget", "forget", "forget") == (0.05, 0.0625, 30, 10, True)
    assert after("forget", "forget", "forget", "forget") is None  # four tries were all there may be
    assert after("set") is after("forget+set") is after("forget", "set") is None


def test_a_prompt_that_grew_too_large_begins_anew_in_smaller_steps() -> None:
    def rate(*missed: str) -> tuple[float, bool, int]:
        found = next_try(FIRST, [part.split("+") for part in missed], max_tries=4)
        assert found is not None
        return found.config.learning_rate, found.goes_on, found.config.num_virtual_tokens

    assert rate("norm") == (0.01, False, 30)
    assert rate("norm", "norm") == (0.005, False, 30)
    assert rate("forget+retain+norm") == (0.01, False, 30), "what it misses otherwise may come of its size"
    assert rate("norm", "norm", "forget") == (0.005, True, 30), "the rate never rises again"
    assert rate("forget+retain", "norm") == (0.01, False, 45)
    assert next_try(FIRST, [["norm", "set"]], max_tries=4) is None


def test_from_zero_a_weight_can_grow() -> None:
    zero = TrainingConfig(alpha=0.0, beta=0.0)
    found = next_try(zero, [["retain"]], max_tries=3)
    assert found is not None and found.config.alpha > 0 and found.config.beta > 0


@given(misses, st.integers(1, 8))
def test_it_is_budgeted_and_every_try_is_another_run(missed: list[set[str]], max_tries: int) -> None:
    plans = [next_try(FIRST, missed[:n], max_tries=max_tries) for n in range(len(missed) + 1)]
    made = [plan for plan in plans if plan is not None]
    assert len(made) == min(len(missed) + 1, max_tries)
    assert len({plan.config for plan in made}) == len(made)
    assert all(0 < plan.config.num_virtual_tokens <= 45 for plan in made)
    for before, plan in pairwise(made):  # a φ goes on only in a prompt of its own length
        assert not plan.goes_on or plan.config.num_virtual_tokens == before.config.num_virtual_tokens
