"""train_soft_prompt: SPUL in one visible loop (arXiv 2406.12038 §4; losses in ``models.losses``).

What is exact and fast: soft prompt and template head run once per step and every row attends to their keys and values;
the teacher's states come from a cache; the head scores the label position only; rows of a step have similar lengths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models import checkpoint
from models.errors import DatasetError, TrainingDiverged
from models.examples import Example, collate, digest_examples, length_buckets
from models.inference import answer_scores
from models.llm import FrozenLLM
from models.losses import forget_ce, retain_ce, retain_kl, spul_loss
from models.prefix_cache import Prefix, compute_prefix, last_hidden
from models.soft_prompt import SoftPrompt, compose
from models.teacher import Teacher
from models.training_copy import training_copy

Stopped = Literal["converged", "max_steps", "deadline", "cancelled"]


@dataclass(frozen=True)
class TrainingConfig:
    """SPUL's knobs. Paper: p=30, α=1, β=0.5; every step here holds ``forget_batch`` + ``retain_batch`` rows."""

    num_virtual_tokens: int = 30
    alpha: float = 1.0
    beta: float = 0.5
    learning_rate: float = 3e-2
    max_steps: int = 400
    seed: int = 0
    forget_batch: int = 8
    retain_batch: int = 8
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    mean_weight: float = 0.04  # of the newest φ in the running mean that is kept
    # Early stop: every `check_every` steps, on all forget rows (at most `check_rows`) and as many retain rows.
    check_every: int = 25
    check_rows: int = 96
    target_abstain: float = 0.98
    target_retain_drop: float = 0.015
    # "auto" may take gradients from a bfloat16 copy (models.training_copy); "exact" uses the serving model itself.
    precision: Literal["auto", "exact"] = "auto"


@dataclass(frozen=True)
class Progress:
    """One step. Losses are running means; abstain and retain are from the last check, None before it."""

    step: int
    total_steps: int
    loss: float
    forget_loss: float
    retain_loss: float
    kl_loss: float
    elapsed_seconds: float
    forget_abstain: float | None = None
    retain_accuracy: float | None = None
    phase: str = "training"

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class TrainingResult:
    prompt: SoftPrompt
    steps: int
    stopped: Stopped
    seconds: float
    resumed_from: int = 0


@dataclass
class _Running:
    """Running means of the loss terms and the last check's figures."""

    terms: list[float] = field(default_factory=lambda: [0.0] * 4)
    abstain: float | None = None
    retain: float | None = None

    def update(self, values: list[float], step: int) -> None:
        weight = max(0.1, 1 / step)
        self.terms = [old + weight * (new - old) for old, new in zip(self.terms, values, strict=True)]

    def progress(self, step: int, total: int, elapsed: float) -> Progress:
        loss, forget, retain, kl = self.terms
        return Progress(step, total, loss, forget, retain, kl, elapsed, self.abstain, self.retain)


def train_soft_prompt(
    llm: FrozenLLM,
    forget: Sequence[Example],
    retain: Sequence[Example],
    config: TrainingConfig,
    *,
    stack: Sequence[SoftPrompt] = (),
    teacher_dir: Path | None = None,
    resume: bytes | None = None,
    deadline: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_checkpoint: Callable[[int, bytes], None] | None = None,
    checkpoint_seconds: float = 20.0,
) -> TrainingResult:
    """Train φ (p, d) so that forget rows answer a generic label and retain rows answer as before.

    ``stack``: prompts in force, placed before φ and frozen, so φ is trained for the very context it will serve in.
    ``deadline``: a ``time.monotonic()`` value. ``should_stop`` is asked every step; on True a last checkpoint is handed
    out and the result says ``cancelled``. A run is a function of (data, config, stack): a resumed one continues the
    same sequence of batches. Raises DatasetError, TrainingDiverged, CheckpointError, TextTooLong, FingerprintMismatch.
    """
    if not forget or not retain:
        raise DatasetError("training needs at least one forget row and one retain row")
    started = time.monotonic()
    if config.precision == "auto":
        llm = training_copy(llm)
    behind = compose(stack, fingerprint=llm.fingerprint)
    phi = nn.Parameter(_initial_prompt(llm, config))
    optimizer = torch.optim.AdamW([phi], lr=config.learning_rate, weight_decay=0.0)
    batches = _Batches(llm, forget, retain, config)
    prefix_length = len(phi) + (0 if behind is None else len(behind)) + len(llm.template.head_ids)
    llm.check_fits([*batches.forget_rows, *batches.retain_rows], prefix_length)
    teacher = Teacher(llm, retain, teacher_dir)
    # What is checked and kept is the running mean of φ: forget and retain take turns winning, their mean does both.
    mean = nn.Parameter(phi.detach().clone(), requires_grad=False)
    parameters = {"phi": phi, "mean": mean}
    run = {
        "fingerprint": llm.fingerprint,
        "dtype": str(llm.dtype),  # a run begun against a bfloat16 copy does not go on against the exact model
        "config": asdict(config),
        "data": digest_examples([*forget, *retain]),
        "stack": [p.digest for p in stack],
    }
    start = int(checkpoint.unpack(resume, parameters, optimizer, expect=run)["step"]) if resume else 0

    def prefix(soft: Tensor) -> Prefix | None:
        return compute_prefix(llm, soft if behind is None else torch.cat([behind.to(soft.device), soft]))

    running, step, saved_at = _Running(), start, time.monotonic()
    stopped: Stopped = "max_steps"
    while step < config.max_steps:
        if should_stop is not None and should_stop():
            stopped = "cancelled"
            break
        if deadline is not None and time.monotonic() > deadline:
            stopped = "deadline"
            break
        forget_rows, retain_rows = batches.at(step)
        batch = collate(
            [*(batches.forget_rows[i] for i in forget_rows), *(batches.retain_rows[i] for i in retain_rows)], llm.device
        )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)

        logits = llm.logits(last_hidden(llm, batch, prefix(phi)))
        on_forget, on_retain = logits[: len(forget_rows)], logits[len(forget_rows) :]
        terms = (
            forget_ce(on_forget, batches.generic_ids[forget_rows]),
            retain_ce(on_retain, teacher.label_ids(retain_rows)),
            retain_kl(on_retain, teacher.logits(retain_rows)),
        )
        loss = spul_loss(*terms, alpha=config.alpha, beta=config.beta)
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"loss is not finite at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([phi], config.max_grad_norm)
        optimizer.step()

        step += 1
        with torch.no_grad():
            mean.lerp_(phi, max(config.mean_weight, 1 / step))
        running.update([float(t.detach()) for t in (loss, *terms)], step - start)
        converged = False
        if step % config.check_every == 0:
            running.abstain, running.retain, before = _check(llm, prefix(mean), batches, teacher, config)
            converged = (
                running.abstain >= config.target_abstain and running.retain >= before - config.target_retain_drop
            )
        if on_progress is not None:
            elapsed = time.monotonic() - started
            on_progress(running.progress(step, config.max_steps, elapsed))
        if converged:
            stopped = "converged"
            break
        if on_checkpoint is not None and time.monotonic() - saved_at >= checkpoint_seconds:
            teacher.save()
            on_checkpoint(step, checkpoint.pack(parameters, optimizer, {**run, "step": step}))
            saved_at = time.monotonic()
    if stopped == "cancelled" and on_checkpoint is not None and step > start:
        on_checkpoint(step, checkpoint.pack(parameters, optimizer, {**run, "step": step}))
    teacher.save()
    prompt = SoftPrompt(mean.detach().float().cpu().clone(), llm.fingerprint)
    return TrainingResult(prompt, step, stopped, time.monotonic() - started, start)


def _schedule(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to a tenth: forget and retain take turns winning at a constant rate."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / config.max_steps))


def _initial_prompt(llm: FrozenLLM, config: TrainingConfig) -> Tensor:
    """Embeddings of the label words, then of random vocabulary words (Lester et al. 2021, §3.2: class labels do best).

    On the model's own scale, unlike a Gaussian, and the generic words are within reach from the first step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    words = [*llm.verbalizer.generic_ids, *llm.verbalizer.label_ids]
    labels = torch.tensor(words * config.num_virtual_tokens)[: config.num_virtual_tokens // 2]
    others = torch.randint(llm.embed.num_embeddings, (config.num_virtual_tokens - len(labels),), generator=generator)
    # Through the module: Gemma's scales what it looks up.
    rows: Tensor = llm.embed(torch.cat([others, labels]).to(llm.device))
    return rows.detach().float().clone()


class _Batches:
    """Which rows each step sees: a pure function of (seed, step), so a resumed run repeats nothing and skips nothing.

    Stratified: every step holds forget rows, and retain rows drawn from those of similar length.
    """

    def __init__(
        self, llm: FrozenLLM, forget: Sequence[Example], retain: Sequence[Example], config: TrainingConfig
    ) -> None:
        self.config = config
        self.forget_rows = llm.rows([e.text for e in forget])
        self.retain_rows = llm.rows([e.text for e in retain])
        verbalizer = llm.verbalizer
        generator = torch.Generator().manual_seed(config.seed)
        # As in the paper, each forget row is given one of the generic labels at random, for good.
        choice = torch.randint(len(verbalizer.generic_ids), (len(forget),), generator=generator)
        self.generic_ids = torch.tensor(verbalizer.generic_ids)[choice].to(llm.device)
        self._forget_lengths = [len(r) for r in self.forget_rows]
        self._buckets = -(-len(forget) // config.forget_batch)
        order = sorted(range(len(retain)), key=lambda i: len(self.retain_rows[i]))
        self._retain_by_length = torch.tensor(order)
        self._retain_lengths = torch.tensor([len(self.retain_rows[i]) for i in order])

    def at(self, step: int) -> tuple[list[int], list[int]]:
        """(forget indices, retain indices) of a step."""
        epoch, index = divmod(step, self._buckets)
        shuffle = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        buckets = length_buckets(self._forget_lengths, self.config.forget_batch, shuffle)
        forget = buckets[int(torch.randperm(len(buckets), generator=shuffle)[index])]
        longest = max(self._forget_lengths[i] for i in forget)
        draw = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) ^ 0x5EED)
        # Half from anywhere, so that every length is seen; half of no more than this step's length, for little padding.
        anywhere = self.config.retain_batch // 2
        fits = max(
            int(torch.searchsorted(self._retain_lengths, longest, right=True)), min(64, len(self._retain_lengths))
        )
        picked = torch.cat(
            [
                torch.randint(len(self._retain_lengths), (anywhere,), generator=draw),
                torch.randint(fits, (self.config.retain_batch - anywhere,), generator=draw),
            ]
        )
        return forget, self._retain_by_length[picked].tolist()


@torch.no_grad()
def _check(
    llm: FrozenLLM, shared: Prefix | None, batches: _Batches, teacher: Teacher, config: TrainingConfig
) -> tuple[float, float, float]:
    """(forget abstain rate, retain accuracy, the teacher's retain accuracy) on a fixed sample, label words only."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    forget = torch.randperm(len(batches.forget_rows), generator=generator)[: config.check_rows].tolist()
    retain = torch.randperm(len(batches.retain_rows), generator=generator)[: config.check_rows].tolist()
    rows = [*(batches.forget_rows[i] for i in forget), *(batches.retain_rows[i] for i in retain)]
    ids = torch.tensor([*llm.verbalizer.label_ids, -1], device=llm.device)  # -1: abstains
    answers = torch.empty(len(rows), dtype=torch.long, device=llm.device)
    for picked in length_buckets([len(r) for r in rows], 32):
        hidden = last_hidden(llm, collate([rows[i] for i in picked], llm.device), shared)
        answers[picked] = ids[answer_scores(llm, hidden).argmax(-1)]
    wanted = teacher.label_ids(retain)
    before = ids[answer_scores(llm, teacher.hidden(retain).to(llm.dtype)).argmax(-1)]
    return (
        float((answers[: len(forget)] == -1).float().mean()),
        float((answers[len(forget) :] == wanted).float().mean()),
        float((before == wanted).float().mean()),
    )
