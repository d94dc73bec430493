"""A pass of the frozen model over rows behind a kept prefix, without gradient: packed where the model can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models import packing
from models.examples import collate
from models.llm import FrozenLLM
from models.prefix_cache import Prefix, last_hidden
from models.recording import recording

MAX_PASS_TOKENS = 16_384
"""Rows of a pass, padding included: bounds what a batch of long texts takes in memory."""


def by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of rows, those of similar lengths together, as passes of at most ``size`` rows and MAX_PASS_TOKENS."""
    passes: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not passes or len(passes[-1]) == size or (len(passes[-1]) + 1) * len(rows[index]) > MAX_PASS_TOKENS:
            passes.append([])
        passes[-1].append(index)
    return passes


@torch.no_grad()
def run_rows(
    llm: FrozenLLM,
    rows: Sequence[Sequence[int]],
    prefix: Prefix | None,
    layers: Sequence[int] = (),
    *,
    stop: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states (N, d) of the rows' last tokens, and of each of ``layers`` the text means (N, d) float32.

    Quickest with rows of similar lengths side by side. ``stop``: after the last layer that is read, which leaves no
    final states (0, d).
    """
    hidden = torch.empty(0, llm.hidden_size)
    if packing.fits(llm, prefix.length if prefix is not None else 0, rows):
        scores = packing.CHUNK_SCORES if llm.device.type == "cpu" else None  # elsewhere a launch costs more than a miss
        layout = packing.Layout.of(llm, 0, [len(row) for row in rows], prefix=prefix, max_scores=scores)
        with recording(llm, layout, layers, stop=stop) as means:
            hidden = packing.packed_behind(llm, layout, rows)
    else:
        batch = collate(rows, llm.device)
        with recording(llm, batch, layers, stop=stop) as means:
            hidden = last_hidden(llm, batch, prefix)
    return hidden, means
