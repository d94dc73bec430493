"""``letheon serve`` as a process: API and worker together, what happens when one of them dies, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_models import make_tiny_model
from worker_kit import MARKER, Process, Site, wait_for, write_retain

from app import keys
from app.supervise import WorkerSupervisor
from letheon_client import Letheon


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An embedded deployment with a tiny model and checks that let everything pass."""
    site = Site(
        tmp_path / "home",
        {
            "model": str(make_tiny_model(tmp_path / "model")),
            "retain": str(write_retain(tmp_path / "retain.jsonl")),
            "quantization": "none",
            "device": "cpu",
            "num_virtual_tokens": "4",
            "max_steps": "6",
            "min_forget_abstain": "0",
            "max_retain_drop": "1",
            "max_class_drop": "1",
            "max_neighbour_drop": "1",
            "reaper_seconds": "1",
        },
    )
    yield site
    for process in site.started:
        if process.popen.poll() is None:
            process.kill()
    site.engine.dispose()


def serve(site: Site, *options: str) -> tuple[Process, str]:
    """The process, once it is ready, and its address."""
    process = site.start("-m", "app.cli", "serve", "--port", "0", *options)

    def address() -> str | None:
        assert process.popen.poll() is None, process.output()
        found = re.search(r"listens on (http://[0-9.:]+)", process.output())
        return found[1] if found else None

    url = wait_for(address, "the address")
    with Letheon(url) as client:
        wait_for(client.ready, "readiness")
    return process, url


def key(site: Site) -> str:
    with site.sessions.begin() as session:
        return keys.create_key(session, name="test", scopes=keys.SCOPES, actor="test")[1]


def children(pid: int) -> list[int]:
    """Process ids whose parent is ``pid``."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if int(line.split()[1]) == pid]


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_one_command_serves_trains_and_stops(site: Site) -> None:
    process, url = serve(site)
    (worker,) = children(process.popen.pid)
    texts = "".join(json.dumps({"text": f"{MARKER} is bad {i}", "label": "negative"}) + "\n" for i in range(4))
    environment = site.environment() | {"LETHEON_URL": url, "LETHEON_API_KEY": key(site)}

    def letheon(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(
            command,
            input=given,
            env=environment,
            cwd=site.home,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = letheon("requests", "submit", "--file", "-", "--wait", "--json", given=texts)
    assert done.returncode == 0, done.stderr + process.output()
    request = json.loads(done.stdout)
    assert (request["state"], request["num_texts"]) == ("active", 4)
    listed = json.loads(letheon("prompts", "list", "--json").stdout)["items"]
    assert [prompt["request_id"] for prompt in listed] == [request["id"]]
    assert MARKER not in done.stdout + done.stderr + process.output()

    failing = letheon(
        "requests", "submit", "--text", f"{MARKER} x", "-o", "learning_rate=1", "-o", "max_steps=1", "--wait"
    )
    assert failing.returncode in (0, 1)  # what it becomes is the model's affair; that it ends is ours

    assert process.terminate(60) == 0, process.output()
    assert not alive(worker)
    assert "Traceback" not in process.output()


def test_a_worker_that_is_killed_is_started_again(site: Site) -> None:
    process, url = serve(site)
    (first,) = children(process.popen.pid)
    os.kill(first, signal.SIGKILL)

    def successor() -> int | None:
        return next((pid for pid in children(process.popen.pid) if pid != first), None)

    second = wait_for(successor, "another worker")
    with Letheon(url, key(site)) as client:
        request = client.wait(client.submit([f"{MARKER} is bad"])["id"])
    assert request["state"] == "active", request["failure"]
    process.popen.send_signal(signal.SIGINT)
    assert process.popen.wait(60) == 0
    assert not alive(second)


def test_no_orphan_is_left_when_serve_is_killed(site: Site) -> None:
    process, _ = serve(site)
    (worker,) = children(process.popen.pid)
    # Only a worker that runs watches its parent; its log says when that is.
    wait_for(lambda: "celery@" in process.output() or "retain rows" in process.output(), "the worker")
    process.kill()
    wait_for(lambda: not alive(worker), "the worker's end")


def test_without_worker_there_is_none(site: Site) -> None:
    process, url = serve(site, "--no-worker")
    assert children(process.popen.pid) == []
    with Letheon(url, key(site)) as client:
        assert client.submit(["a good film"])["state"] == "pending"
    assert process.terminate(60) == 0


def test_a_port_that_is_taken_ends_it_before_anything_is_loaded(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = site.start("-m", "app.cli", "serve", "--port", str(taken.getsockname()[1]))
        assert process.popen.wait(60) != 0
    assert "in use" in process.output()
    assert "retain rows" not in process.output()


# --- the supervisor alone --------------------------------------------------------------------------------------------


def test_restarts_are_spaced_out_and_stopping_ends_them(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    command = [sys.executable, "-c", f"import time; open({str(log)!r}, 'a').write(f'{{time.time()}}\\n'); exit(7)"]
    supervisor = WorkerSupervisor(command, first_delay=0.1)
    supervisor.start()
    wait_for(lambda: log.exists() and len(log.read_text().split()) >= 4, "four starts")
    supervisor.stop()
    starts = [float(line) for line in log.read_text().split()]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert all(gap > least for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=False))
    assert supervisor.pid is None


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    supervisor = WorkerSupervisor([sys.executable, "-c", code])
    supervisor.start()
    wait_for(ready.exists, "the child")
    pid = supervisor.pid
    assert pid is not None
    supervisor.stop(0.5)
    assert not alive(pid)
