"""``bench.attacks``: its arithmetic by hand, and all of it on a tiny model; a second run trains nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_kit import write_sets
from matplotlib import pyplot as plt
from tiny_models import make_tiny_model

from bench import attacks, plots, sequence
from models.evaluation import RowAnswers
from models.examples import Example
from models.inference import Classification
from models.llm import FrozenLLM

pytestmark = pytest.mark.slow

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "acting", "plot", "story", "scene"]
PEOPLE = ("zaq", "wub")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def llm(base: Path) -> FrozenLLM:
    return FrozenLLM.load(str(base), quantization="none", device="cpu")


def test_every_attack_has_figures_and_what_was_trained_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = replace(attacks.ROUTED_TRAINING, max_steps=6, check_every=6)
    for module in (attacks, sequence):
        monkeypatch.setattr(module, "ROUTED_TRAINING", quick)
    command = [
        "attacks",
        "--data",
        str(write_sets(tmp_path / "data", dict.fromkeys(PEOPLE, 10), unseen=10)),
        "--base",
        str(base),
        "--epochs",
        "1",
    ]
    command += ["--work", str(tmp_path / "work"), "--retain-rows", "40", "--measure-rows", "30", "--people", "2"]
    command += ["--quantization", "none", "--out", str(tmp_path / "attacks.json")]
    monkeypatch.setattr(sys, "argv", command)
    attacks.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "attacks.json").read_text()) == found

    assert {row["person"] for row in found["people"]} == set(PEOPLE)
    parts = {"no_attack", "prompt_strip", "forced_choice", "top2", "variants", "membership"}
    parts |= {"reintroduction_1", "reintroduction_4", "dilution_1", "dilution_2", "dilution_4"}
    assert set(found["mean"]) == parts
    for row in (*found["people"], found["mean"]):
        for part in parts:
            for name, value in row[part].items():
                assert value is None or name in ("rows", "shortened") or 0 <= value <= 1, (part, name)
    bare = found["precision"]["trained_under"]["bare"]
    assert set(bare) == set(found["precision"]["training"]) == {"nf4", "int8", "none", "bf16"}
    assert all(set(row) == set(bare) for row in found["precision"]["trained_under"].values())
    assert found["precision"]["held_out_rows"] == 30

    for drawn, panels in ((found, 3), (found | {"precision": None}, 1)):
        figure = plots.attacks(drawn)
        assert len(figure.axes) == panels
        plt.close(figure)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    assert len([file for file in kept if file.parts[-3] == "attacks" and file.suffix == ".safetensors"]) == 3
    monkeypatch.setattr(attacks, "PRECISIONS", {"none": "none", "bf16": "none"})
    digests = iter(("before", "after"))
    monkeypatch.setattr(FrozenLLM, "weights_digest", lambda self: next(digests))
    with pytest.raises(SystemExit, match="weights changed"):
        attacks.main()
    assert capsys.readouterr().out == ""
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()} == kept


def test_a_query_too_long_loses_its_front(llm: FrozenLLM) -> None:
    parts = ["good film ", "bad plot "]
    whole = llm.count_tokens("good film bad plot the story")
    assert attacks.fitted(llm, parts, "the story", whole) == ("good film bad plot the story", False)
    assert attacks.fitted(llm, parts, "the story", whole - 1) == ("bad plot the story", True)
    assert attacks.fitted(llm, parts, "the story", 0) == ("the story", True)  # the text itself is never cut


def said(label: str) -> Classification:
    return Classification(label, label == "unknown", {"negative": 0.0, "positive": 0.0, "unknown": 0.0, label: 1.0})


def test_shares_by_hand() -> None:
    rows = [Example(str(i), "positive") for i in range(4)]
    answers = [said("unknown"), said("positive"), said("negative"), said("unknown")]
    assert attacks.shares(answers, rows) == {"unknown": 0.5, "true_label": 0.25}
    assert attacks.probabilities(answers[1:3]).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_forced_choice_is_of_what_the_prompt_hides(llm: FrozenLLM) -> None:
    negative, positive = llm.verbalizer.label_ids
    scores = torch.tensor([[0.1, 0.2, 0.7], [0.2, 0.1, 0.7], [0.2, 0.1, 0.7], [0.1, 0.8, 0.1]])
    behind = RowAnswers(torch.zeros(4), scores, torch.tensor([positive, negative, negative, positive]))
    found = attacks.forced_choice(llm, behind, torch.tensor([1, 1, 0, 1]))
    assert found == {"rows": 3, "prompt_abstain": 0.75, "right": pytest.approx(2 / 3), "majority": pytest.approx(2 / 3)}
    none = RowAnswers(torch.zeros(1), scores[3:], torch.tensor([positive]))
    assert attacks.forced_choice(llm, none, torch.tensor([1]))["right"] is None


def test_the_second_answer_is_read_only_where_a_label_stands_out() -> None:
    scores = torch.tensor([[0.0, 0.0, 1.0], [0.1, 0.2, 0.7], [0.2, 0.1, 0.7], [0.0, 0.0, 1.0], [0.9, 0.1, 0.0]])
    found = attacks.top2(scores, torch.tensor([0, 1, 1, 1, 0]))
    assert found == {"rows": 4, "readable": 0.5, "right": 0.25}
    assert attacks.top2(scores[4:], torch.tensor([0])) == {"rows": 0, "readable": None, "right": None}


def test_membership_is_read_in_the_better_direction() -> None:
    low, high = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.7])
    found = attacks.leaks({"bare": (low, high), "served": (torch.zeros(3), torch.zeros(2))})
    # Of six pairs the member is lower in five; two of three members are lower than every other.
    assert found["bare_auc"] == pytest.approx(5 / 6) and found["bare_tpr_at_1_percent"] == pytest.approx(2 / 3)
    assert found["served_auc"] == 0.5 and found["served_tpr_at_1_percent"] == 0.0
    assert torch.equal(
        attacks.true_label(torch.tensor([[0.1, 0.9], [0.3, 0.7]]), torch.tensor([1, 0])), high.new_tensor([0.9, 0.3])
    )


def test_means_of_fractions_and_sums_of_counts() -> None:
    rows: list[attacks.Figures] = [
        {"a": {"right": 0.5, "rows": 3, "none": None}},
        {"a": {"right": 1.0, "rows": 0, "none": None}},
        {"a": {"right": None, "rows": 1, "none": None}},
    ]
    assert attacks.summary(rows) == {"a": {"right": 0.75, "rows": 4, "none": None}}


def test_bfloat16_rounds_parameters_and_is_another_model(base: Path, llm: FrozenLLM) -> None:
    rounded = attacks.in_bfloat16(FrozenLLM.load(str(base), quantization="none", device="cpu"))
    assert rounded.dtype == torch.bfloat16 and rounded.fingerprint != llm.fingerprint
    assert {buffer.dtype for buffer in rounded.model.buffers()} == {torch.float32}
    for exact, found in zip(llm.model.parameters(), rounded.model.parameters(), strict=True):
        assert torch.equal(exact.bfloat16(), found)
