"""Evidence of one request: what its texts are to the model before and after, for a picture and for an attack.

Two views of the same texts. ``base``: the bare model. ``served``: as this request makes the service answer, whatever
else is in force, and without the guard that knows the forget texts by their digests: it would know them by heart.

- The picture is Fig. 1 of the paper (arXiv 2406.12038): last hidden states at the position that predicts the label, of
  both views together, on a plane (``models.tsne``). A text that the service answers from the base pass has one state,
  so it stays where it is.
- The attack asks whether a text was in the request: after Yeom et al. 2018 its score is the probability of the true
  label, as in ``bench.attacks``. Members are forget texts. Where a forget text has no label, the score of all is that
  of the base model's own answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.examples import Example
from models.inference import Classifier, answer_scores
from models.metrics import auc, auc_interval, roc
from models.routing import Routes
from models.soft_prompt import SoftPrompt
from models.tsne import tsne

Pair = tuple[float, float]


@dataclass(frozen=True, repr=False)
class Views:
    """Of each text (n,): last hidden states (n, d) and ``answer_scores`` (n, L+1) in both views, on the CPU.

    ``moved`` (n,) bool: answered behind a prompt; the states of all others are the base's.
    """

    base: Tensor
    served: Tensor
    base_scores: Tensor
    served_scores: Tensor
    moved: Tensor


@dataclass(frozen=True, repr=False)
class Rows:
    """Texts to make evidence of. ``others`` are the attack's non-members; None: the ``retain`` rows are."""

    forget: Sequence[Example]
    retain: Sequence[Example]
    others: Sequence[Example] | None


@dataclass(frozen=True)
class Attack:
    """Area under the ROC curve with its 95 % interval, and the curve: shares of others and of members."""

    auc: float
    low: float
    high: float
    roc: list[Pair]


@dataclass(frozen=True)
class Cluster:
    """Points of one set and label, in both views, in the same order: of their places, which says nothing of the rows'.

    ``label`` None: the texts came without one.
    """

    set: str
    label: str | None
    base: list[Pair]
    served: list[Pair]


@dataclass(frozen=True)
class Evidence:
    """``labelled``: the attack's score is of the true label, else of the base model's own answer."""

    clusters: list[Cluster]
    moved: int
    members: int
    others: int
    held_out: bool
    labelled: bool
    base: Attack
    served: Attack


def choose(
    forget: Sequence[Example],
    retain: Sequence[Example],
    held_out: Sequence[Example] | None,
    *,
    count: int,
    seed: int,
) -> Rows:
    """At most ``count`` rows of each kind, seeded; the others with the labels of the forget texts, in their shares."""
    picked = list(forget) if len(forget) <= count else random.Random(seed).sample(list(forget), count)
    return Rows(
        picked,
        _alike(picked, retain, count, seed),
        None if held_out is None else _alike(picked, held_out, count, seed),
    )


def _alike(forget: Sequence[Example], rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``rows`` with the same labels, or any where a forget text has none, or none of the rows has one of theirs."""
    draw, shares = random.Random(seed), Counter(e.label for e in forget)
    found: list[Example] = []
    if None not in shares:
        for label in sorted(shares, key=str):
            pool = [row for row in rows if row.label == label]
            found += draw.sample(pool, min(len(pool), round(count * shares[label] / len(forget))))
    return found or draw.sample(list(rows), min(len(rows), count))


def routed_views(classifier: Classifier, routes: Routes, texts: Sequence[str]) -> Views:
    """``routes``: the request's own, alone. Behind its prompt stands what its gate claims, also where the gate decides
    without asking the prompt. Raises TextTooLong.

    As ``classify_routed`` has it of one route, which a test holds it against; here each pass is made once, and its
    states are kept.
    """
    [route] = routes.routes
    hidden, states = classifier.base_pass(texts)
    margins = routes.margins(states)
    moved, certain = (margins > 0).flatten(), routes.sure(margins).flatten()
    base, base_scores = hidden.float().cpu(), answer_scores(classifier.llm, hidden).float().cpu()
    served, served_scores = base.clone(), base_scores.clone()
    if bool(moved.any()):
        claimed = [text for text, claims in zip(texts, moved.tolist(), strict=True) if claims]
        behind = classifier.hidden(claimed, [route.prompt])
        scores = answer_scores(classifier.llm, behind).float().cpu()
        abstains = scores.argmax(1, keepdim=True) == scores.shape[1] - 1
        served[moved] = behind.float().cpu()
        served_scores[moved] = torch.where(abstains, scores, base_scores[moved])
        unknown = torch.zeros(scores.shape[1])
        unknown[-1] = 1.0
        served_scores[certain] = unknown
    return Views(base, served, base_scores, served_scores, moved)


def stacked_views(classifier: Classifier, prompts: Sequence[SoftPrompt], texts: Sequence[str]) -> Views:
    """Mode ``concatenate``: every text behind all prompts. Raises TextTooLong."""
    base, served = classifier.hidden(texts), classifier.hidden(texts, prompts)
    scores = [answer_scores(classifier.llm, hidden).float().cpu() for hidden in (base, served)]
    moved = torch.full((len(texts),), bool(prompts))
    return Views(base.float().cpu(), served.float().cpu(), scores[0], scores[1], moved)


def make_evidence(rows: Rows, views: Views, labels: Sequence[str], *, seed: int) -> Evidence:
    """``views`` of the texts of ``texts_of(rows)``. Raises ValueError for states that are not finite."""
    shown = len(rows.forget) + len(rows.retain)
    members = torch.arange(len(rows.forget))
    others = torch.arange(len(rows.forget), shown) if rows.others is None else torch.arange(shown, len(views.base))
    examples = [*rows.forget, *rows.retain, *(rows.others or ())]
    labelled = all(examples[i].label is not None for i in [*members.tolist(), *others.tolist()])

    def attack(scores: Tensor) -> Attack:
        if labelled:
            wanted = torch.tensor([labels.index(e.label) if e.label is not None else 0 for e in examples])
        else:
            wanted = views.base_scores[:, : len(labels)].argmax(1)
        known = scores[torch.arange(len(scores)), wanted]
        area = auc(known[members], known[others])
        return Attack(area, *auc_interval(area, len(members), len(others)), roc(known[members], known[others]))

    return Evidence(
        clusters=_clusters(rows, views, shown, seed),
        moved=int(views.moved[:shown].sum()),
        members=len(members),
        others=len(others),
        held_out=rows.others is not None,
        labelled=labelled,
        base=attack(views.base_scores),
        served=attack(views.served_scores),
    )


def held_out_figures(rows: Rows, views: Views, labels: Sequence[str]) -> dict[str, Any]:
    """Right answers on the held-out rows in both views, as metrics; empty without such rows.

    A row without a label counts the answer of the base model as right.
    """
    others = rows.others
    if not others:
        return {}
    before, after = (scores[-len(others) :].argmax(1).tolist() for scores in (views.base_scores, views.served_scores))
    pairs = zip(others, before, strict=True)
    truth = [labels.index(row.label) if row.label is not None else answer for row, answer in pairs]

    def accuracy(answers: Sequence[int]) -> float:
        return sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)

    return {
        "held_out_rows": len(truth),
        "held_out_accuracy_before": accuracy(before),
        "held_out_accuracy": accuracy(after),
    }


def texts_of(rows: Rows) -> list[str]:
    return [e.text for e in [*rows.forget, *rows.retain, *(rows.others or ())]]


def _clusters(rows: Rows, views: Views, shown: int, seed: int) -> list[Cluster]:
    moved = views.moved[:shown]
    plane = tsne(torch.cat([views.base[:shown], views.served[:shown][moved]]), seed=seed)
    base, served = plane[:shown], plane[:shown].clone()
    served[moved] = plane[shown:]
    found = []
    for name, start, part in (("forget", 0, rows.forget), ("retain", len(rows.forget), rows.retain)):
        for label in sorted({e.label for e in part}, key=str):
            at = [start + i for i, e in enumerate(part) if e.label == label]
            pairs = sorted(zip(_rounded(base[at]), _rounded(served[at]), strict=True))
            found.append(Cluster(name, label, [a for a, _ in pairs], [b for _, b in pairs]))
    return found


def _rounded(points: Tensor) -> list[Pair]:
    return [(round(x, 2), round(y, 2)) for x, y in points.tolist()]


def as_document(found: Evidence) -> dict[str, Any]:
    """As JSON has it; shares of the curves to four digits."""

    def attack(one: Attack) -> dict[str, Any]:
        curve = [[round(a, 4), round(b, 4)] for a, b in one.roc]
        return {"auc": round(one.auc, 6), "low": round(one.low, 6), "high": round(one.high, 6), "roc": curve}

    return {
        "embedding": {
            "moved": found.moved,
            "clusters": [
                {"set": one.set, "label": one.label, "base": one.base, "served": one.served} for one in found.clusters
            ],
        },
        "membership": {
            "score": "true label" if found.labelled else "base answer",
            "non_members": "held out" if found.held_out else "retain",
            "members": found.members,
            "others": found.others,
            "base": attack(found.base),
            "served": attack(found.served),
        },
    }
