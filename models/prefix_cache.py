"""The shared prefix: keys and values of [soft prompts, template head], computed once, read by every row.

A soft prompt is a *causal* prefix, so its keys and values do not depend on the text: B·(p+n) tokens become p + B·n.
transformers' own cache grows whenever a forward pass uses it; the layers here concatenate without storing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from models.examples import Batch
from models.llm import FrozenLLM


class _RecordingLayer(DynamicLayer):
    """Stores every position, also on sliding-window layers (the window is the mask's business)."""

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = is_sliding


class _ReadOnlyLayer(_RecordingLayer):
    """Gives prefix + new positions to attention and keeps only the prefix."""

    def __init__(self, keys: Tensor, values: Tensor, is_sliding: bool) -> None:
        super().__init__(is_sliding)
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        rows = key_states.shape[0]
        # cat copies, so attention never sees stride-0 keys (wrong results on CUDA for some lengths, pytorch #191937).
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)
        return keys, values


@dataclass(frozen=True, repr=False)
class Prefix:
    """Per layer keys and values (1, heads, length, head_dim) and whether its attention slides."""

    layers: tuple[tuple[Tensor, Tensor, bool], ...]
    length: int

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values, _ in self.layers)

    def cache(self) -> Cache:
        """A read-only view for one or many forward passes."""
        return Cache(layers=[_ReadOnlyLayer(k, v, sliding) for k, v, sliding in self.layers])


def compute_prefix(llm: FrozenLLM, soft: Tensor | None) -> Prefix | None:
    """Run [soft (p, d), template head] once. Gradient flows to ``soft``. None when there is nothing to share."""
    parts = []
    if soft is not None:
        parts.append(soft.to(llm.device, llm.dtype))
    if llm.template.head_ids:
        parts.append(llm.embed(torch.tensor(llm.template.head_ids, device=llm.device)))
    if not parts:
        return None
    embeddings = torch.cat(parts).unsqueeze(0)
    length = embeddings.shape[1]
    kinds = [bool(getattr(layer, "is_sliding", False)) for layer in DynamicCache(config=llm.model.config).layers]
    recorded = [_RecordingLayer(sliding) for sliding in kinds]
    cache = Cache(layers=list(recorded))
    llm.decoder(
        inputs_embeds=embeddings,
        cache=cache,
        position_ids=torch.arange(length, device=llm.device).unsqueeze(0),
        use_cache=True,
    )
    layers = []
    for layer in recorded:
        assert layer.keys is not None
        assert layer.values is not None
        layers.append((layer.keys, layer.values, layer.is_sliding))
    return Prefix(tuple(layers), length)


def last_hidden(llm: FrozenLLM, batch: Batch, prefix: Prefix | None) -> Tensor:
    """Final hidden state (B, d) of each row's last real token: the position that predicts the label.

    Rows are right-padded; positions are passed explicitly, so no attention mask is needed and none can be wrong.
    """
    offset = prefix.length if prefix is not None else 0
    rows, width = batch.input_ids.shape
    positions = torch.arange(offset, offset + width, device=llm.device).unsqueeze(0).expand(rows, -1)
    output = llm.decoder(
        input_ids=batch.input_ids,
        cache=prefix.cache() if prefix is not None else None,
        position_ids=positions,
        use_cache=prefix is not None,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[torch.arange(rows, device=llm.device), batch.lengths - 1]
