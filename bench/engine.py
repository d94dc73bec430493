"""The engine's part of ``bench.serving``: one model, the same texts, in every way of asking them, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor

from bench.training import concatenated
from models.gate import MAX_RANK, NEVER, Gate, fit_space
from models.inference import Classifier
from models.llm import FrozenLLM
from models.passes import by_length
from models.routing import Route, Routes, classify_routed
from models.soft_prompt import SoftPrompt
from models.text_states import gate_layers

TOKENS = 30
PEFT_ROWS = (16, 32, 64)
"""Rows of a pass that PEFT is tried with, none more than Letheon's own."""
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


def routes(llm: FrozenLLM, *, claimed: bool) -> Routes:
    """One request, whose gate claims every query or none, in a space of the rank that a service has.

    Of random states: what they say has no say in what it costs.
    """
    layers = len(gate_layers(llm))
    states = torch.randn(MAX_RANK + 1, layers * llm.hidden_size, generator=torch.Generator().manual_seed(0))
    space = fit_space(states, layers, fingerprint=llm.fingerprint)
    direction = space.points(states[:1])
    none = torch.empty(0, 32, dtype=torch.uint8)
    gate = Gate(direction, -2.0 if claimed else 1.5, NEVER, none, space.digest)
    route = Route(prompt(llm, 0), gate)
    return Routes([route], {space.digest: space}, fingerprint=llm.fingerprint, device=llm.device)


class Peft:
    """PEFT's prompt tuning on the same model, its batches padded on the left as its users do.

    ``soft`` replaces its virtual tokens. ``last_only``: transformers' own ``logits_to_keep=1``, granted to it.
    """

    def __init__(self, llm: FrozenLLM, soft: Tensor, *, last_only: bool) -> None:
        self._llm, self._keep = llm, {"logits_to_keep": 1} if last_only else {}
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(soft))
        model: Any = get_peft_model(llm.model, config).eval()
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(soft)
        self._model = model

    def answers(self, texts: Sequence[str], size: int) -> list[int]:
        """The likeliest next token of each text; tokenized once, texts of similar lengths in passes of ``size``."""
        rows, found = self._llm.rows(texts), [0] * len(texts)
        for picked in by_length(rows, size):
            best = self.scores([rows[i] for i in picked]).argmax(-1).tolist()
            for index, token in zip(picked, best, strict=True):
                found[index] = token
        return found

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits (N, V) of the next token; ``rows`` as ``FrozenLLM.rows`` makes them."""
        rows = [[*self._llm.template.head_ids, *row] for row in rows]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=self._llm.device)
        lengths = torch.tensor([len(row) for row in rows], device=self._llm.device)
        mask = (torch.arange(width, device=ids.device) >= width - lengths.unsqueeze(1)).long()
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **self._keep).logits[:, -1]
        return logits.float()


def quickest(
    way: Callable[[int], object], sizes: Sequence[int], *, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Of ``sizes`` the one with which ``way`` takes least: the better of two turns, after one that warms up."""
    took = dict.fromkeys(sizes, float("inf"))
    way(sizes[0])
    for _ in range(2 if len(sizes) > 1 else 0):
        for size in sizes:
            started = clock()
            way(size)
            took[size] = min(took[size], clock() - started)
    return min(sizes, key=took.__getitem__)


def ways(llm: FrozenLLM, turns: Sequence[Sequence[str]], size: int) -> tuple[dict[str, Way], dict[str, int]]:
    """What answers the texts of turn ``n`` in passes of ``size`` rows, by name; and the rows of a pass of PEFT's ways.

    PEFT has the number that suits it best on the first turn.
    """
    classifier = Classifier(llm)
    stacks = {name: [prompt(llm, seed) for seed in range(count)] for name, count in STACKS.items()}
    peft = {
        "peft": Peft(llm, _soft(stacks["active"]), last_only=True),
        "peft_k4": Peft(llm, _soft(stacks["active_k4"]), last_only=True),
        "peft_plain": Peft(llm, _soft(stacks["active"]), last_only=False),
    }
    tried = [rows for rows in PEFT_ROWS if rows <= size] or [size]
    best = {name: quickest(partial(model.answers, turns[0]), tried) for name, model in peft.items()}
    routed = {f"routed_{name}": routes(llm, claimed=name == "claimed") for name in ("unclaimed", "claimed")}

    def own(stack: Sequence[SoftPrompt]) -> Way:
        return lambda n: classifier.classify(turns[n], stack, batch_size=size)

    def other(name: str) -> Way:
        return lambda n: peft[name].answers(turns[n], best[name])

    def through(found: Routes) -> Way:
        return lambda n: classify_routed(
            classifier, found, turns[n], digest=None, max_prompts=len(found), batch_size=size
        )

    found = (
        {name: own(stack) for name, stack in stacks.items()}
        | {name: through(found) for name, found in routed.items()}
        | {name: other(name) for name in peft}
    )
    return found, best


def _soft(stack: Sequence[SoftPrompt]) -> Tensor:
    return torch.cat([p.embeddings for p in stack])


def over(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Throughput of ``one`` over that of ``other``: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))


def figures(seconds: Mapping[str, Sequence[float]], texts: int) -> dict[str, float]:
    """``texts``: of one turn."""
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
            theirs = torch.cat([Peft(llm, soft, last_only=True).scores([row]) for row in rows])
            found[f"{name}_of_peft"] = float((theirs - plain).abs().max())
    return found
