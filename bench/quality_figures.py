"""What ``bench.quality`` says of answers already at hand; nothing here runs a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.overlaps import members_of, overlapping
from bench.tuned import LABELS
from models.evaluation import RowAnswers, set_figures
from models.examples import Example
from models.gate import Gate, best_cosines
from models.llm import FrozenLLM
from models.metrics import auc, bootstrap, difference, drift, flips, tpr_at_fpr
from models.weight_tuning import METHODS

PARTS = (0.1, 0.25, 0.5)  # of the forget rows, when not all are known
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
    forget rows; where a row is refused, the base's answer. Drift is over the labels and `unknown`, of rows that are not
    answered `unknown` (a gate's refusal has no probabilities but 0 and 1); flips are of all.
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
    moved = drift(answers[retain].scores, base[retain].scores)[~answers[retain].abstained]
    found["retain_drift_nats"] = float(moved.mean()) if len(moved) else None
    found["retain_flips"] = float(flips(answers[retain].said, base[retain].said).double().mean())
    return found


def margins(found: Mapping[str, Answers], wanted: Wanted, method: str) -> dict[str, Any]:
    """How much more of each test set the weight-tuned methods get right than ``method``, in points, row by row.

    On test retain rows below zero is in favour of ``method``, on test forget rows above.
    """
    out: dict[str, Any] = {}
    for other in (m.upper() for m in METHODS):
        for name in ("test_retain", "test_forget"):
            right = [(found[which][name].said == wanted[name]).double() for which in (other, method)]
            gap = difference(*right)
            out.setdefault(other, {})[name] = {"points": 100 * gap.mean, "interval": [100 * gap.low, 100 * gap.high]}
    return out


def claimed_by(gate: Gate, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gate claims, and what it decides alone: (n,) bool each, of points (n, D)."""
    scores = best_cosines(points, gate.directions)
    return scores > gate.threshold, scores > gate.certain


def partial_identification(
    texts: Sequence[str],
    states: torch.Tensor,
    gate_of: Callable[[torch.Tensor], Gate],
    points_of: Callable[[torch.Tensor], torch.Tensor],
    measured: Mapping[str, torch.Tensor],
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """A request of a share of the forget rows; of the others, and of ``measured`` points, what its gate claims.

    What is then answered ``unknown`` lies between ``certain`` and ``claimed``: the prompt decides of the rest. Texts
    that are parts of each other are submitted together, or not: a phrase would give its sentence away.
    """
    groups = [rows for _, rows in members_of(overlapping(texts))]
    random.Random(seed).shuffle(groups)
    order = torch.tensor([i for rows in groups for i in rows])
    ends = torch.tensor([len(rows) for rows in groups]).cumsum(0)
    out = {}
    for share in PARTS:
        cut = int(ends[ends <= max(share * len(order), int(ends[0]))][-1])
        submitted, rest = (states[part] for part in order.tensor_split([cut]))
        gate = gate_of(submitted)
        points = {"submitted": points_of(submitted), "not_submitted": points_of(rest), **measured}
        found = {name: claimed_by(gate, where) for name, where in points.items()}
        out[str(share)] = {
            name: {"claimed": float(claimed.double().mean()), "certain": float(certain.double().mean())}
            for name, (claimed, certain) in found.items()
        }
    return out


def nth(run: int, before: str) -> str:
    """What tells a repetition from the first run, whose names have nothing."""
    return f"{before}run-{run + 1}" if run else ""


def spread(found: Mapping[str, Any], trained: Sequence[str], runs: int) -> dict[str, Any]:
    """Of each trained method, over all its runs: accuracies on the test sets, each run's, in order."""
    return {
        name: {
            which: [found[f"{name}{nth(run, ' ')}"][which]["accuracy"] for run in range(runs)]
            for which in ("test_retain", "test_forget")
        }
        for name in trained
    }


def refused(base: RowAnswers, where: torch.Tensor, llm: FrozenLLM) -> RowAnswers:
    """``base``, but ``unknown`` on the rows ``where`` (n,) bool. The forced choice among labels stays what it was."""
    generic = llm.verbalizer.generic_ids[-1]
    unknown = torch.zeros(base.scores.shape[1])
    unknown[-1] = 1.0
    return RowAnswers(
        said=torch.where(where, torch.tensor(generic), base.said),
        scores=torch.where(where.unsqueeze(-1), unknown, base.scores),
        among_labels=base.among_labels,
    )


TITLE = "Every method: accuracy in percent (95 % interval; the paper), weighted F1, answered `unknown`"


def markdown(found: Mapping[str, Any], published: Mapping[str, tuple[float, ...]], names: Sequence[str]) -> str:
    """Accuracy in percent with its interval, weighted F1, the share answered ``unknown``; the paper's accuracy."""
    lines = [f"# {TITLE}", "", "| | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    for method, sets in found.items():
        cells = []
        for at, name in enumerate(names):
            one = sets[name]
            low, high = (100 * bound for bound in one["accuracy_interval"])
            paper = f"; paper {published[method][at]:.2f}" if at < len(published.get(method, ())) else ""
            cells.append(
                f"{100 * one['accuracy']:.1f} ({low:.1f} to {high:.1f}{paper}), F1 {100 * one['weighted_f1']:.1f}, "
                f"unknown {100 * one['abstain']:.1f}"
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def print_table(
    found: Mapping[str, Any], published: Mapping[str, tuple[float, ...]], names: Sequence[str], console: Console
) -> None:
    table = Table(title="accuracy, % (95 % interval; paper, LLaMA-2-7B); answered unknown, %")
    for column in ("", *names):
        table.add_column(column, justify="right")
    for name, sets in found.items():
        cells = []
        for at, which in enumerate(names):
            row = sets[which]
            low, high = row["accuracy_interval"]
            paper = f"; {published[name][at]:.1f}" if name in published and at < len(published[name]) else ""
            cells.append(f"{100 * row['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f}{paper}) {row['abstain']:.1%}")
        table.add_row(name, *cells)
    console.print(table)
