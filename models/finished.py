"""A training that is done, as bytes: what waits for an approval is taken up, not trained again. Never a pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from models.errors import InvalidPrompt
from models.soft_prompt import SoftPrompt
from models.training import TrainingResult

_KEY, _META = "finished", "meta"


def pack(result: TrainingResult, *, seed: int) -> bytes:
    """The prompt, bit for bit, and what is told of its training. ``seed``: of the try, which has one of its own."""
    prompt = result.prompt
    meta = {
        "fingerprint": prompt.fingerprint,
        "seed": seed,
        "steps": result.steps,
        "stopped": result.stopped,
        "seconds": result.seconds,
    }
    blob = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
    return save({_KEY: prompt.embeddings.contiguous(), _META: blob})


def unpack(data: bytes, *, fingerprint: str, seed: int) -> TrainingResult | None:
    """What ``pack`` was given; None for any other bytes, another model's or another try's.

    Neither the retain set nor the prompts in force are asked for: a prompt that was done before they changed stands as
    if it had been activated then, and the checks see it on the set as it is.
    """
    try:
        tensors = load(data)
        meta: dict[str, Any] = json.loads(tensors[_META].numpy().tobytes())
        if (meta["fingerprint"], meta["seed"]) != (fingerprint, seed):
            return None
        prompt = SoftPrompt(tensors[_KEY], fingerprint)
    except (SafetensorError, InvalidPrompt, KeyError, ValueError):
        return None
    return TrainingResult(prompt, meta["steps"], meta["stopped"], meta["seconds"], resumed_from=meta["steps"])
