"""Figures of merit from answers already at hand: pure functions of tensors, nothing here runs a model.

Scores are "higher = more so": an attack's score is higher for what it takes for a member.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959964  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Estimate:
    """A mean with its percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor, *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Estimate:
    """Of the mean of ``values`` (n,): percentile bootstrap (Efron 1979) over rows. Raises ValueError for none.

    It knows the spread between rows, not that between training runs.
    """
    if not len(values):
        raise ValueError("no values to estimate a mean from")
    values = values.double()
    draw = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=draw)].mean() for _ in range(draws)]
    )
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return Estimate(float(values.mean()), low, high)


def wilson(hits: int, rows: int, *, z: float = Z95) -> Estimate:
    """Of a share: Wilson's score interval (1927), 95 % by default; it has a width at 0 of n, too. Raises ValueError.

    ``app.receipt_format``, which must not need torch, has its own.
    """
    if not 0 <= hits <= rows or not rows:
        raise ValueError(f"{hits} of {rows} is not a share")
    share, square = hits / rows, z * z
    middle = (share + square / (2 * rows)) / (1 + square / rows)
    half = z / (1 + square / rows) * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def difference(a: Tensor, b: Tensor, *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Estimate:
    """Of mean(a) - mean(b), (n,) each, on the same rows in the same order: what both find hard cancels out."""
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} values are not of the same rows")
    return bootstrap(a.double() - b.double(), seed=seed, draws=draws, level=level)


def auc(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve of a score, (m,) and (n,): P(member > other) + P(equal) / 2 (Mann and Whitney 1947)."""
    if not len(members) or not len(others):
        raise ValueError("an ROC curve needs members and others")
    ordered = others.double().sort().values
    below = torch.searchsorted(ordered, members.double(), right=False)
    upto = torch.searchsorted(ordered, members.double(), right=True)
    return float((below + upto).double().mean() / (2 * len(others)))


def auc_interval(area: float, members: int, others: int, *, z: float = Z95) -> tuple[float, float]:
    """95 % by default: Newcombe 2006 (part 2, method 5), the score interval of Hanley and McNeil's variance (1982).

    Within 0 to 1, and with a width at both ends, where theirs has none. Raises ValueError.
    """
    if not 0 <= area <= 1 or members < 1 or others < 1:
        raise ValueError(f"{area} is not an area of {members} members and {others} others")

    def error(true: float) -> float:
        spread = (1 - true) / (2 - true) + true / (1 + true)
        rows = (members + others) / 2 - 1
        return z * math.sqrt(true * (1 - true) * (1 + rows * spread) / (members * others))

    def bound(sign: int) -> float:
        """Where the distance from ``area`` is as large as the error there: what is farther away is less likely."""
        inside, outside = area, 1.0 if sign > 0 else 0.0
        for _ in range(60):
            middle = (inside + outside) / 2
            if sign * (middle - area) < error(middle):
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    return (0.0 if area == 0 else bound(-1), 1.0 if area == 1 else bound(1))


def roc(members: Tensor, others: Tensor) -> list[tuple[float, float]]:
    """The ROC curve of a score, (m,) and (n,): shares of others and of members at or above each value of it.

    From (0, 0) to (1, 1); rows of equal score are one slanted step, so the area under it is ``auc``.
    """
    if not len(members) or not len(others):
        raise ValueError("an ROC curve needs members and others")
    members, others = members.double(), others.double()
    found = [(0.0, 0.0)]
    for least in torch.cat([members, others]).unique().flip(0):
        found.append((float((others >= least).double().mean()), float((members >= least).double().mean())))
    return found


def tpr_at_fpr(members: Tensor, others: Tensor, fpr: float) -> float:
    """Share of members above the lowest threshold that at most ``fpr`` of the others pass (Carlini et al. 2022, §4).

    With fewer than 1 / fpr others no other may pass.
    """
    if not len(members) or not len(others):
        raise ValueError("an ROC curve needs members and others")
    allowed = int(fpr * len(others) + 1e-9)
    ordered = others.double().sort(descending=True).values
    if allowed == len(ordered):
        return 1.0
    return float((members.double() > ordered[allowed]).double().mean())


def drift(served: Tensor, base: Tensor) -> Tensor:
    """KL(base ‖ served) of each row from probabilities (n, c), in nats: what serving changed for texts to retain."""
    base, served = base.double().clamp_min(1e-12), served.double().clamp_min(1e-12)
    return (base * (base.log() - served.log())).sum(-1)


def flips(served: Tensor, base: Tensor) -> Tensor:
    """Whether the answer changed, (n,) bool, from answers as ids (n,)."""
    return served != base


def log_odds(probability: Tensor) -> Tensor:
    """ln p / (1 - p), which is close to normal over models (Carlini et al. 2022, §VI-A, eq. 5); any shape, nats."""
    p = probability.double().clamp(1e-9, 1 - 1e-9)
    return p.log() - (-p).log1p()


def likelihood_ratio(shadows: Tensor, trained: Tensor, target: Tensor) -> Tensor:
    """LiRA (Carlini et al. 2022, alg. 1): how much likelier ``target`` (n,) is of models trained with a row, (n,) nats.

    ``shadows`` (s, n): the same score of shadow models, ``trained`` (s, n) bool: which had the row. One variance for
    all rows on each side, as §V-C has it for few models. Raises ValueError where a row has a side with no model, or a
    side has no row with two, and for shapes that do not fit or scores that are not finite.
    """
    if not shadows.shape == trained.shape == (len(shadows), len(target)):
        raise ValueError(f"shapes do not fit: {tuple(shadows.shape)}, {tuple(trained.shape)}, {tuple(target.shape)}")
    if not bool(torch.isfinite(shadows).all() and torch.isfinite(target).all()):
        raise ValueError("scores are not finite")
    log_likelihood = {}
    for side, where in ((True, trained), (False, ~trained)):
        counts = where.sum(0)
        if not bool((counts > 0).all()) or int(counts.max()) < 2:
            raise ValueError("every row needs models that were trained with it, and without, and some row two of each")
        scores = torch.where(where, shadows.double(), 0.0)
        means = scores.sum(0) / counts
        squares = torch.where(where, (shadows.double() - means) ** 2, 0.0).sum()
        variance = (squares / (counts - 1).clamp_min(0).sum()).clamp_min(1e-12)
        log_likelihood[side] = -((target.double() - means) ** 2) / (2 * variance) - 0.5 * variance.log()
    return log_likelihood[True] - log_likelihood[False]
