"""The model that the SST-2 benches measure: fine-tuned here once, on the forget rows and some of the retain rows."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar

from models.evaluation import RowAnswers
from models.examples import Example, digest_examples, read_examples
from models.finetune import FinetuneConfig, FinetuneProgress, finetune
from models.llm import FrozenLLM
from models.row_cache import CacheFolder
from models.soft_prompt import SoftPrompt
from models.training import TrainingResult

LABELS = ("negative", "positive")
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}
SETS = ("train_retain", "train_forget", "test_retain", "test_forget")
# What comes with the source, by the digest of data and settings: the adapter, since fine-tuning takes half an hour and
# never ends in quite the same model, and in `made` the soft prompts that were trained for it, minutes each.
SHIPPED = Path(__file__).parent / "adapters"
# As the demo adapter was made: on CPU the unquantized base in bfloat16 autocast is faster than NF4 (docs/LOG.md).
FINETUNE: dict[str, Any] = {
    "quantization": "none",
    "rank": 8,
    "lora_alpha": 16,
    "learning_rate": 5e-4,
    "batch_size": 24,
}


@dataclass(frozen=True, repr=False)
class Tuned:
    """``sets``: the four whole files. ``retain``: the train rows that the model was tuned on. ``work``: its folder."""

    llm: FrozenLLM
    adapter: Path
    sets: dict[str, list[Example]]
    retain: list[Example]
    work: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder with {train,test}_{forget,retain}.jsonl.gz")
    parser.add_argument("--base", default="var/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--work", type=Path, default=Path("var/sst2"))
    parser.add_argument("--template", default="instruction-first")
    parser.add_argument("--quantization", default="nf4", choices=["none", "int8", "nf4"])
    parser.add_argument("--retain-rows", type=int, default=4000, help="retain rows to fine-tune on and to train with")
    parser.add_argument("--epochs", type=int, default=2, help="of the fine-tuning")
    parser.add_argument("--seed", type=int, default=0)


def tuned(args: argparse.Namespace, console: Console) -> Tuned:
    """Fine-tune, or find what an earlier run left under ``--work``; then load it as it would serve."""
    if args.data is None:
        raise SystemExit("--data is missing: the folder with the four SST-2 files")
    sets = {name: read_examples(str(args.data / f"{name}.jsonl.gz"), labels=LABELS) for name in SETS}
    retain = random.Random(args.seed).sample(sets["train_retain"], min(args.retain_rows, len(sets["train_retain"])))
    rows = [*sets["train_forget"], *retain]
    tuning = FinetuneConfig(
        base=args.base, output="", template=args.template, epochs=args.epochs, seed=args.seed, **FINETUNE
    )
    work = args.work / digest_of(asdict(tuning), digest_examples(rows))
    adapter = SHIPPED / work.name  # its digest names the data and the settings
    if not adapter.exists():
        adapter = work / "adapter"
    tune_once(adapter, rows, tuning, console)
    unpack(SHIPPED / work.name / "made", work)
    llm = FrozenLLM.load(args.base, adapter=str(adapter), quantization=args.quantization, template=args.template)
    return Tuned(llm, adapter, sets, retain, work)


def tune_once(adapter: Path, rows: Sequence[Example], tuning: FinetuneConfig, console: Console) -> None:
    """Fine-tune into the folder ``adapter``, unless an earlier run did."""
    if (adapter / "adapter_model.safetensors").exists():
        return
    with Bar(console=console) as bar:
        task = bar.add_task(adapter.name, total=None)

        def tick(p: FinetuneProgress) -> None:
            bar.update(task, total=p.total_steps, completed=p.step, description=f"{adapter.name}, loss {p.loss:.3f}")

        finetune(rows, replace(tuning, output=str(adapter)), tick)


def kept_answers(path: Path, make: Callable[[], Mapping[str, RowAnswers]]) -> dict[str, RowAnswers]:
    """Answers by set: from ``path`` where an earlier run left them."""
    if not path.exists():
        data = io.BytesIO()
        torch.save({n: (a.said, a.scores, a.among_labels) for n, a in make().items()}, data)
        write(path, data.getvalue())
    return {n: RowAnswers(*parts) for n, parts in torch.load(path, weights_only=True).items()}


def kept_prompt(path: Path, llm: FrozenLLM, train: Callable[[], TrainingResult]) -> tuple[SoftPrompt, dict[str, Any]]:
    """A prompt and facts on its training: from ``path`` where an earlier run left them."""
    data, facts = (path.with_name(path.name + suffix) for suffix in (".safetensors", ".json"))
    if not facts.exists():
        result = train()
        write(data, result.prompt.to_bytes())
        found = {
            "steps": result.steps,
            "seconds": round(result.seconds, 1),  # of the last stretch, where it was resumed
            "resumed_from": result.resumed_from,
            "stopped": result.stopped,
        }
        write(facts, json.dumps(found).encode())
    return SoftPrompt.from_bytes(data.read_bytes(), fingerprint=llm.fingerprint), json.loads(facts.read_text())


def parse(parser: argparse.ArgumentParser, out: Path) -> argparse.Namespace:
    """The arguments, those of a recorded result among them. With ``--json`` it prints that and ends with SystemExit."""
    parser.add_argument("--out", type=Path, default=out, help=f"where the result is recorded (default {out})")
    parser.add_argument("--json", action="store_true", help="print the recorded result and compute nothing")
    args = parser.parse_args()
    if args.json:
        if not args.out.exists():
            raise SystemExit(f"{args.out}: nothing is recorded there; run without --json")
        print(args.out.read_text(encoding="utf-8").strip())
        raise SystemExit(0)
    return args


def machine() -> str:
    """The processor, as Linux names it, with the widest units for products that it has: one name may be many kinds."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^flags\s*: (.+)$", text, re.MULTILINE)[:1])))
    units = next((UNITS[flag] for flag in UNITS if flag in flags), None)
    return ", ".join(filter(None, [names[0] if names else platform.processor(), units]))


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def record(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print one JSON line, and keep it. It names machine and day, these unless it says otherwise."""
    line = json.dumps({"machine": machine(), "date": today(), **result})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


def unpack(made: Path, work: Path) -> None:
    """Files that come with the source, where an earlier run left none."""
    for file in sorted(made.rglob("*"), reverse=True):  # a prompt before the facts that say it is there
        target = work / file.relative_to(made)
        if file.is_file() and not target.exists():
            write(target, file.read_bytes())


def kept_in(folder: Path) -> CacheFolder:
    """Caches of a bench's rows. Anybody may know which: they are public."""
    return CacheFolder(folder, b"bench")


def slug(name: str) -> str:
    return name.lower().replace(" ", "-").replace("&", "and")


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
