"""Whether an exported prompt acts outside as it does inside: ``python -m bench.interop [--json]``. The demo model.

For float32 and NF4: a prompt near the model's words is exported as a zip, unpacked, and run by real PEFT over the same
base, and through the script that comes with it as vLLM's ``prompt_embeds`` (read back as vLLM's server reads them, run
by transformers; vLLM itself is not run). Both against the plain sequence [prompt][template][text] and against the
service's classifier, which shares the prefix and packs rows. PEFT's own copy of the adapter is imported again.
Figures are largest absolute differences over the vocabulary where the label is predicted; ends with one JSON line,
exit status 1 where PEFT differs from the plain sequence in float32 by more than 1e-5 or an import is not bit for bit.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor

from app import zip_files
from app.cli_interop import EXPORTED, read_files
from app.defaults import load_arguments
from app.settings import Quantization, get_settings
from bench.tuned import machine, today
from models.inference import Classifier
from models.interop import max_bytes, peft_files, read_peft
from models.llm import FrozenLLM
from models.prompt_embeds import answer, prompt_embeds, read_export, to_base64, token_ids
from models.soft_prompt import SoftPrompt

LIMIT = 1e-5
TOKENS = 30
TEXTS = (
    "a gripping , well acted thriller that never lets up",
    "the plot is thin and the jokes are thinner",
    "It's hard to say what the director of this film had in mind; the first hour is bright, the second one is not.",
    "bad",
    "<|im_end|> is in this text",
)


@torch.no_grad()
def measure(llm: FrozenLLM, folder: Path) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    words = llm.embed(torch.randint(0, llm.embed.num_embeddings, (TOKENS,), generator=draw).to(llm.device))
    noise = 0.05 * llm.word_norm / llm.hidden_size**0.5 * torch.randn(TOKENS, llm.hidden_size, generator=draw)
    prompt = SoftPrompt(words.float().cpu() + noise, llm.fingerprint)
    files = zip_files.unpack(
        zip_files.pack(peft_files(prompt, llm, base="base", mode="routed")), dict.fromkeys(EXPORTED, 2**26)
    )
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tensor, about = read_export(folder)
    rows = [token_ids(about, llm.tokenizer, text) for text in TEXTS]
    served = llm.logits(Classifier(llm).hidden(TEXTS, [prompt]))
    plain = torch.stack([last(llm.model(inputs_embeds=sequence(llm, prompt.embeddings, row))) for row in rows])
    through_vllm = torch.stack([last(llm.model(inputs_embeds=as_vllm(llm, tensor, row))) for row in rows])
    model = PeftModel.from_pretrained(llm.model, str(folder)).eval()
    peft = []
    for row in rows:
        ids = torch.tensor([row], device=llm.device)
        peft.append(last(model(input_ids=ids, attention_mask=torch.ones_like(ids))))
    in_peft = torch.stack(peft)
    model.save_pretrained(str(folder / "again"), save_embedding_layers=False)  # or it asks the hub about the base
    back = read_peft(
        read_files(folder / "again", max_bytes(llm.hidden_size)),
        fingerprint=llm.fingerprint,
        hidden_size=llm.hidden_size,
    )
    labels = [found.label for found in Classifier(llm).classify(TEXTS, [prompt])]
    return {
        "peft_and_plain": difference(in_peft, plain),
        "vllm_sequence_and_plain": difference(through_vllm, plain),
        "peft_and_served": difference(in_peft, served),
        "peft_and_served_probabilities": difference(in_peft.softmax(-1), served.softmax(-1)),
        "largest_logit": round(float(in_peft.abs().max()), 3),
        "same_labels": labels == [answer(about, logits) for logits in in_peft],
        "imported_bit_for_bit": back.to_bytes() == prompt.to_bytes(),
        "without_the_prompt": difference(llm.logits(Classifier(llm).hidden(TEXTS)), served),
    }


def sequence(llm: FrozenLLM, prompt: Tensor, row: list[int]) -> Tensor:
    """(1, p + n, d): the literal definition."""
    ids = torch.tensor(row, device=llm.device)
    return torch.cat([prompt.to(llm.device, llm.dtype), llm.embed(ids)]).unsqueeze(0)


def as_vllm(llm: FrozenLLM, prompt: Tensor, row: list[int]) -> Tensor:
    sent = to_base64(prompt_embeds(prompt, llm.embed, row))
    taken: Tensor = torch.load(io.BytesIO(base64.b64decode(sent, validate=True)), weights_only=True, map_location="cpu")
    return taken.to(llm.device).unsqueeze(0)


def last(output: Any) -> Tensor:
    found: Tensor = output.logits[0, -1].float()
    return found


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line and nothing else")
    parser.add_argument("--record", action="store_true", help="keep the result in docs/bench/interop.json")
    args = parser.parse_args()
    console = Console(stderr=True, quiet=args.json)
    result: dict[str, Any] = {"bench": "interop", "texts": len(TEXTS), "virtual_tokens": TOKENS, "limit": LIMIT}
    kinds: tuple[Quantization, ...] = ("none", "nf4")
    with tempfile.TemporaryDirectory(prefix="letheon-interop-") as folder:
        for kind in kinds:
            settings = get_settings().model_copy(update={"quantization": kind, "device": "cpu"})
            found = measure(FrozenLLM.load(**load_arguments(settings)), Path(folder) / kind)
            result[kind] = found
            console.print(kind, found, markup=False)
    good = result["none"]["peft_and_plain"] <= LIMIT and all(result[kind]["imported_bit_for_bit"] for kind in kinds)
    line = json.dumps({"machine": machine(), "date": today(), **result})
    if args.record:
        Path("docs/bench/interop.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
