"""A bfloat16 copy of the frozen model to *train against* on CPUs with bfloat16 units (AMX, AVX512-BF16).

A training step is many small matrix products over the same frozen weights. NF4 layers unpack them four times a step
(prefix and rows, forward and backward); a bfloat16 copy of the unpacked values needs no unpacking and runs on the
bfloat16 units. Only the gradient of the soft prompt comes from it: what serves, and what decides about activation, is
always the quantized model itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models.llm import FrozenLLM

_copies: WeakKeyDictionary[FrozenLLM, FrozenLLM] = WeakKeyDictionary()


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return " amx_bf16" in flags or " avx512_bf16" in flags


def training_copy(llm: FrozenLLM) -> FrozenLLM:
    """A bfloat16 copy with the same fingerprint where that is faster (such a CPU, not int8), else ``llm`` itself."""
    if llm.device.type != "cpu" or llm.identity["quantization"] == "int8" or not has_bf16_units():
        return llm
    if llm not in _copies:
        _copies[llm] = _copy(llm)
    return _copies[llm]


@torch.no_grad()
def _copy(llm: FrozenLLM) -> FrozenLLM:
    # Of a copy, since a model writes into its configuration.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(llm.model.config), dtype=torch.bfloat16)
    sources = dict(llm.model.named_modules())
    for name, module in model.named_modules():
        source = sources[name]
        for key, buffer in source.named_buffers(recurse=False):
            if key in module._buffers:
                module._buffers[key] = buffer.clone()  # rotary frequencies keep their float32
        for key, parameter in module.named_parameters(recurse=False):
            if key == "weight" and hasattr(source.weight, "quant_state"):
                value = _dequantized(source.weight)
                # Linear4bit is (out, in); GPT-2's Conv1D is (in, out).
                parameter.copy_(value if isinstance(module, nn.Linear) else value.t())
            else:
                value = getattr(source, key)
                parameter.copy_(value if value.shape == parameter.shape else value.t())
    identity = {k: llm.identity[k] for k in ("base", "adapter", "quantization", "dtype")}
    return FrozenLLM(model, llm.tokenizer, template=llm.template, verbalizer=llm.verbalizer, identity=identity)


def _dequantized(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit  # here: a second and a half that only models under NF4 need

    return dequantize_4bit(weight.data, cast(Any, weight).quant_state)
