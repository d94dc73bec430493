"""A training step as one sequence: [soft prompt, template head] once, then every row, each blind to the others.

What a small step costs is less its tokens than its passes over the weights: prefix, shorter and longer rows apart make
three, forward and backward. Packed there is one of each, and no padding. The mask grows with the square of the tokens,
so large steps stay as they were (docs/LOG.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.llm import FrozenLLM

MAX_TOKENS = 768


def fits(llm: FrozenLLM, soft: Tensor, rows: Sequence[Sequence[int]]) -> bool:
    """Whether packing pays, and whether it is exact: one mask serves all layers only where no window cuts a row."""
    shared = len(soft) + len(llm.template.head_ids)
    window = getattr(llm.model.config, "sliding_window", None)
    longest = shared + max(len(row) for row in rows)
    return shared + sum(len(row) for row in rows) <= MAX_TOKENS and (window is None or longest <= window)


def packed_last_hidden(llm: FrozenLLM, soft: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states (N, d) of the rows' last tokens, as ``last_hidden`` behind ``compute_prefix(soft)``.

    ``soft``: (p, d), to which the gradient flows.
    """
    device, head = llm.device, llm.template.head_ids
    ids = torch.tensor([*head, *(token for row in rows for token in row)], device=device)
    embeddings = torch.cat([soft.to(device, llm.dtype), llm.embed(ids)])
    shared = len(soft) + len(head)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    owner = torch.cat(
        [
            torch.full((shared,), -1, device=device),
            torch.arange(len(rows), device=device).repeat_interleave(lengths),
        ]
    )
    places = torch.arange(len(owner), device=device)
    before = lengths.cumsum(0) - lengths  # tokens of the rows ahead
    positions = places.clone()
    positions[shared:] -= before[owner[shared:]]
    seen = (owner == -1) | (owner.unsqueeze(1) == owner)  # (query, key)
    seen &= places.unsqueeze(1) >= places
    mask = torch.zeros(seen.shape, dtype=llm.dtype, device=device).masked_fill_(~seen, torch.finfo(llm.dtype).min)
    output = llm.decoder(
        inputs_embeds=embeddings.unsqueeze(0),
        attention_mask=mask[None, None],
        position_ids=positions.unsqueeze(0),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[shared + before + lengths - 1]
