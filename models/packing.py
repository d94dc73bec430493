"""Rows as one flat sequence, each blind to the others: a training step with its prefix in front, or rows to serve.

Everything but attention is per token, so it runs on one flat sequence: one pass over the weights, and no padding.
Attention runs apart: the prefix on itself, then the rows in padded batches behind the prefix's keys and values, in
plain matrix products with the query heads of a group side by side. On CPU those take a third (with the backward pass a
fifth) of the time of torch's fused kernel, whose block is the whole of such a short row (docs/LOG.md has the figures).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.examples import collate
from models.llm import FrozenLLM
from models.prefix_cache import Prefix, compute_prefix, last_hidden

log = logging.getLogger(__name__)
MAX_SCORES = 4_000_000
"""Of one layer, kept for the backward pass, three times over; where there would be more, a fused kernel keeps none."""
TOLERANCE = 0.05  # of a state, by its norm: bfloat16 is within one or two percent
INT8_TOLERANCE = 0.1  # the same under int8, where what is an outlier is asked of all rows of a pass
CHUNK_SCORES = 500_000
"""Of one layer at a time where there is no backward pass: what stays in a core's cache."""
_SDPA_OR_PACKED = "letheon_sdpa_or_packed"
_packable: WeakKeyDictionary[FrozenLLM, bool] = WeakKeyDictionary()


def fits(llm: FrozenLLM, ahead: int, rows: Sequence[Sequence[int]]) -> bool:
    """Whether packing is exact: a model that can be packed, and no row behind ``ahead`` positions past a window.

    One mask serves all layers.
    """
    window = getattr(llm.model.config.get_text_config(), "sliding_window", None)
    longest = ahead + max(len(row) for row in rows)
    return (window is None or longest <= window) and packable(llm)


def packable(llm: FrozenLLM) -> bool:
    """Whether this model's layers keep packed rows apart; tried once, on three short ones.

    Not where scores are capped or have sinks, where a layer is no attention (a state runs from row to row), where a
    model does not hand its arguments down to its layers, or where it has attention of its own.
    """
    if llm.model.config._attn_implementation not in ("sdpa", _SDPA_OR_PACKED):
        return False
    if llm not in _packable:
        _packable[llm] = _keeps_rows_apart(llm)
        if not _packable[llm]:
            log.warning("%s: its rows are not packed, so training and serving are slower", type(llm.model).__name__)
    return _packable[llm]


class _NotPackable(Exception):
    """What the attention of a packed step does not do."""


@torch.no_grad()
def _keeps_rows_apart(llm: FrozenLLM) -> bool:
    """A row's state is the same to the last bit, whatever the row before it says, and what it is behind a prefix."""
    tail = [*llm.template.tail_ids, llm.verbalizer.label_ids[0]]
    first, second, other = [tail[0], *tail], [tail[-1], tail[-1]], [tail[-1], *tail]
    soft = llm.embed(torch.tensor(llm.verbalizer.label_ids[:2], device=llm.device)).float()
    usual = llm.model.config._attn_implementation
    prefix = compute_prefix(llm, soft)
    assert prefix is not None
    try:
        with _without_outliers(llm):
            one, again = (packed_last_hidden(llm, soft, [ahead, second]) for ahead in (first, other))
        states = packed_last_hidden(llm, soft, [first, second])
        layout = Layout.of(llm, 0, [len(first), len(second)], prefix=prefix, max_scores=0)
        behind = packed_behind(llm, layout, [first, second])
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except (_NotPackable, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # Shapes and arguments that this model's layers do not take; trying is how one knows.
        log.info("%s: %s", type(llm.model).__name__, error)
        llm.model.config._attn_implementation = usual
        return False
    plain = torch.cat([last_hidden(llm, collate([row], llm.device), prefix) for row in (first, second)])
    apart = torch.equal(one[1], again[1]) and not torch.equal(one[0], again[0])
    within = INT8_TOLERANCE if llm.identity.get("quantization") == "int8" else TOLERANCE
    if not (apart and all(float((found - plain).norm() / plain.norm()) <= within for found in (states, behind))):
        llm.model.config._attn_implementation = usual
        return False
    return True


@contextmanager
def _without_outliers(llm: FrozenLLM) -> Iterator[None]:
    """int8 looks for outliers over all rows of a pass, packed or padded, so that each has a say in the others' columns:
    whether rows are apart shows only without that."""
    states: list[Any] = [m.state for m in llm.model.modules() if type(m).__name__ == "Linear8bitLt"]
    before = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def packed_last_hidden(llm: FrozenLLM, soft: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states (N, d) of the rows' last tokens, as ``last_hidden`` behind ``compute_prefix(soft)``.

    ``soft``: (p, d), to which the gradient flows.
    """
    device, head = llm.device, llm.template.head_ids
    ids = torch.tensor([*head, *(token for row in rows for token in row)], device=device)
    embeddings = torch.cat([soft.to(device, llm.dtype), llm.embed(ids)])
    layout = Layout.of(llm, len(soft) + len(head), [len(row) for row in rows], max_scores=None)
    return _run(llm, layout, inputs_embeds=embeddings.unsqueeze(0))


def packed_behind(llm: FrozenLLM, layout: Layout, rows: Sequence[Sequence[int]]) -> Tensor:
    """The same of rows behind a kept prefix, whose ``layout`` is theirs. No gradient."""
    ids = torch.tensor([token for row in rows for token in row], device=llm.device)
    return _run(llm, layout, input_ids=ids.unsqueeze(0))


def _run(llm: FrozenLLM, layout: Layout, **inputs: Tensor) -> Tensor:
    # For good, since another thread may be running the model: without a layout it is sdpa itself.
    llm.model.config._attn_implementation = _SDPA_OR_PACKED
    output = llm.decoder(
        **inputs,
        attention_mask=layout.chunks[0].mask[None, None],  # four axes: taken as it is
        position_ids=layout.positions.unsqueeze(0),
        use_cache=False,
        packed=layout,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[layout.last]


@dataclass(frozen=True, repr=False)
class _Chunk:
    """Rows whose attention is one padded batch (n, L) behind the shared positions.

    ``lengths`` (n,): of the rows. ``padded`` (n·L,): where in the sequence their tokens are, the first one's again
    where a row is shorter than L. ``back`` (t,): from there to the sequence. ``mask`` (S + L, S + L): additive and
    causal; S positions are shared.
    """

    lengths: Tensor
    padded: Tensor
    back: Tensor
    mask: Tensor

    @property
    def rows(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, repr=False)
class Layout:
    """Where the rows are in a sequence of T tokens.

    The prefix is its first ``shared`` tokens, or ``prefix``, kept from before. ``positions`` (T,). ``last`` (N,): each
    row's last token. ``chunks``: of neighbouring rows, in order.
    """

    shared: int
    prefix: Prefix | None
    positions: Tensor
    last: Tensor
    chunks: tuple[_Chunk, ...]

    @classmethod
    def of(
        cls,
        llm: FrozenLLM,
        shared: int,
        lengths: Sequence[int],
        *,
        prefix: Prefix | None = None,
        max_scores: int | None = CHUNK_SCORES,
    ) -> Layout:
        """``max_scores``: of a chunk, where it has more than one row. None: one chunk."""
        behind = prefix.length if prefix is not None else shared
        size = torch.tensor(lengths)
        starts = shared + size.cumsum(0) - size
        heads = int(llm.model.config.get_text_config().num_attention_heads)
        chunks, first = [], 0
        while first < len(lengths):
            longest, end = lengths[first], first + 1
            while end < len(lengths):
                wider = max(longest, lengths[end])
                if max_scores is not None and heads * (end + 1 - first) * wider * (behind + wider) > max_scores:
                    break
                longest, end = wider, end + 1
            chunks.append(_chunk(llm, starts[first:end], size[first:end], longest, behind))
            first = end
        columns = torch.cat([torch.arange(n) for n in lengths])
        places = torch.cat([torch.arange(shared), behind + columns])
        last = starts + size - 1
        return cls(shared, prefix, places.to(llm.device), last.to(llm.device), tuple(chunks))

    def padded(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """States (1, T, d) as padded rows (n, L, d) with their lengths (n,), in order."""
        width = states.shape[-1]
        return [(states[0].index_select(0, c.padded).view(c.rows, -1, width), c.lengths) for c in self.chunks]


def _chunk(llm: FrozenLLM, starts: Tensor, size: Tensor, longest: int, behind: int) -> _Chunk:
    column = torch.arange(longest)
    real = column < size.unsqueeze(1)  # (n, L)
    padded = torch.where(real, starts.unsqueeze(1) + column, starts[0])
    places = torch.arange(behind + longest)
    mask = torch.zeros(len(places), len(places), dtype=llm.dtype)
    mask.masked_fill_(places.unsqueeze(1) < places, torch.finfo(llm.dtype).min)
    back = real.flatten().nonzero().squeeze(1)
    return _Chunk(size.to(llm.device), padded.flatten().to(llm.device), back.to(llm.device), mask.to(llm.device))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, H, T, D) query, (1, K, T, D) key and value → (1, T, H, D)."""
    if packed is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise _NotPackable("scores are capped, biased or have sinks")
    shared, heads, dim = packed.shared, query.shape[1], query.shape[-1]
    scaling = kwargs.get("scaling") or dim**-0.5
    out = []
    if packed.prefix is not None:
        ahead_k, ahead_v, _ = packed.prefix.layers[cast(int, module.layer_idx)]
    else:
        ahead_k, ahead_v = key[:, :, :shared], value[:, :, :shared]
    if shared:
        mask = packed.chunks[0].mask[:shared, :shared]
        out.append(_attend(query[:, :, :shared], ahead_k, ahead_v, mask, scaling)[0].transpose(0, 1))
    for chunk in packed.chunks:
        queries = _rows(query, chunk)
        keys, values = (
            torch.cat([ahead.expand(chunk.rows, -1, -1, -1), _rows(x, chunk)], dim=2)
            for ahead, x in ((ahead_k, key), (ahead_v, value))
        )
        mask = chunk.mask[ahead_k.shape[2] :]
        if heads * chunk.rows * mask.numel() > MAX_SCORES:
            fused, _ = sdpa_attention_forward(module, queries, keys, values, mask[None, None], scaling=scaling)
            on_rows = fused.transpose(1, 2)
        else:
            on_rows = _attend(queries, keys, values, mask, scaling)
        flat = on_rows.transpose(1, 2).reshape(-1, heads * dim).index_select(0, chunk.back)
        out.append(flat.view(-1, heads, dim))
    return torch.cat(out).unsqueeze(0), None


def _rows(states: Tensor, chunk: _Chunk) -> Tensor:
    """(1, h, T, D) → those of the chunk, padded: (n, h, L, D)."""
    _, heads, length, dim = states.shape
    flat = states[0].transpose(0, 1).reshape(length, heads * dim).index_select(0, chunk.padded)
    return flat.view(chunk.rows, -1, heads, dim).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """softmax(q kᵀ · scaling + mask) v of (B, H, L, D), (B, K, S, D) and (L, S); H / K query heads share a key."""
    rows, heads, length, dim = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, -1, dim)  # (B, K, H/K · L, D)
    scores = (query @ key.transpose(-1, -2)).view(rows, groups, -1, length, key.shape[2])
    weights = torch.softmax(scores * scaling + mask, dim=-1)
    return (weights.view(rows, groups, -1, key.shape[2]) @ value).view(rows, heads, length, dim)


@cache
def leave_attention_out() -> None:
    """From now on attention runs as it is written also where the layers around it are compiled."""
    AttentionInterface.register(_SDPA_OR_PACKED, torch.compiler.disable(_attention))


AttentionInterface.register(_SDPA_OR_PACKED, _attention)
AttentionMaskInterface.register(_SDPA_OR_PACKED, sdpa_mask)
