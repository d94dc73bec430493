"""Exact t-SNE (van der Maaten and Hinton 2008): some hundred states on a plane, the same ones every time.

Every pair of points is computed, so the cost is quadratic: a second or two for 500 points. For that it needs no library
of its own, which in a worker would be a fifth of all that is installed (docs/decisions/0026). A picture is no proof:
distances between clusters, and their sizes, mean nothing in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PERPLEXITY = 30.0
"""Neighbours that a point is placed by, about; a third of the points where there are fewer."""
_SMALL = 1e-12
_BISECTIONS = 60
# As in Belkina et al. 2019 and scikit-learn: close points are drawn together first, then they settle.
_EXAGGERATION, _EARLY, _STEPS = 12.0, 250, 750
_START = 1e-4  # standard deviation of the first coordinate at the start
_NOISE = 1e-2  # of that, so that points in one place, or on a line, are not there for good


@torch.no_grad()
def tsne(states: Tensor, *, seed: int) -> Tensor:
    """Points (n, 2) float64 on the CPU of ``states`` (n, d). Raises ValueError for states that are not finite."""
    states = states.detach().cpu().double()
    count = len(states)
    if not bool(torch.isfinite(states).all()):
        raise ValueError("the states are not finite")
    if count < 3:
        return torch.zeros(count, 2, dtype=torch.float64)
    attraction = affinities(states, min(PERPLEXITY, (count - 1) / 3))
    points = _principal(states)
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points = points + _START * _NOISE * noise
    rate = max(count / _EXAGGERATION / 4, 50.0)
    update, gains = torch.zeros_like(points), torch.ones_like(points)
    for steps, factor, momentum in ((_EARLY, _EXAGGERATION, 0.5), (_STEPS, 1.0, 0.8)):
        wanted = attraction * factor
        for _ in range(steps):
            gradient = _gradient(points, wanted)
            gains = torch.where(update * gradient < 0, gains + 0.2, gains * 0.8).clamp_min(0.01)
            update = momentum * update - rate * gains * gradient
            points = points + update
    return points - points.mean(0)


def affinities(states: Tensor, perplexity: float) -> Tensor:
    """How much each pair attracts, (n, n) float64, symmetric, sums to 1: of each point a normal distribution over the
    others, as wide as makes its entropy the logarithm of ``perplexity``."""
    distances = torch.cdist(states, states).square()
    distances.fill_diagonal_(torch.inf)
    # Only differences matter to the distribution: so the nearest always has a weight, however narrow it gets.
    distances = distances - distances.min(1, keepdim=True).values
    low = torch.zeros(len(states), 1, dtype=torch.float64)
    high = torch.full_like(low, torch.inf)
    precision = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        weights = torch.exp(-distances * precision)
        share = weights / weights.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(share, share).sum(1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, precision, low), torch.where(wide, high, precision)
        precision = torch.where(high.isinf(), precision * 2, (low + high) / 2)
    return ((share + share.T) / (2 * len(states))).clamp_min(_SMALL)


def divergence(points: Tensor, attraction: Tensor) -> float:
    """What t-SNE makes small: the KL divergence of the pairs on the plane (n, 2) from ``affinities`` (n, n), nats."""
    near = _nearness(points)
    placed = (near / near.sum()).clamp_min(_SMALL)
    return float(torch.special.xlogy(attraction, attraction / placed).fill_diagonal_(0).sum())


def _gradient(points: Tensor, attraction: Tensor) -> Tensor:
    near = _nearness(points)
    force = (attraction - (near / near.sum()).clamp_min(_SMALL)) * near
    return 4 * (force.sum(1, keepdim=True) * points - force @ points)


def _nearness(points: Tensor) -> Tensor:
    """Student's t with one degree of freedom, of each pair; 0 of a point with itself."""
    near: Tensor = 1 / (1 + torch.cdist(points, points).square())
    near.fill_diagonal_(0)
    return near


def _principal(states: Tensor) -> Tensor:
    """The first two principal components (n, 2), scaled to the start; of each the largest value is positive."""
    centred = states - states.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    found = (vectors[:, -2:] * values[-2:].clamp_min(0).sqrt()).flip(1)
    largest = found.abs().argmax(0)
    found = found * torch.where(found[largest, torch.arange(2)] < 0, -1.0, 1.0)
    start: Tensor = found / found[:, 0].std().clamp_min(_SMALL) * _START
    return start
