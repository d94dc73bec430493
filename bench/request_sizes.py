"""Small requests and larger ones, met by the worker's own job: ``python -m bench.request_sizes --data DIR [--json]``.

Of 1, 8, 32 and 128 texts, each alone on a database of its own, from submit to active, on the model of the SST-2
benches. Then, without the guard: what is answered ``unknown`` of the texts themselves, of their rule-made variants
(``models.variants``; with the guard too, which folds case), of unseen texts that name the same person, and of 1,000
held-out texts that name nobody who was ever forgotten. A request of more texts than a person has is on several people.
The gate space, which the first request of a service pays for, is made before and timed apart. Finished requests are
kept under ``var/``; seconds want an idle machine. ``--json`` prints the recorded result and computes nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from app import active_set, lifecycle
from app.settings import Settings
from app.tables import RequestState
from bench.activation import sibling, submit
from bench.tuned import Tuned, add_arguments, digest_of, parse, record, slug, tuned, write
from models.gate_rows import GateRows, space_source
from models.inference import Classifier
from models.routing import Routes, classify_routed
from models.text_states import text_states
from models.variants import RULES, variants
from worker.context import Context, stack_reader
from worker.main import prepare
from worker.tasks import run_job

SIZES = (1, 8, 32, 128)
SUBJECTS = {1: 6, 8: 4, 32: 2, 128: 1}  # requests of each size
MIN_UNSEEN = 5
UNRELATED = 1000
ASKED_SECONDS = {1: 120, 8: 180, 32: 300, 128: 480}  # on two cores: this project's own targets


@dataclass(frozen=True, repr=False)
class Request:
    """``texts`` to forget on these people, and ``unseen`` ones that name them."""

    people: list[str]
    texts: list[str]
    unseen: list[str]


def requests(data: Path, seed: int) -> list[Request]:
    """In a seeded order; no two of one size are on the same person."""
    groups: dict[str, dict[str, list[str]]] = {"train": defaultdict(list), "test": defaultdict(list)}
    for side, found in groups.items():
        with gzip.open(data / f"{side}_forget.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                found[row["entity"]].append(row["text"])
    train, test = groups["train"], groups["test"]
    draw = random.Random(seed)
    order = [name for name in sorted(train) if len(test[name]) >= MIN_UNSEEN]
    draw.shuffle(order)
    out = []
    for size in SIZES:
        names = iter(order)
        for _ in range(SUBJECTS[size]):
            people: list[str] = []
            while sum(len(train[name]) for name in people) < size:
                name = next(names)
                if size > max(len(train[n]) for n in order) or len(train[name]) >= size:
                    people.append(name)
            texts = [text for name in people for text in train[name]]
            out.append(Request(people, draw.sample(texts, size), [text for name in people for text in test[name]]))
    return out


class Bench:
    """The worker's context, with nothing in force, and what every request is measured on."""

    def __init__(self, model: Tuned, args: argparse.Namespace, folder: Path) -> None:
        rows = folder / "retain.jsonl"
        rows.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in model.retain))
        settings = Settings(
            home=folder / "empty",
            model=args.base,
            adapter=str(model.adapter),
            quantization=args.quantization,
            template=args.template,
            retain=str(rows),
        )
        self.folder, self.empty = folder, prepare(settings)
        gate_rows = GateRows(self.empty.llm, self.empty.retain, settings.gate_rows, self.empty.cache)
        started = time.perf_counter()
        self.space = gate_rows.fit_space()
        gate_rows.states([*gate_rows.calibration_rows, *gate_rows.check_rows])
        self.space_seconds = round(time.perf_counter() - started, 1)
        self.source = space_source(self.empty.llm, self.empty.retain, settings.gate_rows)
        self.unrelated = [e.text for e in random.Random(1).sample(model.sets["test_retain"], UNRELATED)]
        self.unrelated_states = text_states(self.empty.llm, self.unrelated)

    def met(self, request: Request, name: str) -> dict[str, Any]:
        """Submit it, let the worker do it, and measure what is then served."""
        context = sibling(self.empty, self.folder / name)
        with context.sessions.begin() as session:
            active_set.add_gate_space(session, self.source, self.space.to_bytes())
        started = time.perf_counter()
        request_id = submit(context, request.texts)
        run_job(context, request_id)
        seconds = time.perf_counter() - started
        with context.sessions() as session:
            row = lifecycle.get_request(session, request_id)
            tries = lifecycle.list_tries(session, request_id)
            routes = stack_reader(context).read(session).routes
        found: dict[str, Any] = {
            "texts": len(request.texts),
            "people": request.people,
            "state": row.state,
            "seconds": round(seconds, 1),
            "tries": len(tries) + 1,
        }
        if row.state not in (RequestState.ACTIVE, RequestState.FAILED):
            raise SystemExit(f"a request of {len(request.texts)} texts was left {row.state}")
        if row.state == RequestState.FAILED or row.metrics is None or routes is None:
            return {**found, "failure": row.failure}
        kept = ("steps", "training_seconds", "prompt_abstain", "warnings", "unseen_claimed", "unseen_certain")
        found |= {key: row.metrics[key] for key in kept}
        return {**found, **self._measured(context, routes, request)}

    def _measured(self, context: Context, routes: Routes, request: Request) -> dict[str, Any]:
        classifier = Classifier(context.llm)

        def abstained(texts: Sequence[str]) -> list[bool]:
            answers = classify_routed(
                classifier, routes, texts, digest=None, max_prompts=context.settings.max_prompts_per_query
            )
            return [found.answer.abstained for found in answers]

        changed: dict[str, list[str]] = {rule: [] for rule in RULES}
        for seed, text in enumerate(request.texts):
            for rule, variant in variants(text, seed=seed).items():
                changed[rule].append(variant)
        by_rule = {rule: abstained(texts) for rule, texts in changed.items() if texts}
        bare = [one for found in by_rule.values() for one in found]
        digests = [context.vault.gate_digest(variant) for texts in changed.values() for variant in texts]
        guarded = [one or bool(routes.known_by(digest)) for one, digest in zip(bare, digests, strict=True)]
        claimed = (routes.margins(self.unrelated_states) > 0).any(1).nonzero().flatten().tolist()
        refused = sum(abstained([self.unrelated[i] for i in claimed])) if claimed else 0
        return {
            "own_abstain": _share(abstained(request.texts)),
            "variants_abstain": _share(bare),
            "variants_guarded": _share(guarded),
            "by_rule": {rule: _share(found) for rule, found in by_rule.items()},
            "unseen_abstain": _share(abstained(request.unseen)),
            "false_forget": round(refused / len(self.unrelated), 4),
        }


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By size: the worst request and the mean one, of those that became active."""
    out = {}
    for size in sorted({row["texts"] for row in rows}):
        group = [row for row in rows if row["texts"] == size]
        met = [row for row in group if "failure" not in row]
        found: dict[str, Any] = {"requests": len(group), "active": len(met), "asked_seconds": ASKED_SECONDS[size]}
        for key, worst in (
            ("own_abstain", min),
            ("variants_abstain", min),
            ("variants_guarded", min),
            ("unseen_abstain", min),
            ("false_forget", max),
            ("seconds", max),
        ):
            values = [row[key] for row in met]
            if values:
                found[key] = {"worst": worst(values), "mean": round(statistics.mean(values), 4)}
        out[str(size)] = found
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, choices=SIZES, help="only these; no record then")
    args = parse(parser, Path("docs/bench/request_sizes.json"))
    console = Console(stderr=True)
    model = tuned(args, console)
    wanted = [request for request in requests(args.data, args.seed) if len(request.texts) in args.sizes]
    with tempfile.TemporaryDirectory() as folder:
        run = Bench(model, args, Path(folder))
        settings = run.empty.settings.model_dump(mode="json", exclude={"home", "retain", "adapter"})
        rows = []
        for number, request in enumerate(wanted):
            key = digest_of(settings, request.texts, run.unrelated, run.space.digest)
            kept = model.work / "request-sizes" / f"{len(request.texts)}-{slug(request.people[0])}-{key}.json"
            if not kept.exists():
                write(kept, json.dumps(run.met(request, str(number))).encode())
            rows.append(json.loads(kept.read_text()))
            console.print(rows[-1])
    by_size = summary(rows)
    print_table(by_size, console)
    if set(args.sizes) != set(SIZES):
        return
    record(
        args,
        {
            "bench": "request_sizes",
            "by_size": by_size,
            "gate_space_seconds": run.space_seconds,
            "unrelated_rows": UNRELATED,
            "threads": torch.get_num_threads(),
            "requests": rows,
        },
    )


def print_table(by_size: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="worst request / mean; answered unknown in %, without the guard")
    names = ("own_abstain", "variants_abstain", "variants_guarded", "unseen_abstain", "false_forget")
    for column in ("texts", "active", "own", "variants", "guarded", "unseen", "unrelated", "seconds (asked)"):
        table.add_column(column, justify="right")
    for size, found in by_size.items():
        if not found["active"]:
            table.add_row(size, f"0 of {found['requests']}")
            continue
        cells = [f"{100 * found[n]['worst']:.1f} / {100 * found[n]['mean']:.1f}" for n in names]
        time_to_active = f"{found['seconds']['worst']:.0f} / {found['seconds']['mean']:.0f} ({found['asked_seconds']})"
        table.add_row(size, f"{found['active']} of {found['requests']}", *cells, time_to_active)
    console.print(table)


if __name__ == "__main__":
    main()
