"""Gate alone, prompt alone, or both? ``python -m bench.frontier --data DIR [--topics FILE] [--json]``.

For requests of 1, 4, 16 and 64 texts, on people (SST-2) and on topics (Yelp reviews by category): how many unseen texts
on the same subject are answered ``unknown``, against how many held-out texts on anything else, as the share of retain
rows that a gate may claim goes from 0.05 to 10 %. "Both":
the gate proposes and the prompt decides. "Routed", as the service does: the same, but what the gate is certain of (at
0.05 %) it decides alone. No digest guard anywhere. Trained prompts are kept under ``var/``; ``--json`` prints the
recorded result and computes nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

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
from models.gate import GateSpace, best_cosines
from models.gate_fit import fit_gate
from models.gate_rows import GateRows
from models.inference import Classifier
from models.soft_prompt import SoftPrompt
from models.surroundings import NEAR_ROWS, ROUTED_TRAINING
from models.text_states import text_states
from models.training import train_soft_prompt

CERTAIN_CLAIMS = 0.0005  # the service's default
SIZES = (1, 4, 16, 64)
RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
PEOPLE = ("spielberg", "sandler", "bullock")
TOPICS = ("Beauty & Spas", "Hotels & Travel")
MIN_UNSEEN = 8
MAX_WORDS = 60  # of a review: two cores train with longer ones for an hour
GATE_ROWS = 4096
HELD_OUT = {"people": 2000, "topics": 600}
ALONE_ROWS = 400  # held-out rows that a prompt alone answers


@dataclass(frozen=True, repr=False)
class Subject:
    """``texts`` on it, in a seeded order; ``others``: rows to whiten, calibrate and train with; ``held_out``: fresh."""

    kind: str
    name: str
    texts: list[Example]
    others: list[Example]
    held_out: list[Example]


def people(data: Path, model: Tuned, seed: int) -> list[Subject]:
    """A person's texts are those of both splits: the model was tuned on some of the unseen ones, too."""
    texts: dict[str, list[Example]] = defaultdict(list)
    for side in ("train", "test"):
        with gzip.open(data / f"{side}_forget.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line, row in zip(lines, model.sets[f"{side}_forget"], strict=True):
                texts[json.loads(line)["entity"]].append(row)
    test = model.sets["test_retain"]
    held_out = random.Random(seed + 1).sample(test, min(HELD_OUT["people"], len(test)))
    return [Subject("people", n, _shuffled(texts[n], seed), model.retain, held_out) for n in PEOPLE]


def topics(file: Path, seed: int) -> list[Subject]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [row for line in lines if len((row := json.loads(line))["text"].split()) <= MAX_WORDS]
    found = []
    for name in TOPICS:
        own = [Example(r["text"], r["label"]) for r in rows if r["category"] == name]
        others = _shuffled([Example(r["text"], r["label"]) for r in rows if r["category"] != name], seed)
        held_out = others[: HELD_OUT["topics"]]
        found.append(Subject("topics", name, _shuffled(own, seed), others[len(held_out) :], held_out))
    return found


def _shuffled(rows: Sequence[Example], seed: int) -> list[Example]:
    return random.Random(seed).sample(list(rows), len(rows))


class Measured:
    """One subject: its space and the states of all its rows, computed when they are needed."""

    def __init__(self, model: Tuned, subject: Subject, work: Path) -> None:
        self.llm, self.subject = model.llm, subject
        self.classifier = Classifier(model.llm)
        self.work = work / digest_of(asdict(ROUTED_TRAINING))
        folder = model.work / "gate" if subject.kind == "people" else work / f"gate-{slug(subject.name)}"
        self.rows = GateRows(model.llm, subject.others, GATE_ROWS, kept_in(folder))

    @cached_property
    def space(self) -> GateSpace:
        return self.rows.fit_space()

    @cached_property
    def calibration(self) -> Tensor:
        return self.rows.states(self.rows.calibration_rows)

    @cached_property
    def points(self) -> Tensor:
        """Of the subject's texts."""
        return self.space.points(self._states(self.subject.texts))

    @cached_property
    def held_out(self) -> Tensor:
        return self.space.points(self._states(self.subject.held_out))

    def _states(self, rows: Sequence[Example]) -> Tensor:
        return text_states(self.llm, [r.text for r in rows])

    def prompt(self, size: int) -> tuple[SoftPrompt, dict[str, Any]]:
        forget = self.subject.texts[:size]
        gate = self._gate(size, RATES[0])
        near = [self.subject.others[i] for i in self.rows.nearest(self.space, gate.directions, NEAR_ROWS)]
        path = self.work / f"{slug(self.subject.name)}-{size}"
        return kept_prompt(path, self.llm, lambda: train_soft_prompt(self.llm, forget, near, ROUTED_TRAINING))

    def _gate(self, size: int, rate: float) -> Any:
        states = self._states(self.subject.texts[:size])
        return fit_gate(
            states,
            self.calibration,
            self.space,
            digests=[],
            max_false_claims=rate,
            max_certain_claims=min(rate, CERTAIN_CLAIMS),
        ).gate

    def figures(self, size: int) -> list[dict[str, Any]]:
        """A row for each rate and one for the prompt alone (``rate`` None): from an earlier run where there was one."""
        prompt, _ = self.prompt(size)
        gates = [self._gate(size, rate).digest for rate in RATES]  # whatever they are made from
        key = digest_of(gates, prompt.digest, ALONE_ROWS, HELD_OUT, self.llm.fingerprint)
        kept = self.work / f"{slug(self.subject.name)}-{size}-{key}.figures"
        if not kept.exists():
            write(kept, json.dumps(self._figures(size)).encode())
        found: list[dict[str, Any]] = json.loads(kept.read_text())
        return found

    def _figures(self, size: int) -> list[dict[str, Any]]:
        prompt, facts = self.prompt(size)
        texts = [r.text for r in self.subject.texts]
        own_answers = self._abstains(texts, prompt)
        loosest = self._gate(size, RATES[-1])
        near = best_cosines(self.held_out, loosest.directions) > loosest.threshold
        near[:ALONE_ROWS] = True  # for the prompt alone
        wanted = near.nonzero().flatten().tolist()
        held_out_answers = torch.zeros(len(near), dtype=torch.bool)
        held_out_answers[wanted] = self._abstains([self.subject.held_out[i].text for i in wanted], prompt)
        head = {"kind": self.subject.kind, "subject": self.subject.name, "texts": size, **facts}
        out = [
            {
                **head,
                "rate": None,
                "prompt_own": _mean(own_answers[:size]),
                "prompt_unseen": _mean(own_answers[size:]),
                "prompt_false": _mean(held_out_answers[:ALONE_ROWS]),
            }
        ]
        for rate in RATES:
            gate = self._gate(size, rate)
            claims = best_cosines(self.points, gate.directions) > gate.threshold
            false = best_cosines(self.held_out, gate.directions) > gate.threshold
            sure = best_cosines(self.points, gate.directions) > gate.certain
            sure_false = best_cosines(self.held_out, gate.directions) > gate.certain
            out.append(
                {
                    **head,
                    "rate": rate,
                    "directions": len(gate.directions),
                    "gate_own": _mean(claims[:size]),
                    "gate_unseen": _mean(claims[size:]),
                    "gate_false": _mean(false),
                    "both_own": _mean(claims[:size] & own_answers[:size]),
                    "both_unseen": _mean(claims[size:] & own_answers[size:]),
                    "both_false": _mean(false & held_out_answers),
                    "routed_own": _mean((claims & own_answers | sure)[:size]),
                    "routed_unseen": _mean((claims & own_answers | sure)[size:]),
                    "routed_false": _mean(false & held_out_answers | sure_false),
                }
            )
        return out

    def _abstains(self, texts: Sequence[str], prompt: SoftPrompt) -> Tensor:
        return torch.tensor([a.abstained for a in self.classifier.classify(texts, [prompt])])


def _mean(hits: Tensor) -> float:
    return round(float(hits.float().mean()), 5)


def averages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the subjects of a kind, for each size and rate."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["texts"], row["rate"]].append(row)
    figures = [f"{who}_{what}" for who in ("gate", "both", "routed") for what in ("own", "unseen", "false")]
    alone = ["prompt_own", "prompt_unseen", "prompt_false"]
    out = []
    for (kind, texts, rate), found in groups.items():
        names = alone if rate is None else figures
        means = {name: round(sum(row[name] for row in found) / len(found), 5) for name in names}
        out.append({"kind": kind, "texts": texts, "rate": rate, "subjects": len(found), **means})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--topics", type=Path, help=".jsonl.gz with text, label, category; without it, people only")
    args = parse(parser, Path("docs/bench/frontier.json"))
    console = Console(stderr=True)
    model = tuned(args, console)
    work = model.work / f"frontier-{args.seed}-{args.quantization}"
    subjects = [*people(args.data, model, args.seed), *(topics(args.topics, args.seed) if args.topics else [])]
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        measured = Measured(model, subject, work)
        for size in [s for s in SIZES if len(subject.texts) - s >= MIN_UNSEEN]:
            rows += measured.figures(size)
            console.print(f"{subject.name}, {size} texts: {rows[-1]['steps']} steps in {rows[-1]['seconds']} s")
    means = averages(rows)
    print_table(means, console)
    record(args, {"bench": "frontier", "averages": means, "rows": rows})


def print_table(means: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="answered unknown: unseen texts on the subject / held-out texts on others, %")
    for column in ("", "texts", "rate", "gate alone", "both", "routed", "prompt alone"):
        table.add_column(column, justify="right")
    for row in means:
        cells = [
            f"{100 * row[f'{who}_unseen']:.0f} / {100 * row[f'{who}_false']:.2f}" if f"{who}_unseen" in row else ""
            for who in ("gate", "both", "routed", "prompt")
        ]
        rate = "" if row["rate"] is None else f"{100 * row['rate']:g} %"
        table.add_row(row["kind"], str(row["texts"]), rate, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
