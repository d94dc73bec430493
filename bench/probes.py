"""Texts whose answers are known, and prompts in force that change exactly the answers that they are meant to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.defaults import load_arguments
from app.settings import Quantization, Settings
from app.vault import Vault, letters
from models.gate import NEVER, Gate, GateSpace, fit_space
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routing import Route
from models.soft_prompt import SoftPrompt
from models.text_states import gate_layers, text_states

SPACE_TEXTS = 128
FURTHEST = 0.9  # cosine of two texts that a gate still tells apart whatever batch they are in

MARGINS: dict[Quantization, float] = {"none": 0.01, "int8": 0.2, "nf4": 0.2}
"""How far the best answer's probability is above the second: the last bits of an answer, and with quantized weights
some before them, depend on its batch."""


class NoProbes(Exception):
    """The model or the texts give no decisive answers."""


@dataclass(frozen=True, repr=False)
class Probes:
    """``texts`` with the bare model's ``labels``, never ``unknown``, and their ``points`` (N, D) in ``space``."""

    texts: list[str]
    labels: list[str]
    points: Tensor
    space: GateSpace
    fingerprint: str
    hidden_size: int

    def alone(self, index: int) -> float:
        """The best cosine of any other text with this one."""
        cosines = self.points @ self.points[index]
        cosines[index] = -1.0
        return float(cosines.max())

    def route(self, index: int, kind: str, vault: Vault, seed: int) -> Route:
        """A synthetic prompt and a gate of a ``kind``:

        - ``guard``: knows the text by its keyed digest and claims nothing: `unknown` whatever the prompt says
        - ``certain``: claims the text and is sure of it: the same, by its direction alone
        - ``claim``: claims the text, and its prompt decides
        - ``idle``: claims nothing and knows nothing
        """
        threshold = (1.0 + self.alone(index)) / 2 if kind in ("certain", "claim") else NEVER
        known = [list(vault.gate_digest(self.texts[index]))] if kind == "guard" else []
        gate = Gate(
            self.points[index : index + 1].clone(),
            threshold,
            threshold if kind == "certain" else NEVER,
            torch.tensor(known, dtype=torch.uint8).reshape(-1, 32),
            self.space.digest,
        )
        noise = torch.randn(30, self.hidden_size, generator=torch.Generator().manual_seed(seed))
        return Route(SoftPrompt(0.05 * noise, self.fingerprint), gate)


def find_probes(settings: Settings, texts: Sequence[str], count: int, *, furthest: float = FURTHEST) -> Probes:
    """The first ``count`` decisive ones of ``texts``, none like another. Loads the model and lets it go again.

    ``furthest``: cosine that no two of them reach; 1 where no gate has to tell them apart. Raises NoProbes.
    """
    llm = FrozenLLM.load(**load_arguments(settings))
    limit = llm.text_limit(settings.max_text_tokens, settings.num_virtual_tokens)
    margin = MARGINS[settings.quantization]
    folded: dict[str, str] = {}
    for text in texts:
        if len(folded) == max(SPACE_TEXTS, 8 * count):
            break
        if 0 < llm.count_tokens(text) <= limit:
            folded.setdefault(letters(text), text)
    candidates = list(folded.values())
    sample = random.Random(0).sample(candidates, min(SPACE_TEXTS, len(candidates)))
    space = fit_space(text_states(llm, sample), len(gate_layers(llm)), fingerprint=llm.fingerprint)
    found: list[str] = []
    labels: list[str] = []
    points = torch.empty(0, len(space.center))
    classifier = Classifier(llm)
    for start in range(0, len(candidates), 64):
        chunk = candidates[start : start + 64]
        states = space.points(text_states(llm, chunk))
        for text, point, answer in zip(chunk, states, classifier.classify(chunk), strict=True):
            best, second = sorted(answer.probabilities.values(), reverse=True)[:2]
            apart = not len(points) or float((points @ point).max()) < furthest
            if not answer.abstained and best - second >= margin and apart and len(found) < count:
                found.append(text)
                labels.append(answer.label)
                points = torch.cat([points, point.unsqueeze(0)])
        if len(found) == count:
            return Probes(found, labels, points, space, llm.fingerprint, llm.hidden_size)
    raise NoProbes(
        f"of {len(candidates)} texts only {len(found)} have answers that are {margin} apart, {count} are needed"
    )
