"""``torch.compile`` of the layers: the same answers, kept only where it pays, and no silent fallback."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model
from transformers import AttentionInterface

from models import compiling, packing
from models.compiling import CompileTrial, compile_layers, compile_where_it_pays
from models.errors import ModelError
from models.inference import Classifier
from models.llm import FrozenLLM
from models.recording import layers_of
from models.soft_prompt import SoftPrompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inductor's own
    pytest.mark.skipif(all(shutil.which(name) is None for name in ("c++", "g++", "clang++")), reason="no C++ compiler"),
]

TEXTS = ["the film is good", "bad", "a bad movie with a great director , awful acting and a plot", "good and bad"]


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[FrozenLLM]:
    torch._dynamo.reset()
    yield FrozenLLM.load(str(make_tiny_model(tmp_path, "llama")), quantization="none", device="cpu")
    AttentionInterface.register(packing._SDPA_OR_PACKED, packing._attention)
    torch._dynamo.reset()


def plain(llm: FrozenLLM) -> bool:
    kinds = {"_packed_only" in layer.forward.__qualname__ for layer in layers_of(llm)}
    assert len(kinds) == 1, "all of them or none"
    return not kinds.pop()


def prompt(llm: FrozenLLM) -> SoftPrompt:
    return SoftPrompt(torch.randn(5, llm.hidden_size, generator=torch.Generator().manual_seed(0)), llm.fingerprint)


def test_compiled_layers_answer_alike_and_leave_their_states_to_be_read(llm: FrozenLLM) -> None:
    def ask(classifier: Classifier) -> list[torch.Tensor]:
        hidden, states = classifier.base_pass(TEXTS)
        return [hidden, states, classifier.hidden(TEXTS, [prompt(llm)]), classifier.hidden(TEXTS[:1])]

    before = ask(Classifier(llm))
    switch = compile_layers(llm)
    for one, other in zip(ask(Classifier(llm)), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    switch(False)
    assert plain(llm)
    assert all(torch.equal(one, other) for one, other in zip(ask(Classifier(llm)), before, strict=True))


def test_no_length_and_no_number_of_texts_compiles_anew(llm: FrozenLLM) -> None:
    """Or the first callers would wait for that, each time."""
    compile_where_it_pays(llm, rows=8)
    compile_layers(llm)
    classifier = Classifier(llm)
    classifier.hidden(TEXTS)
    classifier.hidden(TEXTS[:1], [prompt(llm)])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for count in range(1, 9):
        texts = [" ".join(["good"] * (1 + 7 * n + count)) for n in range(count)]
        classifier.base_pass(texts)
        classifier.hidden(texts, [prompt(llm)])
        classifier.hidden(texts, [prompt(llm), prompt(llm)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("least", [0.0, 1e9], ids=["pays", "does not"])
def test_what_is_quicker_is_kept(
    llm: FrozenLLM, least: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "MIN_GAIN", least)
    monkeypatch.setattr(compiling, "MIN_GAIN_ALONE", 0.0)
    with caplog.at_level(logging.WARNING):
        trial = compile_where_it_pays(llm, rows=4)
    assert set(trial.gains) == {1, 4} and min(trial.gains.values()) > 0
    assert trial.difference < 1e-4
    assert plain(llm) != (least == 0.0)
    assert f"in passes of 4; {'kept' if least == 0.0 else 'not kept'}" in caplog.text


def test_a_model_that_cannot_be_packed_is_refused(llm: FrozenLLM) -> None:
    llm.model.config._attn_implementation = "eager"
    with pytest.raises(ModelError, match="cannot be packed"):
        compile_where_it_pays(llm, rows=4)
    assert plain(llm)


def test_other_states_are_refused(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "FLOAT32_TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="other states"):
        compile_where_it_pays(llm, rows=4)
    assert plain(llm)


def test_without_a_compiler_it_says_so(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "none"),))
    with fresh_cache(), pytest.raises(ModelError, match=r"C\+\+ compiler"):
        compile_where_it_pays(llm, rows=4)
    assert plain(llm)


def test_it_pays_for_full_passes_at_no_cost_to_a_text_alone() -> None:
    def pays(alone: float, full: float) -> bool:
        return CompileTrial({1: alone, 64: full}, 0.0, 1.0).pays

    assert pays(0.97, 1.03) and pays(1.2, 1.1)
    assert not pays(0.96, 1.5) and not pays(1.5, 1.02)
