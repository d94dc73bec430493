"""What brings a prompt to its target soonest: ``python -m bench.starts --data DIR [--json]``.

Requests of eight texts on people of SST-2, trained as the worker does in mode ``routed`` (the same rows near the
gate, 60 steps, doubled at most twice) but checked every ten steps, from five starts:

- ``words``: words of the forget set, each followed by a generic label; the service's way (decision 8).
- ``vocabulary``: rows of the embedding matrix at random, as the paper has it.
- ``generic``: a prompt trained once for this model to answer ``unknown`` to any text, as could come with a base model.
- ``earlier``: the finished prompt of the person before.
- ``words, MLP``: ``words``, with an MLP beside φ while it is trained.

``steps`` until 98 % of the forget texts abstain and no retain row near them is lost, or to the end; ``forgotten``: to
95 % abstaining. ``unseen`` and ``false``: of unseen texts on the person, and of held-out texts, what the prompt
alone answers ``unknown``. Every training is kept under ``var/``. ``--json`` prints the recorded result.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.frontier import GATE_ROWS, people
from bench.tuned import Tuned, add_arguments, digest_of, kept_in, kept_prompt, parse, record, slug, tuned, write
from models.evaluation import row_answers
from models.examples import Example, digest_examples
from models.gate import GateSpace
from models.gate_rows import GateRows
from models.soft_prompt import SoftPrompt
from models.surroundings import ROUTED_TRAINING, look_around
from models.training import Progress, train_soft_prompt

TEXTS = 8  # of a request
STARTS = ("words", "vocabulary", "generic", "earlier", "words, MLP")
CONFIG = replace(ROUTED_TRAINING, check_every=10)
ENCODER = 128  # hidden size of the MLP
FORGOTTEN = 0.95
GENERIC_ROWS, HELD_OUT = 64, 300
FALSE_CLAIMS = 0.002  # the service's default


class Bench:
    def __init__(self, model: Tuned, args: argparse.Namespace) -> None:
        self.model, self.llm = model, model.llm
        self.people = people(args.data, model, args.seed)
        self.rows = GateRows(self.llm, model.retain, GATE_ROWS, kept_in(model.work / "gate"))
        self.held_out = random.Random(args.seed).sample(self.people[0].held_out, HELD_OUT)
        rows = [digest_examples(found) for found in (*(p.texts for p in self.people), self.held_out)]
        settings = [asdict(CONFIG), ENCODER, FALSE_CLAIMS, TEXTS, args.seed, self.llm.fingerprint]
        self.work = model.work / f"starts-{digest_of(settings, rows)}"
        self.space: GateSpace = self.rows.fit_space()

    def generic(self) -> SoftPrompt:
        """Anything is answered ``unknown``: no retain row has a say."""
        drawn = random.Random(0).sample(self.model.retain, GENERIC_ROWS)
        config = replace(CONFIG, alpha=0.0, beta=0.0, max_steps=CONFIG.min_steps, check_every=1000)
        return kept_prompt(self.work / "generic", self.llm, lambda: train_soft_prompt(self.llm, drawn, drawn, config))[
            0
        ]

    def vocabulary(self, seed: int) -> SoftPrompt:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.llm.model.config.vocab_size, (CONFIG.num_virtual_tokens,), generator=draw)
        return SoftPrompt(self.llm.embed(ids.to(self.llm.device)).detach().float().cpu(), self.llm.fingerprint)

    def trained(self, who: int, start: str) -> tuple[dict[str, Any], SoftPrompt]:
        """Facts on one training, and its prompt."""
        person = self.people[who]
        path = self.work / f"{slug(person.name)}-{slug(start).replace(',', '')}"
        if path.with_suffix(".json").exists():
            prompt = SoftPrompt.from_bytes(
                path.with_suffix(".safetensors").read_bytes(), fingerprint=self.llm.fingerprint
            )
            return json.loads(path.with_suffix(".json").read_text()), prompt
        forget = person.texts[:TEXTS]
        near = look_around(self.llm, self.rows, self.space, forget, max_false_claims=FALSE_CLAIMS).near
        config = replace(CONFIG, encoder_hidden_size=ENCODER) if start == "words, MLP" else CONFIG
        checks: dict[int, tuple[float, float]] = {}

        def note(p: Progress) -> None:
            if p.step % CONFIG.check_every == 0 and p.forget_abstain is not None and p.retain_accuracy is not None:
                checks[p.step] = p.forget_abstain, p.retain_accuracy

        result = train_soft_prompt(self.llm, forget, near, config, start=self._start(who, start), on_progress=note)
        unseen = person.texts[TEXTS:]
        found = {
            "person": person.name,
            "texts": TEXTS,
            "start": start,
            "steps": result.steps,
            "converged": result.stopped == "converged",
            "forgotten": next((step for step, (abstain, _) in checks.items() if abstain >= FORGOTTEN), None),
            "seconds": round(result.seconds, 1),
            "unseen": self._abstain(result.prompt, unseen),
            "false": self._abstain(result.prompt, self.held_out),
            "checks": checks,
        }
        write(path.with_suffix(".safetensors"), result.prompt.to_bytes())
        write(path.with_suffix(".json"), json.dumps(found).encode())
        return found, result.prompt

    def _start(self, who: int, start: str) -> SoftPrompt | None:
        if start == "vocabulary":
            return self.vocabulary(100 * who + TEXTS)
        if start == "generic":
            return self.generic()
        if start == "earlier":
            return self.trained(who - 1, "words")[1]  # the first one's is the last one's
        return None

    def _abstain(self, prompt: SoftPrompt, rows: Sequence[Example]) -> float:
        return float(row_answers(self.llm, [prompt], [e.text for e in rows]).abstained.double().mean())


def summary(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Of each start, over people."""
    out: dict[str, dict[str, float | int | None]] = {}
    for start in STARTS:
        rows = [row for row in found if row["start"] == start]
        out[start] = {
            "trainings": len(rows),
            "converged": sum(row["converged"] for row in rows),
            "steps_median": statistics.median(row["steps"] for row in rows),
            "steps_worst": max(row["steps"] for row in rows),
            "forgotten_median": statistics.median(row["forgotten"] or row["steps"] for row in rows),
            **{key: round(statistics.fmean(row[key] for row in rows), 4) for key in ("unseen", "false")},
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parse(parser, Path("docs/bench/starts.json"))
    console = Console(stderr=True)
    run = Bench(tuned(args, console), args)
    found = []
    for who in range(len(run.people)):
        for start in STARTS:
            found.append(run.trained(who, start)[0])
            console.print({k: v for k, v in found[-1].items() if k != "checks"})
    by_start = summary(found)
    table = Table(title="over people")
    for column in ("start", *next(iter(by_start.values()))):
        table.add_column(column, justify="right")
    for name, figures in by_start.items():
        table.add_row(name, *(str(v) for v in figures.values()))
    console.print(table)
    record(args, {"bench": "starts", "seed": args.seed, "by_start": by_start, "trainings": found})


if __name__ == "__main__":
    main()
