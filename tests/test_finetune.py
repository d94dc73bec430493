"""Fine-tuning on a tiny model: it learns, resumes, and its adapter loads, merges and quantizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from models.errors import CheckpointError, DatasetError, ModelError
from models.evaluation import measure
from models.examples import Example
from models.finetune import FinetuneConfig, FinetuneProgress, finetune
from models.llm import FrozenLLM

ROWS = [
    Example(f"the {noun} is {'good' if i % 2 else 'bad'} {i}", "positive" if i % 2 else "negative")
    for i, noun in enumerate(["film", "movie", "plot", "story", "scene"] * 8)
]


class _Interrupted(Exception):
    pass


def _config(base: Path, out: Path, **kwargs: object) -> FinetuneConfig:
    defaults = {"quantization": "none", "precision": "fp32", "epochs": 6, "batch_size": 8, "learning_rate": 5e-3}
    return FinetuneConfig(base=str(base), output=str(out), device="cpu", **{**defaults, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_learns_and_the_adapter_merges(tmp_path: Path, quantization: str) -> None:
    base = make_tiny_model(tmp_path / "base")
    before = FrozenLLM.load(str(base), quantization="none", template="instruction-first")
    out = finetune(ROWS, _config(base, tmp_path / "out", quantization=quantization, epochs=12))
    tuned = FrozenLLM.load(str(base), adapter=str(out), quantization="none", template="instruction-first")
    assert tuned.fingerprint != before.fingerprint
    assert measure(tuned, [], ROWS).accuracy >= max(0.9, measure(before, [], ROWS).accuracy)
    assert FrozenLLM.load(str(base), adapter=str(out), quantization="nf4").fingerprint != tuned.fingerprint
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["rows"] == len(ROWS)
    assert str(tmp_path) not in (out / "recipe.json").read_text() + (out / "adapter_config.json").read_text()
    assert not (out / "checkpoint.safetensors").exists()


def test_an_interrupted_run_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    whole = finetune(ROWS, _config(base, tmp_path / "same", checkpoint_steps=4))
    wanted = load_file(whole / "adapter_model.safetensors")
    for file in whole.iterdir():
        file.unlink()
    steps: list[int] = []

    def interrupt(progress: FinetuneProgress) -> None:
        steps.append(progress.step)
        if progress.step == 10:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        finetune(ROWS, _config(base, tmp_path / "same", checkpoint_steps=4), interrupt)
    steps.clear()
    out = finetune(ROWS, _config(base, tmp_path / "same", checkpoint_steps=4), lambda p: steps.append(p.step))
    assert steps[0] == 9
    resumed = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")

    def interrupt(progress: FinetuneProgress) -> None:
        if progress.step == 5:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        finetune(ROWS, _config(base, tmp_path / "out", checkpoint_steps=4), interrupt)
    with pytest.raises(CheckpointError, match="data differs"):
        finetune(ROWS[:-1], _config(base, tmp_path / "out"))


def test_bad_input_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    with pytest.raises(DatasetError, match="label on every row"):
        finetune([Example("no label")], _config(base, tmp_path / "out"))
    with pytest.raises(DatasetError):
        finetune([], _config(base, tmp_path / "out"))
    with pytest.raises(ModelError, match="no such file"):
        finetune(ROWS, _config(tmp_path / "none.gguf", tmp_path / "out"))


def test_adapters_that_do_not_fit_or_are_pickles_are_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    (tmp_path / "pickle" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no pickles"):
        FrozenLLM.load(str(base), adapter=str(tmp_path / "pickle"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    (tmp_path / "weights" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights are refused"):
        FrozenLLM.load(str(tmp_path / "weights"))
