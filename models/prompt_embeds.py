"""Run an exported prompt elsewhere: token ids as Letheon makes them, and the sequence that vLLM takes as prompt embeds.

This file is put into every export, beside ``letheon.json`` and the tensor, and needs torch and safetensors only. The
order is [prompt][template, up to the text][text][template, after it]; a BOS token, where the tokenizer has one, is the
first of the template and so comes behind the prompt.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TENSOR_FILES = ("prompt.safetensors", "adapter_model.safetensors")
KEY = "prompt_embeddings"


def read_export(folder: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The prompt (p, d) float32, and what ``letheon.json`` says: ids of the template, of the labels, the model's."""
    about = json.loads((Path(folder) / "letheon.json").read_text(encoding="utf-8"))
    file = next(path for name in TENSOR_FILES if (path := Path(folder) / name).is_file())
    return load_file(file)[KEY], about


def token_ids(about: Mapping[str, Any], tokenizer: Any, text: str) -> list[int]:
    """Of template and text: what follows the prompt. Special tokens in a user's text are characters, not tokens."""
    template = about["template"]
    ids = tokenizer.encode(template["lead"] + text, add_special_tokens=False, split_special_tokens=True)
    return [*template["head_ids"], *ids, *template["tail_ids"]]


@torch.no_grad()
def prompt_embeds(prompt: Tensor, embed: Callable[[Tensor], Tensor], ids: list[int]) -> Tensor:
    """(p + n, d): the whole sequence. ``embed``: the base model's ``get_input_embeddings()``."""
    words = embed(torch.tensor(ids))
    return torch.cat([prompt.to(words.dtype), words.cpu()])


def to_base64(embeds: Tensor) -> str:
    """For ``prompt_embeds`` of vLLM's completions API, which reads it with ``torch.load(weights_only=True)``."""
    buffer = io.BytesIO()
    torch.save(embeds.contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def answer(about: Mapping[str, Any], logits: Tensor) -> str:
    """The label of next-token logits (vocabulary,), or ``unknown``: generic words are one answer, together."""
    labels, generic = about["labels"], about["generic_labels"]
    shares = logits[[*labels.values(), *generic.values()]].float().softmax(-1)
    scores = [*shares[: len(labels)].tolist(), float(shares[len(labels) :].sum())]
    return str([*labels, "unknown"][scores.index(max(scores))])
