"""Classification beside the bare model, PEFT and itself: ``python -m bench.serving [--record | --json]``.

Wants an idle machine.

One model, one process, every way of asking it taken in turns; ratios are medians of the rounds' ratios, above 1 is
quicker. Texts: SST-2's test set from ``--data`` (as ``bench.quality``), else the demo's held-out reviews.

- ``bench.engine``: no prompt, one, four before every query; routed, where the gate claims none or all; PEFT's prompt
  tuning with the same virtual tokens on the same quantized model, texts of similar lengths together, in passes of the
  number of rows that suits it best, with and without ``logits_to_keep=1``. Either side tokenizes its texts once, inside
  the measured time. A batch of 16 is a pass of 16 rows, of which a turn takes four. Largest logit differences from
  plain concatenation, on the float32 model.
- HTTP: a ``letheon serve`` process with one request in force, ``--clients`` clients with one text each, closed loop,
  against the same texts through the engine in this process; and against a server that runs each text alone.
- The 99th percentile of the latency while every second a request is activated or revoked, over that of a steady set.
  Its gate claims one text in sixteen, as another's does that stays in force: each time it comes the keys and values of
  its prompt are computed, and while it is in force what it claims runs again behind it. That it did is read from the
  server's own metrics: a larger share of the texts has run behind a prompt while it came and went.

``--record`` keeps the result (of a ``--part``, with what is there of the other), ``--json`` prints the recorded one and
computes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from bench.tuned import machine, parse, record, today
from models.examples import read_examples
from models.inference import Classifier, Encoded
from models.llm import FrozenLLM
from models.routing import Route, Routes, classify_routed
from models.text_states import text_states

SWAP_SECONDS = 1.0
SWAP_CLAIMS = 1 / 16  # of the texts
ENGINE_ROUNDS = 3  # for each of --rounds: a turn takes a second
TURN = 64  # texts of a turn, or one batch where that is more
ASKED = 2048  # texts that the clients take in turn, and so does the engine beside them
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
    found: dict[str, dict[str, Any]] = {}
    for size in sizes:
        count = max(size, TURN)
        turns = [[run.texts[i % len(run.texts)] for i in range(n * count, (n + 1) * count)] for n in range(rounds + 1)]
        ways, passes = engine.ways(llm, turns, size)
        found[str(size)] = {**engine.figures(interleaved(ways, rounds), count), "rows_of_a_pass": passes}
        run.console.print(size, found[str(size)])
    float32 = run.settings.model_copy(update={"quantization": "none", "device": "cpu"})
    exact = FrozenLLM.load(**load_arguments(float32))
    differences = engine.differences(exact, run.texts[:64])
    return {
        **{name: min(one[name] for one in found.values()) for name in engine.RATIOS},
        "max_abs_logit_diff": max(differences[name] for name in engine.STACKS),
        "batches": found,
        "logit_differences": differences,
    }


def through_http(run: Bench) -> dict[str, Any]:
    """A server with a batcher and one without beside the engine, in turns; then the latency while sets change."""
    probes = find_probes(run.settings, run.texts, 3)
    with deployed(run.settings, postgres=None) as site:
        add_space(site.sessions, "bench", probes.space)
        put_in_force(site.sessions, site.vault, site.settings, probes.route(0, "guard", site.vault, 0), ["one"])
        site.start(1)
        with environment(LETHEON_MAX_BATCH_TEXTS="1"):
            site.start(1)
        llm = FrozenLLM.load(**load_arguments(run.settings))
        rates: dict[str, list[float]] = {"engine": [], "http": [], "http_unbatched": []}
        for number in range(run.rounds + 1):
            texts = (run.texts[number * 997 % len(run.texts) :] + run.texts)[:ASKED]
            found = {
                "engine": in_process(llm, probes, site, texts, run.clients, run.seconds),
                "http": rate(load(site, 0, texts, run.clients, run.seconds)),
                "http_unbatched": rate(load(site, 1, texts, run.clients, run.seconds)),
            }
            run.console.print({name: round(value, 1) for name, value in found.items()})
            for name, value in found.items() if number else ():  # the first round warms up
                rates[name].append(value)
        one, other = (claiming(llm, probes, run.texts[:512], site, index) for index in (1, 2))
        put_in_force(site.sessions, site.vault, site.settings, one, ["stays"])
        latency = swapped(run, site, other)
    return {
        "http_over_engine": median_ratio(rates["http"], rates["engine"]),
        "batched_over_unbatched": median_ratio(rates["http"], rates["http_unbatched"]),
        **{f"{name}_texts_per_second": statistics.median(found) for name, found in rates.items()},
        **latency,
    }


def in_process(llm: FrozenLLM, probes: Probes, site: Site, texts: Sequence[str], size: int, seconds: float) -> float:
    """Texts a second, in batches of ``size``, as the server's model thread would answer them.

    What the server does beside that thread, tokens and digests, is done before the clock starts.
    """
    route = probes.route(0, "guard", site.vault, 0)
    routes = Routes([route], {probes.space.digest: probes.space}, fingerprint=llm.fingerprint, device=llm.device)
    rows = llm.rows(texts)
    encoded = [Encoded(row, site.vault.gate_digest(text)) for row, text in zip(rows, texts, strict=True)]
    classifier, done, took = Classifier(llm), 0, 0.0
    classifier.prefix(())  # the server has it since its first batch
    started = time.perf_counter()
    while took < seconds:
        batch = [encoded[(done + i) % len(encoded)] for i in range(size)]
        classify_routed(classifier, routes, batch, digest=None, max_prompts=4)
        done += size
        took = time.perf_counter() - started
    return done / took


def claiming(llm: FrozenLLM, probes: Probes, texts: Sequence[str], site: Site, index: int) -> Route:
    """A prompt, and a gate that claims SWAP_CLAIMS of ``texts`` and leaves every one of them to the prompt."""
    route = probes.route(index, "claim", site.vault, index)
    cosines = (probes.space.points(text_states(llm, texts)) @ route.gate.directions[0]).tolist()
    return Route(route.prompt, replace(route.gate, threshold=quantile(cosines, 1 - SWAP_CLAIMS)))


def load(site: Site, replica: int, texts: Sequence[str], clients: int, seconds: float) -> list[Sample]:
    """Raises SystemExit when an answer is neither 200 nor a 503 with Retry-After."""
    bodies = [{"text": text} for text in texts[:ASKED]]
    samples = asyncio.run(drive(site.replicas[replica].url, site.key, bodies, clients=clients, seconds=seconds))
    if failed := [sample for sample in samples if sample.failed]:
        raise SystemExit(f"{len(failed)} of {len(samples)} failed: {failed[0].status} {failed[0].error}")
    return samples


def rate(samples: Sequence[Sample]) -> float:
    """Answers a second while all clients ask: from the end of the first batch of answers to the last question.

    Raises SystemExit when no answer came between.
    """
    ends = sorted(sample.end for sample in samples if sample.status == 200)
    asked = max(sample.start for sample in samples)
    # Answers come a batch at a time: those of the first one were waited for before the clock starts.
    first = max((end for end in ends if end <= ends[0] + TOGETHER), default=asked)
    within = [end for end in ends if first < end <= asked]
    if not within:
        raise SystemExit("too few answers for a rate; take more --seconds")
    return len(within) / (within[-1] - first)


def swapped(run: Bench, site: Site, route: Route) -> dict[str, Any]:
    """Latency with a steady set, and while ``route`` comes or goes each second; in turns.

    Raises SystemExit when it came and went less than half as often, or when no more texts ran behind a prompt then.
    """
    steady: list[list[Sample]] = []
    changing: list[list[Sample]] = []
    changes, behind = 0, {"steady": 0.0, "changing": 0.0}
    with ThreadPoolExecutor(1) as pool:
        for _ in range(run.rounds):
            before = prompted(site)
            steady.append(load(site, 0, run.texts, run.clients, 2 * run.seconds))
            between = prompted(site)
            stop = threading.Event()
            swapping = pool.submit(swap, site, route, stop)
            try:
                changing.append(load(site, 0, run.texts, run.clients, 2 * run.seconds))
            finally:
                stop.set()
                changes += swapping.result()  # raises what went wrong there
            behind["steady"] += between - before
            behind["changing"] += prompted(site) - between
    due = run.rounds * 2 * run.seconds / SWAP_SECONDS
    shares = {
        name: behind[name] / sum(len(samples) for samples in rounds)
        for name, rounds in (("steady", steady), ("changing", changing))
    }
    if changes < due / 2 or shares["changing"] <= shares["steady"]:
        raise SystemExit(f"{changes} changes of about {due:.0f}; shares of texts behind a prompt: {shares}")
    return {
        **swap_figures(steady, changing),
        "changes": changes,
        "changes_due": round(due),
        **{f"prompted_share_{name}": round(share, 4) for name, share in shares.items()},
    }


def swap(site: Site, route: Route, stop: threading.Event) -> int:
    """Puts ``route`` in force and takes it out again, until told to stop; how often it did either. Leaves it out."""
    prompt_id: str | None = None
    changes = 0
    with httpx2.Client(base_url=site.replicas[0].url, headers={"Authorization": f"Bearer {site.key}"}) as admin:

        def revoke(prompt_id: str) -> None:
            admin.post(f"/admin/prompts/{prompt_id}/revoke", json={"reason": "bench"}, timeout=60).raise_for_status()

        while not stop.is_set():
            began = time.monotonic()
            if prompt_id is None:
                prompt_id, _, _ = put_in_force(site.sessions, site.vault, site.settings, route, ["two"])
            else:
                revoke(prompt_id)
                prompt_id = None
            changes += 1
            stop.wait(max(0.0, SWAP_SECONDS - (time.monotonic() - began)))
        if prompt_id is not None:
            revoke(prompt_id)
    return changes


def prompted(site: Site) -> float:
    """Texts that the first replica has answered so far after a prompt had its say."""
    url = f"{site.replicas[0].url}/metrics"
    text = httpx2.get(url, headers={"Authorization": f"Bearer {site.key}"}, timeout=60).raise_for_status().text
    found = re.findall(r'^letheon_classified_texts_total\{outcome="(?:cleared|abstained)"\} (\S+)$', text, re.MULTILINE)
    if len(found) != 2:
        raise SystemExit("the server's metrics do not say how texts were answered")
    return sum(float(value) for value in found)


def swap_figures(steady: Sequence[Sequence[Sample]], changing: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """By round. What was refused waited, too."""
    seconds = {
        name: [[sample.end - sample.start for sample in samples] for samples in rounds]
        for name, rounds in (("steady", steady), ("changing", changing))
    }
    p99 = {name: [quantile(found, 0.99) for found in rounds] for name, rounds in seconds.items()}
    return {
        "p99_during_swap": median_ratio(p99["changing"], p99["steady"]),
        "p99_ms": 1000 * statistics.median(p99["steady"]),
        "p99_changing_ms": 1000 * statistics.median(p99["changing"]),
        "p50_ms": 1000 * statistics.median(statistics.median(found) for found in seconds["steady"]),
        "refused_steady": sum(sample.refused for samples in steady for sample in samples),
        "refused_changing": sum(sample.refused for samples in changing for sample in samples),
    }


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
    parser.add_argument("--record", action="store_true", help="keep the result where --out says")
    args = parse(parser, Path("docs/bench/serving.json"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes go, too
    settings = get_settings().model_copy(update={"quantization": args.quantization})
    source = args.data / "test_retain.jsonl.gz" if args.data else reviews_dir(settings.home) / "held_out.jsonl"
    texts = [row.text for row in read_examples(str(source), labels=settings.labels)]
    random.Random(0).shuffle(texts)
    console = Console(stderr=True)
    run = Bench(settings, texts, args.clients, args.rounds, args.seconds, console)
    found: dict[str, Any] = {"bench": "serving", "quantization": args.quantization}
    found |= {"threads": torch.get_num_threads(), "clients": args.clients, "rounds": args.rounds}
    if args.part != "http":
        found |= {"machine": machine(), "date": today(), **over_the_model(run, args.sizes)}
    if args.part != "engine":
        found |= {"machine_http": machine(), "date_http": today(), **through_http(run)}
    table = Table(title="above 1 is quicker, but for latencies")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, value in found.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:.4g}")
    console.print(table)
    if args.record:
        there = json.loads(args.out.read_text(encoding="utf-8")) if args.part != "all" and args.out.exists() else {}
        record(args, there | found)
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
