"""What ``bench.quality`` says of answers already at hand; nothing here runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.tuned import LABELS
from models.evaluation import RowAnswers, set_figures
from models.examples import Example
from models.metrics import auc, bootstrap, difference, drift, flips, tpr_at_fpr
from models.weight_tuning import METHODS

Answers = Mapping[str, RowAnswers]  # by set
Wanted = Mapping[str, torch.Tensor]  # true label tokens (n,), by set


def figures(answers: Answers, wanted: Wanted) -> dict[str, Any]:
    """Of each set: the figures, and the accuracy's interval."""
    out = {}
    for name, found in answers.items():
        right = bootstrap(found.said == wanted[name])
        out[name] = {**set_figures(found, wanted[name]).as_dict(), "accuracy_interval": [right.low, right.high]}
    return out


def leaks(answers: Answers, base: Answers, rows: Mapping[str, Sequence[Example]], wanted: Wanted) -> dict[str, Any]:
    """What is left to see, of the forget rows and of the change.

    ``loss``: membership by the true label's share of the verbalizer's words (after Yeom et al. 2018), trained forget
    rows against such as were never trained on, whichever way an attacker reads it; 0.5 is nothing. SST-2's test rows
    are often phrases of its train sentences (495 of 552 forget rows), which draws it to 0.5 for every method alike.
    ``streisand``: how well the mass on `unknown` tells trained forget rows from anybody's unseen rows, that is, who
    asked to be forgotten. ``forced_choice_accuracy``: how often the right label still wins among labels, on trained
    forget rows; where a row is refused, the base's answer. Drift is over the labels and `unknown`.
    """

    def of_label(name: str) -> torch.Tensor:
        index = [LABELS.index(row.label or "") for row in rows[name]]
        return answers[name].scores[torch.arange(len(index)), index]

    found: dict[str, Any] = {}
    members, others = of_label("train_forget"), of_label("test_forget")
    forwards = auc(members, others)
    found["loss_auc"] = max(forwards, 1 - forwards)
    found["loss_tpr_at_1_percent"] = max(tpr_at_fpr(sign * members, sign * others, 0.01) for sign in (1, -1))
    found["streisand_auc"] = auc(answers["train_forget"].scores[:, -1], answers["test_retain"].scores[:, -1])
    right = answers["train_forget"].among_labels == wanted["train_forget"]
    found["forced_choice_accuracy"] = float(right.double().mean())
    retain = "test_retain"
    found["retain_drift_nats"] = float(drift(answers[retain].scores, base[retain].scores).mean())
    found["retain_flips"] = float(flips(answers[retain].said, base[retain].said).double().mean())
    return found


def margins(found: Mapping[str, Answers], wanted: Wanted, method: str) -> dict[str, Any]:
    """How much more of each test set the weight-tuned methods get right than ``method``, row by row."""
    out: dict[str, Any] = {}
    for other in (m.upper() for m in METHODS):
        for name in ("test_retain", "test_forget"):
            right = [(found[which][name].said == wanted[name]).double() for which in (other, method)]
            gap = difference(*right)
            out.setdefault(other, {})[name] = {"points": 100 * gap.mean, "interval": [100 * gap.low, 100 * gap.high]}
    return out
