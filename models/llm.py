"""FrozenLLM: one causal LLM, loaded, merged with its adapter, quantized, frozen and fingerprinted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.errors import ModelError, TextTooLong
from models.template import TEXT_ONLY, Template, Tokenizer, Verbalizer

Quantization = Literal["none", "int8", "nf4"]

# What decides how a directory behaves; a README or a training log does not.
_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


class FrozenLLM:
    """The one LLM of a process. Nothing in Letheon ever changes a parameter of it (promise 1).

    Attributes:
        fingerprint: SHA-256 hex over base, adapter, quantization, compute dtype, template and verbalizer.
            A soft prompt is bound to it.
        hidden_size: width d of the input embeddings, hence of a soft prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        template: Template,
        verbalizer: Verbalizer,
        identity: dict[str, Any],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template = template
        self.verbalizer = verbalizer
        self.identity = {**identity, "template": template.source, "words": verbalizer.words, "ids": verbalizer.ids}
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.embed = cast(nn.Embedding, model.get_input_embeddings())
        self.hidden_size = self.embed.embedding_dim
        self.device = self.embed.weight.device
        self.dtype = self.embed.weight.dtype
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._assert_head_is_plain()

    @classmethod
    def load(
        cls,
        source: str,
        *,
        adapter: str | None = None,
        quantization: Quantization = "nf4",
        device: str = "auto",
        template: str = "instruction-first",
        labels: Sequence[str] = ("negative", "positive"),
        generic_labels: Sequence[str] = ("neutral", "unknown"),
    ) -> FrozenLLM:
        """Load a hub id, a local directory or a ``.gguf`` file; merge ``adapter``; quantize; freeze.

        CPU computes in float32, CUDA in bfloat16; the adapter is merged before quantization, in the same.
        Raises ModelError (and its InvalidTemplate, InvalidVerbalizer) with a message that says what to mend.
        """
        target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
        model, tokenizer, base_digest = load_base(source, dtype)
        adapter_digest = None
        if adapter is not None:
            model, adapter_digest = _merge_adapter(model, Path(adapter))
        quantize(model, quantization, dtype)
        nn.Module.to(model, target)
        return cls(
            model,
            tokenizer,
            template=Template.build(template, tokenizer),
            verbalizer=Verbalizer.build(tuple(labels), tuple(generic_labels), tokenizer),
            identity={
                "base": base_digest,
                "adapter": adapter_digest,
                "quantization": quantization,
                "dtype": str(dtype).removeprefix("torch."),
            },
        )

    # --- text to ids -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        return self.tokenizer.encode(self.template.lead + text, **TEXT_ONLY)

    def count_tokens(self, text: str) -> int:
        """Tokens of the text, template excluded: what ``max_text_tokens`` limits."""
        return len(self.encode(text))

    def text_tokens(self, row: Sequence[int]) -> int:
        """The same of a row."""
        return len(row) - len(self.template.tail_ids)

    def row(self, text: str) -> list[int]:
        """Ids of text + tail: what follows the shared prefix (soft prompts + head)."""
        return [*self.encode(text), *self.template.tail_ids]

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """``row`` for many texts, tokenised in one call."""
        if not texts:
            return []
        encoded = self.tokenizer([self.template.lead + t for t in texts], **TEXT_ONLY)["input_ids"]
        return [[*ids, *self.template.tail_ids] for ids in encoded]

    @property
    def max_positions(self) -> int:
        config = self.model.config.get_text_config()  # a multimodal model keeps it below
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def text_room(self, prompt_tokens: int = 0) -> int:
        """Tokens that a text may have behind ``prompt_tokens`` virtual tokens and the template."""
        return self.max_positions - len(self.template.head_ids) - len(self.template.tail_ids) - prompt_tokens

    def text_limit(self, configured: int, prompt_tokens: int) -> int:
        """Tokens of the longest text that API and worker take: ``configured``, or what has room behind one prompt."""
        return min(configured, self.text_room(prompt_tokens))

    def check_fits(self, rows: Sequence[Sequence[int]], prefix_length: int) -> None:
        """Raises TextTooLong when a row behind the prefix passes the model's positions."""
        longest = max((len(row) for row in rows), default=0) + prefix_length
        if longest > self.max_positions:
            raise TextTooLong(f"{longest} positions with template and prompts, but the model has {self.max_positions}")

    @cached_property
    @torch.no_grad()
    def word_norm(self) -> float:
        """Mean length of the vocabulary's input embeddings, as the model looks them up: Gemma scales them."""
        ids = torch.arange(self.embed.num_embeddings, device=self.device)
        return float(torch.cat([self.embed(part).float().norm(dim=-1) for part in ids.split(8192)]).mean())

    # --- ids to hidden states and logits -----------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The transformer without its language-model head."""
        return cast(nn.Module, self.model.base_model)

    def logits(self, hidden: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """Next-token logits (float32) of last hidden states (..., d), over all tokens or the given rows only."""
        head = cast(nn.Linear, self.model.get_output_embeddings())
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if token_ids is not None:
            # Few rows, so in float32: bfloat16 has steps of an eighth where logits are about 20.
            index = torch.tensor(token_ids, device=weight.device)
            weight, bias = weight[index].float(), None if bias is None else bias[index].float()
            hidden = hidden.float()
        logits = nn.functional.linear(hidden, weight, bias).float()
        if self._softcap:  # Gemma 2
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @torch.no_grad()
    def _assert_head_is_plain(self) -> None:
        """Our head (decoder → linear → softcap) must equal the architecture's own; some scale or mix logits."""
        ids = torch.tensor([[*self.template.head_ids, *self.template.tail_ids]], device=self.device)
        ours = self.logits(self.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
            raise ModelError(f"{type(self.model).__name__} post-processes its logits in a way Letheon does not know")

    def weights_digest(self) -> str:
        """SHA-256 over every parameter, buffer and quantization constant, in name order."""
        sha = hashlib.sha256()
        state = self.model.state_dict()
        for name in sorted(state):
            if isinstance(state[name], Tensor):
                sha.update(name.encode())
                sha.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


def load_base(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer, str]:
    """The unquantized model on CPU, its tokenizer and the digest of its files. Raises ModelError."""
    path = Path(source)
    try:
        if path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise ModelError(f"no such file: {source}")
            # Dequantized: an adapter is merged, and bitsandbytes quantizes, in full precision.
            kwargs: dict[str, Any] = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
            files, location = [path], str(path.parent)
        else:
            if not path.is_dir():
                path = _download(source)
            kwargs = {}
            files, location = sorted({f for p in _MODEL_FILES for f in path.glob(p)}), str(path)
            if not any(f.suffix == ".safetensors" for f in files):
                raise ModelError(f"{source}: no .safetensors file; pickled weights are refused")
        # Said, since without a word transformers asks whoever sits at the terminal whether to run a model's own code.
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, trust_remote_code=False, **kwargs)
        gguf = {"gguf_file": path.name} if kwargs else {}
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **gguf)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {source!r}: {type(error).__name__}: {error}") from error
    return cast(PreTrainedModel, model), cast(Tokenizer, tokenizer), _digest_files(files)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{repo_id!r} is no local path and no reachable hub id ({type(error).__name__})") from error


def _digest_files(files: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            # A GGUF or single file may be renamed; a directory's names matter.
            sha.update((file.name if len(files) > 1 else "").encode() + hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest()


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> tuple[PreTrainedModel, str]:
    from peft import PeftModel

    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not weights.is_file() or not config.is_file():
        raise ModelError(f"{adapter}: needs adapter_model.safetensors and adapter_config.json (no pickles)")
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{adapter}: does not fit this base model ({type(error).__name__})") from error
    return cast(PreTrainedModel, merged), _digest_files([config, weights])


def quantize(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replace every linear layer but the head by its bitsandbytes form, in place; weights quantize on ``.to()``.

    transformers' own bitsandbytes path cannot start from GGUF or from a merged model, hence this loop.
    """
    if quantization == "none":
        return
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    if quantization == "int8":
        # One warning per layer and call: int8 on CPU casts inputs to float16 inside, by design.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        weight = module.weight.data.t().contiguous() if isinstance(module, Conv1D) else module.weight.data  # GPT-2
        out_features, in_features = weight.shape
        has_bias = module.bias is not None
        layer: nn.Module
        if quantization == "nf4":
            layer = Linear4bit(
                in_features, out_features, bias=has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
            # With AVX512-BF16, eval() repacks these weights on first use: other numbers, and no gradient after.
            layer.support_avx512bf16_for_cpu = False
        else:
            layer = Linear8bitLt(
                in_features, out_features, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta"
            )
            layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
