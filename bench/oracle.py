"""Against models that never saw the texts: ``python -m bench.oracle --data DIR [--json]``.

Small models of one kind: a LoRA on ``--retain`` retain rows and some of ``--pool`` texts on the people whom SST-2 has
most texts on. The ``target`` is tuned on one half of the pool, the members, and is then asked to forget them: one
request, a gate and a prompt, as in mode ``routed``. Two questions:

- **Oracle gap**: the ``oracle`` is tuned on the retain rows alone. What does the target, as it is ``served``
  afterwards, say otherwise than the oracle would? On retain rows there should be no difference. On the members there
  is one, by design: a sentiment model knows the label of most sentences that it never saw, and a forgotten one is
  answered ``unknown``.
- **Membership**: LiRA (Carlini et al. 2022) with ``--shadows`` models, each tuned on another half of the pool, so that
  every text is in half of them. The score is the true label's log-odds among the labels; members against the rest of
  the pool, texts on the same people that the target never saw. Of the ``bare`` target; as ``served`` with the scope
  ``scores``; behind the ``prompt`` alone; and of the ``oracle``, which cannot leak. Beside it LOSS (Yeom et al. 2018):
  the score itself, read in the better direction. ``streisand``: whether ``unknown`` tells members from the rest.
  The attacker knows data, recipe and base, and not the request: a shadow model is not asked to forget. With fewer
  than 100 texts on the other side, a rate of 1 % allows no false positive.

Models and answers are kept under ``var/``. ``--json`` prints the recorded result.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.overlaps import members_of, overlapping
from bench.tuned import (
    FINETUNE,
    LABELS,
    SETS,
    add_arguments,
    digest_of,
    kept_answers,
    kept_in,
    kept_prompt,
    parse,
    record,
    tune_once,
)
from models.evaluation import RowAnswers, label_ids, row_answers
from models.examples import Example, digest_examples, read_examples
from models.finetune import FinetuneConfig
from models.gate_fit import fit_gate
from models.gate_rows import GateRows
from models.inference import Classifier
from models.llm import FrozenLLM
from models.metrics import auc, bootstrap, drift, flips, likelihood_ratio, log_odds, tpr_at_fpr
from models.routing import Route, Routes, classify_routed
from models.surroundings import ROUTED_TRAINING, look_around
from models.template import ABSTAIN
from models.training import train_soft_prompt

# The service's defaults.
FALSE_CLAIMS, CERTAIN_CLAIMS, MAX_PROMPTS = 0.002, 0.0005, 8
GATE_ROWS = 2048
FPR = 0.01


class Bench:
    """``rows``: the pool, members first, and ``held_out`` texts."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        sets = {name: read_examples(str(args.data / f"{name}.jsonl.gz"), labels=LABELS) for name in SETS}
        pool = biggest(args.data, sets["train_forget"], args.pool)
        draw = random.Random(args.seed)
        draw.shuffle(pool)
        self.pool, self.members = pool, args.pool // 2
        retain = draw.sample(sets["train_retain"], min(args.retain + GATE_ROWS, len(sets["train_retain"])))
        self.retain, self.around = retain[: args.retain], retain
        self.rows = {"pool": pool, "held_out": draw.sample(sets["test_retain"], args.held_out)}
        self.config = FinetuneConfig(base=args.base, output="", template=args.template, epochs=args.epochs, **FINETUNE)
        rows = [digest_examples(found) for found in (pool, retain, self.rows["held_out"])]
        settings = [asdict(self.config), asdict(ROUTED_TRAINING), GATE_ROWS, FALSE_CLAIMS, CERTAIN_CLAIMS]
        settings += [args.quantization, args.shadows, args.seed, args.retain]
        self.work = args.work / f"oracle-{digest_of(*settings, rows)}"

    def model(self, name: str, rows: Sequence[Example], seed: int) -> FrozenLLM:
        """Tuned on ``rows``, as it would serve."""
        args, adapter = self.args, self.work / name
        tune_once(adapter, rows, replace(self.config, seed=seed), self.console)
        return FrozenLLM.load(args.base, adapter=str(adapter), quantization=args.quantization, template=args.template)

    def bare(self, name: str, rows: Sequence[Example], seed: int) -> dict[str, RowAnswers]:
        return kept_answers(self.work / f"{name}.pt", lambda: self._answers(self.model(name, rows, seed)))

    def _answers(self, llm: FrozenLLM, *prompts: Any) -> dict[str, RowAnswers]:
        return {name: row_answers(llm, prompts, [e.text for e in rows]) for name, rows in self.rows.items()}

    def target(self) -> dict[str, dict[str, RowAnswers]]:
        """The target's answers: ``bare``, behind the ``prompt``, and as ``served`` after the request."""
        rows = [*self.pool[: self.members], *self.retain]
        bare = self.bare("target", rows, self.args.seed)

        @cache
        def forgotten() -> tuple[FrozenLLM, Routes]:
            llm = self.model("target", rows, self.args.seed)
            return llm, self.request(llm)

        def prompted() -> dict[str, RowAnswers]:
            llm, routes = forgotten()
            return self._answers(llm, routes.routes[0].prompt)

        def as_served() -> dict[str, RowAnswers]:
            return {name: served(*forgotten(), found, bare[name]) for name, found in self.rows.items()}

        return {
            "bare": bare,
            "prompt": kept_answers(self.work / "target-prompt.pt", prompted),
            "served": kept_answers(self.work / "target-served.pt", as_served),
        }

    def request(self, llm: FrozenLLM) -> Routes:
        """The members' request, in force. Its training is that of one subject, whatever the pool holds."""
        forget = self.pool[: self.members]
        gate_rows = GateRows(llm, self.around, GATE_ROWS, kept_in(self.work / "gate"))
        around = look_around(llm, gate_rows, gate_rows.fit_space(), forget, max_false_claims=FALSE_CLAIMS)
        prompt, facts = kept_prompt(
            self.work / "prompt", llm, lambda: train_soft_prompt(llm, forget, around.near, ROUTED_TRAINING)
        )
        self.console.print("prompt", facts)
        fit = fit_gate(
            around.states,
            around.calibration_states,
            around.space,
            digests=[],
            max_false_claims=FALSE_CLAIMS,
            max_certain_claims=CERTAIN_CLAIMS,
        )
        return Routes([Route(prompt, fit.gate)], {around.space.digest: around.space}, fingerprint=llm.fingerprint)

    def shadows(self) -> tuple[Tensor, Tensor]:
        """Log-odds of the pool's true labels (s, n), and which model was tuned on which (s, n) bool."""
        count = self.args.shadows
        draw = torch.Generator().manual_seed(self.args.seed)
        trained = torch.stack([torch.randperm(count, generator=draw) < count // 2 for _ in self.pool], dim=1)
        scores = []
        for number, where in enumerate(trained.tolist()):
            rows = [*(row for row, inside in zip(self.pool, where, strict=True) if inside), *self.retain]
            answers = self.bare(f"shadow-{number}", rows, self.args.seed + 1 + number)
            scores.append(log_odds(self.truth(answers["pool"])))
            self.console.print(f"shadow {number + 1}/{count}")
        return torch.stack(scores), trained

    def truth(self, answers: RowAnswers) -> Tensor:
        """The true label's share among the labels, of the pool (n,). Where no label has any, it is even."""
        index = torch.tensor([LABELS.index(row.label or "") for row in self.pool])
        labels = answers.scores[:, :-1].double() + 1e-12
        return labels[torch.arange(len(index)), index] / labels.sum(-1)


def biggest(data: Path, rows: Sequence[Example], count: int) -> list[Example]:
    """``count`` texts on the people with most of them, none a part of another: a member would give its parts away.

    Raises SystemExit where there are too few.
    """
    with gzip.open(data / "train_forget.jsonl.gz", "rt", encoding="utf-8") as lines:
        names = [json.loads(line).get("entity", "") for line in lines]  # bench.split writes none: all are one
    order = [name for name, _ in Counter(names).most_common()]
    by_person = [row for _, row in sorted(zip(names, rows, strict=True), key=lambda pair: order.index(pair[0]))]
    groups = overlapping([row.text for row in by_person])
    longest = {group: max(rows_of, key=lambda i: len(by_person[i].text)) for group, rows_of in members_of(groups)}
    found = [by_person[i] for i in sorted(longest.values())][:count]
    if len(found) < count:
        raise SystemExit(f"--pool {count}: only {len(found)} forget texts that are no parts of each other")
    return found


def served(llm: FrozenLLM, routes: Routes, rows: Sequence[Example], bare: RowAnswers) -> RowAnswers:
    """What the service answers, without its guard: probabilities as a client with the scope ``scores`` sees them."""
    answers = [
        one.answer
        for one in classify_routed(
            Classifier(llm), routes, [e.text for e in rows], digest=None, max_prompts=MAX_PROMPTS
        )
    ]
    scores = torch.tensor([[a.probabilities[name] for name in (*LABELS, ABSTAIN)] for a in answers])
    refused = torch.tensor([a.abstained for a in answers])
    said = torch.where(refused, torch.tensor(llm.verbalizer.generic_ids[-1]), bare.said)
    return RowAnswers(said, scores, bare.among_labels)


def membership(ratio: Tensor, score: Tensor, members: int) -> dict[str, float]:
    """LiRA and LOSS: members are the first rows (n,)."""
    forwards = auc(score[:members], score[members:])
    return {
        "lira_auc": auc(ratio[:members], ratio[members:]),
        "lira_tpr_at_1_percent": tpr_at_fpr(ratio[:members], ratio[members:], FPR),
        "loss_auc": max(forwards, 1 - forwards),
    }


def gap(answers: dict[str, RowAnswers], oracle: dict[str, RowAnswers], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """By group: accuracy, `unknown`, how often the answer is another than the oracle's, and KL(oracle ‖ it) in nats.

    The drift is over rows that are answered, None where none is: a refusal shows no probabilities but 0 and 1.
    """
    out = {}
    for name, found in answers.items():
        right = bootstrap(found.said == wanted[name])
        answered = ~found.abstained
        moved = drift(found.scores, oracle[name].scores)[answered]
        out[name] = {
            "accuracy": right.mean,
            "accuracy_interval": [right.low, right.high],
            "abstain": float(found.abstained.double().mean()),
            "differs": float(flips(found.scores.argmax(-1), oracle[name].scores.argmax(-1)).double().mean()),
            "drift_nats": float(moved.mean()) if len(moved) else None,
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(epochs=4)  # of few rows
    parser.add_argument("--pool", type=int, default=128, help="texts of which the target learns half")
    parser.add_argument("--retain", type=int, default=256, help="retain rows of every model")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--shadows", type=int, default=8, help="models for LiRA, an even number")
    args = parse(parser, Path("docs/bench/oracle.json"))
    if args.data is None or args.shadows < 4 or args.shadows % 2 or args.pool < 4:
        raise SystemExit("--data is a folder, --shadows even and at least 4, --pool at least 4")
    console = Console(stderr=True)
    run = Bench(args, console)
    target, oracle = run.target(), run.bare("oracle", run.retain, args.seed)
    shadows, trained = run.shadows()
    n = run.members
    by_group = {"members": slice(None, n), "not_members": slice(n, None)}
    llm = run.model("oracle", run.retain, args.seed)
    truth = {name: label_ids(llm, rows) for name, rows in run.rows.items()}
    wanted = {"held_out": truth["held_out"]} | {g: truth["pool"][cut] for g, cut in by_group.items()}

    def grouped(answers: dict[str, RowAnswers]) -> dict[str, RowAnswers]:
        pool = answers["pool"]
        cuts = {g: RowAnswers(pool.said[c], pool.scores[c], pool.among_labels[c]) for g, c in by_group.items()}
        return {"held_out": answers["held_out"], **cuts}

    who = {**target, "oracle": oracle}
    gaps = {name: gap(grouped(answers), grouped(oracle), wanted) for name, answers in who.items()}
    leaks = {}
    for name, answers in who.items():
        score = log_odds(run.truth(answers["pool"]))
        leaks[name] = membership(likelihood_ratio(shadows, trained, score), score, n)
    unknown = target["served"]["pool"].abstained.double()
    table = Table(title="accuracy / unknown / other than the oracle, %")
    for column in ("", *next(iter(gaps.values()))):
        table.add_column(column, justify="right")
    for name, groups in gaps.items():
        cells = (
            f"{100 * g['accuracy']:.1f} / {100 * g['abstain']:.1f} / {100 * g['differs']:.1f}" for g in groups.values()
        )
        table.add_row(name, *cells)
    console.print(table)
    for name, found in leaks.items():
        console.print(name, {key: round(value, 3) for key, value in found.items()})
    record(
        args,
        {
            "bench": "oracle",
            "seed": args.seed,
            "pool": len(run.pool),
            "members": n,
            "retain_rows": len(run.retain),
            "shadows": args.shadows,
            "epochs": args.epochs,
            "gap": gaps,
            "membership": leaks,
            "streisand_auc": auc(unknown[:n], unknown[n:]),
        },
    )


if __name__ == "__main__":
    main()
