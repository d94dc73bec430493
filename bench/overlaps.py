"""Texts that are parts of each other: SST-2's rows are often phrases of its sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence


def overlapping(texts: Sequence[str]) -> list[int]:
    """The group of each text: the least index among those that contain it or are contained in it, and so on."""
    group = list(range(len(texts)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for place, i in enumerate(by_length):
        for j in by_length[place + 1 :]:
            if texts[i] in texts[j]:
                a, b = sorted((root(i), root(j)))
                group[b] = a
    return [root(i) for i in range(len(texts))]


def members_of(groups: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
    """Each group and its members, in the order of their first."""
    found: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        found[group].append(index)
    return found.items()
