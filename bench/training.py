"""What a training step costs: ``python -m bench.training [--json]``. Demo model, demo reviews; wants an idle machine.

The same step (same rows, same weights, same loss, AdamW on φ) in these ways, taken in turns in one process:

- Letheon's own (``models.training.spul_terms``): the step as one packed sequence behind one prefix, the teacher's
  states from the cache. Once more with a cold cache, as when a row is drawn for the first time: in a routed request's
  60 steps about half of the draws are. What a training does between steps (checks, running mean) is in neither.
- naive: [φ, head, text, tail] of every row concatenated and padded in one batch, the teacher run again every step. The
  vocabulary head scores the label position only, which a straightforward port would not do either. Once more with
  transformers' ``eager`` attention: its default, torch's fused kernel, is slow in the backward pass on CPU, and a
  port that knew so would lose less.
- PEFT: ``PromptEncoder`` trained by ``transformers.Trainer``, the same loss in ``compute_loss``.

Figures are medians of ratios within a round. Then the gradient of φ, Letheon's against naive, in float32; and the error
of both on the bfloat16 copy that trains, against the model that serves. From the
recorded ``bench.quality``, where there is one: ``compute_to_quality``, the rows that a prompt has seen that passes the
checks, over the paper's ten epochs (the least of them; None where none passes). ``--json`` prints the recorded result
and computes nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PromptEncoderConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from app.defaults import load_arguments
from app.pull import reviews_dir
from app.settings import get_settings
from bench.routing_cost import paired
from bench.tuned import parse, record
from models.examples import Example, read_examples
from models.llm import FrozenLLM
from models.losses import forget_ce, retain_ce, retain_kl, spul_loss
from models.teacher import Teacher
from models.training import spul_terms
from models.training_copy import training_copy

TOKENS = 30
ALPHA, BETA = 1.0, 0.5
BATCHES = ((8, 8), (8, 24))
TEMPLATES = ("paper", "instruction-first")


@dataclass(frozen=True, repr=False)
class Rows:
    """One step's rows: token ids of text and tail, and the token each is to answer."""

    forget: list[list[int]]
    generic_ids: Tensor
    retain: list[list[int]]
    picked: list[int]


def pick(llm: FrozenLLM, examples: Sequence[Example], forget: int, retain: int, seed: int) -> Rows:
    """Random rows; the retain rows are ``examples`` by index."""
    draw = random.Random(seed)
    picked = draw.sample(range(len(examples)), forget + retain)
    rows = llm.rows([examples[i].text for i in picked])
    generic = [draw.choice(llm.verbalizer.generic_ids) for _ in range(forget)]
    return Rows(rows[:forget], torch.tensor(generic, device=llm.device), rows[forget:], picked[forget:])


def padded(llm: FrozenLLM, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, n) ids of head, text and tail, right-padded, and their lengths (B,)."""
    whole = [[*llm.template.head_ids, *row] for row in rows]
    width = max(len(row) for row in whole)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in whole], device=llm.device)
    return ids, torch.tensor([len(row) for row in whole], device=llm.device)


def concatenated(llm: FrozenLLM, soft: Tensor | None, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B, V) at the label position of [soft, head, text, tail], every row whole."""
    ids, lengths = padded(llm, rows)
    embeddings = llm.embed(ids)
    if soft is not None:
        embeddings = torch.cat([soft.to(embeddings.dtype).expand(len(ids), -1, -1), embeddings], dim=1)
        lengths = lengths + len(soft)
    positions = torch.arange(embeddings.shape[1], device=llm.device).expand(len(ids), -1)
    hidden = llm.decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
    return llm.logits(hidden[torch.arange(len(ids), device=llm.device), lengths - 1])


def naive_loss(llm: FrozenLLM, phi: Tensor, rows: Rows, label_ids: Tensor) -> Tensor:
    logits = concatenated(llm, phi, [*rows.forget, *rows.retain])
    with torch.no_grad():
        teacher = concatenated(llm, None, rows.retain)
    return combined(logits, rows, teacher, label_ids)


def own_loss(llm: FrozenLLM, phi: Tensor, rows: Rows, teacher: Teacher) -> Tensor:
    logits, label_ids = teacher.logits(rows.picked), teacher.label_ids(rows.picked)
    terms, _ = spul_terms(llm, phi, rows.forget, rows.generic_ids, rows.retain, logits, label_ids)
    return spul_loss(*terms, alpha=ALPHA, beta=BETA)


def combined(logits: Tensor, rows: Rows, teacher: Tensor, label_ids: Tensor) -> Tensor:
    """The SPUL loss from logits (F + R, V)."""
    on_forget, on_retain = logits[: len(rows.forget)].float(), logits[len(rows.forget) :].float()
    terms = (
        forget_ce(on_forget, rows.generic_ids),
        retain_ce(on_retain, label_ids),
        retain_kl(on_retain, teacher.float()).mean(),
    )
    return spul_loss(*terms, alpha=ALPHA, beta=BETA)


def eager(llm: FrozenLLM, step: Callable[[int], float]) -> Callable[[int], float]:
    """The step with attention as transformers writes it out."""

    def run(number: int) -> float:
        config = llm.model.config
        usual = config._attn_implementation
        config._attn_implementation = "eager"
        try:
            return step(number)
        finally:
            config._attn_implementation = usual

    return run


def step_of(loss: Callable[[Tensor, int], Tensor], hidden_size: int) -> Callable[[int], float]:
    """A step of AdamW on a φ of its own; the argument is the round, the answer its seconds."""
    phi = nn.Parameter(0.02 * torch.randn(TOKENS, hidden_size, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([phi], lr=1e-2, weight_decay=0.0)

    def step(number: int) -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss(phi, number).backward()
        torch.nn.utils.clip_grad_norm_([phi], 1.0)
        optimizer.step()
        return time.perf_counter() - started

    return step


def peft_loss(model: Any, inputs: Any) -> Tensor:
    """SPUL's loss on a PeftModel: it prepends its prompt and scores every position, as it does for anyone."""
    rows: Rows = inputs["rows"]
    ids, lengths, label_ids = inputs["ids"], inputs["lengths"], inputs["label_ids"]
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)).long()
    every = torch.arange(len(ids), device=ids.device)
    logits = model(input_ids=ids, attention_mask=mask).logits[every, TOKENS + lengths - 1]
    kept = every[len(rows.forget) :]
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=ids[kept], attention_mask=mask[kept]).logits
    return combined(logits, rows, teacher[torch.arange(len(kept)), lengths[kept] - 1], label_ids)


class _PeftTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        return peft_loss(model, inputs)


class _Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def peft_step(llm: FrozenLLM, rows: Sequence[Rows], labels: Sequence[Tensor]) -> Callable[[int], float]:
    """A step of ``Trainer`` on ``PromptEncoder``; a fresh short training for each round, of which the last step counts.

    What a training costs to begin stays out, and the encoder's hidden size is the model's, as in the SPUL paper.
    """
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=llm.hidden_size, peft_type="P_TUNING"
    )
    model = get_peft_model(llm.model, config)

    def step(number: int) -> float:
        ids, lengths = padded(llm, [*rows[number].forget, *rows[number].retain])
        batch = {"rows": rows[number], "ids": ids, "lengths": lengths, "label_ids": labels[number]}
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=2,
                per_device_train_batch_size=1,
                learning_rate=1e-2,
                max_grad_norm=1.0,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=llm.device.type == "cpu",
                dataloader_pin_memory=False,
            )
            _PeftTrainer(
                model=model,
                args=arguments,
                train_dataset=[batch, batch],
                data_collator=lambda items: items[0],
                callbacks=[clock],
            ).train()
        return clock.seconds[-1]

    return step


def compare(llm: FrozenLLM, examples: Sequence[Example], forget: int, retain: int, rounds: int) -> dict[str, float]:
    """Rows per second of Letheon's step over the two others', and of each."""
    rows = [pick(llm, examples, forget, retain, number) for number in range(rounds + 1)]
    teacher = Teacher(llm, examples)
    labels = [teacher.label_ids(found.picked) for found in rows]  # the cache is warm, as it is after a first request
    naive = step_of(lambda phi, n: naive_loss(llm, phi, rows[n], labels[n]), llm.hidden_size)
    ways = {
        "letheon": step_of(lambda phi, n: own_loss(llm, phi, rows[n], teacher), llm.hidden_size),
        "letheon_cold": step_of(lambda phi, n: own_loss(llm, phi, rows[n], Teacher(llm, examples)), llm.hidden_size),
        "naive": naive,
        "naive_eager": eager(llm, naive),
        "peft": peft_step(llm, rows, labels),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        names = list(ways)
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:  # none always follows the same one
            spent = ways[name](number)
            llm.model.eval()  # Trainer leaves it training
            if number:  # the first round warms up
                seconds[name].append(spent)
    own, cold = seconds["letheon"], seconds["letheon_cold"]
    return {
        "step_over_naive": round(statistics.median(paired(seconds["naive"], own)), 3),
        "step_over_naive_eager": round(statistics.median(paired(seconds["naive_eager"], own)), 3),
        "over_peft": round(statistics.median(paired(seconds["peft"], own)), 3),
        "step_over_naive_cold": round(statistics.median(paired(seconds["naive"], cold)), 3),
        "over_peft_cold": round(statistics.median(paired(seconds["peft"], cold)), 3),
        **{
            f"{name}_rows_per_second": round((forget + retain) / statistics.median(s), 2) for name, s in seconds.items()
        },
    }


def gradients(llm: FrozenLLM, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Of φ on one step of 8 + 8 rows, (p, d) each: Letheon's and naive."""
    rows = pick(llm, examples, 8, 8, 0)
    teacher = Teacher(llm, examples)
    start = 0.02 * torch.randn(TOKENS, llm.hidden_size, generator=torch.Generator().manual_seed(0))
    phis = [nn.Parameter(start.clone()) for _ in range(2)]
    own_loss(llm, phis[0], rows, teacher).backward()
    naive_loss(llm, phis[1], rows, teacher.label_ids(rows.picked)).backward()
    own, naive = (phi.grad for phi in phis)
    assert own is not None
    assert naive is not None
    return own, naive


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def compute_to_quality(recorded: Path) -> float | None:
    if not recorded.exists():
        return None
    found = json.loads(recorded.read_text(encoding="utf-8"))
    if found["scale"] == "smoke" or found["compute"] is None:
        return None
    return min((one["over_paper"] for one in found["compute"].values() if one["passes"]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    args = parse(parser, Path("docs/bench/training.json"))
    console = Console(stderr=True)
    settings = get_settings()
    examples = read_examples(str(reviews_dir(settings.home) / "train.jsonl"), labels=settings.labels)
    found: dict[str, Any] = {"bench": "training", "rounds": args.rounds, "templates": {}}
    found["compute_to_quality"] = compute_to_quality(args.out.with_name("quality.json"))
    for template in TEMPLATES:
        arguments: dict[str, Any] = {**load_arguments(settings), "template": template}
        served = FrozenLLM.load(**arguments)
        llm = training_copy(served)
        sizes: dict[str, Any] = {}
        for forget, retain in BATCHES:
            sizes[f"{forget}+{retain}"] = compare(llm, examples, forget, retain, args.rounds)
            console.print(template, f"{forget}+{retain}", sizes[f"{forget}+{retain}"])
        exact = FrozenLLM.load(**{**arguments, "quantization": "none"})
        sizes["gradient_rel_diff"] = relative(*gradients(exact, examples))
        # What bfloat16 costs, each way, against the model that serves.
        truth = gradients(served, examples)[1]
        rounded = dict(zip(("letheon", "naive"), gradients(llm, examples), strict=True))
        sizes["gradient_error_of_training_copy"] = {way: relative(found, truth) for way, found in rounded.items()}
        sizes["dtype"] = str(llm.dtype).removeprefix("torch.")
        found["templates"][template] = sizes
    steps = {name: [sizes[f"{f}+{r}"] for f, r in BATCHES] for name, sizes in found["templates"].items()}
    for key in ("step_over_naive", "step_over_naive_eager"):
        found[key] = {name: min(s[key] for s in both) for name, both in steps.items()}
    found["over_peft"] = min(s["over_peft"] for both in steps.values() for s in both)
    found["gradient_rel_diff"] = max(sizes["gradient_rel_diff"] for sizes in found["templates"].values())
    console.print(json.dumps(found, indent=1))
    record(args, found)


if __name__ == "__main__":
    main()
