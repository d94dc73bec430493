"""Which rows are nearest to the forget texts, by hand; the checks of a stack of prompts; how long a word is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from api_kit import tiny_llm
from tiny_models import make_tiny_model

from models.evaluation import CheckLimits, CheckReport, check_prompts
from models.examples import Example
from models.inference import Classification
from models.llm import FrozenLLM
from models.neighbours import how_many, nearest, neighbour_figures
from models.soft_prompt import SoftPrompt

RETAIN = [Example(f"the {word} film is {word}") for word in ("good", "bad", "great", "awful", "very", "not")] * 4
FORGET = [Example("what a story"), Example("quite a director")]


def test_how_many() -> None:
    assert [how_many(n) for n in (1, 3, 8, 256, 1024, 100_000)] == [1, 1, 2, 64, 64, 64]


def test_nearest_by_hand() -> None:
    """Two layers of two numbers each. Centred on the rows' mean, which is zero, the second row points as the text."""
    rows = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 5], [-1, 0, -1, 0], [0, -1, 0, -5]])
    forget = torch.tensor([[0.0, 9, 0.1, 1], [0, 0.1, 0, 0.1]])
    assert nearest(rows, forget, 2) == [1]
    assert nearest(rows, -forget, 2) == [3]
    # A layer of long states has no more say than the other.
    assert nearest(torch.tensor([[1.0, 0, 50, -90], [0, 1, -50, 90]] * 2), torch.tensor([[1.0, 0, 5, -9]]), 2) == [0]


def test_figures_by_hand() -> None:
    def said(label: str) -> Classification:
        return Classification(label, label == "unknown", {})

    rows = [Example("a", "positive"), Example("b", "negative"), Example("c"), Example("d", "positive")]
    before = [said("positive"), said("positive"), said("negative"), said("positive")]
    after = [said("unknown"), said("negative"), said("unknown"), said("positive")]
    found = neighbour_figures(rows, before, after)
    assert (found.rows, found.before, found.after, found.abstain) == (4, 0.75, 0.5, 0.5)
    assert found.violations(0.25) == found.violations(0.0) == [], "one answer alone is no evidence"
    worse = neighbour_figures(rows, before, [*after[:3], said("unknown")])
    assert worse.violations(0.5) == [] and len(worse.violations(0.49)) == 1


def _prompt(seed: int) -> SoftPrompt:
    noise = torch.randn(4, tiny_llm().hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(noise, tiny_llm().fingerprint)


def _check(prompt: SoftPrompt, forget: Sequence[Example], retain: Sequence[Example], **limits: float) -> CheckReport:
    return check_prompts(
        tiny_llm(),
        [_prompt(0), prompt],
        forget,
        retain,
        max_retain_rows=99,
        seed=0,
        limits=CheckLimits(0.0, 1.0, 1.0, **limits),
    )


def test_a_stack_is_asked_the_same() -> None:
    copies = [Example(example.text) for example in FORGET] * 2  # the nearest of all
    report = _check(_prompt(3), FORGET, [*RETAIN[:12], *copies])
    assert report.neighbour_rows == 4, "a quarter of sixteen"
    assert report.neighbour_abstain == report.forget_abstain, "they are the forget texts themselves"
    lengths = _prompt(3).embeddings.norm(dim=1) / tiny_llm().word_norm
    assert report.prompt_norm == pytest.approx(float(lengths.max())), "of the newest prompt"
    assert report.prompt_norm_mean == pytest.approx(float(lengths.mean()))
    without = _check(_prompt(3), (), RETAIN)
    assert without.neighbour_rows is without.neighbour_abstain is without.prompt_norm is None


def test_a_stack_that_fails_these_limits() -> None:
    silent = next(p for p in map(_prompt, range(1, 300)) if _check(p, FORGET, RETAIN).neighbour_abstain == 1)
    report = _check(silent, FORGET, RETAIN, max_neighbour_drop=0.5)
    assert report.missed == ["retain"] and "nearest to the forget texts" in report.violations[0]
    assert report.neighbour_accuracy == 0 and report.neighbour_accuracy_before == 1, "unlabelled rows, all answered"
    assert report.prompt_norm is not None
    report = _check(silent, FORGET, RETAIN, max_prompt_norm=report.prompt_norm * 0.99)
    assert report.missed == ["norm"] and "times as long" in report.violations[0]


def test_the_length_of_a_word_is_what_the_model_looks_up(tmp_path: Path) -> None:
    gemma = FrozenLLM.load(str(make_tiny_model(tmp_path / "g", family="gemma2")), quantization="none", device="cpu")
    plain = float(gemma.embed.weight.norm(dim=1).mean())
    assert gemma.word_norm == pytest.approx(plain * gemma.hidden_size**0.5, rel=1e-3)
    llm = tiny_llm()
    assert llm.word_norm == pytest.approx(float(llm.embed.weight.norm(dim=1).mean()))
