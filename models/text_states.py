"""What a gate reads: the mean over a text's tokens of the frozen model's early hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.llm import FrozenLLM
from models.passes import by_length, run_rows
from models.prefix_cache import Prefix, compute_prefix
from models.recording import layers_of

LAYERS = (0, 2, 4, 8)  # 0: the embeddings


def gate_layers(llm: FrozenLLM) -> tuple[int, ...]:
    """The layers to read: LAYERS as far as the model has them."""
    depth = len(layers_of(llm))
    return tuple(layer for layer in LAYERS if layer <= depth)


@torch.no_grad()
def text_states(llm: FrozenLLM, texts: Sequence[str], *, prefix: Prefix | None = None, batch_size: int = 64) -> Tensor:
    """States (N, L·d) float32 on the CPU, layer after layer; the model runs no further than the last layer read.

    ``prefix``: of the bare template, computed where it is not given. Raises TextTooLong.
    """
    layers = gate_layers(llm)
    prefix = prefix if prefix is not None else compute_prefix(llm, None)
    rows = llm.rows(texts)
    llm.check_fits(rows, prefix.length if prefix is not None else 0)
    out = torch.empty(len(rows), len(layers) * llm.hidden_size)
    for picked in by_length(rows, batch_size):
        _, means = run_rows(llm, [rows[i] for i in picked], prefix, layers, stop=True)
        out[picked] = torch.cat(means, dim=-1).cpu()
    return out
