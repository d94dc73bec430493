"""The SPUL paper's comparison (arXiv 2406.12038, Table 1): ``python -m bench.quality --data DIR [--scale …] [--json]``.

One model, fine-tuned on forget and retain rows; then one request for **all** forget rows, met in every way that the
paper compares, and more: in-context unlearning (flipped-label demonstrations before the query), gate-and-refuse
(no prompt), and SPUL behind its gate, by the service's rule. Accuracy is argmax over the whole vocabulary, as there;
anything but the true label is wrong. Intervals: 95 %, bootstrap over rows. Every finished row is kept under ``var/``,
with its answers, so a run that is cut short goes on where it was. ``--json`` prints the recorded result.

Row SPUL is the paper's: a prompt for every query, trained with random retain rows to its last step. "Behind its gate"
is what the service does in mode ``routed``: another prompt, for claimed queries only, trained with rows near the gate.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar

from bench.embedding import embedding
from bench.quality_figures import (
    claimed_by,
    figures,
    leaks,
    margins,
    markdown,
    nth,
    partial_identification,
    print_table,
    refused,
    spread,
)
from bench.tuned import (
    LABELS,
    Tuned,
    add_arguments,
    digest_of,
    kept_answers,
    kept_in,
    kept_prompt,
    parse,
    record,
    slug,
    tuned,
    write,
)
from models.evaluation import RowAnswers, label_ids, row_answers
from models.examples import Example, digest_examples
from models.gate import Gate, GateSpace
from models.gate_fit import fit_gate
from models.gate_rows import GateRows
from models.llm import FrozenLLM
from models.row_cache import CacheFolder
from models.soft_prompt import SoftPrompt
from models.surroundings import NEAR_ROWS, ROUTED_TRAINING
from models.text_states import text_states
from models.training import Progress, TrainingConfig, TrainingResult, train_soft_prompt
from models.variants import RULES
from models.weight_tuning import METHODS, Method, WeightTuningConfig, unlearn_by_tuning

SETS = ("train_retain", "train_forget", "test_retain", "test_forget")
VARIANTS = "forget_variants"  # of the measured train_forget rows, by the rules of models.variants in turn
PAPER: dict[str, tuple[float, ...]] = {  # Table 1, SST-2, LLaMA-2-7B, accuracy in percent
    "QLoRA": (99.89, 99.72, 95.57, 96.07),
    "GA": (55.66, 53.93, 55.96, 56.89),
    "RL": (33.31, 13.82, 31.00, 14.26),
    "GA+KL": (55.64, 53.96, 55.94, 56.89),
    "GA+GD": (97.17, 13.75, 94.43, 11.31),
    "SPUL": (99.15, 12.98, 94.93, 16.07),
}
PAPER_ROWS = 10 * (1425 + 46331)  # its ten epochs of SST-2's train rows (§5.1)
TOKENS = 30  # p, as in the paper
SHOWN = 150  # rows of each kind in the picture
TRAINED = (*(m.upper() for m in METHODS), "SPUL", "routed prompt")  # what another seed makes anew
METHOD_NAMES = ("vanilla", "QLoRA", *(m.upper() for m in METHODS), "in-context", "SPUL", "routed prompt")
GATE_ROWS = 4096
# The service's defaults.
FALSE_CLAIMS, CERTAIN_CLAIMS, MIN_ABSTAIN, MAX_DROP = 0.002, 0.0005, 0.9, 0.03


@dataclass(frozen=True)
class Scale:
    """Rows to measure of each set, forget rows of the request, retain rows to tune with, steps of SPUL.

    ``shown``: forget texts with a flipped label, and as many retain texts, that in-context unlearning demonstrates.
    ``paper`` measures every row; its fine-tuning on all retain rows is asked for with ``--retain-rows`` and
    ``--epochs``. The base is a LoRA, on a CPU on the unquantized model, quantized afterwards as it serves.
    """

    measured: int
    forget: int | None = None
    retain: int | None = None
    steps: int | None = None
    shown: int = 8


SCALES = {"smoke": Scale(40, 32, 32, 10, 2), "small": Scale(1000), "paper": Scale(20_000)}


class Bench:
    """The model, the four sets, and each way to unlearn: a name, and answers to rows of one set."""

    def __init__(self, model: Tuned, args: argparse.Namespace, console: Console) -> None:
        self.model, self.args, self.console = model, args, console
        self.llm, self.scale = model.llm, SCALES[args.scale]
        # To its last step, as in the paper: no early stop.
        self.training = TrainingConfig(
            max_steps=self.scale.steps,
            forget_batch=8,
            retain_batch=8,
            seed=args.seed,
            target_abstain=2.0,
            check_every=50,
        )
        # Near the gate, as the service trains, but one schedule of three epochs of the forget set: the service plans
        # twelve where a request is on several subjects, and stops when it converges.
        self.near_training = replace(ROUTED_TRAINING, max_steps=self.scale.steps, max_doublings=0, seed=args.seed)
        self.forget = model.sets["train_forget"][: self.scale.forget]
        self.retain = model.retain[: self.scale.retain]
        draw = random.Random(1)
        whole = {**model.sets, "train_retain": model.retain, "train_forget": self.forget}
        self.rows = {n: draw.sample(whole[n], min(self.scale.measured, len(whole[n]))) for n in SETS}
        self.rows[VARIANTS] = [
            Example(rule(row.text, number), row.label)
            for number, (row, rule) in enumerate(zip(self.rows["train_forget"], cycle(RULES.values()), strict=False))
        ]
        self.wanted = {n: label_ids(self.llm, rows) for n, rows in self.rows.items()}
        # Everything that an answer depends on: a row of another model or other settings must not pass for this one's.
        settings = [asdict(self.scale), asdict(self.training), GATE_ROWS, FALSE_CLAIMS, CERTAIN_CLAIMS]
        settings += [asdict(self.near_training), NEAR_ROWS]
        settings += [asdict(WeightTuningConfig(m, seed=args.seed)) for m in METHODS]
        rows = [digest_examples(found) for found in (self.forget, self.retain, *self.rows.values())]
        self.work = model.work / f"quality-{digest_of(self.llm.fingerprint, settings, rows)}"

    def prompted(self, llm: FrozenLLM, *prompts: SoftPrompt) -> dict[str, RowAnswers]:
        return {name: row_answers(llm, prompts, [e.text for e in rows]) for name, rows in self.rows.items()}

    def base(self) -> dict[str, RowAnswers]:
        return self.prompted(self.llm)

    def vanilla(self) -> dict[str, RowAnswers]:
        args = self.args
        return self.prompted(FrozenLLM.load(args.base, quantization=args.quantization, template=args.template))

    def by_tuning(self, method: Method, run: int = 0) -> dict[str, RowAnswers]:
        args = self.args
        exact = FrozenLLM.load(args.base, adapter=str(self.model.adapter), quantization="none", template=args.template)
        with Bar(console=self.console) as bar:
            task = bar.add_task(method, total=None)
            config = WeightTuningConfig(method, seed=args.seed + run)
            tuned_llm = unlearn_by_tuning(
                exact,
                self.forget,
                self.retain,
                config,
                quantization=args.quantization,
                on_progress=lambda p: bar.update(task, total=p.total_steps, completed=p.step),
            )
        return self.prompted(tuned_llm)

    def in_context(self) -> dict[str, RowAnswers]:
        """Demonstrations as one prefix before every query (Pawelczyk et al. 2310.07579, §4), flipped ones first."""
        draw = random.Random(self.args.seed)
        shown = [
            *((e.text, LABELS[1 - LABELS.index(e.label or "")]) for e in draw.sample(self.forget, self.scale.shown)),
            *((e.text, e.label or "") for e in draw.sample(self.retain, self.scale.shown)),
        ]
        llm = self.llm
        ids: list[int] = []
        for text, label in shown:
            ids += [*llm.template.head_ids, *llm.row(text), llm.verbalizer.id_of(label)]
            ids += llm.tokenizer.encode("\n\n", add_special_tokens=False)
        words = llm.embed(torch.tensor(ids, device=llm.device)).detach().float().cpu()
        return self.prompted(llm, SoftPrompt(words, llm.fingerprint))

    def spul(self, tokens: int = TOKENS, run: int = 0) -> dict[str, RowAnswers]:
        return self.prompted(self.llm, self.soft_prompt(tokens, run)[0])

    def soft_prompt(self, tokens: int = TOKENS, run: int = 0) -> tuple[SoftPrompt, dict[str, Any]]:
        config = replace(self.training, num_virtual_tokens=tokens, seed=self.args.seed + run)
        return self.trained(f"spul-{tokens}{nth(run, '-')}", self.retain, config, kept_in(self.model.work / "teacher"))

    def routed_prompt(self, run: int = 0) -> tuple[SoftPrompt, dict[str, Any]]:
        config = replace(self.near_training, seed=self.args.seed + run)
        near = [self.retain[i] for i in self.gate_rows.nearest(self.space, self.gate.directions, NEAR_ROWS)]
        return self.trained(f"routed-{digest_examples(near)[:12]}{nth(run, '-')}", near, config, None)

    def trained(
        self, name: str, retain: Sequence[Example], config: TrainingConfig, cache: CacheFolder | None
    ) -> tuple[SoftPrompt, dict[str, Any]]:
        """A prompt for all forget rows, and facts on its training; one that was cut short goes on."""
        checkpoint = self.work / f"{name}.checkpoint"

        def train() -> TrainingResult:
            with Bar(console=self.console) as bar:
                task = bar.add_task(name, total=None)

                def tick(p: Progress) -> None:
                    bar.update(task, total=p.total_steps, completed=p.step, description=f"{name}, loss {p.loss:.3f}")

                return train_soft_prompt(
                    self.llm,
                    self.forget,
                    retain,
                    config,
                    cache=cache,
                    resume=checkpoint.read_bytes() if checkpoint.exists() else None,
                    on_progress=tick,
                    on_checkpoint=lambda _step, data: write(checkpoint, data),
                )

        prompt, facts = kept_prompt(self.work / name, self.llm, train)
        return prompt, {**facts, "rows": facts["steps"] * (config.forget_batch + config.retain_batch)}

    def embedding(self) -> list[dict[str, Any]]:
        """Fig. 1: trained rows, before and after."""
        groups = {name: self.rows[name][:SHOWN] for name in ("train_retain", "train_forget")}
        prompts = {"base": [], "unlearned": [self.soft_prompt()[0]]}
        return embedding(self.llm, prompts, groups, seed=self.args.seed)

    @cached_property
    def gate_rows(self) -> GateRows:
        # A cache of fewer rows would drop the others from the one that the benches share.
        folder = self.model.work if self.scale.retain is None else self.work
        return GateRows(self.llm, self.retain, GATE_ROWS, kept_in(folder / "gate"))

    @cached_property
    def space(self) -> GateSpace:
        return self.gate_rows.fit_space()

    @cached_property
    def states(self) -> torch.Tensor:
        """Of all forget rows."""
        return text_states(self.llm, [e.text for e in self.forget])

    @cached_property
    def gate(self) -> Gate:
        return self.gate_of(self.states)

    def gate_of(self, states: torch.Tensor) -> Gate:
        return fit_gate(
            states,
            self.gate_rows.states(self.gate_rows.calibration_rows),
            self.space,
            digests=[],
            max_false_claims=FALSE_CLAIMS,
            max_certain_claims=CERTAIN_CLAIMS,
        ).gate

    @cached_property
    def points(self) -> dict[str, torch.Tensor]:
        """Of each set's rows."""
        return {n: self.space.points(text_states(self.llm, [e.text for e in rows])) for n, rows in self.rows.items()}

    @cached_property
    def claims(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Which rows the request's gate claims, and which it decides alone, (n,) bool each, by set."""
        return {name: claimed_by(self.gate, points) for name, points in self.points.items()}

    def partial(self) -> dict[str, dict[str, dict[str, float]]]:
        """See ``partial_identification``."""
        measured = {name: self.points[name] for name in ("test_forget", "test_retain")}
        texts = [e.text for e in self.forget]
        return partial_identification(texts, self.states, self.gate_of, self.space.points, measured, self.args.seed)

    def gate_and_refuse(self) -> dict[str, RowAnswers]:
        base = self.kept("QLoRA", self.base)
        return {name: refused(base[name], claimed, self.llm) for name, (claimed, _) in self.claims.items()}

    def behind_gate(self, run: int = 0) -> dict[str, RowAnswers]:
        """Of every row, also those that the gate would not claim."""
        return self.prompted(self.llm, self.routed_prompt(run)[0])

    def gated(self, *, alone: bool, prompt: str = "routed prompt") -> dict[str, RowAnswers]:
        """``unknown`` where the gate claims and the prompt abstains; everything else is the base's.

        ``alone``: also where the gate is certain, as the service has it. Its guard is left out. ``prompt``: whose
        answers, by the name of a row.
        """
        base = self.kept("QLoRA", self.base)
        ways: dict[str, Callable[[], dict[str, RowAnswers]]] = {"SPUL": self.spul, "routed prompt": self.behind_gate}
        prompted = self.kept(prompt, ways[prompt])
        return {
            name: refused(base[name], certain & alone | claimed & prompted[name].abstained, self.llm)
            for name, (claimed, certain) in self.claims.items()
        }

    def compute(self, found: dict[str, Any]) -> dict[str, Any]:
        """Rows that went through a training step, and over the paper's: ten epochs of its forget and retain rows.

        ``passes``: at least MIN_ABSTAIN of the measured forget rows are answered ``unknown``, by the prompt alone too,
        and no more than MAX_DROP of the accuracy on test retain rows is lost.
        """
        before = found["QLoRA"]["test_retain"]["accuracy"]
        out = {}
        for name, alone, facts in (
            ("SPUL", "SPUL", self.soft_prompt()[1]),
            ("SPUL behind its gate", "routed prompt", self.routed_prompt()[1]),
        ):
            abstain = min(found[which]["train_forget"]["abstain"] for which in (name, alone))
            drop = before - found[name]["test_retain"]["accuracy"]
            passes = abstain >= MIN_ABSTAIN and drop <= MAX_DROP
            out[name] = {**facts, "over_paper": facts["rows"] / PAPER_ROWS, "passes": passes}
        return out

    def kept(self, name: str, make: Callable[[], dict[str, RowAnswers]]) -> dict[str, RowAnswers]:
        """Answers by set, from an earlier run where there was one."""

        def timed() -> dict[str, RowAnswers]:
            started = time.monotonic()
            found = make()
            self.console.print(f"{name}: {time.monotonic() - started:.0f} s")
            return found

        return kept_answers(self.work / f"{slug(name)}.pt", timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[], help="SPUL with so many virtual tokens as well (paper, Fig. 2)"
    )
    parser.add_argument("--runs", type=int, default=1, help="train each method so often, with one seed after another")
    parser.add_argument(
        "--methods", nargs="+", choices=METHOD_NAMES, help="compute and keep these, other sizes and runs too; no record"
    )
    parser.add_argument("--paper", action=argparse.BooleanOptionalAction, default=True, help="its figures for SST-2")
    args = parse(parser, Path("docs/bench/quality.json"))
    console = Console(stderr=True)
    run = Bench(tuned(args, console), args, console)
    weights = run.llm.weights_digest()
    ways: dict[str, Callable[[], dict[str, RowAnswers]]] = {
        "vanilla": run.vanilla,
        "QLoRA": run.base,
        **{m.upper(): partial(run.by_tuning, m) for m in METHODS},
        "in-context": run.in_context,
        "SPUL": run.spul,
        **{f"SPUL, p = {p}": partial(run.spul, p) for p in sorted({*args.tokens} - {TOKENS})},
        "routed prompt": run.behind_gate,
    }
    for again in range(1, args.runs):
        ways |= {f"{m.upper()}{nth(again, ' ')}": partial(run.by_tuning, m, again) for m in METHODS}
        ways[f"SPUL{nth(again, ' ')}"] = partial(run.spul, TOKENS, again)
        ways[f"routed prompt{nth(again, ' ')}"] = partial(run.behind_gate, again)
    by_gate: dict[str, Callable[[], dict[str, RowAnswers]]] = {  # of answers that are kept
        "gate-and-refuse": run.gate_and_refuse,
        "SPUL behind its gate": partial(run.gated, alone=True),
        "SPUL behind its gate, prompt decides all": partial(run.gated, alone=False),
        "the paper's prompt behind that gate": partial(run.gated, alone=True, prompt="SPUL"),
    }
    if args.methods:
        for name, way in ways.items():
            if any(name == m or name.startswith((f"{m}, p = ", f"{m} run-")) for m in args.methods):
                run.kept(name, way)
        return
    rows = {name: run.kept(name, way) for name, way in ways.items()} | {name: way() for name, way in by_gate.items()}
    if run.llm.weights_digest() != weights:
        raise SystemExit("the served model's weights changed")
    found = {name: figures(answers, run.wanted) for name, answers in rows.items()}
    published = PAPER if args.paper else {}
    write(args.out.with_suffix(".md"), markdown(found, published, (*SETS, VARIANTS)).encode())
    print_table(found, published, (*SETS, VARIANTS), console)
    record(
        args,
        {
            "bench": "quality",
            "scale": args.scale,
            "seed": args.seed,
            "runs": args.runs,
            "tokens": TOKENS,
            "over_runs": spread(found, TRAINED, args.runs),
            "template": args.template,
            "quantization": args.quantization,
            "retain_rows": len(run.retain),
            "forget_rows": len(run.forget),
            "methods": found,
            "paper": PAPER if args.paper else None,
            "compute": run.compute(found) if args.paper else None,
            "gate": {
                "directions": len(run.gate.directions),
                "threshold": run.gate.threshold,
                "certain": run.gate.certain,
            },
            "partial_identification": run.partial(),
            "leaks": {n: leaks(a, rows["QLoRA"], run.rows, run.wanted) for n, a in rows.items()},
            "margins_over": {m: margins(rows, run.wanted, m) for m in ("SPUL", "SPUL behind its gate")},
            "embedding": run.embedding(),
        },
    )


if __name__ == "__main__":
    main()
