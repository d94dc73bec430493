"""What 1,000 active requests cost: ``python -m bench.routing_cost``. Demo model and demo reviews; gates are synthetic.

A gate is a few directions, so random ones cost what real ones do. Bare model, 1 and ``--requests`` active requests are
measured in turns, in one process; figures are ratios within a round. Ends with one JSON line, kept in
docs/bench/routing_cost.json; ``--json`` prints that and computes nothing. Wants an idle machine.
``bench.activation`` measures what it takes to activate one more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from app.defaults import load_arguments
from app.pull import reviews_dir
from app.settings import get_settings
from app.vault import Vault
from bench.tuned import parse, record
from models.examples import collate, read_examples
from models.gate import NEVER, Gate, GateSpace, best_cosines
from models.gate_rows import GateRows
from models.inference import Classifier
from models.llm import FrozenLLM
from models.prefix_cache import Prefix, last_hidden
from models.routing import Route, Routed, Routes, classify_routed
from models.row_cache import CacheFolder
from models.soft_prompt import SoftPrompt
from models.text_states import text_states

GATE_ROWS = 4096


def synthetic(llm: FrozenLLM, space: GateSpace, states: torch.Tensor, count: int, directions: int) -> list[Route]:
    """Random prompts, and random gates that claim none of ``states`` (N, D)."""
    draw = torch.Generator().manual_seed(7)
    points = space.points(states)
    routes = []
    for _ in range(count):
        own = torch.nn.functional.normalize(torch.randn(directions, states.shape[1], generator=draw), dim=-1)
        embeddings = 0.05 * torch.randn(30, llm.hidden_size, generator=draw)
        digests = torch.randint(256, (16, 32), generator=draw, dtype=torch.uint8)
        # Well above the best score: that of the same text differs in its last bits from one batch to the next.
        threshold = float(best_cosines(points, own).max()) + 1e-3
        gate = Gate(own, threshold, NEVER, digests, space.digest)
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
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def size_of(routes: Routes) -> int:
    """Bytes of prompts and gates, the float64 copies of the directions included; the space they share is not."""
    return sum(
        route.prompt.embeddings.nbytes + 3 * route.gate.directions.nbytes + route.gate.digests.nbytes
        for route in routes.routes
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--directions", type=int, default=1, help="of each gate")
    parser.add_argument("--rounds", type=int, default=5, help="of one batch of 64 texts")
    parser.add_argument("--singles", type=int, default=200, help="single-text calls, for the latency")
    args = parse(parser, Path("docs/bench/routing_cost.json"))
    console = Console(stderr=True)
    settings = get_settings()
    llm = FrozenLLM.load(**load_arguments(settings))
    folder = reviews_dir(settings.home)
    retain = read_examples(str(folder / "train.jsonl"), labels=settings.labels)
    queries = read_examples(str(folder / "held_out.jsonl"), labels=settings.labels)
    rows = GateRows(llm, retain, GATE_ROWS, CacheFolder(settings.home / "bench-gate", b"bench"))
    result = {
        "bench": "routing_cost",
        **measure(
            llm,
            rows.fit_space(),
            [e.text for e in queries],
            requests=args.requests,
            directions=args.directions,
            rounds=args.rounds,
            singles=args.singles,
        ),
    }
    console.print(result)
    record(args, result)


def measure(
    llm: FrozenLLM,
    space: GateSpace,
    queries: list[str],
    *,
    requests: int = 1000,
    directions: int = 1,
    rounds: int = 5,
    singles: int = 200,
) -> dict[str, Any]:
    """Throughput of batches of 64, latency of single texts, memory; with and without ``requests`` in force."""
    vault = Vault(bytes(range(32)))
    classifier = Classifier(llm)
    _, query_states = classifier.base_pass(queries[:512])
    routes = synthetic(llm, space, query_states, requests, directions)
    many = Routes(routes, {space.digest: space}, fingerprint=llm.fingerprint, device=llm.device)
    held = size_of(many) / requests
    one = Routes(routes[:1], {space.digest: space}, fingerprint=llm.fingerprint, device=llm.device)

    def run(active: Routes, texts: list[str]) -> list[Routed]:
        return classify_routed(classifier, active, texts, digest=vault.gate_digest, max_prompts=4)

    last = f"k={requests}"
    sets = {"k=1": one, last: many}

    def in_batches(active: Routes) -> Callable[[int], object]:
        return lambda n: run(active, batch(queries, n))

    def one_by_one(active: Routes) -> Callable[[int], object]:
        return lambda n: run(active, [queries[n]])

    def bare(number: int) -> object:
        return classifier.classify(batch(queries, number))

    def bare_alone(number: int) -> object:
        return classifier.classify([queries[number]])

    if any(found.claims for found in run(many, batch(queries, 1))):
        raise SystemExit("a gate claims a text of this batch: what is measured is more than the gates")
    batches = interleaved({"bare": bare, **{name: in_batches(found) for name, found in sets.items()}}, rounds)
    calls = interleaved({"bare": bare_alone, **{name: one_by_one(found) for name, found in sets.items()}}, singles)
    over_bare = {name: statistics.median(paired(batches["bare"], batches[name])) for name in sets}
    p99 = {name: quantile(found, 0.99) for name, found in calls.items()}
    return {
        "requests": requests,
        "directions_per_request": directions,
        "k1_throughput_over_bare": round(over_bare["k=1"], 4),
        f"k{requests}_throughput_over_bare": round(over_bare[last], 4),
        "texts_per_second_bare": round(64 / statistics.median(batches["bare"]), 2),
        "p50_ms": {name: round(1000 * statistics.median(found), 2) for name, found in calls.items()},
        "p99_ms": {name: round(1000 * found, 2) for name, found in p99.items()},
        f"k{requests}_p99_over_k1": round(p99[last] / p99["k=1"], 4),
        "memory_mib_per_request": round(held / 2**20, 4),
        "computed_mib_per_request_7b": round(memory_7b(directions) / 2**20, 3),
        **claimed_cost(classifier, space, queries, rounds=rounds),
        **arrangements(classifier, queries[:64], rounds=rounds),
    }


def paired(a: list[float], b: list[float]) -> list[float]:
    """Ratios a / b within a round: what slows the machine slows both."""
    return [x / y for x, y in zip(a, b, strict=True)]


def batch(queries: list[str], number: int, size: int = 64) -> list[str]:
    start = (number * size) % (len(queries) - size)
    return queries[start % 448 : start % 448 + size]


def memory_7b(directions: int) -> float:
    """Bytes of one request at d = 4096, p = 30: prompt, directions of four layers, in float64 too, and 64 digests."""
    return 4 * 30 * 4096 + directions * (4 + 8) * 4 * 4096 + 64 * 32


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

    for share in (1, 8):
        routes = [gate(i, i) for i in range(share)]
        shared = [Route(routes[0].prompt, route.gate) for route in routes]
        ways = {
            "bare": lambda _: classifier.classify(texts),
            "apart": classify(Routes(routes, {space.digest: space}, fingerprint=llm.fingerprint, device=llm.device)),
            "shared": classify(Routes(shared, {space.digest: space}, fingerprint=llm.fingerprint, device=llm.device)),
        }
        seconds = interleaved(ways, max(2, rounds // 2))
        base = statistics.median(seconds["bare"])
        for name in ("apart", "shared"):
            found[f"claimed_{share}_of_64_{name}_over_bare"] = round(statistics.median(seconds[name]) / base, 3)
    return found


def arrangements(classifier: Classifier, texts: list[str], *, rounds: int, claimed: int = 8) -> dict[str, float]:
    """What the parts of a claimed batch cost, over one pass of all ``texts``.

    The layers that gates read alone: the rest is what a gate read early could spare a claimed text. Then ``claimed``
    rows, each behind a prompt of its own: one after another, as the service does, and in one batch with a prefix of
    its own for each row. Raises SystemExit when the two do not agree.
    """
    llm = classifier.llm
    draw = torch.Generator().manual_seed(11)
    embeddings = [0.05 * torch.randn(30, llm.hidden_size, generator=draw) for _ in range(claimed)]
    prefixes = [prefix for e in embeddings if (prefix := classifier.prefix([SoftPrompt(e, llm.fingerprint)]))]
    rows = llm.rows(texts[:claimed])

    def apart() -> torch.Tensor:
        ones = [last_hidden(llm, collate([row], llm.device), p) for row, p in zip(rows, prefixes, strict=True)]
        return torch.cat(ones)

    def mixed() -> torch.Tensor:
        layers = [
            (torch.cat([keys for keys, _, _ in layer]), torch.cat([values for _, values, _ in layer]), layer[0][2])
            for layer in zip(*(p.layers for p in prefixes), strict=True)
        ]
        return last_hidden(llm, collate(rows, llm.device), Prefix(tuple(layers), prefixes[0].length))

    with torch.no_grad():
        if not torch.allclose(apart(), mixed(), rtol=1e-2, atol=1e-2):
            raise SystemExit("rows in one batch with prefixes of their own differ from rows one by one")
        ways: dict[str, Callable[[int], object]] = {
            "pass": lambda _: classifier.base_pass(texts),
            "gate_layers": lambda _: text_states(llm, texts, prefix=classifier.prefix(()), batch_size=32),
            f"{claimed}_prompts_apart": lambda _: apart(),
            f"{claimed}_prompts_in_one_batch": lambda _: mixed(),
        }
        seconds = interleaved(ways, rounds)
    whole = seconds.pop("pass")
    return {f"{name}_over_pass": round(statistics.median(paired(found, whole)), 3) for name, found in seconds.items()}


if __name__ == "__main__":
    main()
