"""The SPUL paper's comparison (arXiv 2406.12038, Table 1): ``python -m bench.quality --data DIR [--scale …] [--json]``.

One model, fine-tuned on forget and retain rows; then one request for **all** forget rows, met in every way that the
paper compares, and three more: in-context unlearning (flipped-label demonstrations before the query), gate-and-refuse
(no prompt), and SPUL behind its gate, as the service runs it. Accuracy is argmax over the whole vocabulary, as there;
anything but the true label is wrong. Intervals: 95 %, bootstrap over rows. Every finished row is kept under ``var/``,
with its answers, so a run that is cut short goes on where it was. ``--json`` prints the recorded result.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from bench.tuned import (
    LABELS,
    Tuned,
    add_arguments,
    add_result_arguments,
    digest_of,
    print_recorded,
    record,
    slug,
    tuned,
    write,
)
from models.evaluation import RowAnswers, label_ids, row_answers, set_figures
from models.examples import Example
from models.gate_fit import fit_gate
from models.gate_rows import GateRows
from models.llm import FrozenLLM
from models.metrics import auc, bootstrap, difference, drift, flips, scaled_confidence, tpr_at_fpr
from models.routing import Route, Routes
from models.soft_prompt import SoftPrompt
from models.text_states import text_states
from models.training import Progress, TrainingConfig, train_soft_prompt
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
GATE_ROWS = 4096
FALSE_CLAIMS = 0.002  # the service's default


@dataclass(frozen=True)
class Scale:
    """Rows to measure of each set, forget rows of the request, retain rows to tune with, steps of SPUL.

    ``shown``: forget texts with a flipped label, and as many retain texts, that in-context unlearning demonstrates.
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
        self.work = model.work / f"quality-{digest_of(asdict(self.scale), args.seed, args.quantization)}"

    def prompted(self, llm: FrozenLLM, *prompts: SoftPrompt) -> dict[str, RowAnswers]:
        return {name: row_answers(llm, prompts, [e.text for e in rows]) for name, rows in self.rows.items()}

    def vanilla(self) -> dict[str, RowAnswers]:
        args = self.args
        return self.prompted(FrozenLLM.load(args.base, quantization=args.quantization, template=args.template))

    def by_tuning(self, method: Method) -> dict[str, RowAnswers]:
        args = self.args
        exact = FrozenLLM.load(args.base, adapter=str(self.model.adapter), quantization="none", template=args.template)
        with Bar(console=self.console) as bar:
            task = bar.add_task(method, total=None)
            config = WeightTuningConfig(method, seed=args.seed)
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

    def spul(self) -> dict[str, RowAnswers]:
        return self.prompted(self.llm, self.soft_prompt())

    def soft_prompt(self) -> SoftPrompt:
        """To its last step, as in the paper: no early stop."""
        training = TrainingConfig(
            max_steps=self.scale.steps,
            forget_batch=8,
            retain_batch=8,
            seed=self.args.seed,
            target_abstain=2.0,
            check_every=50,
        )
        folder = self.work / f"spul-{digest_of(asdict(training))}"
        done, checkpoint = folder / "prompt.safetensors", folder / "checkpoint"
        if not done.exists():
            with Bar(console=self.console) as bar:
                task = bar.add_task("SPUL", total=None)

                def tick(p: Progress) -> None:
                    bar.update(task, total=p.total_steps, completed=p.step, description=f"SPUL, loss {p.loss:.3f}")

                result = train_soft_prompt(
                    self.llm,
                    self.forget,
                    self.retain,
                    training,
                    teacher_dir=self.model.work / "teacher",
                    resume=checkpoint.read_bytes() if checkpoint.exists() else None,
                    on_progress=tick,
                    on_checkpoint=lambda _step, data: write(checkpoint, data),
                )
            write(done, result.prompt.to_bytes())
        return SoftPrompt.from_bytes(done.read_bytes(), fingerprint=self.llm.fingerprint)

    def claims(self) -> dict[str, torch.Tensor]:
        """Which rows the request's gate claims, (n,) bool by set."""
        rows = GateRows(self.llm, self.retain, GATE_ROWS, self.work / "gate")
        space = rows.fit_space()
        own = text_states(self.llm, [e.text for e in self.forget])
        calibration = rows.states(rows.calibration_rows)
        gate = fit_gate(own, calibration, space, digests=[], max_false_claims=FALSE_CLAIMS).gate
        empty = SoftPrompt(torch.zeros(1, self.llm.hidden_size), self.llm.fingerprint)
        routes = Routes([Route(empty, gate)], {space.digest: space}, fingerprint=self.llm.fingerprint)
        found = {}
        for name, examples in self.rows.items():
            margins = routes.margins(text_states(self.llm, [e.text for e in examples]))
            found[name] = torch.tensor([bool(claim) for claim in routes.claims(margins, 1)])
        return found

    def gate_and_refuse(self) -> dict[str, RowAnswers]:
        base = self.kept("QLoRA", lambda: self.prompted(self.llm))
        return {name: refused(base[name], claimed, self.llm) for name, claimed in self.claims().items()}

    def gated(self) -> dict[str, RowAnswers]:
        """As the service: a claimed row is ``unknown`` where its prompt abstains, everything else is the base's."""
        base = self.kept("QLoRA", lambda: self.prompted(self.llm))
        prompted = self.kept("SPUL", self.spul)
        return {
            name: refused(base[name], claimed & prompted[name].abstained, self.llm)
            for name, claimed in self.claims().items()
        }

    def kept(self, name: str, make: Callable[[], dict[str, RowAnswers]]) -> dict[str, RowAnswers]:
        """Answers by set, from an earlier run where there was one."""
        path = self.work / f"{slug(name)}.pt"
        if not path.exists():
            started = time.monotonic()
            found = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {n: (a.said, a.scores, a.among_labels) for n, a in found.items()}
            torch.save(tensors, path)
            self.console.print(f"{name}: {time.monotonic() - started:.0f} s")
        return {n: RowAnswers(*parts) for n, parts in torch.load(path, weights_only=True).items()}


def figures(run: Bench, answers: dict[str, RowAnswers]) -> dict[str, Any]:
    """Of each set: the figures, and the accuracy's interval."""
    out = {}
    for name, found in answers.items():
        right = bootstrap(found.said == run.wanted[name])
        out[name] = {**set_figures(found, run.wanted[name]).as_dict(), "accuracy_interval": [right.low, right.high]}
    return out


def leaks(run: Bench, base: dict[str, RowAnswers], answers: dict[str, RowAnswers]) -> dict[str, Any]:
    """What is left to see, of the forget rows and of the change.

    ``loss``: membership by the true label's probability (Yeom et al. 2018), trained forget rows against such as were
    never trained on; 0.5 is nothing. ``forced_choice``: the same from the label words alone. ``streisand``: how well
    the mass on `unknown` tells trained forget rows from anybody's unseen rows, that is, who asked to be forgotten.
    ``forced_choice_accuracy``: how often the right label still wins among labels, on trained forget rows.
    """

    def of_label(name: str, *, forced: bool) -> torch.Tensor:
        scores = answers[name].scores[:, :-1] if forced else answers[name].scores
        index = [LABELS.index(row.label or "") for row in run.rows[name]]
        shares = scores / scores.sum(-1, keepdim=True).clamp_min(1e-12)
        return scaled_confidence(shares[torch.arange(len(index)), index])

    found: dict[str, Any] = {}
    for name, forced in (("loss", False), ("forced_choice", True)):
        members, others = (of_label(which, forced=forced) for which in ("train_forget", "test_forget"))
        found[f"{name}_auc"] = auc(members, others)
        found[f"{name}_tpr_at_1_percent"] = tpr_at_fpr(members, others, 0.01)
    found["streisand_auc"] = auc(answers["train_forget"].scores[:, -1], answers["test_retain"].scores[:, -1])
    right = answers["train_forget"].among_labels == run.wanted["train_forget"]
    found["forced_choice_accuracy"] = float(right.double().mean())
    retain = "test_retain"
    found["retain_drift_nats"] = float(drift(answers[retain].scores, base[retain].scores).mean())
    found["retain_flips"] = float(flips(answers[retain].said, base[retain].said).double().mean())
    return found


def margins(run: Bench, rows: dict[str, dict[str, RowAnswers]], method: str) -> dict[str, Any]:
    """How much more of each test set the weight-tuned methods get right than ``method``, row by row."""
    out: dict[str, Any] = {}
    for other in (m.upper() for m in METHODS):
        for name in ("test_retain", "test_forget"):
            right = [(rows[which][name].said == run.wanted[name]).double() for which in (other, method)]
            gap = difference(*right)
            out.setdefault(other, {})[name] = {"points": 100 * gap.mean, "interval": [100 * gap.low, 100 * gap.high]}
    return out


def refused(base: RowAnswers, where: torch.Tensor, llm: FrozenLLM) -> RowAnswers:
    """``base``, but ``unknown`` on the rows ``where`` (n,) bool. The forced choice among labels stays what it was."""
    generic = llm.verbalizer.generic_ids[-1]
    unknown = torch.zeros(base.scores.shape[1])
    unknown[-1] = 1.0
    return RowAnswers(
        said=torch.where(where, torch.tensor(generic), base.said),
        scores=torch.where(where.unsqueeze(-1), unknown, base.scores),
        among_labels=base.among_labels,
    )


def print_table(found: dict[str, Any], console: Console) -> None:
    table = Table(title="accuracy, % (95 % interval; paper, LLaMA-2-7B); answered unknown, %")
    for column in ("", *SETS, VARIANTS):
        table.add_column(column, justify="right")
    for name, sets in found.items():
        cells = []
        for at, which in enumerate((*SETS, VARIANTS)):
            row = sets[which]
            low, high = row["accuracy_interval"]
            paper = f"; {PAPER[name][at]:.1f}" if name in PAPER and at < len(SETS) else ""
            cells.append(f"{100 * row['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f}{paper}) {row['abstain']:.1%}")
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--methods", nargs="+", help="leave the others out (and their margins)")
    add_result_arguments(parser, Path("docs/bench/quality.json"))
    args = parser.parse_args()
    if args.json:
        print_recorded(args)
        return
    console = Console(stderr=True)
    run = Bench(tuned(args, console), args, console)
    weights = run.llm.weights_digest()
    ways: dict[str, Callable[[], dict[str, RowAnswers]]] = {
        "vanilla": run.vanilla,
        "QLoRA": lambda: run.prompted(run.llm),
        **{m.upper(): lambda m=m: run.by_tuning(m) for m in METHODS},  # type: ignore[misc]
        "in-context": run.in_context,
        "gate-and-refuse": run.gate_and_refuse,
        "SPUL": run.spul,
        "SPUL behind its gate": run.gated,
    }
    rows = {name: run.kept(name, way) for name, way in ways.items() if args.methods is None or name in args.methods}
    if run.llm.weights_digest() != weights:
        raise SystemExit("the served model's weights changed")
    found = {name: figures(run, answers) for name, answers in rows.items()}
    print_table(found, console)
    whole = args.methods is None
    record(
        args,
        {
            "bench": "quality",
            "scale": args.scale,
            "seed": args.seed,
            "forget_rows": len(run.forget),
            "methods": found,
            "paper": PAPER,
            "leaks": {n: leaks(run, rows["QLoRA"], a) for n, a in rows.items()} if "QLoRA" in rows else None,
            "margins_over": {m: margins(run, rows, m) for m in ("SPUL", "SPUL behind its gate")} if whole else None,
        },
    )


if __name__ == "__main__":
    main()
