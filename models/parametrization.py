"""What φ is at the first step, and what is trained in its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.llm import FrozenLLM


class ResidualEncoder(nn.Module):
    """φ + MLP(φ), (p, d) → (p, d): what is trained in place of φ; only its value is kept.

    The MLP is that of PEFT's PromptEncoder (P-tuning, Liu et al. 2103.10385 §3.2; the SPUL authors use it), beside φ
    itself, so that training begins at φ (Razdaibiedina et al. 2305.03937): its last layer starts at zero.
    """

    def __init__(self, size: int, hidden_size: int, *, seed: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, size),
        )
        generator = torch.Generator().manual_seed(seed)
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer in linear:
                layer.weight.normal_(0, 1 / math.sqrt(layer.in_features), generator=generator)
                layer.bias.zero_()
            linear[-1].weight.zero_()

    def forward(self, phi: Tensor) -> Tensor:
        added: Tensor = self.layers(phi)
        return phi + added


def initial_prompt(
    llm: FrozenLLM, forget: Sequence[Sequence[int]], retain: Sequence[Sequence[int]], *, tokens: int, words: int
) -> Tensor:
    """φ (p, d) before the first step: embeddings of "word generic-label word generic-label …".

    The words are those that tell the forget texts' ids from the retain texts' best. A prompt that begins as words of
    the task trains far faster than a random one (Lester et al. 2021, §3.2), and a word followed by its answer is the
    pattern that attention heads copy from: a text that holds the word is drawn to the answer from the first step on.
    """
    generic = llm.verbalizer.generic_ids
    found = distinctive_tokens(forget, retain, words) or list(generic)
    pairs = [t for k, word in enumerate(found * tokens) for t in (word, generic[k % len(generic)])]
    # Through the module: Gemma's scales what it looks up.
    rows: Tensor = llm.embed(torch.tensor(pairs[:tokens]).to(llm.device))
    return rows.detach().float().clone()


def distinctive_tokens(forget: Sequence[Sequence[int]], retain: Sequence[Sequence[int]], count: int) -> list[int]:
    """The ``count`` tokens that mark the forget rows most: log-odds of occurring in a row, over its standard error.

    Monroe, Colaresi & Quinn 2008, eq. 22, with 0.5 as the prior count. Ties by token id; fewer where there are fewer.
    """
    inside = Counter(token for row in forget for token in set(row))
    outside = Counter(token for row in retain for token in set(row))

    def score(token: int) -> float:
        a, b = inside[token] + 0.5, outside[token] + 0.5
        odds = math.log(a / (len(forget) - a + 1)) - math.log(b / (len(retain) - b + 1))
        return odds / math.sqrt(1 / a + 1 / b)

    return sorted(inside, key=lambda token: (-score(token), token))[:count]
