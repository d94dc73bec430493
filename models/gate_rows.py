"""The retain rows behind the gates: half to whiten the space on, a quarter to calibrate with, a quarter to check with.

Neither space nor thresholds have seen the rows of the checks, whose rates are those of fresh texts. With the rows that
set the thresholds a set of gates would keep to any limit there is, and to none outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor

from models import gate
from models.errors import DatasetError
from models.examples import Example, digest_examples
from models.gate import GateSpace, best_cosines, fit_space
from models.llm import FrozenLLM
from models.row_cache import CacheFolder, RowCache
from models.text_states import gate_layers, text_states

_VERSION = 1  # of how a space is made from its rows


class GateRows:
    """At most ``count`` rows of ``retain``, the same ones whenever they are there: those with the least text digests.

    ``space_rows``, ``calibration_rows`` and ``check_rows`` are indices into ``retain``; a row never changes sides.
    """

    def __init__(
        self, llm: FrozenLLM, retain: Sequence[Example], count: int, folder: CacheFolder | None = None
    ) -> None:
        """Raises DatasetError when there are too few different texts for all sides."""
        self.llm, self.retain = llm, retain
        self.space_rows, self.calibration_rows, self.check_rows = sides(retain, count)
        if min(len(self.space_rows), len(self.calibration_rows), len(self.check_rows)) < 2:
            raise DatasetError("the retain set has too few different texts for a gate")
        width = len(gate_layers(llm)) * llm.hidden_size
        self._cache = RowCache([row.text for row in retain], width, folder, f"gate-{llm.fingerprint[:32]}")

    def states(self, indices: Sequence[int]) -> Tensor:
        """(k, D) float32 on the CPU; computes what is missing and keeps it."""
        found = self._cache.rows(indices, lambda texts: text_states(self.llm, texts))
        self._cache.save()
        return found

    def fit_space(self) -> GateSpace:
        return fit_space(self.states(self.space_rows), len(gate_layers(self.llm)), fingerprint=self.llm.fingerprint)

    def nearest(self, space: GateSpace, directions: Tensor, count: int) -> list[int]:
        """The ``space_rows`` that a gate of these directions (c, D) would claim first."""
        scores = best_cosines(space.points(self.states(self.space_rows)), directions)
        return [self.space_rows[i] for i in scores.argsort(descending=True, stable=True)[:count].tolist()]


def space_source(llm: FrozenLLM, retain: Sequence[Example], count: int) -> str:
    """SHA-256 hex of all that a space is made from: model, layers, settings and the rows it is whitened on.

    ``retain``: the whole set, not what is left after requests took their rows from it. Otherwise every such request
    would make a space of its own, and the gates could not be one matrix product.
    """
    chosen = [Example(retain[i].text) for i in sides(retain, count)[0]]
    parts = [llm.fingerprint, gate_layers(llm), gate.RIDGE, gate.MAX_RANK, digest_examples(chosen), _VERSION]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def sides(retain: Sequence[Example], count: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of the rows to whiten on, to calibrate and to check with, ordered by nothing but their texts."""
    ranked: dict[bytes, int] = {}
    for index, row in enumerate(retain):
        ranked.setdefault(hashlib.sha256(b"gate row\0" + row.text.encode()).digest(), index)
    order = sorted(ranked)
    whiten = [ranked[d] for d in order if d[-1] % 2 == 0][: count // 2]
    calibrate, check = ([ranked[d] for d in order if d[-1] % 4 == side][: count // 4] for side in (1, 3))
    return whiten, calibrate, check
