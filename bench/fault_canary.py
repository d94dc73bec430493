"""A string that is in forget texts and nowhere else, and the search for it in all that a deployment says and stores."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from app import lifecycle
from app.errors import VaultError
from app.lifecycle import texts_aad
from app.vault import letters, normalise
from bench.fault_judge import Outcome
from bench.fault_processes import wait_for
from bench.fault_site import Api, Bench, Site

_URL_SAFE = bytes.maketrans(b"+/", b"-_")
MODES = ("routed", "concatenate")  # the latter keeps teacher states on disk


def make_canaries() -> tuple[str, str]:
    """One plain, with capitals, and one of letters that folding, normalising and escaping each change."""
    salt = secrets.token_hex(5)
    return f"Zyxomma{salt}Quill", f"Åﬁ№Ⅷ{salt}ßİ😀"


def forms(canary: str) -> dict[str, bytes]:
    """How it may be spelt where it leaked."""
    spelt = {
        "as it is": canary,
        "lower case": canary.lower(),
        "casefolded": canary.casefold(),
        "upper case": canary.upper(),
        "normalised": normalise(canary),
        "letters only": letters(canary),
    }
    found: dict[str, bytes] = {}
    for name, text in spelt.items():
        found[f"{name}, escaped"] = text.encode("unicode_escape")
        found[f"{name}, UTF-16LE"] = text.encode("utf-16-le")
        found[f"{name}, UTF-16BE"] = text.encode("utf-16-be")
        found[f"{name}, URL"] = quote(text).encode()
        for kind, data in ((name, text.encode()), (f"{name}, JSON", json.dumps(text)[1:-1].encode())):
            found[kind] = data
            found[f"{kind}, hex"] = data.hex().encode()
            found[f"{kind}, HEX"] = data.hex().upper().encode()
            for offset in range(3):  # the same bytes look different at each place within three
                encoded = base64.b64encode(b"\0" * offset + data)
                # without the characters at both ends that its neighbours have a say in
                found[f"{kind}, base64 +{offset}"] = encoded[(0, 2, 3)[offset] : (len(data) + offset) // 3 * 4]
                found[f"{kind}, base64url +{offset}"] = found[f"{kind}, base64 +{offset}"].translate(_URL_SAFE)
    return {name: data for name, data in found.items() if len(data) >= 8}


def search(places: Mapping[str, bytes], canaries: Iterable[str]) -> list[str]:
    """``place: form`` of all that was found."""
    needles = {(canary, name): data for canary in canaries for name, data in forms(canary).items()}
    hits = []
    for place, content in places.items():
        seen = {data for data in needles.values() if data in content}
        hits += [f"{place}: {name} ({canary[:4]}…)" for (canary, name), data in needles.items() if data in seen]
    return hits


# --- ears ------------------------------------------------------------------------------------------------------------


class Collector(HTTPServer):
    """The receiving end of OTLP over HTTP: keeps the bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.received: list[bytes] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def heard(site: Site) -> Iterator[list[bytes]]:
    """All that passes through the broker: Redis' MONITOR, or whatever file is seen in the folder."""
    parts: list[bytes] = []
    end = threading.Event()
    if site.redis is not None:
        connection = socket.create_connection(("127.0.0.1", site.redis.port))
        connection.sendall(b"MONITOR\r\n")
        connection.settimeout(0.1)
        wait_for(lambda: connection.recv(4096), "Redis to answer MONITOR")

    def listen() -> None:
        while not end.is_set():
            if site.redis is not None:
                with contextlib.suppress(TimeoutError):
                    parts.append(connection.recv(2**16))
            else:
                for path in site.settings.broker_dir.rglob("*"):
                    with contextlib.suppress(OSError):  # taken meanwhile, or a folder
                        parts.append(path.name.encode() + path.read_bytes())
                end.wait(0.01)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield parts
    finally:
        end.set()
        thread.join()
        if site.redis is not None:
            connection.close()


# --- what is asked ---------------------------------------------------------------------------------------------------


class Asked:
    """Calls the API and keeps every response whole."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.said: list[bytes] = []

    def __call__(self, method: str, path: str, **body: Any) -> httpx2.Response:
        answer = self.api.client.request(method, path, **body)
        self.keep(answer)
        return answer

    def keep(self, answer: httpx2.Response) -> None:
        headers = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        self.said.append(f"{answer.status_code}\n{headers}\n".encode() + answer.content)


def ask_badly(asked: Asked, canaries: tuple[str, str]) -> None:
    """Everything that is refused, with the canary in the place that is wrong."""
    text = " ".join(canaries)
    long = f"{text} very " * 400
    for body in (
        {"forget_texts": [{"text": text, "label": text}]},
        {"forget_texts": [{"text": text, text: text}]},
        {"forget_texts": [{"text": long}]},
        {"forget_texts": [{"text": [text]}]},
        {"forget_texts": text},
        {"forget_texts": [text], "options": {text: text}},
        {"forget_texts": [text], "options": {"learning_rate": text}},
    ):
        asked("POST", "/unlearn-requests", json=body)
    for path in ("/unlearn-requests", "/classify"):
        asked("POST", path, content=f'{{"forget_texts": ["{text}", "text": "{text}'.encode())
        asked("POST", path, content=json.dumps({"text": text}), headers={"Content-Type": "text/plain"})
    asked("POST", "/classify", json={"texts": [text, long]})
    asked("POST", "/classify", json={"text": {text: text}})


def search_deployment(bench: Bench, number: int, draw: random.Random) -> Outcome:
    """A request with the canary from submit to revoke, on a real API and worker with traces on; then the search."""
    backend, mode = ("postgresql", "sqlite")[number % 2], MODES[number // 2 % 2]
    outcome = Outcome(kind=f"{backend}, {mode}")
    canaries = make_canaries()
    texts = [f"the acting of {canaries[i % 2]} is {word}" for i, word in enumerate(("bad", "good", "slow", "great"))]
    with ExitStack() as stack:
        site = stack.enter_context(bench.site(backend, mode=mode, traces=True))
        collector = Collector()
        stack.callback(collector.close)
        site.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        broker = stack.enter_context(heard(site))
        asked = Asked(site.api())
        ask_badly(asked, canaries)
        body = {"forget_texts": [{"text": text, "label": "negative"} for text in texts], "reason": "asked by mail"}
        answer = asked("POST", "/unlearn-requests", json=body)
        request_id = str(answer.json().get("id"))
        worker = site.worker(training_deadline_seconds=1.5)
        site.wait_checkpoint(request_id)
        sealed = keep_sealed(site, request_id)
        places = stored(bench, site, "in training")
        outcome.judge(site.wait_end(request_id))
        asked("GET", f"/unlearn-requests/{request_id}/events")
        for path in (f"/unlearn-requests/{request_id}", "/unlearn-requests", "/admin/prompts", "/metrics", "/readyz"):
            asked("GET", path)
        asked("POST", "/classify", json={"texts": texts, "scores": True})
        places |= stored(bench, site, "in force")
        for item in asked("GET", "/admin/prompts").json()["items"]:
            asked("POST", f"/admin/prompts/{item['id']}/revoke", json={"reason": "bench"})
        worker.signal(15)
        worker.ended(30)
        asked.api.child.signal(15)
        asked.api.child.ended(30)
        time.sleep(0.1)
        places |= stored(bench, site, "in the end")
        places |= {"responses": b"\n".join(asked.said), "spans": b"\n".join(collector.received)}
        places["broker"] = b"\n".join(broker)
        hits = search(places, canaries)
        outcome.leaks = len(hits)
        outcome.reasons += hits[:10]
        # A place where not even the id is found was not looked at.
        needed = ("responses", "spans", "broker", "logs in the end", "database in the end", "dump in force")
        for name in needed:
            if name in places and request_id.encode() not in places[name]:
                outcome.reasons.append(f"{name}: not even the request's id is there, so nothing was searched")
        outcome.reasons += recoverable(site, request_id, sealed)
        outcome.figures["searched_bytes_max"] = float(sum(map(len, places.values())))
    return outcome


def stored(bench: Bench, site: Site, when: str) -> dict[str, bytes]:
    """All files, those of the cluster too, and a dump."""
    files = [path for path in sorted(site.home.rglob("*")) if path.is_file()]
    logs = [path for path in files if path.suffix == ".log"]
    places = {f"logs {when}": content_of(logs), f"files {when}": content_of(files)}
    if site.kind == "sqlite":
        places[f"database {when}"] = content_of(path for path in files if path.name.startswith("letheon.db"))
    else:
        postgres = bench.postgres
        pages = [p for p in postgres.data.rglob("*") if p.is_file() and {"base", "pg_wal"} & set(p.parts)]
        places[f"database {when}"] = content_of([*pages, postgres.data.parent / "postgres.log"])
        places[f"dump {when}"] = postgres.dump(site.settings.database_url)
    return places


def content_of(paths: Iterable[Path]) -> bytes:
    """Names and bytes, without those that are gone by now.

    Read by a child: closing a database file here would drop the locks of this process's own connections.
    """
    names = [str(path) for path in paths]
    if not names:
        return b""
    found = subprocess.run(["cat", "--", *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    return "\n".join(names).encode() + b"\n" + found


def keep_sealed(site: Site, request_id: str) -> tuple[bytes, bytes]:
    """What somebody may have copied while the request was in training: its wrapped key and its sealed texts."""
    row = site.read(lambda session: lifecycle.get_request(session, request_id))
    assert row.wrapped_key is not None and row.sealed_texts is not None
    return row.wrapped_key, row.sealed_texts


def recoverable(site: Site, request_id: str, sealed: tuple[bytes, bytes]) -> list[str]:
    """Whether the master key still opens such a copy after the shredding."""
    try:
        site.vault.open(sealed[0], sealed[1], aad=texts_aad(request_id))
    except VaultError:
        return []
    return ["the texts of a copy made before the shredding open with the master key"]
