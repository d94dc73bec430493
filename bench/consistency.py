"""Is an answer stale? Judged from outside: what was acknowledged before it was asked for, and what it says."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.template import ABSTAIN


@dataclass(frozen=True)
class Change:
    """One version of the active set. Times are ``time.perf_counter()`` of one process.

    ``started``: before the change was asked for. ``acknowledged``: when whoever asked had it confirmed. ``hidden``: the
    texts that are answered `unknown` under it, by index.
    """

    version: int
    started: float
    acknowledged: float
    hidden: frozenset[int]


@dataclass(frozen=True)
class Answer:
    """``started``: before its first byte was sent. ``ended``: when it was there. ``text``: by index."""

    replica: int
    started: float
    ended: float
    text: int
    version: int
    label: str


@dataclass(frozen=True)
class Verdict:
    """What is wrong with an answer, if anything.

    ``stale_version``: its version is older than one that was acknowledged before it was asked for. ``stale_label``: its
    label is that of no version which could be in force while it was made, or not that of the version it names.
    ``ahead``: it names a version that nobody had asked for yet.
    """

    stale_version: bool
    stale_label: bool
    ahead: bool

    @property
    def stale(self) -> bool:
        return self.stale_version or self.stale_label


def judge(answers: Sequence[Answer], history: Sequence[Change], labels: Sequence[str]) -> list[Verdict]:
    """One verdict per answer. ``history``: every version, in order; ``labels``: the bare model's, by text.

    Raises ValueError for a history with gaps, or whose first version an answer precedes.
    """
    if any(b.version != a.version + 1 or b.started < a.acknowledged for a, b in pairwise(history)):
        raise ValueError("versions have to follow one another, each asked for after the one before was acknowledged")
    acknowledged = [change.acknowledged for change in history]
    started = [change.started for change in history]
    first = history[0].version

    def expected(change: Change, text: int) -> str:
        return ABSTAIN if text in change.hidden else labels[text]

    verdicts = []
    for answer in answers:
        oldest = bisect_right(acknowledged, answer.started) - 1  # acknowledged, so it must be in force
        if oldest < 0:
            raise ValueError("an answer was asked for before the first version was acknowledged")
        newest = bisect_left(started, answer.ended) - 1  # asked for, so it may be
        possible = {expected(change, answer.text) for change in history[oldest : newest + 1]}
        named = answer.version - first
        agrees = 0 <= named < len(history) and expected(history[named], answer.text) == answer.label
        verdicts.append(
            Verdict(
                stale_version=named < oldest,
                stale_label=answer.label not in possible or not agrees,
                ahead=named > newest,
            )
        )
    return verdicts
