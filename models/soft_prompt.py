"""SoftPrompt: p × d virtual-token embeddings bound to one frozen model, and how several of them compose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from models.errors import FingerprintMismatch, InvalidPrompt

_KEY = "embeddings"
UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, OverflowError)
"""What reading safetensors may end in: for a type that torch has no name for it is a KeyError, for instance."""


@dataclass(frozen=True, eq=False, repr=False)  # no repr: a prompt is personal data
class SoftPrompt:
    """``embeddings``: (p, d) float32 on the CPU. ``fingerprint``: of the FrozenLLM it was trained for."""

    embeddings: Tensor
    fingerprint: str

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 2 or 0 in e.shape or e.dtype != torch.float32:
            raise InvalidPrompt(f"embeddings must be (p, d) float32, got {tuple(e.shape)} {e.dtype}")
        if not torch.isfinite(e).all():
            raise InvalidPrompt("embeddings hold non-finite numbers")

    @property
    def num_virtual_tokens(self) -> int:
        return self.embeddings.shape[0]

    def norms(self, word_norm: float) -> tuple[float, float]:
        """The largest and the mean length of its rows, in units of ``FrozenLLM.word_norm``."""
        lengths = self.embeddings.norm(dim=-1) / word_norm
        return float(lengths.max()), float(lengths.mean())

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex of ``to_bytes()``: the prompt's content address."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """safetensors bytes; the fingerprint travels in the header."""
        return save({_KEY: self.embeddings.contiguous()}, metadata={"fingerprint": self.fingerprint})

    @classmethod
    def from_bytes(cls, data: bytes, *, fingerprint: str, digest: str | None = None) -> SoftPrompt:
        """``digest``: the SHA-256 that is on record of these bytes; with another one, none of them is looked at.

        Raises InvalidPrompt for bytes that are not a prompt, FingerprintMismatch for one of another model.
        """
        if not same_digest(data, digest):
            raise InvalidPrompt("the prompt was altered: its digest is another one")
        try:
            tensors = load(data)
            stored = header_fingerprint(data)
        except UNREADABLE as error:
            raise InvalidPrompt(f"not a safetensors prompt ({type(error).__name__})") from None
        if set(tensors) != {_KEY}:
            raise InvalidPrompt("a prompt holds one tensor named 'embeddings'")
        if stored != fingerprint:
            raise FingerprintMismatch(f"prompt of model {stored[:12]}, but this model is {fingerprint[:12]}")
        return cls(tensors[_KEY], stored)


def same_digest(data: bytes, digest: str | None) -> bool:
    return digest is None or hashlib.sha256(data).hexdigest() == digest


def header_fingerprint(data: bytes) -> str:
    """The model that safetensors bytes name in their header. Raises ValueError."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return str((header.get("__metadata__") or {}).get("fingerprint", ""))


def compose(prompts: Sequence[SoftPrompt], *, fingerprint: str) -> Tensor | None:
    """The one place that decides how active prompts act together: (Σp, d), concatenated in order of activation.

    None for no prompt. Raises FingerprintMismatch when one belongs to another model.
    """
    for prompt in prompts:
        if prompt.fingerprint != fingerprint:
            raise FingerprintMismatch(
                f"prompt of model {prompt.fingerprint[:12]}, but this model is {fingerprint[:12]}"
            )
    return torch.cat([p.embeddings for p in prompts]) if prompts else None
