"""What the model would say next: its likeliest tokens over the whole vocabulary, where an answer is read off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.inference import Classifier, Encoded
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt

_ROWS = 16  # (16, V) logits at a time


@dataclass(frozen=True)
class NextToken:
    """``text`` as it would go on, its own space included; empty where the tokenizer has none for this ``id``.

    ``word``: the label or generic label that it stands for.
    """

    id: int
    text: str
    probability: float
    word: str | None


@torch.no_grad()
def next_logits(classifier: Classifier, texts: Sequence[str | Encoded], prompts: Sequence[SoftPrompt] = ()) -> Tensor:
    """Logits (N, V), float32 on the CPU, at the position that predicts the label, behind ``prompts``.

    Raises FingerprintMismatch, TextTooLong.
    """
    hidden = classifier.hidden(texts, prompts)
    return torch.cat([classifier.llm.logits(part).cpu() for part in hidden.split(_ROWS)])


def likeliest(llm: FrozenLLM, logits: Tensor, count: int) -> list[list[NextToken]]:
    """Of each row of ``next_logits`` so many tokens, the likeliest first; equal ones by their id."""
    best, ids = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
    words = dict(zip(llm.verbalizer.ids, llm.verbalizer.words, strict=True))
    return [
        [NextToken(i, token_text(llm, i), p, words.get(i)) for i, p in zip(row, probabilities, strict=True)]
        for row, probabilities in zip(ids[:, :count].tolist(), best[:, :count].tolist(), strict=True)
    ]


def token_text(llm: FrozenLLM, token: int) -> str:
    """A token behind another one: at the beginning of a text some tokenizers leave out its space."""
    before = llm.verbalizer.ids[0]
    alone, together = llm.tokenizer.decode([before]), llm.tokenizer.decode([before, token])
    return together.removeprefix(alone) if together.startswith(alone) else llm.tokenizer.decode([token])
