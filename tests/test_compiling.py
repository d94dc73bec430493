"""``torch.compile`` of the layers: the same answers, kept only where it pays, and no silent fallback."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from api_kit import running
from tiny_models import make_tiny_model
from transformers import AttentionInterface

from models import compiling, packing
from models.compiling import CompileTrial, compare, compile_layers, compile_where_it_pays
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
    packing.leave_attention_out.cache_clear()
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def plain(llm: FrozenLLM) -> bool:
    kinds = {isinstance(layer.forward, compiling._PackedOnly) for layer in layers_of(llm)}
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
    switch(True)
    torch.compiler.set_stance("default")
    for one, other in zip(ask(Classifier(llm)), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    switch(False)
    assert plain(llm)
    assert all(torch.equal(one, other) for one, other in zip(ask(Classifier(llm)), before, strict=True))


def test_no_length_and_no_number_of_texts_compiles_anew(llm: FrozenLLM) -> None:
    """Or the first callers would wait for that, each time."""
    compare(llm, rows=[1, 8])
    torch.compiler.set_stance("default")  # or nothing would be compiled at all
    classifier = Classifier(llm)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for count in range(1, 9):
        texts = [" ".join(["good"] * (1 + 7 * n + count)) for n in range(count)]
        classifier.base_pass(texts)
        classifier.hidden(texts, [prompt(llm)])
        classifier.hidden(texts, [prompt(llm), prompt(llm)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.parametrize("least", [0.0, 1e9], ids=["pays", "does not"])
def test_what_is_quicker_is_kept(
    llm: FrozenLLM, least: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "MIN_GAIN", least)
    monkeypatch.setattr(compiling, "MIN_GAIN_ALONE", 0.0)
    with caplog.at_level(logging.WARNING):
        assert compile_where_it_pays(llm, rows=4) == (least == 0.0)
    assert plain(llm) != (least == 0.0)
    assert f"in passes of 4; {'kept' if least == 0.0 else 'not kept'}" in caplog.text


def test_what_is_asked_for_in_any_case_is_kept(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MIN_GAIN", 1e9)
    assert compile_where_it_pays(llm, rows=4, always=True)
    assert not plain(llm)


def test_what_is_compared_is_what_it_says(llm: FrozenLLM) -> None:
    """Twice, as where one model is started twice: compiled layers are not the plain ones of the second time."""
    for _ in range(2):
        trial, switch = compare(llm, rows=[1, 4])
        assert set(trial.gains) == {1, 4} and min(trial.gains.values()) > 0
        assert 0 < trial.difference < 1e-4
        assert not plain(llm)
    switch(False)
    assert plain(llm)


@pytest.mark.parametrize("size", [1, 4])
def test_numbers_that_are_none_are_refused(llm: FrozenLLM, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiling._difference
    differences = iter([float("nan") if count == size else 0.0 for count in (4, 1)])
    monkeypatch.setattr(compiling, "_difference", lambda one, other: real(one, other) * 0 + next(differences))
    with pytest.raises(ModelError, match="other states"):
        compile_where_it_pays(llm, rows=4)
    assert plain(llm)


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


def test_where_compiling_is_turned_off_it_says_so(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", lambda forward, **_options: forward)  # as with TORCH_COMPILE_DISABLE
    with pytest.raises(ModelError, match="nothing was compiled"):
        compile_where_it_pays(llm, rows=4)
    assert plain(llm)


def test_without_a_compiler_it_says_so(llm: FrozenLLM, tmp_path: Path) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    with (
        config.patch({"cpp.cxx": (str(tmp_path / "none"),)}),
        fresh_cache(),
        pytest.raises(ModelError, match=r"C\+\+ compiler"),
    ):
        compile_where_it_pays(llm, rows=4)
    assert plain(llm)


def test_it_pays_for_full_passes_at_no_cost_to_a_text_alone() -> None:
    def pays(alone: float, full: float) -> bool:
        return CompileTrial({1: alone, 64: full}, 0.0, 1.0).pays

    assert pays(0.95, 1.03) and pays(1.2, 1.1)
    assert not pays(0.94, 1.5) and not pays(1.5, 1.02)


def test_a_server_that_compiles_answers_as_one_that_does_not(
    llm: FrozenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled in the thread that loads, run in the model's: nothing is compiled anew there."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch does when something imports it
    texts = [TEXTS[0], f"{TEXTS[2]} {TEXTS[3]}", TEXTS[1]]
    answers = []
    for name in ("plain", "compiled"):
        with running(
            f"sqlite:///{tmp_path}/{name}.db", tmp_path, llm=llm, compile="on" if name == "compiled" else "off"
        ) as api:
            headers = api.key()
            assert plain(llm) == (name == "plain")
            torch.compiler.set_stance("default")  # or nothing would be compiled at all
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            answers.append([api.classify(headers, text)["results"][0] for text in texts])
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            metrics = api.client.get("/metrics", headers=headers).text
            assert f"letheon_compiled {1.0 if name == 'compiled' else 0.0}" in metrics
    kept = tmp_path / "compiled"  # torch unpickles what it finds there
    assert kept.stat().st_mode & 0o777 == 0o700 and any(kept.iterdir())
    for one, other in zip(*answers, strict=True):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
