"""What to train next when a prompt failed its checks: a short, budgeted schedule over α, β, p and the seed.

A pure function of what was missed, so a worker that takes over in the middle finds itself at the same place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from models.training import TrainingConfig

Missed = Literal["forget", "retain", "norm", "set"]
"""What a check asks: forget rows that abstain, retain rows answered as before, a prompt of the size of words, and the
active set as a whole."""

MORE_TOKENS = 1.5


@dataclass(frozen=True)
class Try:
    """``goes_on``: from the φ that the try before it ended with."""

    config: TrainingConfig
    goes_on: bool


def next_try(first: TrainingConfig, missed: Sequence[Collection[str]], *, max_tries: int) -> Try | None:
    """The try after those that missed this much; ``first`` is the first one's. None: give up.

    Too little forgotten: retain rows weigh half, from where it was. Too much disturbed: they weigh twice as much. Both:
    another start with more virtual tokens. Too large: another start, in steps of half the size. What the gates claim,
    or an earlier request that would be lost, is not a prompt's to mend. Every try has a seed of its own, so that no
    other one's checkpoint can pass for its own.
    """
    current = Try(first, goes_on=False)
    for number, found in enumerate(missed, start=1):
        if number >= max_tries or not found or "set" in found:
            return None
        seed = first.seed + number
        if "norm" in found:  # whatever else it missed: such a prompt says little of what one of a sound size would do
            config = replace(current.config, seed=seed, learning_rate=current.config.learning_rate / 2)
            current = Try(config, goes_on=False)
        elif "forget" in found and "retain" in found:
            tokens = int(first.num_virtual_tokens * MORE_TOKENS)
            current = Try(replace(first, num_virtual_tokens=tokens, seed=seed), goes_on=False)
        else:
            config = replace(current.config, seed=seed)
            factor = 0.5 if "forget" in found else 2.0
            # From zero there is no doubling.
            alpha, beta = (max(factor * value, 0.05) for value in (config.alpha, config.beta))
            rate = min(config.learning_rate, first.learning_rate / 2)
            current = Try(replace(config, alpha=alpha, beta=beta, learning_rate=rate), goes_on=True)
    return current
