"""A training step as one sequence: [soft prompt, template head] once, then every row, each blind to the others.

Everything but attention is per token, so it runs on one flat sequence: one pass over the weights forward and one
backward, and no padding. Attention runs apart: the prefix on itself, then all rows as one padded batch behind the
prefix's keys and values, in plain matrix products with the query heads of a group side by side. On CPU those take a
fifth of the time of torch's fused kernel with its backward pass, whose block is the whole of such a short row
(docs/LOG.md has the figures).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.examples import collate
from models.llm import FrozenLLM
from models.prefix_cache import compute_prefix, last_hidden

log = logging.getLogger(__name__)
MAX_SCORES = 4_000_000
"""Of one layer, kept for the backward pass, three times over; where there would be more, a fused kernel keeps none."""
TOLERANCE = 0.05  # of a state, by its norm: bfloat16 is within one or two percent
_SDPA_OR_PACKED = "letheon_sdpa_or_packed"
_packable: WeakKeyDictionary[FrozenLLM, bool] = WeakKeyDictionary()


def fits(llm: FrozenLLM, soft: Tensor, rows: Sequence[Sequence[int]]) -> bool:
    """Whether packing is exact: a model that can be packed, and no row, with the prefix, longer than a window.

    One mask serves all layers.
    """
    window = getattr(llm.model.config.get_text_config(), "sliding_window", None)
    longest = len(soft) + len(llm.template.head_ids) + max(len(row) for row in rows)
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
            log.info("%s: training steps are not packed, and slower", type(llm.model).__name__)
    return _packable[llm]


@torch.no_grad()
def _keeps_rows_apart(llm: FrozenLLM) -> bool:
    """A row's state is the same to the last bit, whatever the row before it says, and what it is behind a prefix."""
    tail = [*llm.template.tail_ids, llm.verbalizer.label_ids[0]]
    first, second, other = [tail[0], *tail], [tail[-1], tail[-1]], [tail[-1], *tail]
    soft = llm.embed(torch.tensor(llm.verbalizer.label_ids[:2], device=llm.device)).float()
    usual = llm.model.config._attn_implementation
    try:
        states = packed_last_hidden(llm, soft, [first, second])
        again = packed_last_hidden(llm, soft, [other, second])
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        llm.model.config._attn_implementation = usual
        return False
    prefix = compute_prefix(llm, soft)
    plain = torch.cat([last_hidden(llm, collate([row], llm.device), prefix) for row in (first, second)])
    apart = torch.equal(states[1], again[1]) and not torch.equal(states[0], again[0])
    if not apart or float((states - plain).norm() / plain.norm()) > TOLERANCE:
        llm.model.config._attn_implementation = usual
        return False
    return True


def packed_last_hidden(llm: FrozenLLM, soft: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states (N, d) of the rows' last tokens, as ``last_hidden`` behind ``compute_prefix(soft)``.

    ``soft``: (p, d), to which the gradient flows.
    """
    # For good, since another thread may be running the model: without a layout it is sdpa itself.
    llm.model.config._attn_implementation = _SDPA_OR_PACKED
    device, head = llm.device, llm.template.head_ids
    ids = torch.tensor([*head, *(token for row in rows for token in row)], device=device)
    embeddings = torch.cat([soft.to(device, llm.dtype), llm.embed(ids)])
    layout = _Layout.of(len(soft) + len(head), [len(row) for row in rows], device, llm.dtype)
    output = llm.decoder(
        inputs_embeds=embeddings.unsqueeze(0),
        attention_mask=layout.mask[None, None],  # four axes: taken as it is
        position_ids=layout.positions.unsqueeze(0),
        use_cache=False,
        packed=layout,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[layout.last]


@dataclass(frozen=True, repr=False)
class _Layout:
    """Where the rows are in a sequence of T tokens, of which the first ``shared`` are the prefix.

    ``positions`` (T,). ``last`` (N,): each row's last token. ``padded`` (N·L,): places of the rows' tokens behind the
    prefix, the first one's again where a row is shorter than L. ``back`` (T - shared,): from there to the sequence.
    ``mask`` (shared + L, shared + L): additive and causal.
    """

    shared: int
    rows: int
    positions: Tensor
    last: Tensor
    padded: Tensor
    back: Tensor
    mask: Tensor

    @classmethod
    def of(cls, shared: int, lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> _Layout:
        longest, size = max(lengths), torch.tensor(lengths)
        ends = size.cumsum(0)
        column = torch.arange(longest)
        real = column < size.unsqueeze(1)  # (N, L)
        padded = torch.where(real, (ends - size).unsqueeze(1) + column, 0)
        places = torch.arange(shared + longest)
        mask = torch.zeros(len(places), len(places), dtype=dtype)
        mask.masked_fill_(places.unsqueeze(1) < places, torch.finfo(dtype).min)
        return cls(
            shared=shared,
            rows=len(lengths),
            positions=torch.cat([places[:shared], shared + column.expand_as(real)[real]]).to(device),
            last=(shared + ends - 1).to(device),
            padded=padded.flatten().to(device),
            back=real.flatten().nonzero().squeeze(1).to(device),
            mask=mask.to(device),
        )


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: _Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, H, T, D) query, (1, K, T, D) key and value → (1, T, H, D)."""
    if packed is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("scores are capped, biased or have sinks")
    shared, heads, dim = packed.shared, query.shape[1], query.shape[-1]
    scaling = kwargs.get("scaling") or dim**-0.5
    ahead = [x[:, :, :shared] for x in (query, key, value)]
    on_prefix = _attend(ahead[0], ahead[1], ahead[2], packed.mask[:shared, :shared], scaling)
    queries = _rows(query, packed)
    keys, values = (
        torch.cat([x[:, :, :shared].expand(packed.rows, -1, -1, -1), _rows(x, packed)], dim=2) for x in (key, value)
    )
    mask = packed.mask[shared:]
    if heads * packed.rows * mask.numel() > MAX_SCORES:
        fused, _ = sdpa_attention_forward(module, queries, keys, values, mask[None, None], scaling=scaling)
        on_rows = fused.transpose(1, 2)
    else:
        on_rows = _attend(queries, keys, values, mask, scaling)
    flat = on_rows.transpose(1, 2).reshape(-1, heads * dim).index_select(0, packed.back)
    out = torch.cat([on_prefix[0].transpose(0, 1), flat.view(-1, heads, dim)])
    return out.unsqueeze(0), None


def _rows(states: Tensor, packed: _Layout) -> Tensor:
    """(1, h, T, D) → the rows' alone, padded: (N, h, L, D)."""
    _, heads, _, dim = states.shape
    flat = states[0, :, packed.shared :].transpose(0, 1).reshape(-1, heads * dim).index_select(0, packed.padded)
    return flat.view(packed.rows, -1, heads, dim).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """softmax(q kᵀ · scaling + mask) v of (B, H, L, D), (B, K, S, D) and (L, S); H / K query heads share a key."""
    rows, heads, length, dim = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, -1, dim)  # (B, K, H/K · L, D)
    scores = (query @ key.transpose(-1, -2)).view(rows, groups, -1, length, key.shape[2])
    weights = torch.softmax(scores * scaling + mask, dim=-1)
    return (weights.view(rows, groups, -1, key.shape[2]) @ value).view(rows, heads, length, dim)


AttentionInterface.register(_SDPA_OR_PACKED, _attention)
AttentionMaskInterface.register(_SDPA_OR_PACKED, sdpa_mask)
