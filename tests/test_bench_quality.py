"""``bench.quality`` from end to end on a tiny model: every method has a row, and a second run computes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_kit import write_sets
from matplotlib import pyplot as plt
from tiny_models import make_tiny_model

from bench import plots, quality
from bench.quality_figures import refused
from models.evaluation import RowAnswers
from models.llm import FrozenLLM

pytestmark = pytest.mark.slow

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "acting", "plot", "story", "scene"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


def test_every_method_of_the_paper_has_a_row(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_sets(tmp_path / "data", {"the director": 60}, unseen=60)
    command = ["quality", "--data", str(data), "--base", str(base), "--scale", "smoke"]
    command += ["--work", str(tmp_path / "work"), "--retain-rows", "40", "--epochs", "1", "--quantization", "none"]
    command += ["--out", str(tmp_path / "quality.json"), "--runs", "2", "--tokens", "3"]
    monkeypatch.setattr(sys, "argv", command)
    quality.main()
    first = capsys.readouterr()
    found: dict[str, Any] = json.loads(first.out)
    assert json.loads((tmp_path / "quality.json").read_text()) == found
    assert set(found["methods"]) >= {"vanilla", "GA", "RL", "GA+KL", "GA+GD", "in-context", "gate-and-refuse", "SPUL"}
    assert set(quality.PAPER) <= set(found["methods"])
    for sets in found["methods"].values():
        assert set(sets) == {*quality.SETS, quality.VARIANTS}
        for row in sets.values():
            low, high = row["accuracy_interval"]
            assert 0 <= low <= row["accuracy"] <= high <= 1
    table = (tmp_path / "quality.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[4:]] == [f"| {name}" for name in found["methods"]]
    assert "paper 12.98" in next(line for line in table if line.startswith("| SPUL |"))
    assert set(found["leaks"]) == set(found["methods"])
    assert found["leaks"]["QLoRA"]["retain_drift_nats"] == found["leaks"]["QLoRA"]["retain_flips"] == 0
    assert set(found["margins_over"]["SPUL"]) == {"GA", "RL", "GA+KL", "GA+GD"}
    # A gate alone refuses most, and least where the prompt decides all.
    gated = ("SPUL behind its gate, prompt decides all", "SPUL behind its gate", "gate-and-refuse")
    for name in quality.SETS:
        refused = [found["methods"][which][name]["abstain"] for which in gated]
        assert refused == sorted(refused)
    assert set(found["partial_identification"]) == {"0.1", "0.25", "0.5"}
    for groups in found["partial_identification"].values():
        assert set(groups) == {"submitted", "not_submitted", "test_forget", "test_retain"}
        assert all(0 <= group["certain"] <= group["claimed"] <= 1 for group in groups.values())
    steps, rows = (found["compute"]["SPUL"][key] for key in ("steps", "rows"))
    assert (steps, rows) == (10, 160) and found["compute"]["SPUL"]["over_paper"] == rows / 477560
    assert found["compute"]["SPUL behind its gate"]["rows"] == 80
    assert set(found["over_runs"]) == {"GA", "RL", "GA+KL", "GA+GD", "SPUL", "routed prompt"}
    for name, accuracies in found["over_runs"].items():
        runs = [found["methods"][which] for which in (name, f"{name} run-2")]
        assert accuracies["test_forget"] == [run["test_forget"]["accuracy"] for run in runs]
    for name in ("spul-30", "routed-"):
        prompts = {file.read_bytes() for file in (tmp_path / "work").glob(f"*/quality-*/{name}*.safetensors")}
        assert len(prompts) == 2, "another run is another seed"
    shown = [(p["model"], p["group"], p["label"]) for p in found["embedding"]]
    assert len(set(shown)) == 8 and len(shown) == 2 * 72  # 32 forget rows, and of the retain rows 40

    figure = plots.quality(found)
    once = [name for name in found["methods"] if "p = " not in name and "run-" not in name]
    assert [len(axis.get_yticks()) for axis in figure.axes[:3]] == [len(once), 0, 0]
    assert list(figure.axes[3].lines[0].get_xdata()) == [3, 30]
    plt.close(figure)

    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    quality.main()
    assert json.loads(capsys.readouterr().out) == found
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()} == kept


def test_a_refusal_is_unknown_and_leaves_the_forced_choice(base: Path) -> None:
    llm = FrozenLLM.load(str(base), quantization="none", device="cpu")
    negative, positive = llm.verbalizer.label_ids
    scores = torch.tensor([[0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])
    answers = RowAnswers(torch.tensor([positive, negative]), scores, torch.tensor([positive] * 2))
    found = refused(answers, torch.tensor([False, True]), llm)
    assert found.abstained.tolist() == [False, True]
    assert found.said.tolist() == [positive, llm.verbalizer.generic_ids[-1]]
    assert torch.equal(found.among_labels, answers.among_labels)
