"""Classification beside the bare model, PEFT and itself: ``python -m bench.serving``. Wants an idle machine.

One model, one process, every way of asking it taken in turns; ratios are medians of the rounds' ratios, above 1 is
quicker. Texts: SST-2's test set from ``--data`` (as ``bench.quality``), else the demo's held-out reviews.

- ``bench.engine``: no prompt, one, four before every query; routed, where the gate claims none or all; PEFT's prompt
  tuning with the same virtual tokens on the same quantized model, texts of similar lengths together, with and without
  ``logits_to_keep=1``. Largest logit differences from plain concatenation, on the float32 model.
- HTTP: a ``letheon serve`` process with one request in force, ``--clients`` clients with one text each, closed loop,
  against the same texts through the engine in this process; and against a server that runs each text alone.
- The 99th percentile of the latency while every second a request is activated or revoked, over that of a steady set.

``--json`` prints the recorded result and computes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from rich.console import Console
from rich.table import Table

from app.defaults import load_arguments
from app.pull import reviews_dir
from app.settings import Settings, get_settings
from bench import engine
from bench.clients import Sample, drive
from bench.probes import Probes, find_probes
from bench.routing_cost import interleaved, quantile
from bench.site import Site, add_space, deployed, put_in_force
from bench.tuned import parse, record
from models.examples import read_examples
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routing import Routes, classify_routed

SWAP_SECONDS = 1.0
ENGINE_ROUNDS = 3  # for each of --rounds: a batch takes a second
TOGETHER = 0.2  # seconds within which the answers of one batch arrive


@dataclass(frozen=True, repr=False)
class Bench:
    settings: Settings
    texts: list[str]
    clients: int
    rounds: int
    seconds: float
    console: Console


def over_the_model(run: Bench, sizes: Sequence[int]) -> dict[str, Any]:
    """The engine's figures, and by batch size; a ratio's is that of the size where it is worst."""
    llm = FrozenLLM.load(**load_arguments(run.settings))
    rounds = ENGINE_ROUNDS * run.rounds
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        batches = [run.texts[i * size : (i + 1) * size] for i in range(rounds + 1)]
        found[str(size)] = engine.figures(interleaved(engine.ways(llm, batches), rounds), size)
        run.console.print(size, found[str(size)])
    exact = FrozenLLM.load(**load_arguments(run.settings.model_copy(update={"quantization": "none"})))
    differences = engine.differences(exact, run.texts[:64])
    return {
        **{name: min(one[name] for one in found.values()) for name in engine.RATIOS},
        "max_abs_logit_diff": max(differences[name] for name in engine.STACKS),
        "batches": found,
        "logit_differences": differences,
    }


def through_http(run: Bench) -> dict[str, Any]:
    """A server with a batcher and one without beside the engine, in turns; then the latency while sets change."""
    probes = find_probes(run.settings, run.texts, 2)
    with deployed(run.settings, postgres=None) as site:
        add_space(site.sessions, "bench", probes.space)
        put_in_force(site.sessions, site.vault, site.settings, probes.route(0, "guard", site.vault, 0), ["one"])
        site.start(1)
        with environment(LETHEON_MAX_BATCH_TEXTS="1"):
            site.start(1)
        llm = FrozenLLM.load(**load_arguments(run.settings))
        rates: dict[str, list[float]] = {"engine": [], "http": [], "http_unbatched": []}
        for number in range(run.rounds + 1):
            texts = run.texts[number * 997 % len(run.texts) :] + run.texts
            found = {
                "engine": in_process(llm, probes, site, texts, run.clients, run.seconds),
                "http": rate(load(site, 0, texts, run.clients, run.seconds)),
                "http_unbatched": rate(load(site, 1, texts, run.clients, run.seconds)),
            }
            run.console.print({name: round(value, 1) for name, value in found.items()})
            for name, value in found.items() if number else ():  # the first round warms up
                rates[name].append(value)
        latency = swapped(run, site, probes)
    return {
        "http_over_engine": median_ratio(rates["http"], rates["engine"]),
        "batched_over_unbatched": median_ratio(rates["http"], rates["http_unbatched"]),
        **{f"{name}_texts_per_second": statistics.median(found) for name, found in rates.items()},
        **latency,
    }


def in_process(llm: FrozenLLM, probes: Probes, site: Site, texts: Sequence[str], size: int, seconds: float) -> float:
    """Texts a second, in batches of ``size``, as the server would answer them."""
    route = probes.route(0, "guard", site.vault, 0)
    routes = Routes([route], {probes.space.digest: probes.space}, fingerprint=llm.fingerprint)
    classifier, done, started = Classifier(llm), 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds or not done:
        batch = [texts[(done + i) % len(texts)] for i in range(size)]
        classify_routed(classifier, routes, batch, digest=site.vault.gate_digest, max_prompts=4)
        done += size
    return done / took if took >= seconds else 0.0


def load(site: Site, replica: int, texts: Sequence[str], clients: int, seconds: float) -> list[Sample]:
    """Raises SystemExit when an answer is neither 200 nor a 503 with Retry-After."""
    bodies = [{"text": text} for text in texts[:2048]]
    samples = asyncio.run(drive(site.replicas[replica].url, site.key, bodies, clients=clients, seconds=seconds))
    if failed := [sample for sample in samples if sample.failed]:
        raise SystemExit(f"{len(failed)} of {len(samples)} failed: {failed[0].status} {failed[0].error}")
    return samples


def rate(samples: Sequence[Sample]) -> float:
    """Answers a second while all clients ask: from the first answer to the last question."""
    ends = sorted(sample.end for sample in samples if sample.status == 200)
    asked = max(sample.start for sample in samples)
    last = max(end for end in ends if end <= asked)
    # Answers come a batch at a time: those of the first one were waited for before the clock started.
    return sum(ends[0] + TOGETHER < end <= last for end in ends) / (last - ends[0])


def swapped(run: Bench, site: Site, probes: Probes) -> dict[str, Any]:
    """Latency with a steady set, and while a request comes or goes each second; in turns."""
    steady, changing, changes = [], [], 0
    route = probes.route(1, "guard", site.vault, 1)

    def swap(counter: Iterator[int]) -> None:
        prompt_id: str | None = None
        with httpx2.Client(base_url=site.replicas[0].url, headers={"Authorization": f"Bearer {site.key}"}) as admin:
            while not stop.is_set():
                began = time.monotonic()
                if prompt_id is None:
                    prompt_id, _, _ = put_in_force(site.sessions, site.vault, site.settings, route, ["two"])
                else:
                    path = f"/admin/prompts/{prompt_id}/revoke"
                    admin.post(path, json={"reason": "bench"}, timeout=60).raise_for_status()
                    prompt_id = None
                next(counter)
                time.sleep(max(0.0, SWAP_SECONDS - (time.monotonic() - began)))

    for _ in range(run.rounds):
        steady.append(latencies(load(site, 0, run.texts, run.clients, 2 * run.seconds)))
        stop, counter = threading.Event(), itertools.count()
        thread = threading.Thread(target=swap, args=(counter,))
        thread.start()
        try:
            changing.append(latencies(load(site, 0, run.texts, run.clients, 2 * run.seconds)))
        finally:
            stop.set()
            thread.join()
        changes += next(counter)
    p99 = {name: [quantile(found, 0.99) for found in rounds] for name, rounds in (("s", steady), ("c", changing))}
    return {
        "p99_during_swap": median_ratio(p99["c"], p99["s"]),
        "p99_ms": 1000 * statistics.median(p99["s"]),
        "p50_ms": 1000 * statistics.median(statistics.median(found) for found in steady),
        "changes": changes,
    }


def latencies(samples: Sequence[Sample]) -> list[float]:
    return [sample.end - sample.start for sample in samples if sample.status == 200]


def median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


@contextmanager
def environment(**values: str) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SST-2's test_retain.jsonl.gz; default: demo reviews")
    parser.add_argument("--quantization", default="nf4", choices=["none", "int8", "nf4"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64], help="batches of the engine")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round over HTTP")
    parser.add_argument("--part", choices=["all", "engine", "http"], default="all")
    args = parse(parser, Path("docs/bench/serving.json"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes go, too
    settings = get_settings().model_copy(update={"quantization": args.quantization})
    source = args.data / "test_retain.jsonl.gz" if args.data else reviews_dir(settings.home) / "held_out.jsonl"
    texts = [row.text for row in read_examples(str(source), labels=settings.labels)]
    random.Random(0).shuffle(texts)
    console = Console(stderr=True)
    run = Bench(settings, texts, args.clients, args.rounds, args.seconds, console)
    found: dict[str, Any] = {"bench": "serving", "quantization": args.quantization, "device": platform.processor()}
    found |= {"threads": torch.get_num_threads(), "clients": args.clients, "rounds": args.rounds}
    if args.part != "http":
        found |= over_the_model(run, args.sizes)
    if args.part != "engine":
        found |= through_http(run)
    table = Table(title="above 1 is quicker, but for latencies")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, value in found.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}")
    console.print(table)
    record(args, found)


if __name__ == "__main__":
    main()
