"""QLoRA fine-tuning: make a base model that has learned a labelled dataset (arXiv 2305.14314, through peft).

The adapter is a plain PEFT directory; ``FrozenLLM.load(..., adapter=...)`` merges it. On a GPU the base is NF4; on a
CPU float32 or, where the processor has bfloat16 matrix units, bfloat16 autocast is quicker.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from models import checkpoint
from models.errors import DatasetError, ModelError, TrainingDiverged
from models.examples import Example, collate, digest_examples, length_buckets
from models.llm import load_base, quantize
from models.template import TEXT_ONLY, Template, Verbalizer
from models.training_copy import has_bf16_units


@dataclass(frozen=True)
class FinetuneConfig:
    """The recipe; it is written beside the adapter as ``recipe.json``."""

    base: str
    output: str
    quantization: Literal["none", "nf4"] = "nf4"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    template: str = "instruction-first"
    labels: tuple[str, ...] = ("negative", "positive")
    generic_labels: tuple[str, ...] = ("neutral", "unknown")
    rank: int = 8
    lora_alpha: int = 16
    learning_rate: float = 4e-4
    epochs: int = 2
    batch_size: int = 16
    max_text_tokens: int = 256
    warmup: float = 0.05
    seed: int = 0
    device: str = "auto"
    checkpoint_steps: int = 50


@dataclass(frozen=True)
class FinetuneProgress:
    step: int
    total_steps: int
    loss: float  # running mean of the label token's cross-entropy
    accuracy: float  # running mean over batches, argmax over the whole vocabulary
    elapsed_seconds: float


def finetune(
    examples: Sequence[Example],
    config: FinetuneConfig,
    on_progress: Callable[[FinetuneProgress], None] | None = None,
) -> Path:
    """Train a LoRA on the label token and save it to ``config.output``; resumes from its checkpoint there.

    Raises DatasetError (no or unlabelled rows), ModelError (base cannot be loaded), CheckpointError, TrainingDiverged.
    """
    if not examples or any(e.label is None for e in examples):
        raise DatasetError("fine-tuning needs rows, and a label on every row")
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    bf16 = config.precision == "bf16" or (config.precision == "auto" and (device.type == "cuda" or has_bf16_units()))
    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base, tokenizer, base_digest = load_base(config.base, dtype)
    template = Template.build(config.template, tokenizer)
    verbalizer = Verbalizer.build(config.labels, config.generic_labels, tokenizer)
    quantize(base, config.quantization, dtype)
    nn.Module.to(base, device)
    vars(base)["is_loaded_in_4bit"] = config.quantization == "nf4"  # how peft knows to wrap bitsandbytes layers
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    model = get_peft_model(base, lora)
    trainable: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    decoder = base.base_model  # its linear layers now hold the LoRA layers

    head = list(template.head_ids)
    encoded = tokenizer([template.lead + e.text for e in examples], **TEXT_ONLY)["input_ids"]
    rows = [[*head, *ids[: config.max_text_tokens], *template.tail_ids] for ids in encoded]
    targets = torch.tensor([verbalizer.id_of(e.label) for e in examples if e.label is not None])
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = steps_per_epoch * config.epochs
    optimizer = torch.optim.AdamW(trainable.values(), lr=config.learning_rate, weight_decay=0.0)
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "checkpoint.safetensors"
    run = {"data": digest_examples(examples), "base": base_digest, "config": json.loads(json.dumps(asdict(config)))}
    step, loss_mean, accuracy_mean = 0, 0.0, 0.0
    if state_file.exists():
        meta = checkpoint.unpack(state_file.read_bytes(), trainable, optimizer, expect=run)
        step, loss_mean, accuracy_mean = meta["step"], meta["loss"], meta["accuracy"]

    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    started = time.monotonic()
    plan: list[list[int]] = []
    plan_epoch = -1
    model.train()
    while step < total:
        epoch, index = divmod(step, steps_per_epoch)
        if plan_epoch != epoch:
            plan, plan_epoch = _epoch_plan([len(r) for r in rows], config.batch_size, config.seed + epoch), epoch
        picked = plan[index]
        batch = collate([rows[i] for i in picked], device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, total, config.warmup)
        with autocast:
            hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(batch), device=device), batch.lengths - 1]
            logits = base.get_output_embeddings()(last).float()
        wanted = targets[picked].to(device)
        loss = nn.functional.cross_entropy(logits, wanted)
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"loss is not finite at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        step += 1
        accuracy = float((logits.argmax(-1) == wanted).float().mean())
        weight = max(0.02, 1 / step)
        loss_mean += weight * (float(loss.detach()) - loss_mean)
        accuracy_mean += weight * (accuracy - accuracy_mean)
        if step % config.checkpoint_steps == 0 and step < total:
            data = checkpoint.pack(
                trainable, optimizer, {**run, "step": step, "loss": loss_mean, "accuracy": accuracy_mean}
            )
            _write_atomically(state_file, data)
        if on_progress:
            on_progress(FinetuneProgress(step, total, loss_mean, accuracy_mean, time.monotonic() - started))

    # bfloat16 halves the file; merging happens in the base's precision.
    weights = {name: t.to(torch.bfloat16).cpu().contiguous() for name, t in get_peft_model_state_dict(model).items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_config = model.peft_config["default"]
    adapter_config.inference_mode = True
    adapter_config.base_model_name_or_path = Path(config.base).name
    adapter_config.save_pretrained(str(out))
    recipe = {**asdict(config), "base": Path(config.base).name, "output": out.name, "base_digest": base_digest}
    recipe |= {"data_digest": run["data"], "rows": len(rows), "train_accuracy": round(accuracy_mean, 4)}
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    state_file.unlink(missing_ok=True)
    return out


def _epoch_plan(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """One epoch's batches: similar lengths together, batches in random order; a function of the seed only."""
    generator = torch.Generator().manual_seed(seed)
    buckets = length_buckets(lengths, size, generator)
    return [buckets[i] for i in torch.randperm(len(buckets), generator=generator).tolist()]


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then cosine to zero."""
    ramp = max(1, int(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


__all__ = ["FinetuneConfig", "FinetuneProgress", "ModelError", "finetune"]
