"""Hand-worked numbers for the figures of merit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.metrics import (
    auc,
    bootstrap,
    difference,
    drift,
    flips,
    likelihood_ratio,
    log_odds,
    tpr_at_fpr,
    wilson,
)

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.double))


def test_bootstrap_by_hand() -> None:
    """Of 400 coin throws, 100 heads: the normal approximation is 0.25 ± 1.96·√(0.25·0.75/400)."""
    found = bootstrap(torch.tensor([1.0] * 100 + [0.0] * 300))
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.mean == 0.25
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert bootstrap(torch.ones(5)).low == 1.0
    assert bootstrap(torch.tensor([0.0, 1.0]), seed=3) == bootstrap(torch.tensor([0.0, 1.0]), seed=3)
    with pytest.raises(ValueError, match="no values"):
        bootstrap(torch.empty(0))


def test_wilson_by_hand() -> None:
    """1 of 10 and 0 of 10: the textbook's 0.018 to 0.404, and 0 to 0.278."""
    found = wilson(1, 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.0179, 0.4042), abs=1e-4)
    assert wilson(0, 10).low == 0 and wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10).high == pytest.approx(1.0)
    for hits, rows in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="not a share"):
            wilson(hits, rows)


def test_a_difference_is_paired() -> None:
    hard = torch.tensor([0.0, 1.0] * 50)
    found = difference(hard, hard)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="100 and 2"):
        difference(hard, hard[:2])


def test_auc_by_hand() -> None:
    # Pairs (3,1) (3,2) (2,1) win, (2,2) ties: (3 + 1/2) / 4.
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="members and others"):
        auc(torch.empty(0), torch.ones(1))


@given(scores, scores)
def test_auc_is_the_share_of_pairs(members: torch.Tensor, others: torch.Tensor) -> None:
    pairs = [(a > b) + (a == b) / 2 for a in members.tolist() for b in others.tolist()]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(members, others) + auc(others, members) == pytest.approx(1)


def test_tpr_at_fpr_by_hand() -> None:
    others = torch.arange(100.0)  # 1 % may pass: 99 does, so the threshold is 98
    members = torch.tensor([97.0, 98.0, 98.5, 200.0])
    assert tpr_at_fpr(members, others, 0.01) == 0.5
    assert tpr_at_fpr(members, others, 0.0) == 0.25
    assert tpr_at_fpr(members, others[:50], 0.01) == 1.0  # of fifty others none may pass, and none does
    assert tpr_at_fpr(members, others, 1.0) == 1.0


@given(scores, scores, st.floats(0, 1))
def test_tpr_keeps_the_false_positive_rate(members: torch.Tensor, others: torch.Tensor, fpr: float) -> None:
    rate = tpr_at_fpr(members, others, fpr)
    thresholds = [*others.tolist(), float("-inf")]
    fits = [t for t in thresholds if float((others > t).double().mean()) <= fpr + 1e-9]
    assert rate == max(float((members > t).double().mean()) for t in fits)


def test_drift_and_flips_by_hand() -> None:
    base, served = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert drift(served, base).tolist() == pytest.approx([forward, 0.0], abs=1e-9)
    assert flips(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [False, True]


def test_log_odds_by_hand() -> None:
    assert log_odds(torch.tensor([0.5, 0.8])).tolist() == pytest.approx([0.0, math.log(4)])
    assert bool(torch.isfinite(log_odds(torch.tensor([0.0, 1.0]))).all())


def test_likelihood_ratio_by_hand() -> None:
    # One row: trained with it 2 and 4 (mean 3, variance 2), without it 0 and 1 (mean 0.5, variance 0.5).
    shadows = torch.tensor([[2.0], [4.0], [0.0], [1.0]])
    trained = torch.tensor([[True], [True], [False], [False]])
    found = float(likelihood_ratio(shadows, trained, torch.tensor([3.0])))
    assert found == pytest.approx((0 - 0.5 * math.log(2)) - (-(2.5**2) / 1 - 0.5 * math.log(0.5)))
    # Another row with the same spread has no say in the means, and leaves the variances as they are.
    both = likelihood_ratio(torch.cat([shadows, shadows + 10], 1), trained.expand(4, 2), torch.tensor([3.0, 13.0]))
    assert both.tolist() == pytest.approx([found, found])
    for bad in (torch.ones(4, 1, dtype=torch.bool), torch.tensor([[True], [False], [False], [False]])[:2]):
        with pytest.raises(ValueError, match="every row needs models"):
            likelihood_ratio(shadows[: len(bad)], bad, torch.tensor([3.0]))


def test_scores_that_say_nothing_are_refused() -> None:
    shadows, trained = torch.tensor([[1.0], [2.0]]), torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="not finite"):
        likelihood_ratio(shadows, trained, torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="shapes do not fit"):
        likelihood_ratio(shadows, trained, torch.tensor([1.0, 2.0]))


@given(st.integers(0, 10_000))
def test_the_likelihood_ratio_finds_members_and_not_others(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    trained = torch.stack([torch.randperm(8, generator=draw) < 4 for _ in range(60)], dim=1)
    level = torch.randn(60, generator=draw)  # each row is as hard as it is

    def scores(members: torch.Tensor) -> torch.Tensor:
        return level + 3.0 * members + 0.1 * torch.randn(members.shape, generator=draw)

    members = torch.arange(60) < 30
    ratio = likelihood_ratio(scores(trained), trained, scores(members))
    assert auc(ratio[members], ratio[~members]) == 1.0
    assert int((ratio > 0).sum()) == 30
