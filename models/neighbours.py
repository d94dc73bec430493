"""The retain texts that are most like the texts to forget: what a request takes along first, where it takes too much.

An overall accuracy does not show them: a request that silences every text beside its own moves it by a percent or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.examples import Example
from models.inference import Classification

NEIGHBOURS = 64
SHARE = 0.25  # of the rows at hand, at most: more of them would be the retain set once again


@dataclass(frozen=True)
class NeighbourFigures:
    """Accuracies before and after, and the share answered ``unknown``. Unlabelled rows: see ``retain_figures``."""

    rows: int
    before: float
    after: float
    abstain: float

    def violations(self, max_drop: float) -> list[str]:
        """One answer alone is no evidence."""
        allowed = max(max_drop, 1 / self.rows)
        if self.before - self.after <= allowed + 1e-9:
            return []
        return [
            f"accuracy on the {self.rows} retain rows nearest to the forget texts fell by "
            f"{self.before - self.after:.4f}, more than {allowed:.4f}"
        ]


def how_many(rows: int) -> int:
    return max(1, min(NEIGHBOURS, int(SHARE * rows)))


def nearest(rows: Tensor, forget: Tensor, layers: int) -> list[int]:
    """The ``how_many`` of the states (N, D) that are nearest to any of (n, D): mean cosine over ``layers``, centred.

    For where there is no gate space; a gate's own margins say it better.
    """
    center = rows.mean(0)

    def points(states: Tensor) -> Tensor:
        parts: Tensor = torch.nn.functional.normalize((states - center).unflatten(1, (layers, -1)), dim=-1)
        return parts.flatten(1) / math.sqrt(layers)

    best = (points(rows) @ points(forget).T).max(1).values
    found: list[int] = best.argsort(descending=True, stable=True)[: how_many(len(rows))].tolist()
    return found


def neighbour_figures(
    rows: Sequence[Example], before: Sequence[Classification], after: Sequence[Classification]
) -> NeighbourFigures:
    truth = [e.label if e.label is not None else b.label for e, b in zip(rows, before, strict=True)]
    count = len(rows)
    return NeighbourFigures(
        rows=count,
        before=sum(b.label == t for b, t in zip(before, truth, strict=True)) / count,
        after=sum(a.label == t for a, t in zip(after, truth, strict=True)) / count,
        abstain=sum(a.abstained for a in after) / count,
    )
