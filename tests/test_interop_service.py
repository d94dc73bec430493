"""Exports over HTTP and from the command line; imports, which a worker checks like any prompt; the log of both."""

from __future__ import annotations

import io
import json
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from api_kit import (
    MARKER,
    Api,
    add_prompt,
    assert_problem,
    listening,
    make_gate,
    new_key,
    running,
    server_logs,
    soft_prompt,
    tiny_llm,
)
from click.testing import Result
from databases import migrated_database
from safetensors.torch import load
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from typer.testing import CliRunner
from worker_kit import write_retain

from app import active_set, approval, audit, cli, db, interop, job_queue, keys, lifecycle, receipts
from app.errors import Conflict, NotReady
from app.settings import Mode, get_settings
from app.tables import Checkpoint, ForgetDigest, Prompt, UnlearnRequest
from app.vault import Vault
from models.errors import FingerprintMismatch
from models.examples import read_examples
from models.inference import Classifier
from models.interop import ABOUT, CONFIG, WEIGHTS, peft_files, read_peft
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from worker.context import Context
from worker.tasks import run_job

TEXT = f"{MARKER} is awful"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("exports")
    with running(f"sqlite:///{folder}/letheon.db", folder, export_prompts=True, model="a/base") as api:
        yield api


@pytest.fixture(scope="module")
def prompt_id(api: Api) -> str:
    return add_prompt(api.service, soft_prompt(1), make_gate(TEXT))


def entries(api: Api, subject: str) -> list[Any]:
    with api.service.sessions() as session:
        return audit.list_entries(session, limit=200, subject=subject)[0]


def exported(api: Api, prompt_id: str, kind: str, headers: dict[str, str] | None = None) -> Any:
    path = f"/admin/prompts/{prompt_id}/export"
    return api.client.get(path, params={"format": kind}, headers=headers or api.key("admin"))


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# --- export ----------------------------------------------------------------------------------------------------------


def test_every_format_holds_the_prompt_that_is_in_force(api: Api, prompt_id: str) -> None:
    prompt, llm = soft_prompt(1), tiny_llm()
    peft = exported(api, prompt_id, "peft")
    assert (peft.status_code, peft.headers["content-type"]) == (200, "application/zip")
    files = unzipped(peft.content)
    assert read_peft(files, fingerprint=llm.fingerprint, hidden_size=llm.hidden_size).to_bytes() == prompt.to_bytes()
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == "a/base"
    about = json.loads(files[ABOUT])
    assert (about["mode"], about["gate"], about["digest"]) == ("routed", "not exported", prompt.digest)
    tensor = exported(api, prompt_id, "safetensors")
    assert tensor.headers["content-type"] == "application/octet-stream"
    vllm = unzipped(exported(api, prompt_id, "vllm").content)
    for data in (tensor.content, vllm["prompt.safetensors"], files[WEIGHTS]):
        assert torch.equal(load(data)["prompt_embeddings"], prompt.embeddings)
    for response, name in ((peft, f"{prompt_id}-peft.zip"), (tensor, f"{prompt_id}.safetensors")):
        assert response.headers["content-disposition"] == f'attachment; filename="{name}"'
        assert response.headers["cache-control"] == "no-store"
        assert (response.headers["letheon-prompt-digest"], response.headers["letheon-gate"]) == (
            prompt.digest,
            "not exported",
        )
    assert exported(api, prompt_id, "pickle").status_code == 422


def test_an_export_is_in_the_log_and_nothing_of_the_prompt_is(
    api: Api, prompt_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    before = len(entries(api, prompt_id))
    headers = api.key("admin")
    data = exported(api, prompt_id, "vllm", headers).content
    [entry] = entries(api, prompt_id)[: len(entries(api, prompt_id)) - before]
    assert (entry.action, entry.detail) == (
        "prompt.exported",
        {"format": "vllm", "prompt_digest": soft_prompt(1).digest},
    )
    assert entry.actor == "key_" + headers["Authorization"].split("_")[1]
    numbers = [f"{value:.4f}" for value in soft_prompt(1).embeddings.flatten().tolist()[:8]]
    clocks = ("created", "msecs", "relativeCreated")  # they have digits of their own
    logs = "\n".join(
        str({name: value for name, value in vars(record).items() if name not in clocks})
        for record in server_logs(caplog)
    )
    assert logs and not any(number in logs for number in numbers)
    assert repr(data[:40]) not in logs
    with api.service.sessions.begin() as session:
        row = session.get_one(Prompt, prompt_id)
    receipt = receipts.build(api.service.sessions, api.service.vault, row.request_id)
    assert "prompt.exported" in [found["action"] for found in receipt["receipt"]["audit"]]


def test_a_suspended_prompt_is_exported_and_a_revoked_one_is_gone(api: Api) -> None:
    other = add_prompt(api.service, soft_prompt(2), make_gate("the plot of it"))
    headers = api.key("admin")
    with api.service.sessions() as session:
        version = active_set.read_active_set(session).version
    restored = api.client.post(f"/admin/active-sets/{version - 1}/restore", json={"reason": "x"}, headers=headers)
    assert restored.status_code == 200
    assert exported(api, other, "peft").status_code == 200
    assert api.client.post(f"/admin/prompts/{other}/revoke", json={"reason": "x"}, headers=headers).status_code == 200
    before = len(entries(api, other))
    assert_problem(exported(api, other, "peft"), 409, "conflict")
    assert_problem(exported(api, "prm_" + "0" * 28, "peft"), 404, "not-found")
    assert len(entries(api, other)) == before, "nothing left, so nothing is said"


def test_what_does_not_open_or_is_another_models_is_not_exported(api: Api) -> None:
    """In transactions that are never committed, so that the others find their prompt."""
    bad = add_prompt(api.service, soft_prompt(3), make_gate("the acting of it"))
    vault, llm, settings = api.service.vault, tiny_llm(), api.service.settings
    with api.service.sessions() as session:
        row = session.get_one(Prompt, bad)
        assert row.wrapped_key is not None
        aad = active_set.prompt_aad(row.id, row.digest)
        row.sealed = vault.seal(row.wrapped_key, soft_prompt(4).to_bytes(), aad=aad)
        session.flush()
        with pytest.raises(NotReady, match=bad):
            interop.export_prompt(session, vault, llm, settings, bad, "peft", actor="key_1")
        session.rollback()
    with api.service.sessions() as session:
        session.get_one(Prompt, bad).fingerprint = "f" * 64
        session.flush()
        with pytest.raises(Conflict, match="another model"):
            interop.export_prompt(session, vault, llm, settings, bad, "peft", actor="key_1")
        session.rollback()


def test_nothing_is_exported_unless_the_operator_says_so(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, mode=Mode.CONCATENATE) as api:
        prompt_id = add_prompt(api.service, soft_prompt(1))
        problem = assert_problem(exported(api, prompt_id, "peft"), 403, "exports-off")
        assert "LETHEON_EXPORT_PROMPTS" in problem["detail"]
        assert [entry.action for entry in entries(api, prompt_id)] == []


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(f"sqlite:///{tmp_path}/s.db", tmp_path / "s", mode=Mode.CONCATENATE, export_prompts=True) as live:
        url, app, _ = live
        prompt = soft_prompt(1)
        prompt_id = add_prompt(app.state.service, prompt)
        monkeypatch.setenv("LETHEON_URL", url)
        monkeypatch.setenv("LETHEON_API_KEY", new_key(app.state.service, "auditor")["Authorization"][7:])
        get_settings.cache_clear()
        refused = run("prompts", "export", prompt_id, "--out", "no")
        assert refused.exit_code == 1 and "forbidden" in refused.stderr and not Path("no").exists()
        monkeypatch.setenv("LETHEON_API_KEY", new_key(app.state.service, "admin")["Authorization"][7:])
        done = run("prompts", "export", prompt_id, "--out", "adapter", "--json")
        assert done.exit_code == 0, done.stderr
        again = run("prompts", "export", prompt_id, "--out", "adapter")
        assert again.exit_code == 1 and "exists" in again.stderr
        tensor = run("prompts", "export", prompt_id, "--format", "safetensors", "--out", "tensor")
        assert tensor.exit_code == 0, tensor.stderr
    names = {CONFIG, WEIGHTS, ABOUT, "prompt_embeds.py", "README.md"}
    assert {Path(path).name for path in json.loads(done.stdout)["files"]} == names
    assert {path.name for path in Path("adapter").iterdir()} == names
    assert torch.equal(load(Path("tensor/prompt.safetensors").read_bytes())["prompt_embeddings"], prompt.embeddings)
    assert stat.S_IMODE(Path("adapter").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in Path("adapter").iterdir()} == {0o600}


def run(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=given)


# --- import ----------------------------------------------------------------------------------------------------------


class Home:
    """A deployment that the command line and a worker in this process share."""

    def __init__(self, folder: Path, model: Path, llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.llm, self._monkeypatch = folder, model, llm, monkeypatch
        self.knobs: dict[str, Any] = {
            "home": folder / "home",
            "model": str(model),
            "quantization": "none",
            "device": "cpu",
            "retain": str(write_retain(folder / "retain.jsonl")),
            "check_retain_rows": 16,
            "min_forget_abstain": 0,
            "max_retain_drop": 1,
            "max_class_drop": 1,
            "max_neighbour_drop": 1,
        }
        (folder / "home").mkdir()
        self.url = migrated_database(folder / "letheon.db")
        self.engine = db.make_engine(self.url)
        self.sessions: sessionmaker[Session] = db.make_sessions(self.engine)
        self.set()

    def set(self, **knobs: Any) -> None:
        """For the command line; a worker is given the same."""
        self.knobs |= knobs
        self._monkeypatch.setenv("DATABASE_URL", self.url)
        for name, value in self.knobs.items():
            self._monkeypatch.setenv(f"LETHEON_{name.upper()}", str(value))
        get_settings.cache_clear()

    def use(self, *scopes: str) -> str:
        """A key of these scopes, presented by the command line; its id."""
        with self.sessions.begin() as session:
            key, plaintext = keys.create_key(session, name="test", scopes=scopes, actor="test")
            self._monkeypatch.setenv("LETHEON_API_KEY", plaintext)
            return key.id

    def adapter(self, prompt: SoftPrompt, name: str = "adapter") -> Path:
        folder = self.folder / name
        folder.mkdir()
        for file, data in peft_files(prompt, self.llm, base="a/base", mode="routed").items():
            (folder / file).write_bytes(data)
        return folder

    def prompt(self, tokens: int = 5) -> SoftPrompt:
        noise = torch.randn(tokens, self.llm.hidden_size, generator=torch.Generator().manual_seed(7))
        return SoftPrompt(noise * 0.3, self.llm.fingerprint)

    def imported(self, source: Path, *more: str) -> str:
        result = run("prompts", "import", str(source), "--file", "-", "--json", *more, given=TEXTS)
        assert result.exit_code == 0, result.stderr
        found: str = json.loads(result.stdout)["request_id"]
        return found

    def work(self, request_id: str, **changed: Any) -> UnlearnRequest:
        """A worker's whole job."""
        settings = get_settings().model_copy(update=changed)
        retain = read_examples(settings.retain, labels=settings.labels)
        vault = Vault.from_settings(settings)
        try:
            with self.sessions.begin() as session:
                vault.adopt(session)
            context = Context(settings=settings, sessions=self.sessions, vault=vault, llm=self.llm, retain=retain)
            assert run_job(context, request_id)
        finally:
            vault.close()
        with self.sessions() as session:
            return lifecycle.get_request(session, request_id)

    def count(self, table: Any) -> int:
        with self.sessions() as session:
            return len(session.scalars(select(table)).all())


TEXTS = "".join(f"the acting of {MARKER} is {word}\n" for word in ("great", "awful", "slow", "great", "quite good"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(source: Path) -> FrozenLLM:
    return FrozenLLM.load(str(source), quantization="none", device="cpu")


@pytest.fixture
def home(tmp_path: Path, source: Path, llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.chdir(tmp_path)
    home = Home(tmp_path, source, llm, monkeypatch)
    yield home
    home.engine.dispose()
    get_settings.cache_clear()


@pytest.mark.parametrize("mode", list(Mode))
def test_an_imported_prompt_is_checked_and_comes_into_force(home: Home, mode: Mode) -> None:
    home.set(mode=mode)
    actor, prompt = home.use("admin"), home.prompt()
    request_id = home.imported(home.adapter(prompt))
    with home.sessions() as session:
        request = lifecycle.get_request(session, request_id)
        assert (request.state, request.num_texts, request.api_key_id) == ("pending", 4, actor)
        [entry] = [e for e in audit.entries_about(session, request_id) if e.action == "prompt.imported"]
        wanted = {"prompt_digest": prompt.digest, "num_virtual_tokens": 5, "format": "peft"}
        assert (entry.actor, entry.detail) == (actor, wanted)
        assert b"prompt_embeddings" not in session.scalars(select(Checkpoint.sealed)).one()
    done = home.work(request_id)
    assert done.state == "active", done.failure
    assert done.metrics is not None
    assert (done.metrics["stopped"], done.metrics["steps"], done.metrics["passed"]) == ("imported", 0, True)
    with home.sessions() as session:
        [row] = session.scalars(select(Prompt)).all()
        assert (row.digest, row.mode, row.gate_digest is None) == (prompt.digest, mode, mode == Mode.CONCATENATE)
        vault = Vault.from_settings(get_settings())
        assert active_set.open_prompt(vault, row) == prompt.to_bytes(), "bit for bit what was imported"
        vault.close()
        audit.verify(session)
    assert home.count(Checkpoint) == 0, "shredded with the texts"


def test_one_that_fails_its_checks_ends_and_is_not_trained_on(home: Home) -> None:
    home.set(mode=Mode.CONCATENATE)
    home.use("admin")
    failed = home.work(home.imported(home.adapter(home.prompt())), max_retain_drop=-2.0)
    assert failed.state == "failed"
    assert failed.failure is not None and failed.failure["code"] == "checks-failed"
    assert failed.metrics is not None
    assert (failed.metrics["stopped"], failed.metrics["earlier_tries"]) == ("imported", [])
    assert home.count(Prompt) == 0


def test_a_second_person_has_to_agree_where_that_is_asked(home: Home) -> None:
    home.set(mode=Mode.ROUTED)
    home.use("admin", "approve")
    prompt = home.prompt()
    request_id = home.imported(home.adapter(prompt), "--require-approval")
    assert home.work(request_id).state == "awaiting_approval"
    with home.sessions.begin() as session:
        approval.approve(session, request_id, actor="key_of_another")
    assert home.work(request_id).state == "active"
    with home.sessions() as session:
        assert session.scalars(select(Prompt.digest)).one() == prompt.digest


def test_it_survives_a_worker_that_dies_and_one_with_other_settings(home: Home) -> None:
    """The seed and the number of tokens are the request's own, so the worker cannot take it for another training."""
    home.set(mode=Mode.ROUTED)
    home.use("admin")
    prompt = home.prompt()
    request_id = home.imported(home.adapter(prompt))
    with home.sessions.begin() as session:
        claimed = job_queue.claim(session, request_id, owner="lost", lease_seconds=1e-6, max_attempts=3)
        assert claimed is not None
    done = home.work(request_id, seed=99, num_virtual_tokens=8, max_steps=3)
    assert (done.state, done.attempt) == ("active", 2), done.failure
    with home.sessions() as session:
        assert session.scalars(select(Prompt.digest)).one() == prompt.digest


def test_who_may_not_and_what_cannot_be(home: Home) -> None:
    good, other = home.adapter(home.prompt()), SoftPrompt(home.prompt().embeddings * 1e4, home.llm.fingerprint)
    huge = home.adapter(other, "huge")
    foreign = home.adapter(home.prompt(), "foreign")
    about = json.loads((foreign / ABOUT).read_text())
    (foreign / ABOUT).write_text(json.dumps(about | {"fingerprint": "f" * 64}))

    def refused(source: Path, given: str = TEXTS) -> str:
        result = run("prompts", "import", str(source), "--file", "-", given=given)
        assert result.exit_code == 1 and result.stdout == "", (result.stdout, result.stderr)
        assert MARKER not in result.stderr and "Traceback" not in result.stderr
        return " ".join(result.stderr.split())

    home._monkeypatch.delenv("LETHEON_API_KEY", raising=False)
    assert "API key" in refused(good)
    home.use("requests", "approve", "auditor")
    assert "'admin'" in refused(good)
    home.use("admin")
    assert "LETHEON_MAX_PROMPT_NORM" in refused(huge)
    assert "another model" in refused(foreign)
    assert "text 2 has" in refused(good, f"short\n{MARKER} {'word ' * 1000}\n")
    assert "label of text 1" in refused(good, json.dumps({"text": MARKER, "label": "none such"}))
    assert "No such file" in refused(home.folder / "nothing")
    (good / WEIGHTS).unlink()
    (good / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert WEIGHTS in refused(good)
    assert (home.count(UnlearnRequest), home.count(ForgetDigest), home.count(Checkpoint)) == (0, 0, 0)


def test_out_and_in_again(home: Home) -> None:
    """Exported by one service, imported by another with the same model: the same answers from both."""
    home.set(mode=Mode.CONCATENATE)
    home.use("admin")
    prompt = home.prompt()
    with running(
        f"sqlite:///{home.folder}/first.db",
        home.folder,
        llm=home.llm,
        mode=Mode.CONCATENATE,
        export_prompts=True,
    ) as api:
        archive = home.folder / "adapter.zip"
        answer = exported(api, add_prompt(api.service, prompt), "peft")
        assert answer.headers["letheon-gate"] == "none"
        archive.write_bytes(answer.content)
    assert home.work(home.imported(archive)).state == "active"
    with home.sessions() as session:
        [row] = session.scalars(select(Prompt)).all()
        vault = Vault.from_settings(get_settings())
        data = active_set.open_prompt(vault, row)
        vault.close()
    back = SoftPrompt.from_bytes(data, fingerprint=home.llm.fingerprint, digest=prompt.digest)
    texts, classifier = ["the film is good", "bad"], Classifier(home.llm)
    assert torch.equal(classifier.hidden(texts, [back]), classifier.hidden(texts, [prompt]))
    with pytest.raises(FingerprintMismatch):
        SoftPrompt.from_bytes(data, fingerprint="f" * 64)
