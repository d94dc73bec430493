"""Texts whose answers are known, and prompts in force that change exactly the answers that they are meant to."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.defaults import load_arguments
from app.settings import Quantization, Settings
from app.vault import Vault, letters
from bench.training import concatenated
from models.gate import NEVER, Gate, GateSpace, fit_space
from models.inference import Classifier, answer_scores
from models.llm import FrozenLLM
from models.routing import Route
from models.soft_prompt import SoftPrompt
from models.text_states import gate_layers, text_states

SPACE_TEXTS = 128
PROMPT_TOKENS = 30
TEACH_STEPS = 100
FURTHEST = 0.9  # cosine of two texts that a gate still tells apart whatever batch they are in

MARGINS: dict[Quantization, float] = {"none": 0.01, "int8": 0.2, "nf4": 0.2}
"""How far the best answer's probability is above the second: the last bits of an answer, and with quantized weights
some before them, depend on its batch."""
MARGIN_BFLOAT16 = 0.2  # whatever the weights are quantized to


class NoProbes(Exception):
    """The model or the texts give no decisive answers."""


@dataclass(frozen=True, repr=False)
class Probes:
    """``texts`` with the bare model's ``labels``, never ``unknown``, and their ``points`` (N, D) in ``space``.

    ``prompts``: those that were taught to abstain on a text, by its index.
    """

    texts: list[str]
    labels: list[str]
    points: Tensor
    space: GateSpace
    fingerprint: str
    hidden_size: int
    prompts: Mapping[int, SoftPrompt] = field(default_factory=dict)

    def alone(self, index: int) -> float:
        """The best cosine of any other text with this one."""
        cosines = self.points @ self.points[index]
        cosines[index] = -1.0
        return float(cosines.max())

    def route(self, index: int, kind: str, vault: Vault, seed: int) -> Route:
        """A synthetic prompt and a gate of a ``kind``:

        - ``guard``: knows the text by its keyed digest and claims nothing: `unknown` whatever the prompt says
        - ``certain``: claims the text and is sure of it: the same, by its direction alone
        - ``claim``: claims the text, and its prompt decides, which is random
        - ``taught``: claims the text, and its prompt, which is one of ``prompts``, decides: `unknown`
        - ``idle``: claims nothing and knows nothing
        """
        threshold = (1.0 + self.alone(index)) / 2 if kind in ("certain", "claim", "taught") else NEVER
        known = [list(vault.gate_digest(self.texts[index]))] if kind == "guard" else []
        gate = Gate(
            self.points[index : index + 1].clone(),
            threshold,
            threshold if kind == "certain" else NEVER,
            torch.tensor(known, dtype=torch.uint8).reshape(-1, 32),
            self.space.digest,
        )
        if kind == "taught":
            return Route(self.prompts[index], gate)
        return Route(SoftPrompt(_noise(self.hidden_size, seed), self.fingerprint), gate)


def _noise(width: int, seed: int) -> Tensor:
    return 0.05 * torch.randn(PROMPT_TOKENS, width, generator=torch.Generator().manual_seed(seed))


def taught(classifier: Classifier, text: str, seed: int, margin: float) -> SoftPrompt:
    """A prompt behind which this text is answered `unknown`, by ``margin``. Raises NoProbes."""
    llm = classifier.llm
    phi = _noise(llm.hidden_size, seed).to(llm.device, llm.dtype).requires_grad_()
    optimizer = torch.optim.Adam([phi], lr=0.02)
    generic, rows = len(llm.verbalizer.labels), llm.rows([text])
    for _ in range(TEACH_STEPS):
        among = concatenated(llm, phi, rows)[:, list(llm.verbalizer.ids)].log_softmax(-1)
        prompt = SoftPrompt(phi.detach().float().cpu().clone(), llm.fingerprint)
        if float(among.detach()[:, generic:].exp().sum()) > 0.5:
            # What counts is what serving makes of it, which runs the same rows in another shape.
            best, second = answer_scores(llm, classifier.hidden([text], [prompt]))[0].topk(2).values.tolist()
            if classifier.classify([text], [prompt])[0].abstained and best - second >= 2 * margin:
                return prompt
        optimizer.zero_grad()
        (-among[:, generic:].logsumexp(-1).mean()).backward()
        optimizer.step()
    raise NoProbes(f"{TEACH_STEPS} steps did not teach a prompt to abstain")


def find_probes(
    settings: Settings,
    texts: Sequence[str],
    count: int,
    *,
    furthest: float = FURTHEST,
    teach: Collection[int] = (),
) -> Probes:
    """The first ``count`` decisive ones of ``texts``, none like another. Loads the model and lets it go again.

    ``furthest``: cosine that no two of them reach; 1 where no gate has to tell them apart. ``teach``: indices of those
    that get a prompt that abstains on them. Raises NoProbes.
    """
    llm = FrozenLLM.load(**load_arguments(settings))
    limit = llm.text_limit(settings.max_text_tokens, settings.num_virtual_tokens)
    margin = MARGINS[settings.quantization] if llm.dtype == torch.float32 else MARGIN_BFLOAT16
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
            prompts = {index: taught(classifier, found[index], index, margin) for index in teach}
            return Probes(found, labels, points, space, llm.fingerprint, llm.hidden_size, prompts)
    raise NoProbes(
        f"of {len(candidates)} texts only {len(found)} have answers that are {margin} apart, {count} are needed"
    )
