"""Early hidden states of a pass, by forward hooks: on the base pass that answers a query they cost next to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.examples import Batch
from models.llm import FrozenLLM
from models.packing import Layout


class _Enough(Exception):
    """The last layer that is read has run."""


@contextmanager
def recording(
    llm: FrozenLLM, batch: Batch | Layout, layers: Sequence[int], *, stop: bool = False
) -> Iterator[list[Tensor]]:
    """While open, a forward pass of ``batch`` leaves its text means in the list: (B, d) float32 per layer, in order.

    The means are over the text's own tokens: the tail of the template and the padding do not count. With ``stop`` the
    pass ends after the last layer that is read, and the block with it. Not thread-safe, like the model itself.
    """
    means: list[Tensor] = []
    blocks, tail = layers_of(llm), len(llm.template.tail_ids)

    def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        means.append(torch.cat([_means(rows, lengths - tail) for rows, lengths in batch.padded(states)]))
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


def _means(states: Tensor, counts: Tensor) -> Tensor:
    """Means (n, d) float32 of states (n, L, d) over each row's first ``counts`` (n,)."""
    wanted = torch.arange(states.shape[1], device=states.device) < counts.unsqueeze(1)
    # where, not a product: what is infinite at a padded position stays out.
    return torch.where(wanted.unsqueeze(-1), states.float(), 0.0).sum(1) / counts.clamp_min(1).unsqueeze(1)


def layers_of(llm: FrozenLLM) -> nn.ModuleList:
    """The decoder's layers, whatever the architecture calls them. Raises ModelError."""
    depth = int(getattr(llm.model.config, "num_hidden_layers", 0))
    for module in llm.decoder.modules():  # OPT has them one module further in
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(llm.model).__name__} keeps its layers where Letheon does not find them")
