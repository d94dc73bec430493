"""One server under load: ``python -m bench.load [--clients 64] [--minutes 5] [--data DIR] [--record | --json]``.

A real ``letheon serve --no-worker`` on a fresh database, synthetic prompts in force, and clients that ask again as soon
as they have an answer. The texts are SST-2's test sentences (``--data``) or the demo's held-out reviews, those that the
bare model is decided about, so that an answer that reached the wrong caller shows as a wrong label. ``--texts lengths``
makes texts of one word up to the server's limit of them, ``--texts bulk`` sends 64 in a body, ``--leave`` has clients
hang up before the answer.

The server's resident memory is read every second; after the first fifth a line is fitted through it. Minutes say
little about hours: the slope comes with its standard error. Memory grows where the slope is above 1 % an hour and more
than two standard errors above none at all. (Not above 1 % by two errors: a noisy run would then pass with any slope.) A
slope above 1 % that noise may have made is neither: ``rss_undecided``, and a longer run is needed to tell.

Ends with one JSON line; exit status 1 where a status was 5xx (other than 503 with Retry-After), a connection broke, a
label was wrong or memory grows, 2 where only that is undecided. ``--json`` prints the recorded result and computes
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from app.pull import reviews_dir
from app.settings import Settings, get_settings
from bench.clients import LEFT, Sample, drive
from bench.probes import Probes, find_probes
from bench.routing_cost import quantile
from bench.site import Site, add_space, deployed, put_in_force
from bench.tuned import parse, record
from models.examples import read_examples
from models.template import ABSTAIN

KINDS = ("single", "lengths", "bulk")
BULK = 64
LONGEST_WORDS = 160
WARM_UP = 0.2  # of the time
GROWTH = 1.0  # percent an hour of memory that is no leak
FAULTS = ("other_5xx", "other_errors", "broken_connections", "wrong_labels", "rss_grows")


@dataclass(frozen=True)
class Options:
    """``texts``: how many different ones. ``claimed``: of them, each by the gate of one of the ``prompts``."""

    clients: int = 64
    seconds: float = 300.0
    kind: str = "single"
    texts: int = 256
    prompts: int = 8
    claimed: int = 0
    leave: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Of the server's process, at ``at`` seconds."""

    at: float
    rss: int
    files: int


def of_all_lengths(texts: Sequence[str], count: int) -> list[str]:
    """``count`` texts of one word up to LONGEST_WORDS, as many of each order of magnitude: cut from one another."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        wanted = round(math.exp(draw.uniform(0, math.log(LONGEST_WORDS))))
        words: list[str] = []
        while len(words) < wanted:
            words += draw.choice(texts).split()
        made.append(" ".join(words[:wanted]))
    return made


def fit_line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: the value at the first moment, the slope, and its standard error.

    One second's memory is much like the last one's, so fewer readings are independent than were taken: the error is
    widened by sqrt((1 + r) / (1 - r)), where r is the residuals' correlation from one to the next. Raises ValueError
    for fewer than three readings.
    """
    count = len(at)
    if count < 3:
        raise ValueError("a slope with an error needs three readings")
    middle, level = sum(at) / count, sum(values) / count
    spread = sum((t - middle) ** 2 for t in at)
    slope = sum((t - middle) * (v - level) for t, v in zip(at, values, strict=True)) / spread
    rest = [v - level - slope * (t - middle) for t, v in zip(at, values, strict=True)]
    squares = sum(r * r for r in rest)
    error = math.sqrt(squares / (count - 2) / spread)
    if squares > 0:
        alike = min(max(sum(a * b for a, b in pairwise(rest)) / squares, 0.0), 0.99)
        error *= math.sqrt((1 + alike) / (1 - alike))
    return level - slope * (middle - at[0]), slope, error


async def watch(process: psutil.Process, readings: list[Reading]) -> None:
    """A reading every second, until cancelled."""
    while True:
        readings.append(Reading(time.perf_counter(), process.memory_info().rss, process.num_fds()))
        await asyncio.sleep(1.0)


async def run(site: Site, bodies: Sequence[dict[str, Any]], options: Options) -> tuple[list[Sample], list[Reading]]:
    (server,) = site.replicas
    readings: list[Reading] = []
    watching = asyncio.create_task(watch(psutil.Process(server.process.pid), readings))
    try:
        samples = await drive(
            server.url, site.key, bodies, clients=options.clients, seconds=options.seconds, leave=options.leave
        )
    finally:
        watching.cancel()
        await asyncio.wait({watching})
    await asyncio.to_thread(site.wait_ready, server)  # it still answers
    return samples, readings


def wrong_labels(samples: Sequence[Sample], indices: Sequence[Sequence[int]], probes: Probes, claimed: int) -> int:
    """Answers that are not those of the texts that were asked; ``indices``: the texts of each body."""
    wrong = 0
    for sample in samples:
        if sample.status == 200:
            labels = [result["label"] for result in sample.answer["results"]]
            asked = indices[sample.body]
            wrong += abs(len(asked) - len(labels))
            for index, label in zip(asked, labels, strict=False):
                # What a random prompt makes of the text that its gate claims is not known beforehand.
                wrong += label != probes.labels[index] and not (index < claimed and label == ABSTAIN)
    return wrong


def figures(samples: Sequence[Sample], readings: Sequence[Reading], options: Options) -> dict[str, Any]:
    """Raises ValueError when nothing was answered or the readings are too few."""
    answered = [s for s in samples if s.status == 200]
    if not answered:
        raise ValueError("nothing was answered")
    began = min(sample.start for sample in samples)
    latencies = [s.end - s.start for s in answered]
    in_time = sum(s.end <= began + options.seconds for s in answered)
    warm = [r for r in readings if r.at >= readings[0].at + WARM_UP * options.seconds]
    first, slope, error = fit_line([r.at for r in warm], [r.rss for r in warm])
    slope, error = (100 * 3600 * value / first for value in (slope, error))
    return {
        "clients": options.clients,
        "texts": options.kind,
        "prompts": options.prompts,
        "claimed": options.claimed,
        "seconds": options.seconds,
        "asked": len(samples),
        "answered": len(answered),
        "per_second": round(in_time / options.seconds, 2),
        "texts_per_second": round(in_time / options.seconds * (BULK if options.kind == "bulk" else 1), 2),
        **{f"p{q}_ms": round(1000 * quantile(latencies, q / 100), 1) for q in (50, 90, 99)},
        "max_ms": round(1000 * max(latencies), 1),
        "refused_503": sum(s.refused for s in samples),
        "other_5xx": sum(s.status >= 500 and not s.refused for s in samples),
        "other_errors": sum(s.status not in (0, 200) and s.status < 500 for s in samples),
        "broken_connections": sum(s.status == 0 and s.error != LEFT for s in samples),
        "left": sum(s.error == LEFT for s in samples),
        "rss_start_mb": round(warm[0].rss / 2**20, 2),
        "rss_end_mb": round(warm[-1].rss / 2**20, 2),
        "rss_slope_percent_per_hour": round(slope, 3),
        "rss_slope_stderr": round(error, 3),
        "rss_slope_limit": GROWTH,
        "rss_grows": slope > GROWTH and slope > 2 * error,
        "rss_undecided": GROWTH < slope <= 2 * error,
        "rss_mb": [round(r.rss / 2**20, 1) for r in readings[:: max(1, len(readings) // 50)]],
        "files_open_most": max(r.files for r in readings),
    }


def measure(
    settings: Settings, texts: Sequence[str], *, postgres: str | None, options: Options, console: Console
) -> dict[str, Any]:
    """From an empty database to the figures. Raises NoProbes, SiteFailed."""
    if not 0 <= options.claimed <= min(options.prompts, options.texts):
        raise SystemExit("--claimed is at most --prompts, and at most --count")
    if options.kind == "lengths":
        texts = of_all_lengths(texts, 4 * options.texts)
    # A gate that is to claim one text must be able to tell it from the others.
    furthest = 0.9 if options.claimed else 1.0
    probes = find_probes(settings, texts, options.texts, furthest=furthest)
    size, step = (BULK, BULK // 4) if options.kind == "bulk" else (1, 1)
    count = len(probes.texts)
    indices = [[(start + i) % count for i in range(size)] for start in range(0, count, step)]
    bodies = [{"texts": [probes.texts[i] for i in asked]} for asked in indices]
    with deployed(settings, postgres=postgres) as site:
        add_space(site.sessions, "bench", probes.space)
        for number in range(options.prompts):
            kind = "claim" if number < options.claimed else "idle"
            route = probes.route(number % count, kind, site.vault, seed=number)
            put_in_force(site.sessions, site.vault, site.settings, route, [f"synthetic text {number}"])
        console.print("starting the server")
        site.start(1)
        console.print(f"{options.clients} clients for {options.seconds:.0f} s")
        spent = time.process_time()
        samples, readings = asyncio.run(run(site, bodies, options))
        spent = time.process_time() - spent
    return {
        **figures(samples, readings, options),
        "wrong_labels": wrong_labels(samples, indices, probes, options.claimed),
        "clients_cpu_us_per_request": round(1e6 * spent / len(samples), 1),
        "database": "sqlite" if postgres is None else "postgresql",
        "cores": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--data", type=Path, help="folder with SST-2's test_retain.jsonl.gz; default: the demo's reviews"
    )
    parser.add_argument("--texts", choices=KINDS, default="single")
    parser.add_argument("--count", type=int, default=256, help="of different texts")
    parser.add_argument("--prompts", type=int, default=8, help="in force")
    parser.add_argument("--claimed", type=int, default=0, help="texts that a prompt's gate claims")
    parser.add_argument("--leave", type=float, default=0.0, help="share of requests that are left before the answer")
    parser.add_argument("--postgres", help="server to make a database on; default: SQLite")
    parser.add_argument("--record", action="store_true", help="keep the result where --out says")
    args = parse(parser, Path("docs/bench/load.json"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the process and the database go, too
    console = Console(stderr=True)
    settings = get_settings()
    source = args.data / "test_retain.jsonl.gz" if args.data else reviews_dir(settings.home) / "held_out.jsonl"
    texts = [example.text for example in read_examples(str(source), labels=settings.labels)]
    options = Options(args.clients, 60 * args.minutes, args.texts, args.count, args.prompts, args.claimed, args.leave)
    found = measure(settings, texts, postgres=args.postgres, options=options, console=console)
    result = {"bench": "load", **found}
    table = Table(title="one server under load", show_header=False)
    for name, value in result.items():
        table.add_row(name, f"[bold red]{value}[/]" if name in FAULTS and value else str(value))
    console.print(table)
    if args.record:
        record(args, result)
    else:
        print(json.dumps(result))
    if any(result[name] for name in FAULTS):
        return 1
    return 2 if result["rss_undecided"] else 0


if __name__ == "__main__":
    sys.exit(main())
