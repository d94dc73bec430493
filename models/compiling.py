"""``torch.compile`` of the decoder's layers: tried beside the plain ones where it will run, and kept where it pays.

Each layer is compiled by itself and for any length: one kernel serves all layers, and what reads states between them
(``models.recording``) stays outside. Attention is left out, since the number of its chunks changes with every pass;
so is what is not packed (the prefix, models that cannot be): it runs on the plain layers.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import packing
from models.errors import ModelError
from models.inference import Classifier
from models.llm import FrozenLLM
from models.passes import MAX_PASS_TOKENS, run_rows
from models.prefix_cache import Prefix
from models.recording import layers_of

log = logging.getLogger(__name__)

MIN_GAIN = 1.03
"""Throughput over that of the plain layers, in full batches."""
MIN_GAIN_ALONE = 0.95
"""The same of a text alone, so that quiet hours pay little for busy ones."""
ROUNDS = 10
TEXT_TOKENS = (4, 48)
"""Shortest and longest text that is tried."""
FLOAT32_TOLERANCE = 0.001
"""Of a state, by its norm, where all is float32 but the weights: sums in another order, no more."""
TOLERANCE = 0.1
"""The same in bfloat16, and under int8, where the step of one row's rounding is decided by another's outliers."""


@dataclass(frozen=True)
class CompileTrial:
    """``gains``: throughput of the compiled layers over the plain ones, by rows of a pass; medians of ROUNDS.

    ``difference``: of the final states, by their norm, at its largest. ``seconds``: of the first passes, compiling
    included.
    """

    gains: dict[int, float]
    difference: float
    seconds: float

    @property
    def pays(self) -> bool:
        return self.gains[max(self.gains)] >= MIN_GAIN and min(self.gains.values()) >= MIN_GAIN_ALONE


def keep_compiled_in(folder: Path) -> None:
    """What torch compiles it keeps in files that it unpickles: not in /tmp, where others could have put them.

    Unless the environment names another folder.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Torch itself writes its default there, when something imports it.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def compile_where_it_pays(llm: FrozenLLM, *, rows: int, always: bool = False) -> bool:
    """Have passes run on compiled layers if that pays in full passes of ``rows``, or in any case; whether they do now.

    Raises as ``compare`` does.
    """
    trial, switch = compare(llm, rows={1, rows})
    kept = always or trial.pays
    switch(kept)
    gains = ", ".join(f"{gain:.2f} in passes of {size}" for size, gain in sorted(trial.gains.items()))
    log.warning("compiled layers over plain ones: %s; %s", gains, "kept" if kept else "not kept")
    return kept


def compare(llm: FrozenLLM, *, rows: Collection[int]) -> tuple[CompileTrial, Callable[[bool], None]]:
    """Compile the layers and compare, in passes of each of ``rows``, of as many as a pass has room for; also returns
    what switches them on, or off.

    To be called in a thread that computes on as many cores as the one that will serve. They are on afterwards. Raises
    ModelError, and leaves them off, where this model cannot be compiled here, or where its states are others then.
    """
    import torch._dynamo
    import torch._inductor.config

    most = MAX_PASS_TOKENS // (TEXT_TOKENS[1] + len(llm.template.tail_ids))
    sizes = sorted({min(size, most) for size in rows}, reverse=True)  # for the first is decided what runs on all cores
    passes = {size: [_rows(llm, size, seed) for seed in range(ROUNDS)] for size in sizes}
    prefix, switch = Classifier(llm).prefix(()), compile_layers(llm)
    ahead = prefix.length if prefix is not None else 0
    if not all(packing.fits(llm, ahead, some) for found in passes.values() for some in found):
        raise ModelError(f"{type(llm.model).__name__} cannot be packed, and only packed rows run on compiled layers")
    switch(False)  # they may be on since an earlier time
    plain = {size: _states(llm, some, prefix) for size, some in passes.items()}
    switch(True)
    torch.compiler.set_stance("default")  # now is the time for it
    started = time.monotonic()
    try:
        # In this process: a pool of others would stay for as long as the server. Headers would go into a shared folder.
        with torch._inductor.config.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False}):
            compiled = {size: _states(llm, some, prefix) for size, some in passes.items()}
        torch.compiler.set_stance("fail_on_recompile")  # what serves is what was compiled
        _states(llm, [found[0] for found in passes.values()], prefix)
    except torch.OutOfMemoryError:
        switch(False)
        raise
    except Exception as error:  # of dynamo, of inductor, or of the compiler that they call
        switch(False)
        why = f"torch.compile failed here ({type(error).__name__}); it needs a C++ compiler, and files that may run"
        raise ModelError(why) from error
    seconds = time.monotonic() - started
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        switch(False)
        raise ModelError("nothing was compiled: torch.compile is turned off in this environment")
    differences = [_difference(plain[size], compiled[size]) for size in passes]
    exact = llm.dtype == torch.float32 and llm.identity.get("quantization") != "int8"
    if not all(found <= (FLOAT32_TOLERANCE if exact else TOLERANCE) for found in differences):  # nor where it is NaN
        switch(False)
        raise ModelError(f"compiled layers give other states than plain ones, by {max(differences):.2g} of their norm")
    gains = {size: _gain(llm, some, prefix, switch) for size, some in passes.items()}
    switch(True)
    return CompileTrial(gains, max(differences), seconds), switch


def compile_layers(llm: FrozenLLM) -> Callable[[bool], None]:
    """What has packed passes run on compiled layers, or on plain ones again.

    What was not compiled before they are switched on runs as it is written: a caller waits for it.
    """
    packing.leave_attention_out()
    plain = [(layer, getattr(layer.forward, "plain", layer.forward)) for layer in layers_of(llm)]
    compiled = [_PackedOnly(torch.compile(forward, dynamic=True), forward) for _, forward in plain]

    def switch(on: bool) -> None:
        torch.compiler.set_stance("eager_on_recompile" if on else "default")
        for (layer, forward), other in zip(plain, compiled, strict=True):
            layer.forward = other if on else forward

    return switch


class _PackedOnly:
    """A layer's ``forward``: compiled for packed rows, ``plain`` for all else."""

    def __init__(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.compiled, self.plain = compiled, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if kwargs.get("packed") is not None else self.plain)(*args, **kwargs)


def _rows(llm: FrozenLLM, count: int, seed: int) -> list[list[int]]:
    """Rows of random words, of lengths as they come."""
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
    """Each pass twice, every other time the compiled layers first."""

    def seconds(rows: list[list[int]], on: bool) -> float:
        switch(on)
        started = time.perf_counter()
        run_rows(llm, rows, prefix)[0].sum().item()  # waits for the device
        return time.perf_counter() - started

    ratios = []
    for number, rows in enumerate(passes):
        first = bool(number % 2)
        took = {first: seconds(rows, first)}
        took[not first] = seconds(rows, not first)
        ratios.append(took[False] / took[True])
    return statistics.median(ratios)
