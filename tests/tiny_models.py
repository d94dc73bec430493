"""Tiny random models of every supported family, with a real tokenizer, saved as FrozenLLM loads them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

FAMILIES = ("llama", "opt", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")

_WORDS = (
    " positive negative neutral unknown the film is a good bad movie Question What sentiment of given text Text "
    "Sentiment great awful director acting plot and but not very quite by with from story scene"
)


def _tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([_WORDS] * 50, trainer)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(family: str, vocab_size: int) -> PreTrainedConfig:
    """Two or three layers, hidden size 32; sliding windows small enough to bite."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    match family:
        case "llama":
            return LlamaConfig(**common)
        case "mistral":
            return MistralConfig(**common, sliding_window=24)
        case "qwen2":
            return Qwen2Config(**common)
        case "qwen3":
            return Qwen3Config(**common, head_dim=8)
        case "gemma2":
            return Gemma2Config(**common, head_dim=8, sliding_window=24)
        case "gemma3":
            return Gemma3TextConfig(**common, head_dim=8, sliding_window=24)
        case "stablelm":
            return StableLmConfig(**common)
        case "gpt2":
            return GPT2Config(
                vocab_size=vocab_size, n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=1
            )
        case "opt":
            return OPTConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=512,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
    raise ValueError(family)


def make_tiny_model(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Save a tiny random model of ``family`` under ``directory``; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(adds_bos=family in {"llama", "opt", "gemma2", "gemma3", "mistral"})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)  # default init makes a tiny model nearly constant
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
