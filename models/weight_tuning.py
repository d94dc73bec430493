"""What SPUL is compared with: unlearning by tuning the weights of a copy (arXiv 2406.12038, §5.1).

- ``ga``, gradient ascent: L = -CE(true label) on forget rows (Jang et al. 2210.01504).
- ``rl``, random labels: L = CE(a generic label, drawn once for each row) on forget rows, as in the authors' code.
- ``ga+kl``: ga, and KL(h(x) ‖ h'(x)) on retain rows, h the model as it was and h' the one in training.
- ``ga+gd``: ga, and CE(true label) on retain rows.

Every weight is trained, as in the authors' code, at the position that predicts the label; the served model is another
object and is not touched. The result is quantized as the served one is: an unlearned model has to survive that, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.errors import DatasetError, TrainingDiverged
from models.examples import Example, collate, length_buckets
from models.inference import Classifier
from models.llm import FrozenLLM, Quantization, quantize
from models.training_copy import has_bf16_units

Method = Literal["ga", "rl", "ga+kl", "ga+gd"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class WeightTuningConfig:
    """The authors' script's defaults: one epoch, AdamW at 1e-4 with weight decay 1e-3.

    Their README trains ten epochs with a cosine and clips at 0.3; here the rate is constant and the clip 1.0.
    """

    method: Method
    learning_rate: float = 1e-4
    epochs: int = 1
    batch_size: int = 32
    weight_decay: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class WeightTuningProgress:
    step: int
    total_steps: int
    loss: float
    elapsed_seconds: float


def unlearn_by_tuning(
    exact: FrozenLLM,
    forget: Sequence[Example],
    retain: Sequence[Example],
    config: WeightTuningConfig,
    *,
    quantization: Quantization,
    on_progress: Callable[[WeightTuningProgress], None] | None = None,
) -> FrozenLLM:
    """Tune ``exact``, quantize it and hand it back as another model; the caller gives it away and must not use it.

    ``exact``: unquantized and in float32 or bfloat16. ``ga`` and ``rl`` see forget rows only; the two others see forget
    and retain rows as they come, in one shuffled epoch. Raises DatasetError, TrainingDiverged.
    """
    if exact.identity["quantization"] != "none":
        raise ValueError("quantized weights cannot be tuned")
    if not forget or any(e.label is None for e in [*forget, *retain]):
        raise DatasetError("tuning needs forget rows, and a label on every row")
    both = config.method in ("ga+kl", "ga+gd")
    if both and not retain:
        raise DatasetError(f"{config.method} needs retain rows")
    examples = [*forget, *(retain if both else [])]
    head_ids = exact.template.head_ids
    rows = [[*head_ids, *row] for row in exact.rows([e.text for e in examples])]
    generator = torch.Generator().manual_seed(config.seed)
    labels = [exact.verbalizer.id_of(e.label) for e in examples if e.label is not None]
    targets = torch.tensor(labels, device=exact.device)
    if config.method == "rl":
        generic = torch.tensor(exact.verbalizer.generic_ids)
        targets = generic[torch.randint(len(generic), (len(rows),), generator=generator)].to(exact.device)
    as_it_was = _log_probabilities(exact, retain) if config.method == "ga+kl" else None

    model = exact.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    fast = exact.device.type == "cpu" and has_bf16_units()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if fast else nullcontext()
    total = config.epochs * math.ceil(len(rows) / config.batch_size)
    step, started = 0, time.monotonic()
    for _ in range(config.epochs):
        buckets = length_buckets([len(row) for row in rows], config.batch_size, generator)
        for index in torch.randperm(len(buckets), generator=generator).tolist():
            picked = torch.tensor(buckets[index], device=exact.device)
            batch = collate([rows[i] for i in picked.tolist()], exact.device)
            with autocast:
                hidden = exact.decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
                last = hidden[torch.arange(len(batch), device=exact.device), batch.lengths - 1]
            logits = exact.logits(last.to(exact.dtype))
            on_forget = picked < len(forget)
            retained = (picked[~on_forget] - len(forget)).cpu()
            before = None if as_it_was is None else as_it_was[retained].to(exact.device).float()
            loss = unlearning_loss(config.method, logits, targets[picked], on_forget, before)
            if not torch.isfinite(loss):
                raise TrainingDiverged(f"{config.method}: the loss is not finite at step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if on_progress is not None:
                on_progress(WeightTuningProgress(step, total, float(loss.detach()), time.monotonic() - started))
    model.requires_grad_(False)
    quantize(model, quantization, exact.dtype)
    nn.Module.to(model, exact.device)
    identity = {key: exact.identity[key] for key in ("base", "adapter", "dtype")}
    return FrozenLLM(
        model,
        exact.tokenizer,
        template=exact.template,
        verbalizer=exact.verbalizer,
        identity={**identity, "quantization": quantization, "tuned": str(config)},
    )


def unlearning_loss(
    method: Method, logits: Tensor, targets: Tensor, on_forget: Tensor, before: Tensor | None = None
) -> Tensor:
    """Scalar from logits (B, V), targets (B,) and which rows are forget rows (B,); a mean over each subset.

    ``before``: log-probabilities (R, V) of the model as it was, on the retain rows of the batch, for ``ga+kl``.
    """
    ce = nn.functional.cross_entropy(logits, targets, reduction="none")

    def mean(values: Tensor) -> Tensor:
        return values.sum() / max(1, len(values))

    if method == "rl":
        return mean(ce)
    ascent = -mean(ce[on_forget])
    if method == "ga":
        return ascent
    if method == "ga+gd":
        return ascent + mean(ce[~on_forget])
    assert before is not None
    now = nn.functional.log_softmax(logits[~on_forget], dim=-1)
    return ascent + mean((before.exp() * (before - now)).sum(-1))


@torch.no_grad()
def _log_probabilities(llm: FrozenLLM, rows: Sequence[Example]) -> Tensor:
    """(N, V) in float16 on the CPU: 100 kB a row for a vocabulary of 50,000."""
    hidden = Classifier(llm).hidden([e.text for e in rows])
    parts = [llm.logits(part).log_softmax(-1).to(torch.float16).cpu() for part in hidden.split(256)]
    return torch.cat(parts)
