"""What a gate reads: the mean over a text's tokens of the frozen model's early hidden states.

Forward hooks take the means while the model runs, so on the base pass that answers a query they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.examples import Batch, collate, length_buckets
from models.llm import FrozenLLM
from models.prefix_cache import Prefix, compute_prefix, last_hidden

LAYERS = (0, 2, 4, 8)  # 0: the embeddings


class _Enough(Exception):
    """The last layer that is read has run."""


def gate_layers(llm: FrozenLLM) -> tuple[int, ...]:
    """The layers to read: LAYERS as far as the model has them."""
    depth = len(_blocks(llm))
    return tuple(layer for layer in LAYERS if layer <= depth)


@contextmanager
def recording(llm: FrozenLLM, batch: Batch, layers: Sequence[int], *, stop: bool = False) -> Iterator[list[Tensor]]:
    """While open, a forward pass of ``batch`` leaves its text means in the list: (B, d) float32 per layer, in order.

    The means are over the text's own tokens: the tail of the template and the padding do not count. With ``stop`` the
    pass ends after the last layer that is read, and the block with it. Not thread-safe, like the model itself.
    """
    means: list[Tensor] = []
    blocks, tail = _blocks(llm), len(llm.template.tail_ids)
    width = batch.input_ids.shape[1]
    text = torch.arange(width, device=llm.device) < (batch.lengths - tail).unsqueeze(1)
    counts = text.sum(1, keepdim=True).clamp_min(1)

    def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        # where, not a product: what is infinite at a padded position stays out.
        means.append(torch.where(text.unsqueeze(-1), states.float(), 0.0).sum(1) / counts)
        if stop and len(means) == len(layers):
            raise _Enough

    hooks = [(llm.embed if layer == 0 else blocks[layer - 1]).register_forward_hook(take) for layer in layers]
    try:
        yield means
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


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
    for picked in length_buckets([len(row) for row in rows], batch_size):
        batch = collate([rows[i] for i in picked], llm.device)
        with recording(llm, batch, layers, stop=True) as means:
            last_hidden(llm, batch, prefix)
        out[picked] = torch.cat(means, dim=-1).cpu()
    return out


def _blocks(llm: FrozenLLM) -> nn.ModuleList:
    """The decoder's layers, whatever the architecture calls them. Raises ModelError."""
    depth = int(getattr(llm.model.config, "num_hidden_layers", 0))
    for module in llm.decoder.modules():  # OPT has them one module further in
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(llm.model).__name__} keeps its layers where Letheon does not find them")
