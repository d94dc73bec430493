"""The engine's part of ``bench.serving``: one model, the same texts, in every way of asking them, taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor

from bench.training import concatenated
from models.gate import NEVER, Gate, fit_space
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routing import Route, Routes, classify_routed
from models.soft_prompt import SoftPrompt
from models.text_states import text_states

TOKENS = 30
Way = Callable[[int], object]
STACKS = {"bare": 0, "active": 1, "active_k4": 4}
"""Prompts before every query."""
RATIOS = {
    "active_over_bare": ("active", "bare"),
    "over_peft": ("active", "peft"),
    "over_peft_k4": ("active_k4", "peft_k4"),
    "over_peft_plain": ("active", "peft_plain"),
    "routed_unclaimed_over_bare": ("routed_unclaimed", "bare"),
    "routed_claimed_over_bare": ("routed_claimed", "bare"),
}
"""Throughput of the one way over that of the other."""


def prompt(llm: FrozenLLM, seed: int) -> SoftPrompt:
    """Random words: what a prompt says has no say in what it costs."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(llm.embed.num_embeddings, (TOKENS,), generator=draw)
    return SoftPrompt(llm.embed(ids.to(llm.device)).detach().float().cpu(), llm.fingerprint)


def routes(llm: FrozenLLM, texts: Sequence[str], *, claimed: bool) -> Routes:
    """One request, whose gate claims every query or none."""
    states = text_states(llm, texts)
    space = fit_space(states, 4, fingerprint=llm.fingerprint)
    direction = space.points(states[:1])
    none = torch.empty(0, 32, dtype=torch.uint8)
    gate = Gate(direction, -2.0 if claimed else 1.5, NEVER, none, space.digest)
    return Routes([Route(prompt(llm, 0), gate)], {space.digest: space}, fingerprint=llm.fingerprint)


class Peft:
    """PEFT's prompt tuning on the same model, its batches padded on the left as its users do, in batches of a length.

    ``soft`` replaces its virtual tokens. ``last_only``: transformers' own ``logits_to_keep=1``, granted to it.
    """

    def __init__(self, llm: FrozenLLM, soft: Tensor, *, last_only: bool) -> None:
        self._llm, self._keep = llm, {"logits_to_keep": 1} if last_only else {}
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(soft))
        model: Any = get_peft_model(llm.model, config).eval()
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(soft)
        self._model = model

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """Logits (N, V) of the next token."""
        rows = [[*self._llm.template.head_ids, *row] for row in self._llm.rows(texts)]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=self._llm.device)
        lengths = torch.tensor([len(row) for row in rows], device=self._llm.device)
        mask = (torch.arange(width, device=ids.device) >= width - lengths.unsqueeze(1)).long()
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **self._keep).logits[:, -1]
        return logits.float()


def by_length(llm: FrozenLLM, texts: Sequence[str], size: int) -> list[list[str]]:
    """Batches of ``size`` texts of similar lengths: what a careful user of PEFT would feed it."""
    lengths = [len(row) for row in llm.rows(texts)]
    order = sorted(range(len(texts)), key=lambda i: lengths[i])
    return [[texts[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def ways(llm: FrozenLLM, batches: Sequence[Sequence[str]]) -> dict[str, Way]:
    """What answers batch ``n`` of texts, by name."""
    classifier = Classifier(llm)
    stacks = {name: [prompt(llm, seed) for seed in range(count)] for name, count in STACKS.items()}
    peft = {
        "peft": Peft(llm, _soft(stacks["active"]), last_only=True),
        "peft_k4": Peft(llm, _soft(stacks["active_k4"]), last_only=True),
        "peft_plain": Peft(llm, _soft(stacks["active"]), last_only=False),
    }
    some = [text for batch in batches for text in batch][:256]
    routed = {f"routed_{name}": routes(llm, some, claimed=name == "claimed") for name in ("unclaimed", "claimed")}

    def own(stack: Sequence[SoftPrompt]) -> Way:
        return lambda n: classifier.classify(batches[n], stack)

    def other(model: Peft) -> Way:
        return lambda n: [model.scores(batch).argmax(-1) for batch in by_length(llm, batches[n], 32)]

    def through(found: Routes) -> Way:
        return lambda n: classify_routed(classifier, found, batches[n], digest=None, max_prompts=4)

    return (
        {name: own(stack) for name, stack in stacks.items()}
        | {name: through(found) for name, found in routed.items()}
        | {name: other(model) for name, model in peft.items()}
    )


def _soft(stack: Sequence[SoftPrompt]) -> Tensor:
    return torch.cat([p.embeddings for p in stack])


def over(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Throughput of ``one`` over that of ``other``: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))


def figures(seconds: Mapping[str, Sequence[float]], texts: int) -> dict[str, float]:
    return {
        **{name: over(seconds, one, other) for name, (one, other) in RATIOS.items()},
        "texts_per_second": texts / statistics.median(seconds["active"]),
        "texts_per_second_bare": texts / statistics.median(seconds["bare"]),
    }


@torch.no_grad()
def differences(llm: FrozenLLM, texts: Sequence[str]) -> dict[str, float]:
    """Largest differences from plain concatenation of every row whole, in logits of the whole vocabulary, and of PEFT.

    The last is the check that what is compared with does the same thing.
    """
    classifier, found = Classifier(llm), {}
    stacks = {name: [prompt(llm, seed) for seed in range(count)] for name, count in STACKS.items()}
    rows = llm.rows(texts)
    for name, stack in stacks.items():
        soft = _soft(stack) if stack else None
        plain = torch.cat([concatenated(llm, soft, [row]) for row in rows])
        found[name] = float((llm.logits(classifier.hidden(texts, stack)) - plain).abs().max())
        if soft is not None:
            theirs = torch.cat([Peft(llm, soft, last_only=True).scores([text]) for text in texts])
            found[f"{name}_of_peft"] = float((theirs - plain).abs().max())
    return found
