"""Figures about a set of prompts: the checks before activation, and the paper's metrics."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.errors import DatasetError
from models.examples import Example
from models.inference import Classification, Classifier, answer_scores
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class CheckLimits:
    """What a prompt must meet to become active: a rate, and two falls in accuracy (absolute, 0..1).

    In a class of few rows one answer can be more than ``max_class_drop``: see ``allowed_drop``.
    """

    min_forget_abstain: float
    max_retain_drop: float
    max_class_drop: float


@dataclass(frozen=True)
class CheckReport:
    """``violations`` is empty exactly when ``passed``. Accuracies are over labels and generic labels."""

    forget_abstain: float
    forget_abstain_before: float
    retain_accuracy: float
    retain_accuracy_before: float
    worst_class: str
    worst_class_accuracy: float
    worst_class_accuracy_before: float
    per_class: dict[str, dict[str, float]]
    retain_rows: int
    passed: bool
    violations: list[str]

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
) -> CheckReport:
    """Classify forget rows and a seeded sample of retain rows with and without ``prompts``, as they would serve.

    The sample holds as many rows of a rare class as of a common one; the overall accuracy weighs them back.
    Unlabelled retain rows count the base model's own answer as right. Raises DatasetError when a side is empty.
    """
    if not forget or not retain:
        raise DatasetError("checks need at least one forget row and one retain row")
    sample, weights = _stratified(retain, max_retain_rows, seed)
    classifier = Classifier(llm)
    forget_texts, retain_texts = [e.text for e in forget], [e.text for e in sample]
    before = classifier.classify(retain_texts)
    after = classifier.classify(retain_texts, prompts)
    truth = [e.label if e.label is not None else b.label for e, b in zip(sample, before, strict=True)]

    def accuracy(answers: Sequence[Classification], rows: Sequence[int]) -> float:
        right = sum(weights[i] for i in rows if answers[i].label == truth[i])
        return right / sum(weights[i] for i in rows)

    everything = range(len(sample))
    per_class = {}
    for label in sorted(set(truth)):
        rows = [i for i in everything if truth[i] == label]
        per_class[label] = {"rows": len(rows), "before": accuracy(before, rows), "after": accuracy(after, rows)}

    def drop(label: str) -> float:
        return per_class[label]["before"] - per_class[label]["after"]

    allowed = {label: allowed_drop(int(c["rows"]), limits.max_class_drop) for label, c in per_class.items()}
    worst = max(per_class, key=lambda label: drop(label) - allowed[label])
    abstain = _abstain_rate(classifier, forget_texts, prompts)
    overall_before, overall_after = accuracy(before, everything), accuracy(after, everything)
    violations = []
    if abstain < limits.min_forget_abstain:
        violations.append(f"forget abstain rate {abstain:.4f} is below {limits.min_forget_abstain}")
    if overall_before - overall_after > limits.max_retain_drop + 1e-9:
        violations.append(
            f"retain accuracy fell by {overall_before - overall_after:.4f}, more than {limits.max_retain_drop}"
        )
    if drop(worst) > allowed[worst] + 1e-9:
        violations.append(f"accuracy of class {worst!r} fell by {drop(worst):.4f}, more than {allowed[worst]:.4f}")
    return CheckReport(
        forget_abstain=abstain,
        forget_abstain_before=_abstain_rate(classifier, forget_texts, ()),
        retain_accuracy=overall_after,
        retain_accuracy_before=overall_before,
        worst_class=worst,
        worst_class_accuracy=per_class[worst]["after"],
        worst_class_accuracy_before=per_class[worst]["before"],
        per_class=per_class,
        retain_rows=len(sample),
        passed=not violations,
        violations=violations,
    )


def allowed_drop(rows: int, limit: float) -> float:
    """By how much the accuracy of a class may fall: one answer of ``rows`` is not evidence."""
    return max(limit, 1 / rows)


def _stratified(rows: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[float]]:
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


@torch.no_grad()
def measure(
    llm: FrozenLLM, prompts: Sequence[SoftPrompt], examples: Sequence[Example], *, batch_size: int = 32
) -> SetFigures:
    """Paper metrics (arXiv 2406.12038 §5) of a labelled set. Raises DatasetError for unlabelled or no rows."""
    if not examples or any(e.label is None for e in examples):
        raise DatasetError("measuring needs rows, and a label on every row")
    verbalizer = llm.verbalizer
    wanted = torch.tensor([verbalizer.id_of(e.label) for e in examples if e.label is not None])
    hidden = Classifier(llm).hidden([e.text for e in examples], prompts, batch_size=batch_size)
    chosen, abstained, among_labels = [], [], []
    labels = torch.tensor(verbalizer.label_ids)
    for part in hidden.split(256):  # (256, V) logits at a time
        logits = llm.logits(part).cpu()
        chosen.append(logits.argmax(-1))
        abstained.append(answer_scores(llm, part).argmax(-1).cpu() == len(labels))
        among_labels.append(labels[logits[:, labels].argmax(-1)])
    answer, label = torch.cat(chosen), torch.cat(among_labels)
    return SetFigures(
        rows=len(examples),
        accuracy=float((answer == wanted).float().mean()),
        weighted_f1=weighted_f1(wanted.tolist(), answer.tolist()),
        abstain=float(torch.cat(abstained).float().mean()),
        constrained_accuracy=float((label == wanted).float().mean()),
    )


def weighted_f1(truth: Sequence[int], answers: Sequence[int]) -> float:
    """F1 per true class, weighted by its support (scikit-learn's ``average="weighted"``; answers may be anything)."""
    total = 0.0
    for cls in set(truth):
        hits = sum(t == cls == a for t, a in zip(truth, answers, strict=True))
        support, predicted = sum(t == cls for t in truth), sum(a == cls for a in answers)
        total += support * (2 * hits / (support + predicted))
    return total / len(truth)
