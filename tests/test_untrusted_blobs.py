"""Prompts, gates and models from a hostile place: refused with an error of ours, and nothing of them is run."""

from __future__ import annotations

import ast
import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from api_kit import Api, add_prompt, assert_problem, gate_space, make_gate, running, soft_prompt, tiny_llm
from blob_mutations import mutations
from tiny_models import make_tiny_model

from app import active_set
from app.errors import NotReady, VaultError
from app.settings import Mode
from app.stack import StackReader
from app.tables import GateSpace as GateSpaceRow
from app.tables import Prompt
from app.vault import Vault
from models.checkpoint import pack, unpack
from models.errors import CheckpointError, InvalidGate, InvalidPrompt, ModelError
from models.gate import Gate, GateSpace, fit_space
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt

HERE = "a" * 64
COUNT = 4096
REPOSITORY = Path(__file__).resolve().parent.parent


def small() -> dict[str, tuple[bytes, Callable[[bytes, str | None], Any], type[ModelError]]]:
    """A good blob of each kind, how it is read, and how it is refused."""
    prompt = SoftPrompt(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), HERE)
    space = fit_space(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), 2, fingerprint=HERE)
    gate = Gate(space.basis.T[:2].contiguous(), 0.4, 0.9, torch.zeros(3, 32, dtype=torch.uint8), space.digest)
    return {
        "prompt": (
            prompt.to_bytes(),
            lambda data, digest: SoftPrompt.from_bytes(data, fingerprint=HERE, digest=digest),
            InvalidPrompt,
        ),
        "gate": (gate.to_bytes(), lambda data, digest: Gate.from_bytes(data, digest=digest), InvalidGate),
        "space": (
            space.to_bytes(),
            lambda data, digest: GateSpace.from_bytes(data, fingerprint=HERE, digest=digest),
            InvalidGate,
        ),
    }


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kind", ["prompt", "gate", "space"])
def test_every_altered_blob_is_refused(kind: str, tmp_path: Path) -> None:
    """With the digest on record, as they are read to be served."""
    good, read, refusal = small()[kind]
    digest: str = read(good, None).digest
    assert read(good, digest).digest == digest
    seen = set()
    for name, bad in mutations(good, COUNT, seed=1, marker=tmp_path / "unpickled"):
        with pytest.raises(refusal):
            read(bad, digest)
        seen.add(name)
    assert len(seen) == 18, "every kind of damage was done"
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("kind", ["prompt", "gate", "space"])
def test_without_a_digest_damage_that_shows_is_refused(kind: str, tmp_path: Path) -> None:
    """The reader alone, for instance of a file: only what is a whole blob again may pass, and it holds numbers."""
    good, read, _ = small()[kind]
    read(good, None)
    before, passed = memory(), []
    for name, bad in mutations(good, COUNT, seed=2, marker=tmp_path / "unpickled"):
        try:
            found = read(bad, None)
        except ModelError:
            continue
        passed.append(name)
        tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        assert tensors and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    assert memory() - before < 64 * 2**20, "no shape in a header makes room for itself"
    # Other numbers, another name for the same ones, and what a reader of JSON may ignore.
    assert set(passed) <= {"flip", "flip_header", "splice", "duplicate", "metadata", "dtype"}, set(passed)
    assert len(passed) < COUNT // 8
    assert not (tmp_path / "unpickled").exists()


def test_a_type_that_torch_has_no_name_for(tmp_path: Path) -> None:
    header = json.dumps({"embeddings": {"dtype": "F8_E8M0", "shape": [2, 4], "data_offsets": [0, 8]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.raises(InvalidPrompt, match="KeyError"):
        SoftPrompt.from_bytes(data, fingerprint=HERE)
    with pytest.raises(InvalidGate, match="KeyError"):
        Gate.from_bytes(data)


def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path: Path) -> None:
    parameters = {"phi": torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))}
    optimizer = torch.optim.AdamW(parameters.values())
    parameters["phi"].sum().backward()
    optimizer.step()
    good = pack(parameters, optimizer, {"step": 1, "seed": 0})
    assert unpack(good, parameters, optimizer, expect={"seed": 0})["step"] == 1
    refused = 0
    for _, bad in mutations(good, COUNT // 4, seed=7, marker=tmp_path / "unpickled"):
        try:
            unpack(bad, parameters, optimizer, expect={"seed": 0})
        except CheckpointError:
            refused += 1
        assert parameters["phi"].shape == (4, 8) and parameters["phi"].dtype == torch.float32
    assert refused > COUNT // 8
    assert not (tmp_path / "unpickled").exists()


def test_every_altered_sealed_blob_is_refused(vault: Vault, tmp_path: Path) -> None:
    good, _, _ = small()["prompt"]
    wrapped = vault.new_key()
    sealed = vault.seal(wrapped, good, aad="prm_1")
    assert vault.open(wrapped, sealed, aad="prm_1") == good
    rng = random.Random(3)
    for _ in range(COUNT):
        bad = bytearray(rng.choice((sealed, wrapped)))
        was = bytes(bad)
        match rng.randrange(3):
            case 0:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            case 1:
                del bad[rng.randrange(len(bad)) :]
            case _:
                bad += rng.randbytes(rng.randrange(1, 64))
        key, value = (wrapped, bytes(bad)) if was == sealed else (bytes(bad), sealed)
        with pytest.raises(VaultError):
            vault.open(key, value, aad="prm_1")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        yield api


def test_nothing_altered_is_served(api: Api, tmp_path: Path) -> None:
    """Sealed under the right key, as only who has the master key could: still other bytes than were activated."""
    text = "the plot is awful"
    prompt, gate = soft_prompt(1), make_gate(text)
    prompt_id = add_prompt(api.service, prompt, gate)
    vault, fingerprint = api.service.vault, tiny_llm().fingerprint
    marker = tmp_path / "unpickled"
    bad_prompts = list(mutations(prompt.to_bytes(), 100, seed=4, marker=marker))
    bad_gates = list(mutations(gate.to_bytes(), 100, seed=5, marker=marker))
    bad_spaces = list(mutations(gate_space().to_bytes(), 40, seed=6, marker=marker))
    with api.service.sessions() as session:  # never committed
        row = session.get_one(Prompt, prompt_id)
        space = session.get_one(GateSpaceRow, gate.space)
        StackReader(vault, fingerprint=fingerprint, mode=Mode.ROUTED).read(session)
        key, sealed, sealed_gate, data = row.wrapped_key, row.sealed, row.sealed_gate, space.data
        assert key is not None

        def refused() -> None:
            session.flush()
            with pytest.raises((NotReady, VaultError, ModelError)):
                StackReader(vault, fingerprint=fingerprint, mode=Mode.ROUTED).read(session)

        for _, bad in bad_prompts:
            row.sealed = vault.seal(key, bad, aad=active_set.prompt_aad(row.id, row.digest))
            refused()
        row.sealed = sealed
        for _, bad in bad_gates:
            assert row.gate_digest is not None
            row.sealed_gate = vault.seal(key, bad, aad=active_set.gate_aad(row.id, row.gate_digest))
            refused()
        row.sealed_gate = sealed_gate
        for _, bad in bad_spaces:
            space.data = bad
            refused()
        space.data = data
        session.flush()
        StackReader(vault, fingerprint=fingerprint, mode=Mode.ROUTED).read(session)
    assert not marker.exists()


def test_an_altered_prompt_is_a_503(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/letheon.db"
    prompt = soft_prompt(1)
    with running(url, tmp_path, mode=Mode.CONCATENATE) as api:
        prompt_id = add_prompt(api.service, prompt)
        other = SoftPrompt(prompt.embeddings + 1e-3, prompt.fingerprint).to_bytes()  # a prompt, but not this one
        with api.service.sessions.begin() as session:
            row = session.get_one(Prompt, prompt_id)
            assert row.wrapped_key is not None
            row.sealed = api.service.vault.seal(row.wrapped_key, other, aad=active_set.prompt_aad(row.id, row.digest))
    with running(url, tmp_path, mode=Mode.CONCATENATE) as api:
        for _ in range(2):
            response = api.client.post("/classify", json={"text": "good"}, headers=api.key("classify"))
            assert prompt_id in assert_problem(response, 503, "not-ready")["detail"]


# --- code that comes with a model ------------------------------------------------------------------------------------


def python_files() -> list[Path]:
    tops = ("app", "bench", "client", "deploy", "models", "worker")
    return [path for top in tops for path in (REPOSITORY / top).rglob("*.py")]


def test_no_call_trusts_code_that_comes_with_a_model() -> None:
    loads = 0
    for path in python_files():
        source = path.read_text(encoding="utf-8")
        if "from_pretrained" not in source and "trust_remote_code" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            said = {keyword.arg: keyword.value for keyword in node.keywords}.get("trust_remote_code")
            if said is not None:
                assert isinstance(said, ast.Constant) and said.value is False, f"{path.name}:{node.lineno}"
            called = ast.unparse(node.func)
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                assert said is not None, f"{path.name}:{node.lineno} leaves it to whoever sits at the terminal"
                loads += 1
    assert loads >= 2


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_that_comes_with_a_model_is_not_run(model_type: str, tmp_path: Path) -> None:
    """A known architecture is loaded by transformers' own code, an unknown one is refused."""
    folder = Path(make_tiny_model(tmp_path / "tiny"))
    marker = tmp_path / "was-run"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["auto_map"] = {"AutoTokenizer": ["evil.Words", "evil.Words"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    if model_type == "llama":
        assert FrozenLLM.load(str(folder), quantization="none", device="cpu").hidden_size == 32
    else:
        with pytest.raises(ModelError):
            FrozenLLM.load(str(folder), quantization="none", device="cpu")
    assert not marker.exists()
