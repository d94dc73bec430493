"""The retain rows behind the gates: half to whiten the space on, half, which the space never saw, to calibrate with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from models import gate
from models.errors import DatasetError
from models.examples import Example, digest_examples
from models.gate import GateSpace, best_cosines, fit_space
from models.llm import FrozenLLM
from models.row_cache import RowCache
from models.text_states import gate_layers, text_states

_VERSION = 1  # of how a space is made from its rows


class GateRows:
    """At most ``count`` rows of ``retain``, the same ones whenever they are there: those with the least text digests.

    ``space_rows`` and ``calibration_rows`` are indices into ``retain``; a row is always on the same side.
    """

    def __init__(self, llm: FrozenLLM, retain: Sequence[Example], count: int, directory: Path | None = None) -> None:
        """Raises DatasetError when there are too few different texts for both sides."""
        self.llm, self.retain = llm, retain
        self.space_rows, self.calibration_rows = _sides(retain, count)
        if len(self.space_rows) < 2 or len(self.calibration_rows) < 2:
            raise DatasetError("the retain set has too few different texts for a gate")
        width = len(gate_layers(llm)) * llm.hidden_size
        file = directory / f"gate-{llm.fingerprint[:32]}.npz" if directory is not None else None
        self._cache = RowCache([row.text for row in retain], width, file)

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
    chosen = [Example(retain[i].text) for i in _sides(retain, count)[0]]
    parts = [llm.fingerprint, gate_layers(llm), gate.RIDGE, gate.MAX_RANK, digest_examples(chosen), _VERSION]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sides(retain: Sequence[Example], count: int) -> tuple[list[int], list[int]]:
    """Indices of the rows to whiten on and of those to calibrate with, in an order that depends on their texts only."""
    ranked: dict[bytes, int] = {}
    for index, row in enumerate(retain):
        ranked.setdefault(hashlib.sha256(b"gate row\0" + row.text.encode()).digest(), index)
    order = sorted(ranked)
    whiten, calibrate = ([ranked[d] for d in order if d[-1] % 2 == side][: count // 2] for side in (0, 1))
    return whiten, calibrate
