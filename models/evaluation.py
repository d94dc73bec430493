"""Figures about a set of prompts: the checks before activation, and the paper's metrics."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from models.canaries import lost
from models.errors import DatasetError
from models.examples import Example
from models.inference import BATCH, Classification, Classifier, answer_scores
from models.llm import FrozenLLM
from models.neighbours import NeighbourFigures, nearest, neighbour_figures
from models.soft_prompt import SoftPrompt
from models.text_states import gate_layers, text_states

MAX_FORGET_STATES = 256  # of the forget texts, by which neighbours are found


@dataclass(frozen=True)
class CheckLimits:
    """What a prompt must meet to become active: a rate, three falls in accuracy (absolute, 0..1), and a size.

    In a class of few rows one answer can be more than ``max_class_drop``: see ``allowed_drop``. ``max_neighbour_drop``:
    on the retain rows nearest to the forget texts. ``max_prompt_norm``: of a row of φ, in ``FrozenLLM.word_norm``.
    """

    min_forget_abstain: float
    max_retain_drop: float
    max_class_drop: float
    max_neighbour_drop: float = 1.0
    max_prompt_norm: float = math.inf

    def norm_violations(self, largest: float) -> list[str]:
        if largest <= self.max_prompt_norm:
            return []
        return [f"a row of the prompt is {largest:.2f} times as long as a word is, more than {self.max_prompt_norm:g}"]


@dataclass(frozen=True)
class RetainFigures:
    """Accuracy on a stratified sample, weighed back: overall, and by class ``rows``, ``before`` and ``after``."""

    before: float
    after: float
    per_class: dict[str, dict[str, float]]
    rows: int

    def worst_class(self, limits: CheckLimits) -> str:
        """The class that fell furthest beyond what it may."""
        return max(self.per_class, key=lambda label: self._fell(label) - self._allowed(label, limits))

    def violations(self, limits: CheckLimits) -> list[str]:
        found = []
        if self.before - self.after > limits.max_retain_drop + 1e-9:
            found.append(f"retain accuracy fell by {self.before - self.after:.4f}, more than {limits.max_retain_drop}")
        worst = self.worst_class(limits)
        fell, allowed = self._fell(worst), self._allowed(worst, limits)
        if fell > allowed + 1e-9:
            found.append(f"accuracy of class {worst!r} fell by {fell:.4f}, more than {allowed:.4f}")
        return found

    def _fell(self, label: str) -> float:
        return self.per_class[label]["before"] - self.per_class[label]["after"]

    def _allowed(self, label: str, limits: CheckLimits) -> float:
        return allowed_drop(int(self.per_class[label]["rows"]), limits.max_class_drop)


def retain_figures(
    sample: Sequence[Example],
    weights: Sequence[float],
    before: Sequence[Classification],
    after: Sequence[Classification],
) -> RetainFigures:
    """Of a sample from ``stratified``. An unlabelled row counts the answer of ``before`` as right."""
    truth = [e.label if e.label is not None else b.label for e, b in zip(sample, before, strict=True)]

    def accuracy(answers: Sequence[Classification], rows: Sequence[int]) -> float:
        right = sum(weights[i] for i in rows if answers[i].label == truth[i])
        return right / sum(weights[i] for i in rows)

    everything = range(len(sample))
    per_class = {}
    for label in sorted(set(truth)):
        rows = [i for i in everything if truth[i] == label]
        per_class[label] = {"rows": len(rows), "before": accuracy(before, rows), "after": accuracy(after, rows)}
    return RetainFigures(accuracy(before, everything), accuracy(after, everything), per_class, len(sample))


@dataclass(frozen=True)
class CheckReport:
    """``violations`` and ``missed`` are empty exactly when ``passed``. Accuracies are over labels and generic labels.

    ``missed``: what is violated, of ``models.self_tuning.Missed``.
    ``lost_canaries``: earlier requests that no longer hold (``models.canaries``). ``neighbour_…``: of the sampled rows,
    those nearest to the forget texts, which the training may have seen. ``prompt_norm``: the largest row of the newest
    prompt, and the mean. Without forget rows, when a set is checked that is in force already, these and the two abstain
    rates are None.
    """

    forget_abstain: float | None
    forget_abstain_before: float | None
    retain_accuracy: float
    retain_accuracy_before: float
    worst_class: str
    worst_class_accuracy: float
    worst_class_accuracy_before: float
    per_class: dict[str, dict[str, float]]
    retain_rows: int
    neighbour_rows: int | None
    neighbour_accuracy: float | None
    neighbour_accuracy_before: float | None
    neighbour_abstain: float | None
    prompt_norm: float | None
    prompt_norm_mean: float | None
    lost_canaries: int
    active_requests: int
    passed: bool
    violations: list[str]
    missed: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_prompts(
    llm: FrozenLLM,
    prompts: Sequence[SoftPrompt],
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    max_retain_rows: int,
    seed: int,
    limits: CheckLimits,
    canaries: Sequence[Sequence[str]] = (),
) -> CheckReport:
    """Classify forget rows and a seeded sample of retain rows with and without ``prompts``, as they would serve.

    The sample holds as many rows of a rare class as of a common one; the overall accuracy weighs them back.
    ``canaries``: those of each earlier request. Raises DatasetError without retain rows.
    """
    if not retain:
        raise DatasetError("checks need at least one retain row")
    sample, weights = stratified(retain, max_retain_rows, seed)
    classifier = Classifier(llm)
    texts = [e.text for e in sample]
    before, after = classifier.classify(texts), classifier.classify(texts, prompts)
    figures = retain_figures(sample, weights, before, after)
    forget_texts = [e.text for e in forget]
    abstain = _abstain_rate(classifier, forget_texts, prompts) if forget else None
    lost_requests = lost(classifier, prompts, canaries)
    found: dict[str, list[str]] = {"forget": [], "retain": figures.violations(limits), "norm": [], "set": []}
    near: NeighbourFigures | None = None
    norms: tuple[float | None, float | None] = (None, None)
    if forget:
        few = forget_texts[:: -(-len(forget) // MAX_FORGET_STATES)]
        states = text_states(llm, [*texts, *few])
        picked = nearest(states[: len(texts)], states[len(texts) :], len(gate_layers(llm)))
        near = neighbour_figures([sample[i] for i in picked], [before[i] for i in picked], [after[i] for i in picked])
        found["retain"] += near.violations(limits.max_neighbour_drop)
    if forget and prompts:
        norms = largest, _ = prompts[-1].norms(llm.word_norm)
        found["norm"] = limits.norm_violations(largest)
    if abstain is not None and abstain < limits.min_forget_abstain:
        found["forget"].append(f"forget abstain rate {abstain:.4f} is below {limits.min_forget_abstain}")
    if lost_requests:
        found["set"].append(f"{lost_requests} earlier requests would no longer be forgotten")
    violations = [violation for part in found.values() for violation in part]
    worst = figures.worst_class(limits)
    return CheckReport(
        forget_abstain=abstain,
        forget_abstain_before=_abstain_rate(classifier, forget_texts, ()) if forget else None,
        retain_accuracy=figures.after,
        retain_accuracy_before=figures.before,
        worst_class=worst,
        worst_class_accuracy=figures.per_class[worst]["after"],
        worst_class_accuracy_before=figures.per_class[worst]["before"],
        per_class=figures.per_class,
        retain_rows=figures.rows,
        neighbour_rows=near.rows if near else None,
        neighbour_accuracy=near.after if near else None,
        neighbour_accuracy_before=near.before if near else None,
        neighbour_abstain=near.abstain if near else None,
        prompt_norm=norms[0],
        prompt_norm_mean=norms[1],
        lost_canaries=lost_requests,
        active_requests=len(prompts),
        passed=not violations,
        violations=violations,
        missed=[name for name, part in found.items() if part],
    )


def allowed_drop(rows: int, limit: float) -> float:
    """By how much the accuracy of a class may fall: one answer of ``rows`` is not evidence."""
    return max(limit, 1 / rows)


def stratified(rows: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[float]]:
    """``count`` rows, an equal share of each label (no label is one too) as far as it goes, at least one of each.

    Second: how many rows each stands for.
    """
    strata: dict[str | None, list[Example]] = {}
    for row in rows:
        strata.setdefault(row.label, []).append(row)
    sample: list[Example] = []
    weights: list[float] = []
    # The rarest first: what a small stratum leaves of its share goes to the larger ones.
    for left, label in zip(
        range(len(strata), 0, -1), sorted(strata, key=lambda k: (len(strata[k]), str(k))), strict=True
    ):
        share = max(1, (count - len(sample)) // left)
        picked = random.Random(seed).sample(strata[label], min(share, len(strata[label])))
        sample += picked
        weights += [len(strata[label]) / len(picked)] * len(picked)
    return sample, weights


def _abstain_rate(classifier: Classifier, texts: Sequence[str], prompts: Sequence[SoftPrompt]) -> float:
    return sum(c.abstained for c in classifier.classify(texts, prompts)) / len(texts)


@dataclass(frozen=True)
class SetFigures:
    """The paper's metrics on one labelled set, and two beside them.

    ``accuracy`` and ``weighted_f1``: argmax over the whole vocabulary, anything but the true label's token is wrong.
    ``abstain``: share that the service answers ``unknown``. ``constrained_accuracy``: argmax over the label words only.
    """

    rows: int
    accuracy: float
    weighted_f1: float
    abstain: float
    constrained_accuracy: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class RowAnswers:
    """Of each row (n,): ``said``, the token that wins over the whole vocabulary; ``among_labels``, over labels only.

    ``scores`` (n, L+1): see ``answer_scores``.
    """

    said: Tensor
    scores: Tensor
    among_labels: Tensor

    @property
    def abstained(self) -> Tensor:
        """Whether the service answers ``unknown``, (n,) bool."""
        return self.scores.argmax(-1) == self.scores.shape[-1] - 1


@torch.no_grad()
def row_answers(
    llm: FrozenLLM, prompts: Sequence[SoftPrompt], texts: Sequence[str], *, batch_size: int = BATCH
) -> RowAnswers:
    """What the model answers behind ``prompts``, on the CPU. Raises TextTooLong, FingerprintMismatch."""
    hidden = Classifier(llm).hidden(texts, prompts, batch_size=batch_size)
    labels = torch.tensor(llm.verbalizer.label_ids)
    said, scores, among = [], [], []
    for part in hidden.split(256):  # (256, V) logits at a time
        logits = llm.logits(part).cpu()
        said.append(logits.argmax(-1))
        scores.append(answer_scores(llm, part).cpu())
        among.append(labels[logits[:, labels].argmax(-1)])
    return RowAnswers(torch.cat(said), torch.cat(scores), torch.cat(among))


def label_ids(llm: FrozenLLM, examples: Sequence[Example]) -> Tensor:
    """True label tokens (n,). Raises DatasetError for unlabelled or no rows."""
    if not examples or any(e.label is None for e in examples):
        raise DatasetError("measuring needs rows, and a label on every row")
    return torch.tensor([llm.verbalizer.id_of(e.label) for e in examples if e.label is not None])


def set_figures(answers: RowAnswers, wanted: Tensor) -> SetFigures:
    """Paper metrics (arXiv 2406.12038 §5) of answers against the true label tokens (n,)."""
    return SetFigures(
        rows=len(wanted),
        accuracy=float((answers.said == wanted).float().mean()),
        weighted_f1=weighted_f1(wanted.tolist(), answers.said.tolist()),
        abstain=float(answers.abstained.float().mean()),
        constrained_accuracy=float((answers.among_labels == wanted).float().mean()),
    )


def measure(
    llm: FrozenLLM, prompts: Sequence[SoftPrompt], examples: Sequence[Example], *, batch_size: int = BATCH
) -> SetFigures:
    """``set_figures`` of a labelled set. Raises DatasetError, TextTooLong, FingerprintMismatch."""
    wanted = label_ids(llm, examples)
    return set_figures(row_answers(llm, prompts, [e.text for e in examples], batch_size=batch_size), wanted)


def weighted_f1(truth: Sequence[int], answers: Sequence[int]) -> float:
    """F1 per true class, weighted by its support (scikit-learn's ``average="weighted"``; answers may be anything)."""
    total = 0.0
    for cls in set(truth):
        hits = sum(t == cls == a for t, a in zip(truth, answers, strict=True))
        support, predicted = sum(t == cls for t in truth), sum(a == cls for a in answers)
        total += support * (2 * hits / (support + predicted))
    return total / len(truth)
