"""Variants: what each rule does, and what none may do."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.variants import RULES, case, frame, order, truncation, typos, variants

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=80)
TEXT = "spielberg's most inventive film, and also his darkest"


@given(texts, st.integers(0, 2**32), st.sampled_from(sorted(RULES)))
def test_rules_are_functions_of_text_and_seed(text: str, seed: int, rule: str) -> None:
    assert RULES[rule](text, seed) == RULES[rule](text, seed)
    assert all(found != text for found in variants(text, seed=seed).values())


def test_each_rule_by_hand() -> None:
    assert {case(TEXT, seed) for seed in range(20)} == {TEXT.upper(), TEXT.title()}  # it is lower case already
    assert order(TEXT, 3) == "and also his darkest, spielberg's most inventive film"
    assert order("one two three four", 0) == "three four one two"
    assert {truncation("a b c d e f", seed) for seed in range(20)} == {"a b c d", "c d e f"}
    assert truncation("a b", 1) == "a b"
    assert all(TEXT in frame(TEXT, seed) for seed in range(20))


@given(st.lists(st.from_regex(r"[a-z]{1,9}", fullmatch=True), min_size=1, max_size=15), st.integers(0, 999))
def test_typos_are_few_and_small(words: list[str], seed: int) -> None:
    before, after = words, typos(" ".join(words), seed).split(" ")
    assert len(before) == len(after)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) <= max(1, len(words) // 5)
    for a, b in changed:
        assert abs(len(a) - len(b)) <= 1 and a[0] == b[0]
        assert sum(((Counter(a) - Counter(b)) + (Counter(b) - Counter(a))).values()) <= 2


@given(st.lists(st.from_regex(r"[a-z]{1,9}", fullmatch=True), min_size=1, max_size=15), st.integers(0, 999))
def test_order_and_truncation_keep_the_words(words: list[str], seed: int) -> None:
    text = " ".join(words)
    assert Counter(order(text, seed).split()) == Counter(words)
    kept = truncation(text, seed).split()
    assert len(kept) >= 2 * len(words) / 3 and not Counter(kept) - Counter(words)


@pytest.mark.parametrize("text", ["", " ", "!", "1 2 3", "ok"])
def test_texts_with_little_to_change(text: str) -> None:
    assert text not in variants(text).values()
