"""``bench.oracle`` and ``bench.starts``, whole, on a tiny model: what is kept is not made twice."""

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

from bench import frontier, oracle, plots, starts, tuned
from bench.overlaps import members_of, overlapping
from models.evaluation import RowAnswers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


def test_parts_of_each_other_are_one_group() -> None:
    texts = ["b c", "x", "a b c", "c", "x y", "c d"]  # "c" joins "b c" and "c d"
    groups = overlapping(texts)
    assert groups == [0, 1, 0, 0, 1, 0]
    assert dict(members_of(groups)) == {0: [0, 2, 3, 5], 1: [1, 4]}


def test_membership_by_hand() -> None:
    ratio, score = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = oracle.membership(ratio, score, 2)
    assert found == {"lira_auc": 1.0, "lira_tpr_at_1_percent": 1.0, "loss_auc": 1.0}, (
        "LOSS reads it the other way round"
    )


def test_the_gap_is_to_the_oracle_group_by_group() -> None:
    def answers(*rows: list[float]) -> dict[str, RowAnswers]:
        scores = torch.tensor(rows)
        return {"held_out": RowAnswers(scores.argmax(-1), scores, scores[:, :2].argmax(-1))}

    of_oracle = answers([0.5, 0.25, 0.25], [0.9, 0.05, 0.05])
    wanted = {"held_out": torch.tensor([0, 1])}
    same = oracle.gap(of_oracle, of_oracle, wanted)["held_out"]
    assert (same["accuracy"], same["abstain"], same["differs"], same["drift_nats"]) == (0.5, 0.0, 0.0, 0.0)
    served = oracle.gap(answers([0.25, 0.25, 0.5], [0.9, 0.05, 0.05]), of_oracle, wanted)["held_out"]
    assert (served["accuracy"], served["abstain"], served["differs"]) == (0.0, 0.5, 0.5)
    assert served["drift_nats"] == 0.0, "of the row that is answered"
    moved = oracle.gap(answers([0.25, 0.5, 0.25], [0.05, 0.05, 0.9]), of_oracle, wanted)["held_out"]
    # KL((.5, .25, .25) ‖ (.25, .5, .25)) = .5 ln 2 - .25 ln 2
    assert moved["drift_nats"] == pytest.approx(0.25 * 0.6931, rel=1e-3)


def test_models_with_and_without_the_texts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oracle, "ROUTED_TRAINING", replace(oracle.ROUTED_TRAINING, max_steps=4, check_every=4))
    monkeypatch.setattr(oracle, "GATE_ROWS", 80)
    data = write_sets(tmp_path / "data", {"zaq": 9, "wub": 3, "few": 1}, unseen=2, retain=120)
    command = ["oracle", "--data", str(data), "--base", str(base), "--work", str(tmp_path / "work"), "--epochs", "1"]
    command += ["--quantization", "none", "--pool", "12", "--retain", "24", "--held-out", "20", "--shadows", "4"]
    command += ["--out", str(tmp_path / "oracle.json")]
    monkeypatch.setattr(sys, "argv", command)
    oracle.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "oracle.json").read_text()) == found
    assert (found["pool"], found["members"], found["retain_rows"]) == (12, 6, 24)
    assert set(found["gap"]) == set(found["membership"]) == {"bare", "prompt", "served", "oracle"}
    for groups in found["gap"].values():
        assert set(groups) == {"members", "not_members", "held_out"}
    assert all(group["differs"] == 0 and group["drift_nats"] in (0, None) for group in found["gap"]["oracle"].values())
    assert all(0 <= value <= 1 for leaks in found["membership"].values() for value in leaks.values())

    figure = plots.oracle(found)
    assert [bar.get_height() for bar in figure.axes[1].patches] == [x["lira_auc"] for x in found["membership"].values()]
    plt.close(figure)
    monkeypatch.setattr(tuned, "finetune", None)
    monkeypatch.setattr(oracle, "train_soft_prompt", None)
    oracle.main()
    assert json.loads(capsys.readouterr().out) == found
    monkeypatch.setattr(sys, "argv", [*command, "--pool", "14"])
    with pytest.raises(SystemExit, match="only 13"):
        oracle.main()


def test_every_start_is_tried_on_the_same_requests(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frontier, "PEOPLE", ("zaq", "wub"))
    monkeypatch.setattr(starts, "TEXTS", 4)
    monkeypatch.setattr(starts, "HELD_OUT", 20)
    monkeypatch.setattr(starts, "GENERIC_ROWS", 8)
    quick = replace(starts.CONFIG, num_virtual_tokens=4, min_steps=4, check_every=2, max_doublings=0)
    monkeypatch.setattr(starts, "CONFIG", quick)
    data = write_sets(tmp_path / "data", {"zaq": 8, "wub": 8}, unseen=4)
    command = ["starts", "--data", str(data), "--base", str(base), "--work", str(tmp_path / "work"), "--epochs", "1"]
    command += ["--quantization", "none", "--retain-rows", "60", "--out", str(tmp_path / "starts.json")]
    monkeypatch.setattr(sys, "argv", command)
    starts.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "starts.json").read_text()) == found
    runs = {(row["person"], row["texts"], row["start"]) for row in found["trainings"]}
    assert runs == {(who, 4, start) for who in ("zaq", "wub") for start in starts.STARTS}
    for start, figures in found["by_start"].items():
        rows = [row for row in found["trainings"] if row["start"] == start]
        assert (figures["trainings"], figures["steps_worst"]) == (2, max(row["steps"] for row in rows))
    figure = plots.starts(found)
    assert sorted(figure.axes[0].lines[0].get_ydata()) == sorted(row["steps"] for row in found["trainings"])
    plt.close(figure)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    starts.main()
    assert json.loads(capsys.readouterr().out) == found
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
