"""Training checkpoints as safetensors bytes: parameters, AdamW moments and a small JSON header. Never a pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from models.errors import CheckpointError
from models.soft_prompt import UNREADABLE


def pack(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, meta: dict[str, Any]) -> bytes:
    """Parameters (name → tensor), their AdamW state and JSON-serialisable ``meta``."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"param.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    blob = json.dumps(meta, sort_keys=True).encode()
    tensors["meta"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return save(tensors)


def unpack(
    data: bytes, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, *, expect: dict[str, Any]
) -> dict[str, Any]:
    """Load ``pack``'s bytes into the parameters and the optimizer; return its meta.

    Raises CheckpointError when the bytes are damaged, shapes differ or a key of ``expect`` has another value.
    """
    try:
        tensors = load(data)
        meta: dict[str, Any] = dict(json.loads(tensors.pop("meta").numpy().tobytes()))
    except UNREADABLE as error:
        raise CheckpointError(f"damaged checkpoint ({type(error).__name__})") from None
    for key, value in expect.items():
        if meta.get(key) != value:
            raise CheckpointError(f"checkpoint is of another run: {key} differs")
    for name, parameter in parameters.items():
        stored = tensors.get(f"param.{name}")
        if stored is None or stored.shape != parameter.shape:
            raise CheckpointError(f"checkpoint does not fit: {name}")
        with torch.no_grad():
            parameter.copy_(stored)
        prefix = f"optim.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        # AdamW keeps its step count on the CPU and its moments beside the parameter.
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    return meta
