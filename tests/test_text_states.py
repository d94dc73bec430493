"""What gates read = hidden states of a plain forward pass, averaged by hand over the text's tokens. Every family."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, make_tiny_model
from torch import Tensor

import models.text_states
from models.errors import ModelError, TextTooLong
from models.examples import Batch, collate
from models.inference import Classifier
from models.llm import FrozenLLM
from models.prefix_cache import compute_prefix, last_hidden
from models.recording import recording
from models.text_states import gate_layers, text_states

TEXTS = [
    "a bad movie with a great director , awful acting and a plot that is not very quite there",
    "bad",
    "the film is good",
    "the story of the scene by the director is neutral and the acting great but the plot awful " * 2,
    "x1 é",
]


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    path = make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return FrozenLLM.load(str(path), quantization="none", device="cpu")


@torch.no_grad()
def _by_hand(llm: FrozenLLM, text: str, layers: tuple[int, ...]) -> Tensor:
    """One row, no prefix, no padding, the model's own hidden states: (L·d,)."""
    head, own = llm.template.head_ids, llm.encode(text)
    ids = torch.tensor([[*head, *own, *llm.template.tail_ids]])
    states = llm.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    if llm.model.config.model_type in {"gpt2", "opt"}:  # their first hidden state has the positions in it already
        states = (llm.embed(ids), *states[1:])
    text_tokens = slice(len(head), len(head) + len(own))
    return torch.cat([states[layer][0, text_tokens].mean(0) for layer in layers])


def _hooks(llm: FrozenLLM) -> int:
    return sum(len(module._forward_hooks) for module in llm.model.modules())


def _batch(llm: FrozenLLM) -> Batch:
    return collate(llm.rows(TEXTS))


def test_states_are_the_models_hidden_states_over_the_text_only(llm: FrozenLLM) -> None:
    wanted = torch.stack([_by_hand(llm, text, (0, 2)) for text in TEXTS])
    assert gate_layers(llm) == (0, 2)
    for batch_size in (64, 2):
        found = text_states(llm, TEXTS, batch_size=batch_size)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    assert float((wanted[0] - wanted[2]).norm()) > 0.1, "texts that no reader could confuse"


def test_any_layers_can_be_read(llm: FrozenLLM) -> None:
    with torch.no_grad():
        prefix = compute_prefix(llm, None)
        with recording(llm, _batch(llm), (0, 1, 2)) as means:
            last_hidden(llm, _batch(llm), prefix)
    wanted = torch.stack([_by_hand(llm, text, (0, 1, 2)) for text in TEXTS])
    assert [m.shape for m in means] == [(len(TEXTS), llm.hidden_size)] * 3
    torch.testing.assert_close(torch.cat(means, dim=-1), wanted, rtol=2e-4, atol=2e-5)


def test_stopped_pass_and_recorded_pass_agree(llm: FrozenLLM) -> None:
    hidden, states = Classifier(llm).base_pass(TEXTS)
    assert torch.equal(states, text_states(llm, TEXTS))
    assert torch.equal(hidden, Classifier(llm).hidden(TEXTS)), "recording changed the model's output"


def test_the_stopped_pass_runs_no_further_than_it_reads(llm: FrozenLLM) -> None:
    ran: list[int] = []
    blocks = [m for name, m in llm.decoder.named_modules() if name.split(".")[-1] in {"0", "1", "2"}]
    assert len(blocks) == 3
    with torch.no_grad():
        prefix = compute_prefix(llm, None)
    handles = [b.register_forward_hook(lambda _m, _i, _o, k=k: ran.append(k)) for k, b in enumerate(blocks)]
    try:
        text_states(llm, TEXTS, prefix=prefix)
        assert ran == [0, 1]
        ran.clear()
        Classifier(llm).base_pass(TEXTS[:1])
        assert ran == [0, 1, 2] * 2, "head, then text"
    finally:
        for handle in handles:
            handle.remove()


def test_what_stands_in_the_padding_does_not_matter(llm: FrozenLLM) -> None:
    batch = _batch(llm)
    garbage = batch.input_ids.clone()
    for i, length in enumerate(batch.lengths.tolist()):
        garbage[i, length:] = 3 + i
    with torch.no_grad():
        prefix = compute_prefix(llm, None)
        found = []
        for ids in (batch.input_ids, garbage):
            with recording(llm, batch, (0, 2)) as means:
                last_hidden(llm, Batch(ids, batch.lengths), prefix)
            found.append(torch.cat(means, dim=-1))
    assert torch.equal(*found)


def test_hooks_are_gone_whatever_happens(llm: FrozenLLM) -> None:
    before, answers = _hooks(llm), Classifier(llm).hidden(TEXTS)
    batch = _batch(llm)
    text_states(llm, TEXTS)
    assert _hooks(llm) == before
    with pytest.raises(ZeroDivisionError), recording(llm, batch, (0, 2)):
        assert _hooks(llm) == before + 2
        raise ZeroDivisionError
    assert _hooks(llm) == before
    broken = Batch(torch.full_like(batch.input_ids, 1 << 30), batch.lengths)
    for stop in (False, True):
        with pytest.raises(IndexError), recording(llm, broken, (0, 2), stop=stop):
            last_hidden(llm, broken, None)
        assert _hooks(llm) == before
    assert torch.equal(Classifier(llm).hidden(TEXTS), answers)


def test_a_text_past_the_models_positions_is_refused(llm: FrozenLLM) -> None:
    before = _hooks(llm)
    for read in (lambda texts: text_states(llm, texts), Classifier(llm).base_pass):
        with pytest.raises(TextTooLong, match="positions"):
            read(["good", "good " * 600])
    assert _hooks(llm) == before


def test_prefix_may_be_given_and_nothing_is_no_text(llm: FrozenLLM) -> None:
    with torch.no_grad():
        prefix = compute_prefix(llm, None)
    assert torch.equal(text_states(llm, TEXTS, prefix=prefix), text_states(llm, TEXTS))
    assert text_states(llm, []).shape == (0, 2 * llm.hidden_size)


def test_layers_that_the_model_lacks_are_not_read(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.text_states, "LAYERS", (0, 1, 3, 4))
    assert gate_layers(llm) == (0, 1, 3)
    assert text_states(llm, TEXTS[:2]).shape == (2, 3 * llm.hidden_size)


def test_an_unknown_architecture_is_refused(llm: FrozenLLM) -> None:
    config, depth = llm.model.config, llm.model.config.num_hidden_layers
    config.num_hidden_layers = 7
    try:
        with pytest.raises(ModelError, match="keeps its layers"):
            gate_layers(llm)
    finally:
        config.num_hidden_layers = depth
