"""Whether ``torch.compile`` pays here: ``python -m bench.compiled [--quantization none] [--record | --json]``.

What ``LETHEON_COMPILE`` tries at a server's start (``models.compiling``), in passes of each of ``--rows``: throughput
on compiled layers over that on the plain ones, medians of paired turns, above 1 is quicker; the largest difference of a
final state, by its norm; and the seconds that the compiling took. Wants an idle machine and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from app.defaults import load_arguments
from app.model_thread import in_passing, keep_memory
from app.settings import Settings, get_settings
from bench.tuned import parse, record
from models.compiling import CompileTrial, compare
from models.llm import FrozenLLM


def tried(settings: Settings, rows: list[int]) -> tuple[CompileTrial, FrozenLLM]:
    llm = FrozenLLM.load(**load_arguments(settings))
    return compare(llm, rows=rows)[0], llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", choices=("none", "int8", "nf4"), default="nf4")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="rows of a pass")
    parser.add_argument("--record", action="store_true", help="keep the result where --out says")
    args = parse(parser, Path("docs/bench/compiled.json"))
    settings = get_settings().model_copy(update={"quantization": args.quantization})
    keep_memory()  # as a server does
    trial, llm = in_passing(lambda: tried(settings, args.rows))
    table = Table("rows of a pass", "compiled over plain")
    for size, gain in sorted(trial.gains.items()):
        table.add_row(str(size), f"{gain:.3f}")
    console = Console(stderr=True)
    console.print(table, f"compiled in {trial.seconds:.0f} s; states differ by {trial.difference:.1e} of their norm")
    result = {
        "bench": "compiled",
        "quantization": args.quantization,
        "device": llm.device.type,
        "threads": torch.get_num_threads(),
        "compiled_over_plain": {str(size): round(gain, 4) for size, gain in sorted(trial.gains.items())},
        "pays": trial.pays,
        "difference": trial.difference,
        "compile_seconds": round(trial.seconds, 1),
    }
    if args.record:
        record(args, result)
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
