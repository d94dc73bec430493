"""Hand-worked numbers for the SPUL loss."""

from __future__ import annotations

import math

import pytest
import torch

from models.losses import forget_ce, retain_ce, retain_kl, spul_loss


def test_forget_ce_by_hand() -> None:
    # Row 1: softmax of (0, 0) is (1/2, 1/2). Row 2: logits (ln 3, 0) give (3/4, 1/4).
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) + math.log(4)) / 2  # targets: 1 → 1/2, 1 → 1/4
    assert float(forget_ce(logits, torch.tensor([1, 1]))) == pytest.approx(expected)


def test_retain_ce_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0]])
    assert float(retain_ce(logits, torch.tensor([0]))) == pytest.approx(math.log(4 / 3))


def test_retain_kl_by_hand_and_direction() -> None:
    prompted = torch.tensor([[math.log(3), 0.0]])  # (3/4, 1/4)
    teacher = torch.tensor([[0.0, 0.0]])  # (1/2, 1/2)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(retain_kl(prompted, teacher)) == pytest.approx(forward)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(retain_kl(teacher, prompted)) == pytest.approx(backward)
    assert forward != pytest.approx(backward)


def test_kl_of_equal_distributions_is_zero_whatever_the_offset() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert retain_kl(logits + 5.0, logits).tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_kl_is_of_each_row_alone() -> None:
    prompted, teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    disturbed = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert retain_kl(prompted, teacher).tolist() == pytest.approx([disturbed, 0.0], abs=1e-6)


def test_spul_loss_weighs_its_terms() -> None:
    parts = [torch.tensor(x) for x in (2.0, 3.0, 5.0)]
    assert float(spul_loss(*parts, alpha=0.5, beta=0.1)) == pytest.approx(2 + 1.5 + 0.5)
