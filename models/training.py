"""train_soft_prompt: SPUL in one visible loop (arXiv 2406.12038 §4; losses in ``models.losses``).

What is exact and fast: soft prompt and template head run once per step and every row attends to their keys and values;
the teacher's states come from a cache; the head scores the label position only; a step is one packed sequence, and
where a model cannot be packed shorter and longer rows run apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models import checkpoint, packing
from models.errors import DatasetError, TrainingDiverged
from models.examples import Example, collate, digest_examples, length_buckets
from models.inference import answer_scores
from models.llm import FrozenLLM
from models.losses import forget_ce, retain_ce, retain_kl, spul_loss
from models.parametrization import ResidualEncoder, initial_prompt
from models.prefix_cache import Prefix, compute_prefix, last_hidden
from models.row_cache import CacheFolder
from models.soft_prompt import SoftPrompt, compose
from models.teacher import Teacher
from models.training_copy import training_copy

_ABSTAINS = -1

Stopped = Literal["converged", "max_steps", "deadline", "cancelled", "imported"]
"""``imported``: it was trained elsewhere, and nothing here has touched it."""


@dataclass(frozen=True)
class TrainingConfig:
    """SPUL's knobs. Paper: p=30, α=1, β=0.5; every step here holds ``forget_batch`` + ``retain_batch`` rows."""

    num_virtual_tokens: int = 30
    alpha: float = 1.0
    beta: float = 0.5
    learning_rate: float = 3e-2
    max_steps: int | None = None  # None: enough for this forget set, see `planned_steps`
    min_steps: int = 140
    min_epochs: int = 3
    seed: int = 0
    forget_batch: int = 4
    retain_batch: int = 12
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    init_words: int = 4  # distinctive tokens of the forget set that φ starts from
    # Of an MLP trained beside φ (models.parametrization), and its learning rate; None: φ alone.
    encoder_hidden_size: int | None = None
    encoder_learning_rate: float = 1e-3
    mean_weight: float = 0.2  # of the newest φ in the running mean that is kept
    # Early stop: every `check_every` steps, on all forget rows (at most `check_rows`) and as many retain rows.
    check_every: int = 25
    check_rows: int = 96
    target_abstain: float = 0.98
    target_retain_drop: float = 0.0
    # A schedule that ends below `least_abstain` is doubled and goes on, at most so often (never past `max_steps`).
    least_abstain: float = 0.95
    max_doublings: int = 0
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
    start: SoftPrompt | None = None,
    cache: CacheFolder | None = None,
    resume: bytes | None = None,
    deadline: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_checkpoint: Callable[[int, bytes], None] | None = None,
    checkpoint_seconds: float = 20.0,
) -> TrainingResult:
    """Train φ (p, d) so that forget rows answer a generic label and retain rows answer as before.

    ``stack``: prompts in force, placed before φ and frozen, so φ is trained for the very context it will serve in.
    ``start``: φ to begin with instead of words of the forget set; the first checkpoint is at step 0 then, since a
    resumed run does not ask for it. ``cache``: where the teacher's states are kept for the next run. ``deadline``: a
    ``time.monotonic()`` value. ``should_stop`` is asked every step; on True a last checkpoint is handed out and the
    result says ``cancelled``. A run is a function of (data, config, stack, start): a resumed one continues the same
    sequence of batches. Raises DatasetError, TrainingDiverged, TextTooLong, CheckpointError, FingerprintMismatch, and
    ValueError for a ``start`` of another length.
    """
    if not forget or not retain:
        raise DatasetError("training needs at least one forget row and one retain row")
    started = time.monotonic()
    served = llm  # what is checked; gradients may come from a copy
    if config.precision == "auto":
        llm = training_copy(served)
    behind = compose(stack, fingerprint=llm.fingerprint)
    batches = _Batches(llm, forget, retain, config)
    phi = nn.Parameter(
        initial_prompt(
            llm,
            batches.forget_texts,
            batches.retain_texts,
            tokens=config.num_virtual_tokens,
            words=config.init_words,
        )
    )
    if start is not None:
        compose([start], fingerprint=llm.fingerprint)  # raises for another model's
        if start.embeddings.shape != phi.shape:
            raise ValueError(f"a start of {start.num_virtual_tokens} virtual tokens for {len(phi)}")
        phi.data.copy_(start.embeddings)
    trained = {"phi": phi}
    groups: list[dict[str, Any]] = [{"params": [phi], "peak": config.learning_rate}]
    encoder: Callable[[Tensor], Tensor] = _itself
    if config.encoder_hidden_size is not None:
        encoder = ResidualEncoder(phi.shape[1], config.encoder_hidden_size, seed=config.seed).to(phi.device)
        trained |= dict(encoder.named_parameters())
        groups.append({"params": list(encoder.parameters()), "peak": config.encoder_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    prefix_length = len(phi) + (0 if behind is None else len(behind)) + len(llm.template.head_ids)
    llm.check_fits([*batches.forget_rows, *batches.retain_rows], prefix_length)
    teacher = Teacher(llm, retain, cache)
    # What is checked and kept is the running mean of φ: forget and retain take turns winning, their mean does both.
    mean = nn.Parameter(phi.detach().clone(), requires_grad=False)
    # KL of each retain row, when it was last seen, that the teacher has right: what is disturbed most is repeated most.
    hardness = nn.Parameter(torch.zeros(len(retain)), requires_grad=False)
    parameters = {**trained, "mean": mean, "hardness": hardness}
    run = {
        "fingerprint": llm.fingerprint,
        "dtype": str(llm.dtype),  # a run begun against a bfloat16 copy does not go on against the exact model
        "config": asdict(config),
        "data": digest_examples([*forget, *retain]),
        "stack": [p.digest for p in stack],
    }
    resumed_from, doublings = 0, 0
    if resume:
        state = checkpoint.unpack(resume, parameters, optimizer, expect=run)
        resumed_from, doublings = int(state["step"]), int(state["doublings"])

    check = _Check(served, behind, batches, retain, config)
    total = planned_steps(config, len(forget)) * 2**doublings

    def pack() -> bytes:
        return checkpoint.pack(parameters, optimizer, {**run, "step": step, "doublings": doublings})

    running, step, saved_at = _Running(), resumed_from, time.monotonic()
    stopped: Stopped = "max_steps"
    if start is not None and not resume and on_checkpoint is not None:
        on_checkpoint(0, pack())
    while step < total:
        if should_stop is not None and should_stop():
            stopped = "cancelled"
            break
        if deadline is not None and time.monotonic() > deadline:
            stopped = "deadline"
            break
        forget_rows, retain_rows = batches.at(step, hardness)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, total, config.warmup_steps)

        teacher_logits, label_ids = teacher.logits(retain_rows), teacher.label_ids(retain_rows)
        soft = encoder(phi)
        terms, kl = spul_terms(
            llm,
            soft if behind is None else torch.cat([behind.to(soft.device), soft]),
            [batches.forget_rows[i] for i in forget_rows],
            batches.generic_ids[forget_rows],
            [batches.retain_rows[i] for i in retain_rows],
            teacher_logits,
            label_ids,
        )
        loss = spul_loss(*terms, alpha=config.alpha, beta=config.beta)
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"loss is not finite at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()

        step += 1
        with torch.no_grad():
            mean.lerp_(encoder(phi), max(config.mean_weight, 1 / step))
            # Where the teacher is wrong, L_r is to move the answer. Rounding makes a KL of nothing slightly negative.
            disturbed = kl.clamp_min(0) * (teacher_logits.argmax(-1) == label_ids)
            hardness[retain_rows] = disturbed.cpu()
        running.update([float(t.detach()) for t in (loss, *terms)], step - resumed_from)
        converged = False
        may_double = step == total and doublings < config.max_doublings and config.max_steps is None
        if step % config.check_every == 0 or may_double:
            running.abstain, running.retain = check(mean)
            floor = check.retain_accuracy_before - config.target_retain_drop
            converged = running.abstain >= config.target_abstain and running.retain >= floor
            if may_double and running.abstain < config.least_abstain:  # half the rate again, and to zero from there
                total, doublings = 2 * total, doublings + 1
        if on_progress is not None:
            elapsed = time.monotonic() - started
            on_progress(running.progress(step, total, elapsed))
        if converged:
            stopped = "converged"
            break
        if on_checkpoint is not None and time.monotonic() - saved_at >= checkpoint_seconds:
            teacher.save()
            on_checkpoint(step, pack())
            saved_at = time.monotonic()
    if stopped == "cancelled" and on_checkpoint is not None and step > resumed_from:
        on_checkpoint(step, pack())
    teacher.save()
    prompt = SoftPrompt(mean.detach().float().cpu().clone(), llm.fingerprint)
    return TrainingResult(prompt, step, stopped, time.monotonic() - started, resumed_from)


def spul_terms(
    llm: FrozenLLM,
    soft: Tensor,
    forget_rows: list[list[int]],
    generic_ids: Tensor,
    retain_rows: list[list[int]],
    teacher_logits: Tensor,
    label_ids: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(L_f, L_r, L_kl) of one step, and the KL of each retain row (R,). ``soft`` (p, d); teacher_logits (R, V).

    Rows are token ids of text and tail: ``soft`` and the template's head are run once for all of them.
    """
    rows = [*forget_rows, *retain_rows]
    if packing.fits(llm, len(soft) + len(llm.template.head_ids), rows):
        hidden = packing.packed_last_hidden(llm, soft, rows)
    else:
        hidden = _hidden_by_length(llm, rows, compute_prefix(llm, soft))
    logits = llm.logits(hidden)
    on_forget, on_retain = logits[: len(forget_rows)], logits[len(forget_rows) :]
    kl = retain_kl(on_retain, teacher_logits)
    return (forget_ce(on_forget, generic_ids), retain_ce(on_retain, label_ids), kl.mean()), kl


def planned_steps(config: TrainingConfig, forget_rows: int) -> int:
    """Steps of a run that does not stop early: ``max_steps``, or ``min_steps`` and ``min_epochs`` of the forget set."""
    if config.max_steps is not None:
        return config.max_steps
    return max(config.min_steps, config.min_epochs * math.ceil(forget_rows / config.forget_batch))


def _itself(phi: Tensor) -> Tensor:
    return phi


def _schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero: at a constant rate forget and retain take turns winning to the end."""
    return min(1.0, (step + 1) / max(1, warmup)) * (0.5 + 0.5 * math.cos(math.pi * step / total))


class _Batches:
    """Which rows each step sees: a function of (seed, step, hardness), so a resumed run goes on as it would have.

    Stratified: every step holds forget rows. Retain rows of one length only, to save padding, train far worse.
    """

    def __init__(
        self, llm: FrozenLLM, forget: Sequence[Example], retain: Sequence[Example], config: TrainingConfig
    ) -> None:
        self.config = config
        self.forget_rows = llm.rows([e.text for e in forget])
        self.retain_rows = llm.rows([e.text for e in retain])
        tail = len(llm.template.tail_ids)
        self.forget_texts = [row[: len(row) - tail] for row in self.forget_rows]
        self.retain_texts = [row[: len(row) - tail] for row in self.retain_rows]
        verbalizer = llm.verbalizer
        generator = torch.Generator().manual_seed(config.seed)
        # As in the paper, each forget row is given one of the generic labels at random, for good.
        choice = torch.randint(len(verbalizer.generic_ids), (len(forget),), generator=generator)
        self.generic_ids = torch.tensor(verbalizer.generic_ids)[choice].to(llm.device)
        self._forget_lengths = [len(r) for r in self.forget_rows]
        self._buckets = -(-len(forget) // config.forget_batch)

    def at(self, step: int, hardness: Tensor) -> tuple[list[int], list[int]]:
        """(forget indices, retain indices) of a step. Half of the retain rows repeat what the prompt disturbed most."""
        config = self.config
        epoch, index = divmod(step, self._buckets)
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        buckets = length_buckets(self._forget_lengths, config.forget_batch, shuffle)
        forget = buckets[int(torch.randperm(len(buckets), generator=shuffle)[index])]
        draw = torch.Generator().manual_seed((config.seed * 1_000_003 + step) ^ 0x5EED)
        retain = torch.randint(len(self.retain_rows), (config.retain_batch,), generator=draw)
        again = config.retain_batch // 2
        if again and int((hardness > 0).sum()) > again:
            retain[:again] = torch.multinomial(hardness, again, generator=draw)
        return forget, retain.tolist()


class _Check:
    """Forget abstain rate and retain accuracy on a fixed sample, by the model that serves, label words only."""

    def __init__(
        self,
        served: FrozenLLM,
        behind: Tensor | None,
        batches: _Batches,
        retain: Sequence[Example],
        config: TrainingConfig,
    ) -> None:
        generator = torch.Generator().manual_seed(config.seed + 1)
        self._forget = torch.randperm(len(batches.forget_rows), generator=generator)[: config.check_rows].tolist()
        picked = torch.randperm(len(retain), generator=generator)[: config.check_rows].tolist()
        self._served, self._behind = served, behind
        self._rows = [*(batches.forget_rows[i] for i in self._forget), *(batches.retain_rows[i] for i in picked)]
        own = self._answers(self._rows[len(self._forget) :], compute_prefix(served, None))
        self._wanted = torch.tensor(  # as in `evaluation.check_prompts`
            [
                o if (label := retain[i].label) is None else served.verbalizer.id_of(label)
                for i, o in zip(picked, own.tolist(), strict=True)
            ]
        )
        self.retain_accuracy_before = float((own == self._wanted).float().mean())

    def __call__(self, soft: Tensor) -> tuple[float, float]:
        answers = self._answers(self._rows, _prefix(self._served, self._behind, soft))
        return (
            float((answers[: len(self._forget)] == _ABSTAINS).float().mean()),
            float((answers[len(self._forget) :] == self._wanted).float().mean()),
        )

    @torch.no_grad()
    def _answers(self, rows: list[list[int]], shared: Prefix | None) -> Tensor:
        llm = self._served
        ids = torch.tensor([*llm.verbalizer.label_ids, _ABSTAINS])
        answers = torch.empty(len(rows), dtype=torch.long)
        for picked in length_buckets([len(r) for r in rows], 32):
            hidden = last_hidden(llm, collate([rows[i] for i in picked], llm.device), shared)
            answers[picked] = ids[answer_scores(llm, hidden).argmax(-1).cpu()]
        return answers


def _hidden_by_length(llm: FrozenLLM, rows: list[list[int]], shared: Prefix | None) -> Tensor:
    """Last hidden states (N, d) of rows, the shorter and the longer half apart: padding costs like anything else."""
    halves = length_buckets([len(row) for row in rows], -(-len(rows) // 2))
    states = [last_hidden(llm, collate([rows[i] for i in half], llm.device), shared) for half in halves]
    order = torch.tensor([i for half in halves for i in half], device=llm.device)
    return torch.cat(states)[order.argsort()]


def _prefix(llm: FrozenLLM, behind: Tensor | None, soft: Tensor) -> Prefix | None:
    """The shared prefix of the frozen prompts ``behind`` and the one in training."""
    return compute_prefix(llm, soft if behind is None else torch.cat([behind.to(soft.device), soft]))
