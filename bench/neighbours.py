"""What requests do to the retain rows nearest to each: ``python -m bench.neighbours --data DIR [--requests N]``.

The people of ``bench.sequence``, with its prompts, each alone and all of them together, measured as the checks before
activation do it (``models.routed_checks``): this is what ``LETHEON_MAX_NEIGHBOUR_DROP`` bounds. Ends with one JSON
line, kept in docs/bench/neighbours.json; ``--json`` prints that and computes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.sequence import MAX_PROMPTS, Bench, build, people
from bench.tuned import add_arguments, parse, record, tuned
from models.inference import Classifier
from models.neighbours import how_many, neighbour_figures
from models.routing import Routes, classify_routed


def beside(run: Bench, routes: Routes, index: int) -> dict[str, Any]:
    """Of the rows that route ``index`` would claim first: how many it does, and what they lose, in accuracy."""
    rows = [run.model.retain[i] for i in run.rows.check_rows]
    margins = routes.margins(run.rows.states(run.rows.check_rows))[:, index]
    order = margins.argsort(descending=True, stable=True)[: how_many(len(rows))].tolist()
    near = [rows[i] for i in order]
    found: dict[str, Any] = {
        "person": run.persons[index].name,
        "rows": len(near),
        "claimed": int((margins[order] > 0).sum()),
    }
    alone = Routes([routes.routes[index]], routes.spaces, fingerprint=run.llm.fingerprint)
    for name, active in (("alone", alone), ("all", routes)):
        texts = [row.text for row in near]
        answers = classify_routed(Classifier(run.llm), active, texts, digest=None, max_prompts=MAX_PROMPTS)
        figures = neighbour_figures(near, [a.base for a in answers], [a.answer for a in answers])
        found |= {f"{name}_drop": figures.before - figures.after, f"{name}_unknown": figures.abstain}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--requests", type=int, default=16)
    args = parse(parser, Path("docs/bench/neighbours.json"))
    args.measure_rows = 0  # of no other rows than these
    console = Console(stderr=True)
    model = tuned(args, console)
    run = Bench(model, *people(args.data, model, args.seed), args)
    routes = build(run, args.requests, console)[0]["routed"]
    found = [beside(run, routes, index) for index in range(len(routes))]
    for row in found:
        console.print(row)
    values = {
        n: [row[n] for row in found] for n in ("claimed", "alone_drop", "alone_unknown", "all_drop", "all_unknown")
    }
    figures = {n: {"worst": max(each), "mean": sum(each) / len(each)} for n, each in values.items()}
    record(args, {"bench": "neighbours", "requests": len(found), **figures, "people": found})


if __name__ == "__main__":
    main()
