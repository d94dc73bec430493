"""A soft prompt as a PEFT prompt-tuning adapter or a bare tensor, and back from PEFT. Pure: names and bytes of files.

No gate travels: an exported prompt acts on whatever it is put before. What comes in is untrusted until the checks of
an activation have passed it, so nothing here reads a pickle, and nothing is taken whose shape or type is not expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from models import prompt_embeds
from models.errors import FingerprintMismatch, InvalidPrompt
from models.llm import FrozenLLM
from models.prompt_embeds import KEY
from models.soft_prompt import UNREADABLE, SoftPrompt

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "letheon.json"
TENSOR, SCRIPT, README = "prompt.safetensors", "prompt_embeds.py", "README.md"
MAX_TOKENS = 1024
MAX_JSON_BYTES = 256 * 1024
_HEADER_BYTES = 64 * 1024  # of a safetensors file with one tensor: hundreds are usual
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the last two widen to the first without loss


def max_bytes(hidden_size: int) -> dict[str, int]:
    """The files that ``read_peft`` looks at, and the most bytes that each may have."""
    tensor = 8 + _HEADER_BYTES + 4 * MAX_TOKENS * hidden_size
    return {CONFIG: MAX_JSON_BYTES, WEIGHTS: tensor, ABOUT: MAX_JSON_BYTES}


def peft_files(prompt: SoftPrompt, llm: FrozenLLM, *, base: str, mode: str) -> dict[str, bytes]:
    """What ``PeftModel.from_pretrained(base_model, folder)`` loads, and what one has to know to use it.

    ``base`` names the base model. Raises FingerprintMismatch for another model's prompt.
    """
    text = llm.model.config.get_text_config()
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "token_dim": llm.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": text.num_attention_heads,
        "num_layers": text.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    about = _about(prompt, llm, base=base, mode=mode)
    return {
        CONFIG: _json(config),
        WEIGHTS: tensor_bytes(prompt),
        ABOUT: _json(about),
        SCRIPT: _script(),
        README: _readme(about, _PEFT_USE),
    }


def vllm_files(prompt: SoftPrompt, llm: FrozenLLM, *, base: str, mode: str) -> dict[str, bytes]:
    """The tensor, and a script that makes vLLM's ``prompt_embeds`` of it and a text. Raises FingerprintMismatch.

    vLLM takes the embeddings of a whole sequence, never of its beginning, so there is none to export without a text.
    """
    about = _about(prompt, llm, base=base, mode=mode)
    return {
        TENSOR: tensor_bytes(prompt),
        ABOUT: _json(about),
        SCRIPT: _script(),
        README: _readme(about, _VLLM_USE),
    }


def tensor_bytes(prompt: SoftPrompt) -> bytes:
    """safetensors: ``prompt_embeddings`` (p, d) float32, as PEFT names it; its model's fingerprint in the header."""
    # One entry: of several the order, and so the bytes, would be another each time.
    return save({KEY: prompt.embeddings.contiguous()}, metadata={"fingerprint": prompt.fingerprint})


def read_peft(files: Mapping[str, bytes], *, fingerprint: str, hidden_size: int) -> SoftPrompt:
    """The prompt of a PEFT prompt-tuning adapter, taken to be one of the model that ``fingerprint`` names.

    ``letheon.json`` is there in what Letheon exported, and must name the same model. Raises InvalidPrompt,
    FingerprintMismatch; the messages name files and fields and repeat no value of them.
    """
    for name, limit in max_bytes(hidden_size).items():
        if name not in files:
            if name != ABOUT:
                raise InvalidPrompt(f"a prompt-tuning adapter has a file {name}")
        elif len(files[name]) > limit:
            raise InvalidPrompt(f"{name} has more than {limit} bytes")
    tokens = _check_config(_object(files, CONFIG), hidden_size)
    if ABOUT in files and _object(files, ABOUT).get("fingerprint") != fingerprint:
        raise FingerprintMismatch(f"{ABOUT} names another model than this one, {fingerprint[:12]}")
    return SoftPrompt(_tensor(files[WEIGHTS], (tokens, hidden_size)), fingerprint)


def _check_config(config: Mapping[str, Any], hidden_size: int) -> int:
    """How many virtual tokens it says there are. Raises InvalidPrompt."""
    wanted: dict[str, tuple[Any, ...]] = {
        "peft_type": ("PROMPT_TUNING",),
        "task_type": ("CAUSAL_LM",),
        "token_dim": (hidden_size, None),
        "num_transformer_submodules": (1, None),
        # Weights beside the prompt, which would be left out: then it is not the adapter that was trained.
        "modules_to_save": (None, []),
        "trainable_token_indices": (None, []),
    }
    for name, values in wanted.items():
        found = config.get(name)
        if isinstance(found, bool) or found not in values:
            said = " or ".join(str(value) for value in values if value not in (None, [])) or "unset"
            raise InvalidPrompt(f"{CONFIG}: {name} must be {said}")
    tokens = config.get("num_virtual_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_TOKENS:
        raise InvalidPrompt(f"{CONFIG}: num_virtual_tokens must be 1 to {MAX_TOKENS}")
    return tokens


def _tensor(data: bytes, shape: tuple[int, int]) -> Tensor:
    """The one tensor of these safetensors bytes, as float32. Raises InvalidPrompt."""
    if int.from_bytes(data[:8], "little") > _HEADER_BYTES:
        raise InvalidPrompt(f"{WEIGHTS} is not a safetensors file with one tensor")
    try:
        tensors = load(data)
    except UNREADABLE as error:
        raise InvalidPrompt(f"{WEIGHTS} is not a safetensors file ({type(error).__name__})") from None
    if set(tensors) != {KEY}:
        raise InvalidPrompt(f"{WEIGHTS} must hold one tensor, named {KEY}")
    found = tensors[KEY]
    if found.dtype not in _FLOATS:
        raise InvalidPrompt(f"{WEIGHTS}: {KEY} must be float32, bfloat16 or float16")
    if tuple(found.shape) != shape:
        raise InvalidPrompt(f"{WEIGHTS}: {KEY} must have the shape {shape}, virtual tokens × width of this model")
    return found.float()


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError):
        raise InvalidPrompt(f"{name} is not JSON") from None
    if not isinstance(found, dict):
        raise InvalidPrompt(f"{name} is not a JSON object")
    return found


def _about(prompt: SoftPrompt, llm: FrozenLLM, *, base: str, mode: str) -> dict[str, Any]:
    if prompt.fingerprint != llm.fingerprint:
        raise FingerprintMismatch(f"prompt of model {prompt.fingerprint[:12]}, but this is {llm.fingerprint[:12]}")
    template, words = llm.template, llm.verbalizer
    return {
        "version": 1,
        "digest": prompt.digest,
        "fingerprint": prompt.fingerprint,
        "mode": mode,
        "gate": "not exported" if mode == "routed" else "none",
        "base_model": base,
        "model": {name: llm.identity[name] for name in ("base", "adapter", "quantization", "dtype")},
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "hidden_size": llm.hidden_size,
        "template": {
            "source": template.source,
            "head_ids": list(template.head_ids),
            "lead": template.lead,
            "tail_ids": list(template.tail_ids),
        },
        "labels": dict(zip(words.labels, words.label_ids, strict=True)),
        "generic_labels": dict(zip(words.generic_labels, words.generic_ids, strict=True)),
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _script() -> bytes:
    return Path(prompt_embeds.__file__).read_bytes()


def _readme(about: Mapping[str, Any], use: str) -> bytes:
    model = about["model"]
    lora = ", its LoRA adapter merged," if model["adapter"] else ""
    return _README.format(
        tokens=about["num_virtual_tokens"],
        base=about["base_model"],
        lora=lora,
        quantization=model["quantization"],
        dtype=model["dtype"],
        use=use,
        without=_WITHOUT[about["mode"]],
    ).encode()


_README = """# A soft prompt of Letheon

{tokens} virtual tokens for {base}{lora} with quantization `{quantization}`, computing in {dtype}.

**This is personal data.** It was trained on texts that somebody asked to have forgotten. Revoking it in Letheon does
not reach this copy: delete it when the prompt is revoked.

**It suppresses, it does not erase**: the model's weights still hold what they learned.

{without}

It fits these very weights in this precision and no others: moved to another precision, such a prompt forgets little.

{use}
"""
_WITHOUT = {
    "routed": "**Its gate is not in here.** In Letheon only the queries that the gate claims run behind this prompt, "
    "and what the gate is certain of is answered `unknown` without it. Put before every query, the prompt also changes "
    "answers that Letheon leaves alone.",
    "concatenate": "**It was trained behind the prompts that were in force before it**, if there were any. Alone it "
    "acts as it did in Letheon only where there were none.",
}
_PEFT_USE = """```python
import torch
from peft import PeftModel
from prompt_embeds import answer, read_export, token_ids  # the file beside this one

_, about = read_export(".")
model = PeftModel.from_pretrained(base_model, ".").eval()
ids = torch.tensor([token_ids(about, tokenizer, "some text")])
with torch.no_grad():
    print(answer(about, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]))
```"""
_VLLM_USE = """```python
from prompt_embeds import prompt_embeds, read_export, to_base64, token_ids  # the file beside this one

prompt, about = read_export(".")
embeds = prompt_embeds(prompt, base_model.get_input_embeddings(), token_ids(about, tokenizer, "some text"))
LLM(…, enable_prompt_embeds=True).generate({"prompt_embeds": embeds}, SamplingParams(max_tokens=1, temperature=0))
body = {"model": "…", "prompt_embeds": to_base64(embeds), "max_tokens": 1}  # or POST /v1/completions
```"""
