"""What a replica of a given size needs: ``python -m bench.sizing --shape 1.3B``. Wants an idle machine.

A Llama of that shape with random weights, which cost what others do; every layer holds a copy of the same ones, so that
building it is quick and its memory is real. SST-2 texts (``--data``), else the demo's held-out reviews, in batches,
with one request in force that claims nothing. Texts a second, the seconds of a single text, and memory: of the weights,
while serving, and the process's peak, building included. One shape a run: what one leaves behind would be counted with
the next. ``--json`` prints the record of all.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from app.defaults import load_arguments
from app.pull import reviews_dir
from app.settings import get_settings
from bench import engine
from bench.tuned import machine, today
from models.examples import read_examples
from models.inference import Classifier, rows_of_a_pass
from models.llm import FrozenLLM, Quantization, quantize
from models.packing import packable
from models.routing import classify_routed
from models.template import Template, Tokenizer, Verbalizer

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """``width`` d, ``depth`` layers, ``heads`` on ``keys`` key-value heads, ``inner`` width of the MLP.

    ``tied``: the words are embedded and scored by the same matrix.
    """

    width: int
    depth: int
    heads: int
    keys: int
    inner: int
    tied: bool = False


SHAPES = {
    "135M": Shape(576, 30, 9, 3, 1536, tied=True),  # SmolLM2
    "1.3B": Shape(2048, 24, 16, 16, 5504),
    "7B": Shape(4096, 32, 32, 32, 11008),  # LLaMA 2
    "13B": Shape(5120, 40, 40, 40, 13824),
}


def words(source: str) -> tuple[Tokenizer, int]:
    """The tokenizer of a model and the size of its vocabulary, without its weights: freed memory is not all given back,
    and what is built next would fill it unseen."""
    path = Path(source)
    gguf = path.suffix.lower() == ".gguf"
    folder, kwargs = (str(path.parent), {"gguf_file": path.name}) if gguf else (source, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **kwargs)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs)
    return cast(Tokenizer, tokenizer), config.vocab_size


def peak_bytes() -> int:
    """The most that this process ever had resident, since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Holder(nn.Module):
    """A layer as ``quantize`` takes a model: without a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def get_output_embeddings(self) -> None:
        return None


def build(shape: Shape, tokenizer: Tokenizer, vocabulary: int, quantization: Quantization, device: str) -> FrozenLLM:
    """The model, on the device, its weights as they would serve."""
    target = torch.device(device)
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys,
        intermediate_size=shape.inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
    )
    config._attn_implementation = "sdpa"
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    model = LlamaForCausalLM(small)
    nn.Module.to(model, dtype)
    holder: Any = _Holder(model.model.layers[0])
    quantize(holder, quantization, dtype)
    first = holder.to(target).layer
    assert isinstance(first, LlamaDecoderLayer)
    model.model.layers = nn.ModuleList()
    nn.Module.to(model, target)
    for index in range(shape.depth):
        layer = copy.deepcopy(first, {id(first.self_attn.config): model.config})  # one, as every model has it
        layer.self_attn.layer_idx = index
        model.model.layers.append(layer)
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = shape.depth
    return FrozenLLM(
        model,
        tokenizer,
        template=Template.build("instruction-first", tokenizer),
        verbalizer=Verbalizer.build(("negative", "positive"), ("neutral", "unknown"), tokenizer),
        identity={"shape": shape.__dict__, "quantization": quantization},
    )


def measure(llm: FrozenLLM, texts: list[str], size: int, rounds: int) -> dict[str, float]:
    """Texts a second in batches of ``size``, and the seconds of a single one: medians."""
    routes = engine.routes(llm, claimed=False)
    classifier = Classifier(llm)

    def seconds(count: int) -> float:
        found = []
        for number in range(rounds + 1):
            batch = [texts[(number * count + i) % len(texts)] for i in range(count)]
            started = time.perf_counter()
            rows = rows_of_a_pass(llm, count)
            classify_routed(classifier, routes, batch, digest=None, max_prompts=4, batch_size=rows)
            found.append(time.perf_counter() - started)
        return statistics.median(found[1:])

    tokens = statistics.mean(len(row) for row in llm.rows(texts[: size * rounds]))
    return {"texts_per_second": size / seconds(size), "single_seconds": seconds(1), "tokens_per_text": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--data", type=Path, help="folder with SST-2's test_retain.jsonl.gz; default: demo reviews")
    parser.add_argument("--quantization", default="nf4", choices=["none", "int8", "nf4"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/bench/sizing.json"))
    parser.add_argument("--json", action="store_true", help="print the recorded results and compute nothing")
    args = parser.parse_args()
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"bench": "sizing"}
    if not args.json:
        settings = get_settings()
        source = args.data / "test_retain.jsonl.gz" if args.data else reviews_dir(settings.home) / "held_out.jsonl"
        texts = [row.text for row in read_examples(str(source), labels=settings.labels)]
        random.Random(0).shuffle(texts)
        tokenizer, vocabulary = words(str(load_arguments(settings)["source"]))
        process = psutil.Process()
        gc.collect()
        before = process.memory_info().rss
        llm = build(SHAPES[args.shape], tokenizer, vocabulary, args.quantization, args.device)
        gc.collect()
        built = process.memory_info().rss
        result = {
            "parameters": sum(p.numel() for p in llm.model.parameters() if p.dtype != torch.uint8)
            + sum(2 * p.numel() for p in llm.model.parameters() if p.dtype == torch.uint8),
            **measure(llm, texts, args.batch, args.rounds),
            "batch": args.batch,
            "packed": packable(llm),
            "machine": machine(),
            "date": today(),
            "threads": torch.get_num_threads(),
            "weights_mib": (built - before) / MIB,
            "serving_mib": process.memory_info().rss / MIB,
            "peak_mib": peak_bytes() / MIB,
        }
        if llm.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(llm.device)
            result["gpu"] = torch.cuda.get_device_name(llm.device)
            result["gpu_allocated_mib"] = torch.cuda.max_memory_allocated(llm.device) / MIB
            result["gpu_reserved_mib"] = torch.cuda.max_memory_reserved(llm.device) / MIB
            result["gpu_taken_mib"] = (total - free) / MIB  # with the context, and with what others have there
        known[f"{args.shape}, {args.quantization}, {args.device}"] = result
        Console(stderr=True).print(result)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(known) + "\n", encoding="utf-8")
    print(json.dumps(known))


if __name__ == "__main__":
    main()
