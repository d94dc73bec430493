"""Fitting a gate: directions from the forget texts, thresholds from retain rows.

A threshold is the score that a configured share of all other texts is expected to pass. That share is far below one in
the number of calibration rows, so the upper tail of their scores is fitted and read further out than any of them: an
order statistic would be the score of the one retain text that happens to be nearest. And where the forget texts
leave a gap, each of them scored by a gate that was fitted without it, the thresholds rise into the gap: the clearer a
subject is, the less a gate claims of everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import DatasetError
from models.gate import NEVER, Gate, GateSpace, best_cosines, cosines

OWN_RECALL = 0.95  # of the forget texts that the directions of a gate are to reach
MAX_DIRECTIONS = 128
TAIL = 0.05  # share of the calibration rows that the tail is fitted to, and no fewer than _TAIL_ROWS
CLAIM_RISE, CERTAIN_RISE = 0.25, 0.5  # how far into the gap
GAP_OUTLIERS = 0.05  # of the forget texts may lie below the gap's upper end
_TAIL_ROWS = 10
_GAP_TEXTS = 4  # fewer, copies not counted, say too little of where unseen texts lie
COPY = 0.8  # a cosine that two texts on one subject do not reach, but a text and its quotation do
_ROUNDS = 10  # of k-means
_HELD_OUT = 64  # forget texts that are left out in turn to estimate the recall


@dataclass(frozen=True)
class GateFit:
    """A gate and what is known of it. Rates are fractions of rows.

    ``own_recall``: of the forget texts, by score alone. ``unseen_claimed``: estimated by leaving forget texts out in
    turn, each with its copies (at most _HELD_OUT of them, the clusters as they were), and ``unseen_certain``, the share
    that needs no prompt; both None where nothing is left. ``unseen_rows``: how many were left out for that.
    """

    gate: Gate
    own_recall: float
    unseen_claimed: float | None
    unseen_certain: float | None
    unseen_rows: int


@dataclass(frozen=True)
class _Rates:
    """What a gate may claim of other texts, and what of it without a prompt; None: nothing. ``rises``: into the gap."""

    claims: float
    certain: float | None
    rises: bool


def fit_gate(
    forget: Tensor,
    calibration: Tensor,
    space: GateSpace,
    *,
    digests: Sequence[bytes],
    max_false_claims: float,
    max_certain_claims: float | None = None,
) -> GateFit:
    """Fit on states of the forget texts (n, D), calibrate on states of retain rows (N, D) that the space has not seen.

    ``max_false_claims``: the share of other texts that may be claimed, and ``max_certain_claims`` the share that the
    gate may decide without its prompt; None leaves all to the prompt. Texts on one subject share a direction; where one
    does not reach them all, there are twice as many, and so on. Raises DatasetError.
    """
    if not len(forget) or not len(calibration):
        raise DatasetError("a gate needs forget texts and calibration rows")
    own, others = space.points(forget), space.points(calibration)
    copies = (own @ own.T > COPY).fill_diagonal_(True)
    different = int((~copies.tril(-1).any(1)).sum())
    rates = _Rates(max_false_claims, max_certain_claims, different >= _GAP_TEXTS)
    clusters = 1
    while True:
        belongs = _cluster(own, clusters)
        directions = _directions(own, belongs)
        threshold, certain = _thresholds(own, belongs, copies, best_cosines(others, directions), rates)
        recall = int((best_cosines(own, directions) > threshold).sum()) / len(own)
        if recall >= OWN_RECALL or len(directions) < clusters or clusters >= min(len(own), MAX_DIRECTIONS):
            break
        clusters = min(2 * clusters, len(own), MAX_DIRECTIONS)
    gate = Gate(
        directions=directions,
        threshold=threshold,
        certain=certain,
        digests=torch.tensor([list(d) for d in digests], dtype=torch.uint8).reshape(-1, 32),
        space=space.digest,
    )
    return GateFit(gate, recall, *_left_out_recall(own, belongs, copies, directions, others, rates))


def tail_threshold(scores: Tensor, rate: float) -> float:
    """The score that a share ``rate`` of texts like those of ``scores`` (N,) is expected to pass.

    Inside the sample an order statistic; in the upper tail an exponential above the score that TAIL of them pass, with
    the mean excess as its scale (peaks over threshold, Pickands 1975, of shape zero). Scores have a heavier tail than
    that: SST-2 rates of 0.2, 0.05 and 0.01 % came out as 0.2, 0.08 and 0.04 %.
    """
    if rate <= 0:
        return NEVER
    ordered = scores.double().sort(descending=True).values
    count = len(ordered)
    beyond = min(count - 1, max(_TAIL_ROWS, math.floor(TAIL * count)))
    if rate * count >= beyond:
        allowed = math.floor(rate * count)
        return -1.0 if allowed >= count else float(ordered[allowed])  # -1 is the least cosine, and not claimed
    start = ordered[beyond]
    excess = (ordered[:beyond] - start).mean()
    return min(NEVER, float(start + excess * math.log(beyond / (rate * count))))


def _thresholds(own: Tensor, belongs: Tensor, copies: Tensor, scores: Tensor, rates: _Rates) -> tuple[float, float]:
    """(claims, certain) from the scores of other texts (N,), raised into the gap that the points (n, D) leave."""
    claims = tail_threshold(scores, rates.claims)
    gap = 0.0
    if rates.rises:
        left_out = _left_out_scores(own, belongs, copies).sort().values
        gap = max(0.0, float(left_out[math.floor(GAP_OUTLIERS * len(own))]) - claims)
    threshold = claims + CLAIM_RISE * gap
    if rates.certain is None:
        return threshold, NEVER
    return threshold, max(threshold, tail_threshold(scores, rates.certain), claims + CERTAIN_RISE * gap)


def _left_out_scores(own: Tensor, belongs: Tensor, copies: Tensor) -> Tensor:
    """Of each point (n, D), its score with directions made without it and its ``copies`` (n, n); -1: none is left."""
    names, index = belongs.unique(return_inverse=True)
    sums = torch.zeros(len(names), own.shape[1]).index_add_(0, index, own)
    found = cosines(own, torch.nn.functional.normalize(sums, dim=-1))
    mates = index.unsqueeze(0) == index.unsqueeze(1)
    rest = (mates & ~copies).float() @ own
    none = ~(mates & ~copies).any(1)
    nearest = (own * torch.nn.functional.normalize(rest, dim=-1)).sum(-1)
    found[torch.arange(len(own)), index] = torch.where(none, -1.0, nearest)
    return found.max(1).values


def mean_direction(points: Tensor) -> Tensor:
    """The direction (D,) of points (n, D)."""
    return torch.nn.functional.normalize(points.mean(0), dim=0)


def _directions(points: Tensor, belongs: Tensor) -> Tensor:
    """The mean direction (c, D) of each cluster that has points."""
    return torch.stack([mean_direction(points[belongs == c]) for c in belongs.unique().tolist()])


def _cluster(points: Tensor, count: int) -> Tensor:
    """Spherical k-means: the cluster (n,) of each point. It starts from points far apart, so it needs no chance."""
    if count == 1:
        return torch.zeros(len(points), dtype=torch.long)
    centers = [int((points @ mean_direction(points)).argmax())]
    nearest = points @ points[centers[0]]
    for _ in range(count - 1):
        centers.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, points @ points[centers[-1]])
    belongs = (points @ points[centers].T).argmax(1)
    for _ in range(_ROUNDS):
        moved = (points @ _directions(points, belongs).T).argmax(1)
        if torch.equal(moved, belongs):
            break
        belongs = moved
    return belongs


def _left_out_recall(
    own: Tensor, belongs: Tensor, copies: Tensor, directions: Tensor, others: Tensor, rates: _Rates
) -> tuple[float | None, float | None, int]:
    """Of _HELD_OUT of the points (n, D), what share a gate would claim, and decide alone, that saw no copy of them; and
    how many these are."""
    picked = [i for i in range(0, len(own), -(-len(own) // _HELD_OUT)) if not copies[i].all()]
    if not picked:
        return None, None, 0
    names = belongs.unique().tolist()
    scores = cosines(others, directions)
    claimed = certain = 0
    for i in picked:
        place, rest = names.index(int(belongs[i])), ~copies[i]
        mates = own[(belongs == belongs[i]) & rest]
        kept = [c for c in range(len(names)) if c != place]
        seen, near = scores[:, kept], directions[kept]
        if len(mates):
            without = mean_direction(mates).unsqueeze(0)
            seen, near = torch.cat([seen, cosines(others, without)], 1), torch.cat([near, without])
        if not len(near):
            continue  # its whole cluster was copies of it, and there is no other
        part = copies[rest][:, rest]
        threshold, sure = _thresholds(own[rest], belongs[rest], part, seen.max(1).values, rates)
        score = float(best_cosines(own[i : i + 1], near))
        claimed += score > threshold
        certain += score > sure
    return claimed / len(picked), certain / len(picked), len(picked)
