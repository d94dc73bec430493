"""SPUL on SST-2 at small scale with the paper's metrics: ``python -m bench.sst2 --data DIR``.

Fine-tune the demo model family on forget + a sample of retain rows, train one prompt for *all* of train_forget, and
measure the four sets of the paper's Table 1 before and after. Resumable: adapter and prompt are kept under ``var/``, in
folders named after the data and the settings that made them. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from bench.tuned import add_arguments, digest_of, tuned, write
from models.evaluation import measure
from models.examples import Example
from models.soft_prompt import SoftPrompt
from models.training import Progress, TrainingConfig, train_soft_prompt

PAPER = {  # arXiv 2406.12038, Table 1, SST-2, LLaMA-2-7B, accuracy in percent
    "QLoRA": {"train_retain": 99.89, "train_forget": 99.72, "test_retain": 95.57, "test_forget": 96.07},
    "SPUL": {"train_retain": 99.15, "train_forget": 12.98, "test_retain": 94.93, "test_forget": 16.07},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--measure-rows", type=int, default=1000, help="rows of each retain set to measure")
    parser.add_argument("--max-steps", type=int, help="default: three epochs over the forget set")
    args = parser.parse_args()
    console = Console(stderr=True)

    model = tuned(args, console)
    llm, sets, retain, work = model.llm, model.sets, model.retain, model.work
    sampled: dict[str, list[Example]] = {
        **sets,
        # The model was fine-tuned on these rows, so they are the honest "train" side.
        "train_retain": retain[: args.measure_rows],
        "test_retain": random.Random(1).sample(sets["test_retain"], min(args.measure_rows, len(sets["test_retain"]))),
    }

    weights = llm.weights_digest()
    figures = {"before": {name: measure(llm, [], rows).as_dict() for name, rows in sampled.items()}}

    # To its last step, as in the paper: no early stop.
    training = TrainingConfig(
        max_steps=args.max_steps, forget_batch=8, retain_batch=8, seed=args.seed, target_abstain=2.0, check_every=50
    )
    prompt_dir = work / f"prompt-{digest_of(asdict(training), args.quantization)}"
    prompt_dir.mkdir(exist_ok=True)
    started, checkpoint, spent = time.monotonic(), prompt_dir / "checkpoint", prompt_dir / "seconds"
    earlier = float(spent.read_text()) if checkpoint.exists() else 0.0
    with Bar(console=console) as bar:
        task = bar.add_task("soft prompt", total=None)

        def step(p: Progress) -> None:
            told = f"soft prompt, loss {p.loss:.3f}, abstain {p.forget_abstain}, retain {p.retain_accuracy}"
            bar.update(task, total=p.total_steps, completed=p.step, description=told)
            if p.step % training.check_every == 0 and not console.is_terminal:  # a bar shows nothing in a log
                console.print(f"{p.step}/{p.total_steps} {told}", soft_wrap=True)

        def keep(_step: int, data: bytes) -> None:
            write(checkpoint, data)
            write(spent, str(earlier + time.monotonic() - started).encode())

        result = train_soft_prompt(
            llm,
            sets["train_forget"],
            retain,
            training,
            teacher_dir=work / "teacher",
            resume=checkpoint.read_bytes() if checkpoint.exists() else None,
            on_progress=step,
            on_checkpoint=keep,
        )
    seconds = earlier + time.monotonic() - started
    prompts: list[SoftPrompt] = [result.prompt]
    (prompt_dir / "prompt.safetensors").write_bytes(result.prompt.to_bytes())
    figures["after"] = {name: measure(llm, prompts, rows).as_dict() for name, rows in sampled.items()}

    table = Table(title="SST-2, accuracy % (argmax over the whole vocabulary, as in the paper)")
    for column in ("", *sampled):
        table.add_column(column)
    for name, row in PAPER.items():
        table.add_row(f"paper, LLaMA-2-7B, {name}", *(f"{row[s]:.2f}" for s in sampled))
    for when in ("before", "after"):
        table.add_row(f"here, SmolLM2-135M, {when}", *(f"{100 * figures[when][s]['accuracy']:.2f}" for s in sampled))
    table.add_row("here, answered unknown", *(f"{100 * figures['after'][s]['abstain']:.2f}" for s in sampled))
    console.print(table)
    print(
        json.dumps(
            {
                "bench": "sst2",
                "figures": figures,
                "paper": PAPER,
                "steps": result.steps,
                "resumed_from": result.resumed_from,
                "stopped": result.stopped,
                "seconds": round(seconds, 1),
                "forget_rows": len(sets["train_forget"]),
                "retain_rows": len(retain),
                "quantization": args.quantization,
                "num_virtual_tokens": training.num_virtual_tokens,
                "weights_unchanged": llm.weights_digest() == weights,
            }
        )
    )


if __name__ == "__main__":
    main()
