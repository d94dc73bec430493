"""How long a request takes to activate, the first and the 1,001st: ``python -m bench.activation``.

The worker's own job, from claim to active, on the embedded database: once with nothing in force and once behind
``--requests`` synthetic ones. Both train the same texts with the same steps, so what differs is what the active set
costs. Ends with one JSON line, kept in docs/bench/activation.json; ``--json`` prints that and computes nothing. Wants
an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from app import active_set, db, lifecycle
from app.defaults import resolve_model, resolve_retain
from app.lifecycle import ForgetText
from app.settings import Settings, get_settings
from app.tables import RequestState
from bench.routing_cost import synthetic
from bench.site import put_in_force
from bench.tuned import parse, record
from models.gate_rows import GateRows, space_source
from worker.context import Context
from worker.main import prepare
from worker.tasks import run_job

NAME, TEXTS = "Spielberg", 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--directions", type=int, default=4, help="of each synthetic gate")
    args = parse(parser, Path("docs/bench/activation.json"))
    record(args, {"bench": "activation", **measure(args.requests, args.directions, Console(stderr=True))})


def measure(requests: int, directions: int, console: Console) -> dict[str, Any]:
    """Seconds of either, and their ratio with the training counted alike: the same work, and most of the noise."""
    model, adapter = resolve_model(get_settings())
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            home=Path(folder) / "first",
            model=model,
            adapter=adapter or "",
            retain=resolve_retain(get_settings()),
            max_steps=60,
            min_forget_abstain=0,  # a check that failed would end the measurement
            max_retain_drop=1,
            max_class_drop=1,
            max_neighbour_drop=1,
            max_total_claim_rate=1,
        )
        first = prepare(settings)
        rows = GateRows(first.llm, first.retain, settings.gate_rows, first.cache)
        space = rows.fit_space()
        source = space_source(first.llm, first.retain, settings.gate_rows)
        # Synthetic gates claim none of the rows that are checked: what claimed rows cost is `bench.routing_cost`'s.
        states = rows.states([*rows.calibration_rows, *rows.check_rows])
        console.print("the gate space is made")
        last = sibling(first, Path(folder) / "last")
        for context in (first, last):
            with context.sessions.begin() as session:
                active_set.add_gate_space(session, source, space.to_bytes())
        routes = synthetic(first.llm, space, states, requests, directions)
        for number, route in enumerate(track(routes, "filling the active set", console=console)):
            put_in_force(last.sessions, last.vault, last.settings, route, [f"synthetic text {number}"])
        texts = [e.text for e in first.retain if NAME in e.text][:TEXTS]
        found = {name: activate(context, texts) for name, context in (("first", first), ("last", last))}
    training = sum(f["training_seconds"] for f in found.values()) / 2
    rest = {name: f["seconds"] - f["training_seconds"] for name, f in found.items()}
    result = {
        "requests": requests,
        "activation_seconds": {name: f["seconds"] for name, f in found.items()},
        "training_seconds": {name: f["training_seconds"] for name, f in found.items()},
        "steps": {name: f["steps"] for name, f in found.items()},
        "activation_last_over_first": round((training + rest["last"]) / (training + rest["first"]), 4),
        "raw_last_over_first": round(found["last"]["seconds"] / found["first"]["seconds"], 4),
    }
    console.print(result)
    return result


def sibling(context: Context, home: Path) -> Context:
    """The same worker with a database of its own; the caches of retain rows are shared."""
    home.mkdir()
    (home / "rows").symlink_to(context.settings.home / "rows")
    settings = context.settings.model_copy(update={"home": home})
    db.upgrade(settings.effective_database_url)
    return replace(
        context, settings=settings, sessions=db.make_sessions(db.make_engine(settings.effective_database_url))
    )


def submit(context: Context, texts: list[str]) -> str:
    with context.sessions.begin() as session:
        return lifecycle.create_request(
            session,
            context.vault,
            texts=[ForgetText(text) for text in texts],
            reason=None,
            options={},
            fingerprint=context.llm.fingerprint,
            api_key_id=None,
        ).id


def activate(context: Context, texts: list[str]) -> dict[str, Any]:
    """Let the worker do it. The steps are all taken: to stop early would be luck."""
    request_id = submit(context, texts)
    started = time.perf_counter()
    run_job(context, request_id)
    seconds = time.perf_counter() - started
    with context.sessions() as session:
        request = lifecycle.get_request(session, request_id)
    if request.state != RequestState.ACTIVE or request.metrics is None:
        raise SystemExit(f"the request ended {request.state}: {request.failure}")
    return {"seconds": round(seconds, 2), **{k: request.metrics[k] for k in ("training_seconds", "steps")}}


if __name__ == "__main__":
    main()
