"""The paper's baselines: their losses by hand, and what they do to a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model

from models.errors import DatasetError, TrainingDiverged
from models.examples import Example
from models.inference import Classifier
from models.llm import FrozenLLM
from models.weight_tuning import METHODS, Method, WeightTuningConfig, unlearn_by_tuning, unlearning_loss

FORGET = [Example(f"the film by the director is {w}", "positive") for w in ("good", "great", "not bad", "very good")]
RETAIN = [
    Example(f"the {n} is {w}", "negative") for n in ("plot", "story", "scene", "acting") for w in ("bad", "awful")
]

Load = Callable[[], FrozenLLM]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")
    return lambda: FrozenLLM.load(str(folder), quantization="none", device="cpu")


def test_losses_by_hand() -> None:
    # Softmax (3/4, 1/4), (1/2, 1/2) and (1/4, 3/4); all are to say 0; the first is a forget row.
    third = math.log(3)
    logits = torch.tensor([[third, 0.0], [0.0, 0.0], [0.0, third]])
    targets, forget = torch.zeros(3, dtype=torch.long), torch.tensor([True, False, False])
    before = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    kl = (0.0 + 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    ascent = -math.log(4 / 3)
    expected = {
        "ga": ascent,
        "rl": (math.log(4 / 3) + math.log(2) + math.log(4)) / 3,
        "ga+gd": ascent + (math.log(2) + math.log(4)) / 2,
        "ga+kl": ascent + kl,
    }
    assert set(expected) == set(METHODS)
    for method in METHODS:
        assert float(unlearning_loss(method, logits, targets, forget, before)) == pytest.approx(expected[method])


def test_a_batch_without_forget_or_retain_rows_has_a_loss() -> None:
    logits, targets = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    none, every = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    assert float(unlearning_loss("ga+gd", logits, targets, none)) == pytest.approx(math.log(2))
    assert float(unlearning_loss("ga+gd", logits, targets, every)) == pytest.approx(-math.log(2))
    assert float(unlearning_loss("ga+kl", logits, targets, every, torch.empty(0, 2))) == pytest.approx(-math.log(2))


def probability(llm: FrozenLLM, rows: list[Example], words: tuple[int, ...] | None = None) -> float:
    """Mean probability of the true label, or of these tokens together."""
    shares = llm.logits(Classifier(llm).hidden([e.text for e in rows])).softmax(-1)
    if words is not None:
        return float(shares[:, list(words)].sum(-1).mean())
    ids = [llm.verbalizer.id_of(e.label) for e in rows if e.label is not None]
    return float(shares[torch.arange(len(ids)), ids].mean())


@pytest.mark.parametrize("method", METHODS)
def test_each_method_does_what_it_is_for_and_leaves_the_served_model_alone(load: Load, method: Method) -> None:
    served = load()
    digest = served.weights_digest()
    config = WeightTuningConfig(method, learning_rate=3e-3, epochs=6, batch_size=4)
    steps: list[int] = []
    tuned = unlearn_by_tuning(
        load(), FORGET, RETAIN, config, quantization="none", on_progress=lambda p: steps.append(p.step)
    )
    assert served.weights_digest() == digest != tuned.weights_digest()
    assert served.fingerprint != tuned.fingerprint
    assert steps == list(range(1, (6 if method in ("ga", "rl") else 18) + 1))
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())
    generic = served.verbalizer.generic_ids
    if method == "rl":
        assert probability(tuned, FORGET, generic) > 2 * probability(served, FORGET, generic)
    else:
        assert probability(tuned, FORGET) < probability(served, FORGET) / 2
    if method == "ga+gd":
        assert probability(tuned, RETAIN) > 2 * probability(served, RETAIN)


def test_the_result_is_quantized_as_it_would_serve(load: Load) -> None:
    config = WeightTuningConfig("ga", epochs=1, batch_size=2)
    tuned = unlearn_by_tuning(load(), FORGET, [], config, quantization="nf4")
    assert tuned.identity["quantization"] == "nf4"
    assert any("Linear4bit" in type(module).__name__ for module in tuned.model.modules())
    with pytest.raises(ValueError, match="quantized"):
        unlearn_by_tuning(tuned, FORGET, [], config, quantization="nf4")


def test_bad_input_and_divergence_are_named(load: Load) -> None:
    with pytest.raises(DatasetError, match="label on every row"):
        unlearn_by_tuning(load(), [Example("text")], [], WeightTuningConfig("ga"), quantization="none")
    with pytest.raises(DatasetError, match=r"ga\+kl needs retain rows"):
        unlearn_by_tuning(load(), FORGET, [], WeightTuningConfig("ga+kl"), quantization="none")
    wild = WeightTuningConfig("ga", learning_rate=1e30, epochs=4, batch_size=2)
    with pytest.raises(TrainingDiverged, match="ga: the loss is not finite"):
        unlearn_by_tuning(load(), FORGET, [], wild, quantization="none")
