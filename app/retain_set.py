"""The operator's retain set as a dry run reads it: in the API's memory, from the first one on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.defaults import resolve_retain
from app.settings import Settings
from app.vault import Vault, letters
from models.examples import read_examples
from models.gate_rows import sides, space_source
from models.llm import FrozenLLM
from models.near_copies import side_by_side, signature

_BREATH_ROWS = 64
_BREATH_SECONDS = 0.0005


class RetainSet:
    """``rows``, and of each its keyed digest, the one that the guard goes by, and its signature for near copies.

    ``states`` keeps the early states of the rows that were asked for last, ``gate_rows`` of them at most: four bytes
    for each of their numbers.
    """

    def __init__(self, settings: Settings, vault: Vault, llm: FrozenLLM) -> None:
        """Reads the file. Raises NotConfigured, DatasetError."""
        source = resolve_retain(settings)
        self.rows = read_examples(source, split=settings.retain_split, labels=settings.labels)
        self.digests: list[bytes] = []
        self.guard: list[bytes] = []
        found = []
        for number, row in enumerate(self.rows):
            if number % _BREATH_ROWS == 0:
                time.sleep(_BREATH_SECONDS)  # or this loop would hold up whoever answers meanwhile
            self.digests.append(vault.digest(row.text))
            self.guard.append(vault.gate_digest(row.text))
            found.append(signature(letters(row.text)))
        self.signatures = side_by_side(found)
        self.space_source = space_source(llm, self.rows, settings.gate_rows)
        self._count = settings.gate_rows
        self._states: dict[int, Tensor] = {}

    def chosen(self, kept: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Of the rows ``kept``, those that a worker would whiten on, calibrate and check with.

        Lets go of the states of all others.
        """
        picked = sides([self.rows[i] for i in kept], self._count)
        space, calibration, check = ([kept[i] for i in side] for side in picked)
        held = {*space, *calibration, *check}
        self._states = {i: states for i, states in self._states.items() if i in held}
        return space, calibration, check

    def states(self, indices: Sequence[int], read: Callable[[list[str]], Tensor], at_once: int) -> Tensor:
        """(k, D). ``read`` is given the texts that are missing, ``at_once`` at most; what it read is kept at once."""
        missing = [i for i in indices if i not in self._states]
        for start in range(0, len(missing), at_once):
            part = missing[start : start + at_once]
            found = read([self.rows[i].text for i in part])
            self._states.update({i: row.clone() for i, row in zip(part, found, strict=True)})  # no view keeps the rest
        return torch.stack([self._states[i] for i in indices])
