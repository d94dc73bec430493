"""Prompts as files of PEFT and vLLM: real PEFT answers as the service does, and nothing damaged or hostile is read."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import pickle
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from blob_mutations import Bomb, mutations
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load, save
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from app import zip_files
from app.cli_interop import read_files
from app.errors import InvalidInput
from bench.interop import LIMIT, measure
from models import interop
from models.errors import FingerprintMismatch, InvalidPrompt, ModelError
from models.inference import Classifier
from models.interop import ABOUT, CONFIG, WEIGHTS, max_bytes, peft_files, read_peft, vllm_files
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt

TEXTS = ["the film is good", "a bad movie with a great director , awful acting and a plot", "bad", "</s> good <s>"]
FAMILIES = ("llama", "opt", "gpt2", "gemma3")  # BOS and none, learned positions, scaled embeddings
HERE = "a" * 64


def soft_prompt(llm: FrozenLLM, tokens: int = 7) -> SoftPrompt:
    noise = torch.randn(tokens, llm.hidden_size, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(noise * 0.3, llm.fingerprint)


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def script(folder: Path) -> ModuleType:
    """The file that an export brings along, as whoever unpacks it has it."""
    spec = importlib.util.spec_from_file_location("exported", folder / "prompt_embeds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llm(source: Path) -> FrozenLLM:
    return FrozenLLM.load(str(source), quantization="none", device="cpu")


def base_model(source: Path) -> PreTrainedModel:
    """As transformers has it: nothing of Letheon is in it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def served_logits(llm: FrozenLLM, prompt: SoftPrompt) -> Tensor:
    return llm.logits(Classifier(llm).hidden(TEXTS, [prompt]))


def test_peft_loads_an_export_and_has_the_logits_of_the_service(source: Path, llm: FrozenLLM, tmp_path: Path) -> None:
    prompt = soft_prompt(llm)
    folder = write(peft_files(prompt, llm, base="a/base", mode="routed"), tmp_path / "adapter")
    model = PeftModel.from_pretrained(base_model(source), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    exported = script(folder)
    _, about = exported.read_export(folder)
    wanted, answers = served_logits(llm, prompt), Classifier(llm).classify(TEXTS, [prompt])
    for text, logits, answer in zip(TEXTS, wanted, answers, strict=True):
        ids = torch.tensor([exported.token_ids(about, tokenizer, text)])
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
        assert exported.answer(about, found) == answer.label
    assert not torch.equal(wanted, served_logits(llm, soft_prompt(llm, 6))), "the prompt does something"


def test_what_peft_saves_comes_back_bit_for_bit(source: Path, llm: FrozenLLM, tmp_path: Path) -> None:
    prompt = soft_prompt(llm)
    # The base's own folder: PEFT looks there, else on the hub, whether the vocabulary was resized.
    first = write(peft_files(prompt, llm, base=str(source), mode="routed"), tmp_path / "first")
    PeftModel.from_pretrained(base_model(source), str(first)).save_pretrained(tmp_path / "again")
    limits = max_bytes(llm.hidden_size)
    for folder in (first, tmp_path / "again"):
        back = read_peft(read_files(folder, limits), fingerprint=llm.fingerprint, hidden_size=llm.hidden_size)
        assert back.to_bytes() == prompt.to_bytes()
    archive = tmp_path / "first.zip"
    archive.write_bytes(zip_files.pack(peft_files(prompt, llm, base="a/base", mode="routed")))
    files = read_files(archive, limits)
    assert read_peft(files, fingerprint=llm.fingerprint, hidden_size=llm.hidden_size).digest == prompt.digest


def test_an_adapter_that_peft_made_is_taken(source: Path, llm: FrozenLLM, tmp_path: Path) -> None:
    """One that has nothing to do with Letheon, as a training with PEFT leaves it."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(base_model(source), config)
    model.save_pretrained(tmp_path / "adapter")
    files = read_files(tmp_path / "adapter", max_bytes(llm.hidden_size))
    assert ABOUT not in files
    found = read_peft(files, fingerprint=llm.fingerprint, hidden_size=llm.hidden_size)
    assert torch.equal(found.embeddings, model.prompt_encoder["default"].embedding.weight.detach())


def test_vllm_is_given_the_whole_sequence(source: Path, llm: FrozenLLM, tmp_path: Path) -> None:
    """What its server does with ``prompt_embeds``: base64, ``torch.load`` of weights only, one dense float (n, d)."""
    prompt, base = soft_prompt(llm), base_model(source)
    folder = write(vllm_files(prompt, llm, base="a/base", mode="concatenate"), tmp_path / "export")
    exported, tokenizer = script(folder), AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tensor, about = exported.read_export(folder)
    assert torch.equal(tensor, prompt.embeddings)
    for text, logits in zip(TEXTS, served_logits(llm, prompt), strict=True):
        ids = exported.token_ids(about, tokenizer, text)
        sent = exported.to_base64(exported.prompt_embeds(tensor, base.get_input_embeddings(), ids))
        taken = torch.load(io.BytesIO(base64.b64decode(sent, validate=True)), weights_only=True, map_location="cpu")
        assert taken.shape == (prompt.num_virtual_tokens + len(ids), llm.hidden_size) and taken.dtype == torch.float32
        with torch.no_grad():
            found = base(inputs_embeds=taken.unsqueeze(0)).logits[0, -1]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_the_bench_measures_the_same(llm: FrozenLLM, tmp_path: Path) -> None:
    found = measure(llm, tmp_path / "export")
    assert found["imported_bit_for_bit"] and found["same_labels"]
    for pair in ("peft_and_plain", "vllm_sequence_and_plain", "peft_and_served"):
        assert found[pair] <= LIMIT < found["without_the_prompt"], pair


def test_what_is_said_in_an_export(llm: FrozenLLM) -> None:
    prompt = soft_prompt(llm)
    routed = peft_files(prompt, llm, base="a/base", mode="routed")
    about = json.loads(routed[ABOUT])
    assert (about["gate"], about["fingerprint"], about["digest"]) == ("not exported", llm.fingerprint, prompt.digest)
    assert b"Its gate is not in here" in routed["README.md"] and b"personal data" in routed["README.md"]
    stacked = vllm_files(prompt, llm, base="a/base", mode="concatenate")
    assert json.loads(stacked[ABOUT])["gate"] == "none"
    assert b"behind the prompts that were in force before it" in stacked["README.md"]
    assert peft_files(prompt, llm, base="a/base", mode="routed") == routed, "the same prompt, the same bytes"
    with pytest.raises(FingerprintMismatch):
        peft_files(SoftPrompt(prompt.embeddings, HERE), llm, base="a/base", mode="routed")


# --- what is refused -------------------------------------------------------------------------------------------------


def adapter(tokens: int = 4, width: int = 8) -> dict[str, bytes]:
    embeddings = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": tokens, "token_dim": width}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save({"prompt_embeddings": embeddings})}


def read(files: dict[str, bytes]) -> SoftPrompt:
    return read_peft(files, fingerprint=HERE, hidden_size=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"num_virtual_tokens": 5}, "shape"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 10**30}, "num_virtual_tokens"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens"),
        ({"num_virtual_tokens": "4"}, "num_virtual_tokens"),
        ({"token_dim": 16}, "token_dim"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_another_kind_of_adapter_is_refused(change: dict[str, Any], said: str) -> None:
    files = adapter()
    read(files)
    files[CONFIG] = json.dumps(json.loads(files[CONFIG]) | change).encode()
    with pytest.raises(InvalidPrompt, match=said):
        read(files)


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{", b"\xff\xfe", b'{"a":' * 100_000, b"NaN", b" " * (2**18 + 1)])
@pytest.mark.parametrize("name", [CONFIG, ABOUT])
def test_a_file_that_is_no_small_json_object_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(InvalidPrompt, match=name):
        read(adapter() | {name: data})


def test_a_file_that_is_missing_and_one_of_another_model() -> None:
    for name in (CONFIG, WEIGHTS):
        with pytest.raises(InvalidPrompt, match=name):
            read({other: data for other, data in adapter().items() if other != name})
    with pytest.raises(FingerprintMismatch):
        read(adapter() | {ABOUT: json.dumps({"fingerprint": "b" * 64}).encode()})
    assert read(adapter() | {ABOUT: json.dumps({"fingerprint": HERE}).encode()}).fingerprint == HERE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_floats_are_widened_and_other_types_refused(dtype: torch.dtype) -> None:
    files = adapter()
    given = load(files[WEIGHTS])["prompt_embeddings"]
    files[WEIGHTS] = save({"prompt_embeddings": given.to(dtype)})
    assert torch.equal(read(files).embeddings, given.to(dtype).float())
    for other in (given.double(), given.int(), given.bool(), given.to(torch.float8_e4m3fn)):
        with pytest.raises(InvalidPrompt, match="must be float32"):
            read(files | {WEIGHTS: save({"prompt_embeddings": other})})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    bad = torch.zeros(4, 8)
    bad[3, 7] = value
    with pytest.raises(InvalidPrompt, match="non-finite"):
        read(adapter() | {WEIGHTS: save({"prompt_embeddings": bad})})


def test_damage_is_refused_or_is_a_whole_prompt_again(tmp_path: Path) -> None:
    """As for stored prompts: what is read has the model's shape and holds numbers, and nothing was unpickled."""
    files, marker = adapter(), tmp_path / "unpickled"
    before, passed, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], set()
    for name, bad in mutations(files[WEIGHTS], 2048, seed=11, marker=marker):
        seen.add(name)
        try:
            found = read(files | {WEIGHTS: bad})
        except ModelError:
            continue
        passed.append(name)
        assert found.embeddings.shape == (4, 8) and bool(torch.isfinite(found.embeddings).all())
    assert len(seen) == 18 and len(passed) < 256
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10
    assert not marker.exists()


def test_a_pickle_is_never_looked_at(tmp_path: Path) -> None:
    """PEFT's old form of an adapter: beside the config in a folder it is not read, and under the other name refused."""
    files, marker = adapter(), tmp_path / "unpickled"
    bomb = pickle.dumps(Bomb(marker))
    folder = write({CONFIG: files[CONFIG], "adapter_model.bin": bomb}, tmp_path / "adapter")
    with pytest.raises(InvalidPrompt, match=f"has a file {WEIGHTS}"):
        read(read_files(folder, max_bytes(8)))
    with pytest.raises(InvalidPrompt, match="not a safetensors file"):
        read(files | {WEIGHTS: bomb})
    assert not marker.exists()


# --- zip files -------------------------------------------------------------------------------------------------------


def zipped(entries: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """16 MiB in 16 kB."""
    return zipped([(CONFIG, bytes(2**24))])


@pytest.mark.parametrize("lie", [None, 0, 100], ids=["honest", "says 0", "says 100"])
def test_no_more_is_unpacked_than_there_may_be(bomb: bytes, lie: int | None) -> None:
    data = bytearray(bomb)
    if lie is not None:  # the size in the central directory and in the local header, which anybody can write
        for at in (data.index(b"PK\x01\x02") + 24, data.index(b"PK\x03\x04") + 22):
            data[at : at + 4] = lie.to_bytes(4, "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidInput):
        zip_files.unpack(bytes(data), {CONFIG: 2**16})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 2**10


def hostile_zips() -> Iterator[bytes]:
    good = zip_files.pack(adapter())
    yield b""
    yield b"PK\x03\x04" + bytes(64)
    yield good[:-10]
    yield good[: len(good) // 2]
    with pytest.warns(UserWarning, match="Duplicate name"):
        yield zipped([(CONFIG, b"{}"), (CONFIG, b"{}")])
    yield zipped([(f"{number}", b"") for number in range(100)])
    encrypted = bytearray(good)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(mark) + at] |= 1
    yield bytes(encrypted)
    method = bytearray(good)
    method[method.index(b"PK\x03\x04") + 8] = method[method.index(b"PK\x01\x02") + 10] = 99
    yield bytes(method)
    broken = bytearray(good)
    broken[broken.index(b"PROMPT_TUNING")] ^= 1  # another CRC
    yield bytes(broken)


def test_hostile_zip_files_are_refused() -> None:
    limits = max_bytes(8)
    assert read(zip_files.unpack(zip_files.pack(adapter()), limits)).num_virtual_tokens == 4
    refused = 0
    for data in hostile_zips():
        with pytest.raises(InvalidInput):
            zip_files.unpack(data, limits)
        refused += 1
    assert refused == 9


def test_names_that_lead_elsewhere_are_not_looked_at(tmp_path: Path) -> None:
    entries = [
        (f"../{CONFIG}", b"{}"),
        (f"/tmp/{CONFIG}", b"{}"),
        (f"sub/{CONFIG}", b"{}"),
        ("adapter_model.bin", b"x"),
    ]
    assert zip_files.unpack(zipped(entries), max_bytes(8)) == {}


def test_a_file_that_is_larger_than_an_adapter_can_be(tmp_path: Path) -> None:
    limits = max_bytes(8)
    big = tmp_path / "big.zip"
    with big.open("wb") as file:
        file.truncate(sum(limits.values()) + 2**21)
    with pytest.raises(InvalidInput, match="larger than an adapter"):
        read_files(big, limits)
    folder = write({CONFIG: bytes(limits[CONFIG] + 1)}, tmp_path / "folder")
    with pytest.raises(InvalidInput, match="more than"):
        read_files(folder, limits)


def test_the_limits_let_the_largest_adapter_through() -> None:
    files = adapter(tokens=interop.MAX_TOKENS)
    assert read(files).num_virtual_tokens == interop.MAX_TOKENS
    with pytest.raises(InvalidPrompt, match="num_virtual_tokens"):
        read(adapter(tokens=interop.MAX_TOKENS + 1))
