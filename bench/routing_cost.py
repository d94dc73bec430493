"""What 1,000 active requests cost: ``python -m bench.routing_cost``. Demo model and demo reviews; gates are synthetic.

A gate is a direction, so a random one costs what a real one does. Bare model, 1 and ``--requests`` active requests are
measured in turns, in one process; figures are ratios of medians. Ends with one JSON line. Wants an idle machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from app.defaults import load_arguments
from app.pull import reviews_dir
from app.settings import get_settings
from app.vault import Vault
from models.evaluation import CheckLimits
from models.examples import Example, read_examples
from models.gate import NEVER, Gate, GateSpace, fit_gate
from models.gate_rows import GateRows
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routed_checks import RoutedLimits, check_routes, claimed_rows
from models.routing import Route, Routes, classify_routed
from models.soft_prompt import SoftPrompt
from models.surroundings import ROUTED_TRAINING, look_around
from models.training import train_soft_prompt

GATE_ROWS = 4096


def synthetic(llm: FrozenLLM, space: GateSpace, states: torch.Tensor, count: int) -> list[Route]:
    """Random prompts, and random gates that claim none of ``states`` (N, D)."""
    draw = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(count, states.shape[1], generator=draw), dim=-1)
    least = (space.points(states) @ directions.T).max(0).values
    routes = []
    for direction, threshold in zip(directions, least.tolist(), strict=True):
        embeddings = 0.05 * torch.randn(30, llm.hidden_size, generator=draw)
        digests = torch.randint(256, (16, 32), generator=draw, dtype=torch.uint8)
        gate = Gate(direction.unsqueeze(0).clone(), threshold, NEVER, digests, space.digest)
        routes.append(Route(SoftPrompt(embeddings, llm.fingerprint), gate))
    return routes


def interleaved(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, taken in turns; the argument is the round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way(number)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8, help="of one batch of 64 texts")
    parser.add_argument("--singles", type=int, default=150, help="single-text calls, for the latency")
    args = parser.parse_args()
    console = Console(stderr=True)
    settings = get_settings()
    llm = FrozenLLM.load(**load_arguments(settings))
    folder = reviews_dir(settings.home)
    retain = read_examples(str(folder / "train.jsonl"), labels=settings.labels)
    queries = [e.text for e in read_examples(str(folder / "held_out.jsonl"), labels=settings.labels)]
    rows = GateRows(llm, retain, GATE_ROWS, settings.home / "bench-gate")
    space = rows.fit_space()
    vault = Vault(bytes(range(32)))
    classifier = Classifier(llm)
    _, query_states = classifier.base_pass(queries[:512])
    before = resident()
    routes = synthetic(llm, space, query_states, args.requests)
    many = Routes(routes, {space.digest: space}, fingerprint=llm.fingerprint)
    held = (resident() - before) / args.requests
    one = Routes(routes[:1], {space.digest: space}, fingerprint=llm.fingerprint)
    console.print(f"{args.requests} requests built, {held / 2**20:.3f} MiB each")

    def run(active: Routes, texts: list[str]) -> object:
        return classify_routed(classifier, active, texts, digest=vault.gate_digest, max_prompts=4)

    sets = {"k=1": one, f"k={args.requests}": many}

    def in_batches(active: Routes) -> Callable[[int], object]:
        return lambda n: run(active, batch(queries, n))

    def one_by_one(active: Routes) -> Callable[[int], object]:
        return lambda n: run(active, [queries[n]])

    bare: Callable[[int], object] = lambda n: classifier.classify(batch(queries, n))  # noqa: E731
    batches = interleaved({"bare": bare, **{name: in_batches(found) for name, found in sets.items()}}, args.rounds)
    alone: Callable[[int], object] = lambda n: classifier.classify([queries[n]])  # noqa: E731
    singles = interleaved({"bare": alone, **{name: one_by_one(found) for name, found in sets.items()}}, args.singles)
    last = f"k={args.requests}"
    over_bare = {name: statistics.median(batches["bare"]) / statistics.median(batches[name]) for name in sets}
    p99 = {name: quantile(found, 0.99) for name, found in singles.items()}
    claimed = claimed_cost(classifier, space, queries, rounds=args.rounds)
    activation = activation_cost(llm, classifier, rows, space, retain, many, console)
    result: dict[str, Any] = {
        "bench": "routing_cost",
        "requests": args.requests,
        "k1_throughput_over_bare": round(over_bare["k=1"], 4),
        f"k{args.requests}_throughput_over_bare": round(over_bare[last], 4),
        "p50_ms": {name: round(1000 * statistics.median(found), 2) for name, found in singles.items()},
        "p99_ms": {name: round(1000 * found, 2) for name, found in p99.items()},
        f"k{args.requests}_p99_over_k1": round(p99[last] / p99["k=1"], 4),
        "memory_mib_per_request": round(held / 2**20, 4),
        "computed_mib_per_request_7b": round(memory_7b() / 2**20, 3),
        **claimed,
        **activation,
    }
    console.print(result)
    print(json.dumps(result))


def batch(queries: list[str], number: int, size: int = 64) -> list[str]:
    start = (number * size) % (len(queries) - size)
    return queries[start % 448 : start % 448 + size]


def memory_7b() -> float:
    """Bytes of one request at d = 4096, p = 30: prompt, a direction of four layers and its float64 copy, 64 digests."""
    return 4 * (30 * 4096 + 4 * 4096) + 8 * 4 * 4096 + 64 * 32


def claimed_cost(classifier: Classifier, space: GateSpace, queries: list[str], *, rounds: int) -> dict[str, Any]:
    """Seconds of a batch of 64 of which a share is claimed, by one prompt or each by another, over one that is not."""
    llm = classifier.llm
    texts = queries[:64]
    _, states = classifier.base_pass(texts)
    points = space.points(states)
    found: dict[str, Any] = {}

    def gate(row: int, seed: int) -> Route:
        embeddings = 0.05 * torch.randn(30, llm.hidden_size, generator=torch.Generator().manual_seed(seed))
        none = torch.zeros(0, 32, dtype=torch.uint8)
        direction = points[row : row + 1].clone()
        return Route(
            SoftPrompt(embeddings, llm.fingerprint),
            Gate(direction, 0.999, NEVER, none, space.digest),
        )

    def classify(active: Routes) -> Callable[[int], object]:
        return lambda _: classify_routed(classifier, active, texts, digest=None, max_prompts=4)

    for share in (1, 3, 16):
        routes = [gate(i, i) for i in range(share)]
        shared = [Route(routes[0].prompt, route.gate) for route in routes]
        ways = {
            "bare": lambda _: classifier.classify(texts),
            "apart": classify(Routes(routes, {space.digest: space}, fingerprint=llm.fingerprint)),
            "shared": classify(Routes(shared, {space.digest: space}, fingerprint=llm.fingerprint)),
        }
        seconds = interleaved(ways, max(2, rounds // 2))
        base = statistics.median(seconds["bare"])
        for name in ("apart", "shared"):
            found[f"claimed_{share}_of_64_{name}_over_bare"] = round(statistics.median(seconds[name]) / base, 3)
    return found


def activation_cost(
    llm: FrozenLLM,
    classifier: Classifier,
    rows: GateRows,
    space: GateSpace,
    retain: list[Example],
    many: Routes,
    console: Console,
) -> dict[str, Any]:
    """Seconds from texts to checked, of the first request and of one after ``many``: everything but the database."""
    forget = [e for e in retain if "Spielberg" in e.text][:16]
    kept = [e for e in retain if "Spielberg" not in e.text]
    rows = GateRows(llm, kept, GATE_ROWS, Path(get_settings().home) / "bench-gate")
    rows.states(rows.calibration_rows), rows.states(rows.space_rows)
    limits = RoutedLimits(CheckLimits(0, 1, 1), 1.0, 4)
    started = time.perf_counter()
    around = look_around(llm, rows, space, forget, max_false_claims=0.002)
    config = replace(ROUTED_TRAINING, target_abstain=2.0)  # no early stop: it would be luck
    prompt = train_soft_prompt(llm, forget, around.near, config).prompt
    training = time.perf_counter() - started

    def check(others: Routes) -> None:
        claimed = claimed_rows(around.calibration_states, others)
        fit = fit_gate(
            around.states, around.calibration_states, space, digests=[], max_false_claims=0.002, claimed=claimed
        )
        routes = others.plus(Route(prompt, fit.gate), space)
        check_routes(
            classifier,
            others,
            routes,
            fit,
            forget,
            around.calibration,
            around.calibration_states,
            max_retain_rows=256,
            seed=0,
            limits=limits,
        )

    none = Routes([], {}, fingerprint=llm.fingerprint)
    seconds = interleaved({"first": lambda n: check(none), "last": lambda n: check(many)}, 2)
    first, last = (training + statistics.median(seconds[name]) for name in ("first", "last"))
    console.print(f"activation: {first:.1f} s for the first, {last:.1f} s behind {len(many)}")
    return {
        "activation_seconds_first": round(first, 1),
        "activation_seconds_last": round(last, 1),
        "activation_last_over_first": round(last / first, 4),
        "training_seconds": round(training, 1),
    }


if __name__ == "__main__":
    main()
