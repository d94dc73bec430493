"""Many requests, one after another: ``python -m bench.sequence --data DIR [--json]``.

Real requests (people in SST-2, in a seeded order) on a model that was fine-tuned on their texts. After k = 1, 2, 4, …
of them: how well each is forgotten, on its own texts and on unseen texts that name the same person, and what it costs
everybody else; in mode ``routed`` (without the guard, and with it), as gate-and-refuse (no prompt at all), with the
same prompts concatenated, and in mode ``concatenate``. Then what it costs, up to 1,000 requests
(``bench.routing_cost``; wants an idle machine). Every trained prompt is kept under ``var/``, so a run that is cut
short goes on where it was. ``--json`` prints the recorded result and computes nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from app.vault import letters
from bench import routing_cost
from bench.tuned import (
    Tuned,
    add_arguments,
    digest_of,
    kept_in,
    kept_prompt,
    parse,
    record,
    slug,
    tuned,
    write,
)
from models.examples import Example
from models.gate import GateSpace
from models.gate_fit import fit_gate
from models.gate_rows import GateRows
from models.inference import Classifier, answer_scores
from models.metrics import difference
from models.routing import Route, Routes, classify_routed
from models.soft_prompt import SoftPrompt
from models.surroundings import ROUTED_TRAINING, Surroundings, look_around
from models.template import ABSTAIN
from models.text_states import text_states
from models.training import TrainingConfig, TrainingResult, train_soft_prompt

KS = (1, 2, 4, 8, 16, 32)
MIN_TRAIN, MIN_UNSEEN = 8, 5
GATE_ROWS = 4096
# The service's defaults.
FALSE_CLAIMS, CERTAIN_CLAIMS, MAX_PROMPTS = 0.002, 0.0005, 4
# What a gate may claim, and of that what it may decide without its prompt (None: nothing; the same: everything).
MODES: dict[str, tuple[float, float | None]] = {
    "routed": (FALSE_CLAIMS, CERTAIN_CLAIMS),
    "routed, prompts decide all": (FALSE_CLAIMS, None),
    "gate-and-refuse": (0.001, 0.001),
    "gate-and-refuse, 0.05 %": (CERTAIN_CLAIMS, CERTAIN_CLAIMS),
}
BATCH = 32
LATENCY_TEXTS = 200


@dataclass(frozen=True, repr=False)
class Person:
    name: str
    forget: list[Example]
    unseen: list[Example]


def people(data: Path, model: Tuned, seed: int) -> tuple[list[Person], list[Example]]:
    """People with enough texts on both sides, in a seeded order; and the test texts of all the others."""
    groups: dict[str, dict[str, list[Example]]] = {"train": defaultdict(list), "test": defaultdict(list)}
    for side, found in groups.items():
        with gzip.open(data / f"{side}_forget.jsonl.gz", "rt", encoding="utf-8") as lines:
            names = [json.loads(line)["entity"] for line in lines]
        for name, row in zip(names, model.sets[f"{side}_forget"], strict=True):
            found[name].append(row)
    order = sorted(groups["train"])
    random.Random(seed).shuffle(order)
    fit = [n for n in order if len(groups["train"][n]) >= MIN_TRAIN and len(groups["test"][n]) >= MIN_UNSEEN]
    chosen = fit[: KS[-1]]
    others = [row for name in order if name not in chosen for row in groups["test"][name]]
    return [Person(n, groups["train"][n], groups["test"][n]) for n in chosen], others


class Bench:
    """The trained parts, each made once and kept."""

    def __init__(self, model: Tuned, persons: list[Person], others: list[Example], args: argparse.Namespace) -> None:
        self.model, self.persons, self.others, self.args = model, persons, others, args
        self.llm = model.llm
        self.classifier = Classifier(model.llm)
        self.rows = GateRows(model.llm, model.retain, GATE_ROWS, kept_in(model.work / "gate"))
        self.work = model.work / f"sequence-{digest_of(GATE_ROWS, FALSE_CLAIMS, args.seed, args.quantization)}"
        self.space = self._space()
        test = model.sets["test_retain"]
        self.held_out = random.Random(1).sample(test, min(args.measure_rows, len(test)))

    def _space(self) -> GateSpace:
        path = self.work / "space.safetensors"
        if not path.exists():
            write(path, self.rows.fit_space().to_bytes())
        return GateSpace.from_bytes(path.read_bytes(), fingerprint=self.llm.fingerprint)

    def around(self, person: Person) -> Surroundings:
        return look_around(self.llm, self.rows, self.space, person.forget, max_false_claims=FALSE_CLAIMS)

    def routed_prompt(self, person: Person) -> tuple[SoftPrompt, dict[str, Any]]:
        folder = self.work / f"routed-{digest_of(asdict(ROUTED_TRAINING))}"

        def train() -> TrainingResult:
            return train_soft_prompt(self.llm, person.forget, self.around(person).near, ROUTED_TRAINING)

        return kept_prompt(folder / slug(person.name), self.llm, train)

    def stacked_prompt(self, person: Person, stack: Sequence[SoftPrompt]) -> tuple[SoftPrompt, dict[str, Any]]:
        """Trained behind the earlier ones, on the whole retain set: mode ``concatenate``."""
        config = TrainingConfig()
        folder = self.work / f"stacked-{digest_of(asdict(config), [p.digest for p in stack])}"

        def train() -> TrainingResult:
            return train_soft_prompt(
                self.llm,
                person.forget,
                self.model.retain,
                config,
                stack=stack,
                cache=kept_in(self.work / "teacher"),
                on_checkpoint=lambda _step, data: write(folder / "checkpoint", data),
                resume=(folder / "checkpoint").read_bytes() if (folder / "checkpoint").exists() else None,
            )

        return kept_prompt(folder / slug(person.name), self.llm, train)


class Answers:
    """What the base model answers, and what it answers behind a prompt: each asked once."""

    def __init__(self, run: Bench, groups: dict[str, list[Example]]) -> None:
        self.run = run
        self.places: dict[str, range] = {}
        rows: list[Example] = []
        for name, group in groups.items():
            self.places[name] = range(len(rows), len(rows) + len(group))
            rows += group
        self.rows = rows
        llm = run.llm
        key = sha256(json.dumps([r.text for r in rows]).encode()).hexdigest()[:16]
        kept = run.work / f"base-{key}.pt"
        if kept.exists():
            hidden, self.states = torch.load(kept, weights_only=True)
        else:
            hidden, self.states = run.classifier.base_pass([r.text for r in rows], batch_size=BATCH)
            run.work.mkdir(parents=True, exist_ok=True)
            torch.save((hidden, self.states), kept)
        self.base = run.classifier.answers(answer_scores(llm, hidden))
        self._behind: dict[str, dict[int, str]] = {}

    def behind(self, prompts: Sequence[SoftPrompt], wanted: Sequence[int]) -> dict[int, str]:
        """Answers to rows by index, behind these prompts concatenated (usually one)."""
        key = "+".join(p.digest for p in prompts)
        known = self._behind.setdefault(key, {})
        missing = [i for i in wanted if i not in known]
        if missing:
            answers = self.run.classifier.classify([self.rows[i].text for i in missing], prompts, batch_size=BATCH)
            known.update((i, a.label) for i, a in zip(missing, answers, strict=True))
        return {i: known[i] for i in wanted}

    def right(self, changed: Mapping[int, str], place: range) -> torch.Tensor:
        """Of labelled rows (n,) whether they are right; the answers are the base model's but for ``changed``."""
        return torch.tensor([changed.get(i, self.base[i].label) == self.rows[i].label for i in place])


def routed(answers: Answers, routes: Routes) -> dict[int, str]:
    """Rows answered ``unknown``, without the guard."""
    margins = routes.margins(answers.states)
    claims, sure = routes.claims(margins, MAX_PROMPTS), routes.certain(margins)
    by_route: dict[int, list[int]] = defaultdict(list)
    for row, found in enumerate(claims):
        for route in () if sure[row] else found:
            by_route[route].append(row)
    out = {i: ABSTAIN for i, certain in enumerate(sure) if certain}
    for route, wanted in by_route.items():
        behind = answers.behind([routes.routes[route].prompt], wanted)
        out |= {i: label for i, label in behind.items() if label == ABSTAIN}
    return out


def guard(answers: Answers, persons: Sequence[Person], changed: Mapping[int, str]) -> dict[int, str]:
    """``changed``, and every row that is one of the persons' forget texts but for case, spacing and punctuation."""
    known = {letters(row.text) for person in persons for row in person.forget}
    return {**changed, **{i: ABSTAIN for i, row in enumerate(answers.rows) if letters(row.text) in known}}


def figures(answers: Answers, persons: Sequence[Person], changed: Mapping[int, str]) -> dict[str, Any]:
    """Of the first k requests: rates of rows answered ``unknown``, and what is lost on everything else."""

    def rate(place: range) -> float:
        return sum(changed.get(i) == ABSTAIN for i in place) / len(place)

    own = [rate(answers.places[f"own {p.name}"]) for p in persons]
    unseen = [rate(answers.places[f"unseen {p.name}"]) for p in persons]
    held_out, others = answers.places["held out"], answers.places["others"]
    before, after = answers.right({}, held_out), answers.right(changed, held_out)
    drop = difference(before, after)
    return {
        "own_first": own[0],
        "own_worst": min(own),
        "own_mean": sum(own) / len(own),
        "unseen_first": unseen[0],
        "unseen_worst": min(unseen),
        "unseen_mean": sum(unseen) / len(unseen),
        "retain_drop": drop.mean,
        "retain_drop_interval": [drop.low, drop.high],  # 95 %, over the held-out rows
        "retain_base": float(before.double().mean()),
        "false_abstain": rate(held_out),
        "false_abstain_other_people": rate(others),
    }


def build(run: Bench, count: int, console: Console) -> tuple[dict[str, Routes], list[dict[str, Any]]]:
    """The first ``count`` requests in each of MODES, and facts on each."""
    sets = {name: Routes([], {}, fingerprint=run.llm.fingerprint) for name in MODES}
    facts = []
    states = run.rows.states(run.rows.calibration_rows)
    for index, person in enumerate(run.persons[:count]):
        prompt, found = run.routed_prompt(person)
        own = text_states(run.llm, [e.text for e in person.forget])
        fits = {
            name: fit_gate(
                own,
                states,
                run.space,
                digests=[],
                max_false_claims=rate,
                max_certain_claims=certain,
            )
            for name, (rate, certain) in MODES.items()
        }
        sets = {name: sets[name].plus(Route(prompt, fit.gate), run.space) for name, fit in fits.items()}
        fit = fits["routed"]
        facts.append(
            {
                "person": person.name,
                "texts": len(person.forget),
                **found,
                "unseen_claimed_estimate": fit.unseen_claimed,
                "unseen_certain_estimate": fit.unseen_certain,
                "directions": len(fit.gate.directions),
            }
        )
        console.print(f"{index + 1}/{count} routed, {found['steps']} steps in {found['seconds']:.0f} s")
    return sets, facts


def stack(run: Bench, count: int, console: Console) -> list[SoftPrompt]:
    """The first ``count`` requests in mode ``concatenate``."""
    prompts: list[SoftPrompt] = []
    for index, person in enumerate(run.persons[:count]):
        prompt, found = run.stacked_prompt(person, prompts)
        prompts.append(prompt)
        console.print(f"{index + 1}/{count} stacked, {found['steps']} steps in {found['seconds']:.0f} s")
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--measure-rows", type=int, default=2000, help="held-out retain rows to measure")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--stacked", type=int, default=4, help="requests to train in mode concatenate: slow")
    parser.add_argument("--stacked-rows", type=int, default=500, help="held-out retain rows to measure that mode with")
    parser.add_argument("--skip-cost", action="store_true", help="leave the cost out: it wants an idle machine")
    args = parse(parser, Path("docs/bench/sequence.json"))
    console = Console(stderr=True)
    model = tuned(args, console)
    persons, others = people(args.data, model, args.seed)
    run = Bench(model, persons, others, args)

    record(args, {"bench": "sequence", **measure(run, console)})


def measure(run: Bench, console: Console) -> dict[str, Any]:
    args = run.args
    sets, facts = build(run, args.requests, console)
    routes = sets["routed"]
    stacked = stack(run, args.stacked, console)
    persons = run.persons[: len(routes)]
    groups = {"held out": run.held_out, "others": run.others}
    groups |= {f"own {p.name}": p.forget for p in persons} | {f"unseen {p.name}": p.unseen for p in persons}
    answers = Answers(run, groups)
    curves: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for k in [k for k in KS if k <= len(routes)]:
        for name, whole in sets.items():
            first = Routes(whole.routes[:k], {run.space.digest: run.space}, fingerprint=run.llm.fingerprint)
            found = routed(answers, first)
            curves[name][k] = figures(answers, persons[:k], found)
            if name == "routed":
                curves["routed, guarded"][k] = figures(answers, persons[:k], guard(answers, persons[:k], found))
        console.print(f"k={k} routed {curves['routed'][k]}")
    few = Answers(run, {**groups, "held out": run.held_out[: args.stacked_rows], "others": run.others[:100]})
    longest = max(len(row) for row in run.llm.rows([row.text for row in few.rows]))
    for name, prompts in (("routed prompts concatenated", [r.prompt for r in routes.routes]), ("concatenate", stacked)):
        tokens = [sum(p.num_virtual_tokens for p in prompts[:k]) for k in range(len(prompts) + 1)]
        for k in [k for k in KS if k <= len(prompts) and run.llm.text_room(tokens[k]) >= longest]:
            wanted = [
                i
                for group, place in few.places.items()
                for i in place
                if group in ("held out", "others") or group.split(" ", 1)[1] in {p.name for p in persons[:k]}
            ]
            curves[name][k] = figures(few, persons[:k], few.behind(prompts[:k], wanted))
            console.print(f"k={k} {name} {curves[name][k]}")
    print_table(curves, console)
    costs = None if args.skip_cost else cost(run, routes)
    last = curves["routed"].get(32, {})
    return {
        "k32_worst_abstain": last.get("own_worst"),
        "k32_mean_unseen_abstain": last.get("unseen_mean"),
        "k32_worst_unseen_abstain": last.get("unseen_worst"),
        "k32_retain_drop": last.get("retain_drop"),
        "k1000_throughput_over_bare": costs and costs["k1000_throughput_over_bare"],
        "curves": curves,
        "cost": costs,
        "requests": facts,
        "held_out_rows": len(run.held_out),
        "other_people_rows": len(run.others),
        "calibration_rows": len(run.rows.calibration_rows),
    }


def cost(run: Bench, routes: Routes) -> dict[str, Any]:
    """Of single held-out texts, claimed or not, after each k; and ``bench.routing_cost`` with the same model."""
    path = run.work / f"cost-{digest_of([r.gate.digest for r in routes.routes], LATENCY_TEXTS)}.json"
    if not path.exists():
        texts = [row.text for row in run.held_out]
        sets = {
            f"k={k}": Routes(routes.routes[:k], routes.spaces, fingerprint=run.llm.fingerprint)
            for k in KS
            if k <= len(routes)
        }

        def alone(active: Routes) -> Any:
            return lambda n: classify_routed(
                run.classifier, active, [texts[n]], digest=None, max_prompts=MAX_PROMPTS, batch_size=BATCH
            )

        ways = {"bare": lambda n: run.classifier.classify([texts[n]]), **{n: alone(s) for n, s in sets.items()}}
        seconds = routing_cost.interleaved(ways, LATENCY_TEXTS)
        found = {
            "latency_ms": {
                name: {q: round(1000 * routing_cost.quantile(values, p), 1) for q, p in (("p50", 0.5), ("p99", 0.99))}
                for name, values in seconds.items()
            },
            "mib_in_memory": {name: round(routing_cost.size_of(active) / 2**20, 2) for name, active in sets.items()},
            **routing_cost.measure(run.llm, run.space, texts),  # one direction, as all 32 gates have
            "four_directions": routing_cost.measure(run.llm, run.space, texts, directions=4),
        }
        write(path, json.dumps(found).encode())
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def print_table(curves: dict[str, dict[int, dict[str, Any]]], console: Console) -> None:
    table = Table(title="answered unknown, % (without the guard); retain accuracy lost, points")
    for column in ("", "k", "own worst", "own mean", "first", "unseen worst", "unseen mean", "retain", "others"):
        table.add_column(column)
    names = ("own_worst", "own_mean", "own_first", "unseen_worst", "unseen_mean", "retain_drop")
    for name, by_k in curves.items():
        for k, found in by_k.items():
            cells = [f"{100 * found[n]:.1f}" for n in (*names, "false_abstain_other_people")]
            table.add_row(name, str(k), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
