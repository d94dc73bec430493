"""``torch.compile`` of the decoder's layers: tried beside the plain ones where it will run, and kept where it pays.

Each layer is compiled by itself and for any length: one kernel serves all layers, and what reads states between them
(``models.recording``) stays outside. Attention is left out, since the number of its chunks changes with every pass;
so is what is not packed (the prefix, models that cannot be): it runs on the plain layers.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import packing
from models.errors import ModelError
from models.inference import Classifier
from models.llm import FrozenLLM
from models.passes import run_rows
from models.prefix_cache import Prefix
from models.recording import layers_of

log = logging.getLogger(__name__)

MIN_GAIN = 1.03
"""Throughput over that of the plain layers, in full batches."""
MIN_GAIN_ALONE = 0.97
"""The same of a text alone, so that quiet hours pay nothing for busy ones."""
ROUNDS = 9
FLOAT32_TOLERANCE = 0.001
"""Of a state, by its norm, where all is float32 but the weights: sums in another order, no more."""
TEXT_TOKENS = (4, 48)
"""Shortest and longest text that is tried."""


@dataclass(frozen=True)
class CompileTrial:
    """``gains``: throughput of the compiled layers over the plain ones, by rows of a pass; medians of ROUNDS.

    ``difference``: of the final states, by their norm, at its largest. ``seconds`` that the compiling took.
    """

    gains: dict[int, float]
    difference: float
    seconds: float

    @property
    def pays(self) -> bool:
        return self.gains[max(self.gains)] >= MIN_GAIN and min(self.gains.values()) >= MIN_GAIN_ALONE


def compile_where_it_pays(llm: FrozenLLM, *, rows: int) -> CompileTrial:
    """Have passes run on compiled layers if that pays in full passes of ``rows``. Raises as ``compare`` does."""
    trial, switch = compare(llm, rows={1, rows})
    switch(trial.pays)
    gains = ", ".join(f"{gain:.2f} in passes of {size}" for size, gain in trial.gains.items())
    log.warning("compiled layers over plain ones: %s; %s", gains, "kept" if trial.pays else "not kept")
    return trial


def compare(llm: FrozenLLM, *, rows: Collection[int]) -> tuple[CompileTrial, Callable[[bool], None]]:
    """Compile the layers and compare, in passes of each of ``rows``; also returns what switches them on, or off.

    To be called in a thread that computes on as many cores as the one that will serve. They are on afterwards. Raises
    ModelError, and leaves them off, where this model cannot be compiled here, or where its states are others then.
    """
    if not packing.packable(llm):
        raise ModelError(f"{type(llm.model).__name__} cannot be packed, and only packed rows run on compiled layers")
    passes = {size: [_rows(llm, size, seed) for seed in range(ROUNDS)] for size in sorted(rows)}
    prefix = Classifier(llm).prefix(())
    plain = {size: _states(llm, some, prefix) for size, some in passes.items()}
    started = time.monotonic()
    switch = compile_layers(llm)
    try:
        compiled = {size: _states(llm, some, prefix) for size, some in passes.items()}
    except Exception as error:  # of dynamo, of inductor, or of the compiler that they call
        switch(False)
        raise ModelError(f"torch.compile failed here ({type(error).__name__}); it needs a C++ compiler") from error
    seconds = time.monotonic() - started
    difference = max(_difference(plain[size], compiled[size]) for size in passes)
    exact = llm.dtype == torch.float32 and not packing.is_int8(llm)
    if not difference <= (FLOAT32_TOLERANCE if exact else packing.tolerance(llm)):
        switch(False)
        raise ModelError(f"compiled layers give other states than plain ones, by {difference:.2g} of their norm")
    gains = {size: _gain(llm, some, prefix, switch) for size, some in passes.items()}
    return CompileTrial(gains, difference, seconds), switch


def compile_layers(llm: FrozenLLM) -> Callable[[bool], None]:
    """Have packed passes run on compiled layers; returns what switches them off and on again."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # in this process: a pool would stay for as long as the server
    packing.leave_attention_out(torch.compiler.disable)
    plain = [(layer, layer.forward) for layer in layers_of(llm)]
    compiled = [_packed_only(torch.compile(forward, dynamic=True), forward) for _, forward in plain]

    def switch(on: bool) -> None:
        for (layer, forward), other in zip(plain, compiled, strict=True):
            layer.forward = other if on else forward

    switch(True)
    return switch


def _packed_only(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if kwargs.get("packed") is not None else plain)(*args, **kwargs)

    return forward


def _rows(llm: FrozenLLM, count: int, seed: int) -> list[list[int]]:
    """Rows of random words, of lengths as they come: never twice the same number of tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(TEXT_TOKENS[0], TEXT_TOKENS[1], (count,), generator=draw).sort().values.tolist()
    words = [torch.randint(llm.embed.num_embeddings, (length,), generator=draw).tolist() for length in lengths]
    return [[*some, *llm.template.tail_ids] for some in words]


def _states(llm: FrozenLLM, passes: Sequence[list[list[int]]], prefix: Prefix | None) -> Tensor:
    return torch.cat([run_rows(llm, rows, prefix)[0].float() for rows in passes])


def _difference(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm(dim=-1) / one.norm(dim=-1)).max())


def _gain(
    llm: FrozenLLM, passes: Sequence[list[list[int]]], prefix: Prefix | None, switch: Callable[[bool], None]
) -> float:
    def seconds(rows: list[list[int]], on: bool) -> float:
        switch(on)
        started = time.perf_counter()
        run_rows(llm, rows, prefix)[0].sum().item()  # waits for the device
        return time.perf_counter() - started

    return statistics.median(seconds(rows, False) / seconds(rows, True) for rows in passes)
