"""Near copies by their spelling: the estimate against the exact similarity, and what it tells apart."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.vault import letters
from models.near_copies import GRAM, NEAR, side_by_side, signature, similarities

WORDS = ("the", "film", "is", "a", "slow", "story", "of", "two", "people", "who", "never", "meet", "in", "town", "sea")


def _exact(one: str, other: str) -> float:
    grams = [{text[i : i + GRAM] for i in range(len(text) - GRAM + 1)} for text in (one, other)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def _estimate(one: str, other: str) -> float:
    return float(next(similarities(side_by_side([signature(one)]), side_by_side([signature(other)])))[0])


def _text(seed: int, length: int = 20) -> str:
    return "".join(random.Random(seed).choices(WORDS, k=length))


def test_the_estimate_is_near_the_truth() -> None:
    errors = []
    for seed in range(200):
        one = _text(seed)
        other = one[: (seed % 10) * len(one) // 10] + _text(seed + 1000)
        errors.append(_estimate(one, other) - _exact(one, other))
    assert abs(sum(errors) / len(errors)) < 0.03
    assert (sum(e * e for e in errors) / len(errors)) ** 0.5 < 0.06


@given(st.text(min_size=1, max_size=40))
def test_a_text_is_its_own_copy(text: str) -> None:
    folded = letters(text)
    assert _estimate(folded, folded) == 1.0


def test_changed_copies_are_near_and_other_texts_are_not() -> None:
    text = letters("Jane Example was the best part of this rather slow film")
    for other in (
        "jane example was the best part of this rahter slow film",
        "this rather slow film : jane example was the best part of",
        "they say Jane Example was the best part of this rather slow film",
    ):
        assert _estimate(text, letters(other)) >= NEAR
    for other in ("Jane Example bored me", "the best part of the film was its end", "x"):
        assert _estimate(text, letters(other)) < NEAR


def test_side_by_side_and_in_order() -> None:
    texts = [_text(seed) for seed in range(7)]
    rows = side_by_side([signature(text) for text in texts])
    found = list(similarities(rows, rows))
    assert len(found) == 7
    for place, scores in enumerate(found):
        assert scores.shape == (7,) and scores.argmax() == place and scores[place] == pytest.approx(1.0)
        assert scores.max() == 1.0 and sorted(scores)[-2] < 0.9
