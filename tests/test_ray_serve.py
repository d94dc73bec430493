"""The Ray Serve deployment, run as its page says: ``serve run`` with two replicas, on a local Ray of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from api_kit import MASTER_KEY, add_prompt, make_gate, new_key, running, soft_prompt, sse, wait_until
from databases import database_kinds, free_port, fresh_database
from tiny_models import make_tiny_model
from vault_kit import away
from worker_kit import PYTHONPATH, ROOT, Process, wait_for

from app.vault import Vault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'letheon[ray]'"
    ),
]

# `serve run` starts a Ray of its own where none runs in the process. This one is small and has no dashboard.
DRIVER = """
import sys, ray
from ray.serve.scripts import cli
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=sys.argv[1], namespace="serve")
cli(["run", sys.argv[2]])
"""
FORGOTTEN = "Zyxomma Quillfeather is bad"
OTHERS = ["a great story", "the plot is awful"]
SECRETS = {name: f"{name}{secrets.token_hex(8)}" for name in ("text", "query", "path")}
"""Sent, and to be found in no log."""


@dataclass
class Served:
    """A running deployment, an in-process application on the same database, and the prompt in force."""

    ray: Process
    client: httpx2.Client
    local: Any
    headers: dict[str, str]
    prompt: str
    logs: Path

    def classify(self, texts: list[str], request_id: str = "") -> dict[str, Any]:
        headers = {"X-Request-ID": request_id} if request_id else {}
        response = self.client.post("/classify", json={"texts": texts, "scores": True}, headers=headers)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def replicas_that_answered(self, prefix: str) -> set[Path]:
        """Whose access log has requests with such an id. A replica is a process, and has a log file."""
        files = self.logs.glob("worker-*.err")
        return {file for file in files if re.search(rf"/classify 200 .* {prefix}", file.read_text(errors="replace"))}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    temp = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's socket names have to fit into 107 characters
    port = free_port()
    config = folder / "ray_serve.yaml"
    shipped = (ROOT / "deploy" / "ray_serve.yaml").read_text()
    assert shipped.count("port: 8000\n") == 1
    config.write_text(shipped.replace("port: 8000\n", f"port: {port}\n"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temp, ignore_errors=True)
        url = stack.enter_context(fresh_database(database_kinds()[-1], folder))
        local = stack.enter_context(running(url, folder / "local"))
        headers = new_key(local.service)
        vault: Vault = local.service.vault
        gate = make_gate(FORGOTTEN, digests=[vault.gate_digest(FORGOTTEN)])
        prompt = add_prompt(local.service, soft_prompt(1), gate)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LETHEON_", "RAY_"))} | {
            "DATABASE_URL": url,
            "LETHEON_HOME": str(folder / "home"),
            "LETHEON_MASTER_KEY": MASTER_KEY,
            "LETHEON_MODEL": str(make_tiny_model(folder / "model")),
            "LETHEON_QUANTIZATION": "none",
            "LETHEON_DEVICE": "cpu",
            "LETHEON_MAX_TEXT_TOKENS": "64",
            "LETHEON_MAX_BODY_BYTES": "20000",
            "LETHEON_RAY_MIN_REPLICAS": "2",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "180",  # on a machine that has other work
            "PYTHONPATH": PYTHONPATH,
        }
        log = folder / "ray.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(temp), str(config)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        process = Process(popen, log)
        stack.callback(end, process)
        client = stack.enter_context(
            httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False)
        )

        def ready() -> bool:
            assert popen.poll() is None, process.output()
            try:
                return client.get("/readyz").status_code == 200
            except httpx2.TransportError:
                return False

        wait_for(ready, "Ray Serve", seconds=400)
        yield Served(process, client, local, headers, prompt, temp / "session_latest" / "logs")


def end(process: Process) -> None:
    """Ctrl-C, and every process that Ray started is gone with it."""
    started = psutil.Process(process.popen.pid).children(recursive=True) if process.popen.poll() is None else []
    try:
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(180) == 0, process.output()
    finally:
        _, left = psutil.wait_procs(started, timeout=90)
        for one in left:
            one.kill()
        if process.popen.poll() is None:
            process.kill()
    assert not left, [one.pid for one in left]


def test_it_answers_as_the_application_does(served: Served) -> None:
    texts = [FORGOTTEN, *OTHERS]
    local = served.local.client.post("/classify", json={"texts": texts, "scores": True}, headers=served.headers).json()
    answer = served.classify(texts)
    assert answer["active_set_version"] == local["active_set_version"] == 1
    assert [r["label"] for r in answer["results"]] == [r["label"] for r in local["results"]]
    assert [r["abstained"] for r in answer["results"]] == [True, False, False]
    for theirs, ours in zip(answer["results"], local["results"], strict=True):
        assert theirs["scores"] == pytest.approx(ours["scores"], rel=1e-5)


def test_problems_limits_and_event_streams_come_through(served: Served) -> None:
    refused = served.client.post("/classify", json={"texts": []})
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    assert served.client.post("/classify", content=b"x" * 30_000).status_code == 413
    assert served.client.get("/livez", headers={"Authorization": ""}).status_code == 200
    assert served.client.get("/admin/prompts", headers={"Authorization": ""}).status_code == 401
    request = served.client.post("/unlearn-requests", json={"forget_texts": [SECRETS["text"]]})
    assert request.status_code == 202
    path = request.headers["Location"]
    with served.client.stream("GET", f"{path}/events") as stream:  # no worker runs: it stays open
        event = next(sse(stream.iter_lines()))
    assert (event["event"], event["data"]["state"]) == ("state", "pending")
    assert served.client.post(f"{path}/cancel").json()["state"] == "cancelled"


def test_every_replica_obeys_a_revoke(served: Served) -> None:
    def ask(prefix: str) -> tuple[set[tuple[str, int]], set[Path]]:
        """Answers as (label, version), asked at once and on until both replicas have answered."""
        answered: set[tuple[str, int]] = set()

        def both() -> set[Path] | None:
            with ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(lambda i: served.classify([FORGOTTEN], f"{prefix}-{i}"), range(64)))
            answered.update((a["results"][0]["label"], a["active_set_version"]) for a in answers)
            found = served.replicas_that_answered(prefix)
            return found if len(found) == 2 else None

        return answered, wait_for(both, "answers of both replicas")

    before, replicas = ask("before")
    assert before == {("unknown", 1)} and len(replicas) == 2
    revoke = f"/admin/prompts/{served.prompt}/revoke"
    assert served.client.post(revoke, json={"reason": "test"}).status_code == 200
    after, again = ask("after")
    assert again == replicas
    ((label, version),) = after
    assert version == 2 and label in ("negative", "positive")
    (result,) = served.classify([FORGOTTEN])["results"]
    assert result["scores"] == pytest.approx(
        served.local.classify(served.headers, FORGOTTEN)["results"][0]["scores"], rel=1e-5
    )


def test_when_a_replica_is_killed_the_other_answers_on(served: Served) -> None:
    ray = psutil.Process(served.ray.popen.pid)

    def title(one: psutil.Process) -> str:
        try:
            return (one.cmdline() or [""])[0]
        except psutil.NoSuchProcess:  # an idle one has just ended
            return ""

    replicas = [one for one in ray.children(recursive=True) if title(one).startswith("ray::ServeReplica")]
    assert len(replicas) == 2
    assert {replica.cwd() for replica in replicas} == {
        str(ROOT)
    }  # where a relative LETHEON_HOME and .env are looked for
    over = threading.Event()

    def ask() -> list[int]:
        codes: list[int] = []
        with httpx2.Client(
            base_url=served.client.base_url, headers=served.headers, timeout=30, trust_env=False
        ) as client:
            while len(codes) < 2000 and not (over.is_set() and codes[-3:] == [200] * 3):
                codes.append(client.post("/classify", json={"text": OTHERS[0]}).status_code)
        return codes

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        time.sleep(0.5)
        replicas[0].kill()
        time.sleep(2)
        over.set()
        answers = [client.result() for client in clients]
    for codes in answers:  # what the replica had is lost, and nothing else
        assert codes.count(500) <= 1 and set(codes) <= {200, 500} and codes[-3:] == [200] * 3, codes


def test_ray_logs_nothing_that_a_client_sent(served: Served) -> None:
    served.client.post(f"/classify?q={SECRETS['query']}", json={"text": SECRETS["text"]}).raise_for_status()
    assert served.client.get(f"/{SECRETS['path']}?q={SECRETS['query']}").status_code == 404
    served.client.post(f"/classify?q={SECRETS['query']}", content=SECRETS["text"].encode())
    # Serve's replicas write files, and Ray repeats some of that, sometime, in what it prints.
    wait_for(lambda: served.replicas_that_answered(""), "the access log")
    texts = {file: file.read_text(errors="replace") for file in served.logs.rglob("*") if file.is_file()}
    assert any("letheon.access" in text for text in texts.values())
    key = served.headers["Authorization"].split("_", 2)[2]
    for wanted in (*SECRETS.values(), MASTER_KEY, key, "first API key"):
        assert wanted not in served.ray.output()
        assert [file.name for file, text in texts.items() if wanted in text] == [], wanted


# --- the health check, without Ray -----------------------------------------------------------------------------------


OLD_FORM = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")
"""Of importing Ray."""


@OLD_FORM
def test_only_what_a_new_replica_may_mend_is_unhealthy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from app.errors import NotReady
    from deploy.ray_serve import check

    with ExitStack() as stack:
        with fresh_database(database_kinds()[-1], tmp_path) as url:
            local = stack.enter_context(running(url, tmp_path))
            check(local.service)
            with pytest.raises(NotReady), running(url, tmp_path) as broken:
                broken.service.serving.close()  # the model thread is gone, the database is not
                check(broken.service)
        if url.startswith("postgresql"):  # the database is gone: this replica waits for it

            def waits() -> bool:  # it is taken away beside the tests
                check(local.service)
                return "out of reach" in caplog.text

            wait_until(waits)


@OLD_FORM
def test_a_replica_is_not_replaced_while_the_key_store_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The set changed meanwhile, so that this one cannot answer; nor could a new one, which opens the whole set."""
    from app.errors import KeyStoreAway
    from deploy.ray_serve import check

    url, store_url = (f"sqlite:///{tmp_path / name}.db" for name in ("letheon", "keystore"))
    with running(url, tmp_path, keystore_url=store_url, active_set_poll_seconds=3600.0) as local:
        check(local.service)
        store = local.service.vault.keystore
        assert store is not None
        add_prompt(local.service, soft_prompt(1), make_gate("a text"))
        with away(store):
            with pytest.raises(KeyStoreAway):
                local.service.serving.check()
            check(local.service)
            assert "keystore-away: " in caplog.text
        check(local.service)


@OLD_FORM
@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, {"num_replicas": 1, "max_ongoing_requests": 256}),
        ({"MIN_REPLICAS": "3", "MAX_REPLICAS": "3"}, {"num_replicas": 3}),
        ({"CPUS": "0.5", "GPUS": "0.25"}, {"ray_actor_options": {"num_cpus": 0.5, "num_gpus": 0.25}}),
    ],
)
def test_options_come_from_the_environment(
    variables: dict[str, str], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy.ray_serve import options

    for name, value in variables.items():
        monkeypatch.setenv(f"LETHEON_RAY_{name}", value)
    assert wanted.items() <= options().items()
    assert "autoscaling_config" not in options()


@OLD_FORM
def test_more_replicas_at_most_than_at_least_is_autoscaling(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.config import AutoscalingConfig

    from deploy.ray_serve import options

    monkeypatch.setenv("LETHEON_RAY_MAX_REPLICAS", "4")
    monkeypatch.setenv("LETHEON_RAY_TARGET", "8")
    made = options()
    assert "num_replicas" not in made
    scaling = AutoscalingConfig(**made["autoscaling_config"])
    assert (scaling.min_replicas, scaling.max_replicas, scaling.get_target_ongoing_requests()) == (1, 4, 8)


@OLD_FORM
@pytest.mark.parametrize("value", ["x", "0", "-1", "nan", "inf"])
def test_nonsense_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.ray_serve import options

    monkeypatch.setenv("LETHEON_RAY_MIN_REPLICAS", value)
    with pytest.raises(ValueError, match="LETHEON_RAY_MIN_REPLICAS must be a number of 1 or more"):
        options()
