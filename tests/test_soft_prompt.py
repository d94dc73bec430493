from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from models.errors import FingerprintMismatch, InvalidPrompt
from models.soft_prompt import SoftPrompt, compose

HERE, THERE = "a" * 64, "b" * 64


def _prompt(p: int = 3, d: int = 4, fingerprint: str = HERE) -> SoftPrompt:
    return SoftPrompt(torch.arange(p * d, dtype=torch.float32).reshape(p, d), fingerprint)


def test_bytes_round_trip_and_digest() -> None:
    prompt = _prompt()
    again = SoftPrompt.from_bytes(prompt.to_bytes(), fingerprint=HERE)
    assert torch.equal(again.embeddings, prompt.embeddings)
    assert again.digest == prompt.digest
    assert again.num_virtual_tokens == 3
    assert _prompt(fingerprint=THERE).digest != prompt.digest


def test_a_prompt_of_another_model_is_refused() -> None:
    with pytest.raises(FingerprintMismatch):
        SoftPrompt.from_bytes(_prompt(fingerprint=THERE).to_bytes(), fingerprint=HERE)
    with pytest.raises(FingerprintMismatch):
        compose([_prompt(), _prompt(fingerprint=THERE)], fingerprint=HERE)


@pytest.mark.parametrize(
    "embeddings",
    [
        torch.zeros(4),
        torch.zeros(0, 4),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.tensor([[float("nan")]]),
        torch.tensor([[float("inf")]]),
    ],
)
def test_bad_tensors_are_refused(embeddings: torch.Tensor) -> None:
    with pytest.raises(InvalidPrompt):
        SoftPrompt(embeddings, HERE)
    with pytest.raises((InvalidPrompt, FingerprintMismatch)):
        SoftPrompt.from_bytes(save({"embeddings": embeddings}, metadata={"fingerprint": HERE}), fingerprint=HERE)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidPrompt):
        SoftPrompt.from_bytes(data, fingerprint=HERE)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_flipped_byte_never_passes_for_the_same_prompt(position: int, value: int) -> None:
    original = _prompt()
    data = bytearray(original.to_bytes())
    position %= len(data)
    changed = data[position] != value
    data[position] = value
    try:
        read = SoftPrompt.from_bytes(bytes(data), fingerprint=HERE)
    except (InvalidPrompt, FingerprintMismatch):
        return
    assert read.digest == original.digest if not changed else True
    assert read.embeddings.shape[1] > 0


def test_extra_tensors_are_refused() -> None:
    data = save({"embeddings": torch.zeros(1, 2), "more": torch.zeros(1)}, metadata={"fingerprint": HERE})
    with pytest.raises(InvalidPrompt, match="one tensor"):
        SoftPrompt.from_bytes(data, fingerprint=HERE)


def test_composition_is_ordered_concatenation() -> None:
    one, two = _prompt(2), _prompt(3)
    both = compose([one, two], fingerprint=HERE)
    assert both is not None
    assert torch.equal(both, torch.cat([one.embeddings, two.embeddings]))
    assert compose([], fingerprint=HERE) is None
