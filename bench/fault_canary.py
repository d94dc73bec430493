"""A string that is in forget texts and nowhere else, and the search for it in all that a deployment says and stores."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import evidence, lifecycle
from app.active_set import canaries_aad, gate_aad, prompt_aad
from app.errors import VaultError
from app.lifecycle import checkpoint_aad, texts_aad
from app.tables import Checkpoint, Evidence, Prompt
from app.vault import Vault, letters, normalise
from bench.fault_judge import Outcome
from bench.fault_processes import Child, wait_for
from bench.fault_site import Bench, Site
from bench.fault_walk import Asked, ask_badly, log_in, walk

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
                found[f"{kind}, base64 +{offset}"] = _base64_core(data, offset)
                found[f"{kind}, base64url +{offset}"] = found[f"{kind}, base64 +{offset}"].translate(_URL_SAFE)
    return {name: data for name, data in found.items() if len(data) >= 8}


def anchors(canary: str) -> set[bytes]:
    """A part of every form: its ten letters and digits, as the spellings and encodings leave them.

    A tenth as many as there are forms, and what holds none of them need not be searched for these.
    """
    found: set[bytes] = set()
    core = re.search("[0-9a-f]{10}", canary)
    assert core is not None
    for text in (core[0], core[0].upper()):
        data = text.encode()
        # Zeros in between, whichever half comes first.
        found |= {data, text.encode("utf-16-le")[:-1], data.hex().encode(), data.hex().upper().encode()}
        found |= {_base64_core(data, offset) for offset in range(3)}
    return found | {data.translate(_URL_SAFE) for data in found}


def search(places: Mapping[str, bytes], canaries: Iterable[str]) -> list[str]:
    """``place: form`` of all that was found."""
    hits = []
    for canary in canaries:
        core, found = anchors(canary), forms(canary)
        for place, content in places.items():
            if any(part in content for part in core):
                seen = {data for data in set(found.values()) if data in content}
                hits += [f"{place}: {name} ({canary[:4]}…)" for name, data in found.items() if data in seen]
    return hits


def _base64_core(data: bytes, offset: int) -> bytes:
    """As it is within base64, at this place within three: without the characters that its neighbours have a say in."""
    encoded = base64.b64encode(b"\0" * offset + data)
    return encoded[(0, 2, 3)[offset] : (len(data) + offset) // 3 * 4]


# --- ears ------------------------------------------------------------------------------------------------------------


class Collector(HTTPServer):
    """The receiving end of OTLP over HTTP, or of a webhook: keeps what arrives, headers and all."""

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
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(f"{self.path}\n{self.headers}".encode() + body)
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


# --- a trial ---------------------------------------------------------------------------------------------------------

TOGETHER = 3
"""Requests that share a deployment: each a trial of its own, since its canaries are."""


@dataclass(frozen=True, repr=False)
class Copy:
    """What somebody may have copied before it was shredded: a wrapped key, and something that it seals."""

    wrapped: bytes
    sealed: bytes
    aad: str


@dataclass
class Hunt:
    """One request, its canaries, and what was found of them."""

    canaries: tuple[str, str] = field(default_factory=make_canaries)
    request_id: str = ""
    copies: dict[str, Copy] = field(default_factory=dict)  # by what it is
    named: set[str] = field(default_factory=set)  # places where its id was found, so that these were looked at
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def texts(self) -> list[str]:
        words = ("bad", "good", "slow", "great")
        return [f"the acting of {self.canaries[i % 2]} is {word}" for i, word in enumerate(words)]

    def look(self, places: Mapping[str, bytes]) -> None:
        hits = search(places, self.canaries)
        self.outcome.leaks += len(hits)
        self.outcome.reasons += hits[:10]
        self.named |= {name for name, content in places.items() if self.request_id.encode() in content}
        searched = float(sum(map(len, places.values())))
        figures = self.outcome.figures
        figures["searched_bytes_max"] = figures.get("searched_bytes_max", 0.0) + searched


def search_deployment(bench: Bench, numbers: Sequence[int], _: Sequence[random.Random]) -> list[Outcome]:
    """A few requests, each with canaries of its own, from submit to revoke on one API and one worker with traces on.

    All that is said and stored is searched while each trains, when all are in force, and when all is over.
    """
    backend, mode = ("postgresql", "sqlite")[numbers[0] % 2], MODES[numbers[0] // (2 * TOGETHER) % 2]
    hunts = [Hunt(outcome=Outcome(kind=f"{backend}, {mode}")) for _ in numbers]
    with ExitStack() as stack:
        site = stack.enter_context(bench.site(backend, mode=mode, traces=True, export_prompts=True))
        collector, receiver = Collector(), Collector()
        stack.callback(collector.close)
        stack.callback(receiver.close)
        site.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        broker = stack.enter_context(heard(site))
        asked = Asked(site.api())
        log_in(asked, site.key)
        url = f"http://127.0.0.1:{receiver.server_port}/"
        webhook_id = asked("POST", "/webhooks", json={"url": url}).json()["id"]
        worker = site.worker(training_deadline_seconds=1.5)
        for number, hunt in enumerate(hunts):
            ask_badly(asked, hunt.canaries)
            train(site, asked, hunt)
            places = stored(bench, site, "in training")
            for begun in hunts[: number + 1]:
                begun.look(places)
            # A stack of prompts that do not bear each other is refused; of that, too, nothing may be left.
            ends = ("active",) if mode == "routed" or number == 0 else ("active", "failed")
            history = site.wait_end(hunt.request_id)
            hunt.outcome.judge(history, ends)
            kept = keep_copies(site, hunt)
            wanted = (
                {"prompt", "evidence", *(("gate",) if mode == "routed" else ())} if history.state == "active" else ()
            )
            hunt.outcome.reasons += [f"no copy of the {kind} was made" for kind in wanted if kind not in kept]
        ask_well(asked, hunts, webhook_id)
        end(bench, site, asked, worker, hunts, webhook_id)
        places = {"responses": b"\n".join(asked.said), "spans": b"\n".join(collector.received)}
        places |= {"webhook messages": b"\n".join(receiver.received)}
        places |= {"broker": b"\n".join(broker), **stored(bench, site, "in the end")}
        # A place where not even the id is found was not looked at.
        needed = {"responses", "spans", "broker", "webhook messages", "logs in the end", "database in the end"}
        needed |= {"dump in force"} if backend == "postgresql" else set()
        for hunt in hunts:
            hunt.look(places)
            for name in sorted(needed - hunt.named):
                hunt.outcome.reasons.append(f"{name}: not even the request's id is there, so nothing was searched")
            hunt.outcome.reasons += [f"GET {route} was never answered: it was not searched" for route in asked.missed]
            hunt.outcome.reasons += recoverable(site.vault, hunt.copies)
    return [hunt.outcome for hunt in hunts]


def train(site: Site, asked: Asked, hunt: Hunt) -> None:
    """Submit, and wait until the worker is in the middle of it."""
    texts = [{"text": text, "label": "negative"} for text in hunt.texts]
    answer = asked("POST", "/unlearn-requests", json={"forget_texts": texts, "reason": "asked by mail"})
    hunt.request_id = str(answer.json().get("id"))
    wait_for(lambda: {"texts", "checkpoint"} <= keep_copies(site, hunt), "a checkpoint")


def ask_well(asked: Asked, hunts: Sequence[Hunt], webhook_id: str, *, without: Collection[str] = ()) -> None:
    """All that can be read, in all formats but these, and what the model says to the texts."""
    version = str(asked("GET", "/admin/active-sets").json()["items"][0]["version"])
    each = {hunt.request_id: {"request_id": hunt.request_id} for hunt in hunts}
    for item in asked("GET", "/admin/prompts").json()["items"]:
        each[item["request_id"]]["prompt_id"] = item["id"]
    walk(asked, {"webhook_id": webhook_id, "version": version}, each.values(), without=without)
    for hunt in hunts:
        asked("POST", "/classify", json={"texts": hunt.texts, "scores": True})
        body = {"forget_texts": [{"text": text} for text in hunt.texts]}
        if asked("POST", "/unlearn-requests", params={"dry_run": True}, json=body).status_code != 200:
            hunt.outcome.reasons.append("the dry run was refused")


def end(bench: Bench, site: Site, asked: Asked, worker: Child, hunts: Sequence[Hunt], webhook_id: str) -> None:
    """Look at what is in force, revoke all of it, read all once more, and let the processes go."""
    places = stored(bench, site, "in force")
    for hunt in hunts:
        hunt.look(places)
    for item in asked("GET", "/admin/prompts").json()["items"]:
        asked("POST", f"/admin/prompts/{item['id']}/revoke", json={"reason": "bench"})
    ask_well(asked, hunts, webhook_id, without=("pdf",))  # which takes longest, and says what the page says
    for child in (worker, asked.api.child):
        child.signal(15)
        child.ended(30)
    time.sleep(0.1)


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


def keep_copies(site: Site, hunt: Hunt) -> set[str]:
    """Copy what is sealed of a request as long as it is; says of what there is a copy by now."""

    def read(session: Session) -> dict[str, Copy | None]:
        request = lifecycle.get_request(session, hunt.request_id)
        prompt = session.scalar(select(Prompt).where(Prompt.request_id == request.id))
        point, seen = session.get(Checkpoint, request.id), session.get(Evidence, request.id)
        found = {"texts": copy_of(request.wrapped_key, request.sealed_texts, texts_aad(request.id))}
        if point is not None:
            found["checkpoint"] = copy_of(request.wrapped_key, point.sealed, checkpoint_aad(request.id, point.step))
        if prompt is not None:
            key = prompt.wrapped_key
            found["prompt"] = copy_of(key, prompt.sealed, prompt_aad(prompt.id, prompt.digest))
            found["gate"] = copy_of(key, prompt.sealed_gate, gate_aad(prompt.id, prompt.gate_digest or ""))
            found["canaries"] = copy_of(key, prompt.sealed_canaries, canaries_aad(prompt.id, prompt.digest))
            if seen is not None:
                found["evidence"] = copy_of(key, seen.sealed, evidence.aad(request.id))
        return found

    for kind, copy in site.read(read).items():
        if copy is not None and kind not in hunt.copies:
            site.vault.open(copy.wrapped, copy.sealed, aad=copy.aad)  # one that never opened would show nothing
            hunt.copies[kind] = copy
    return set(hunt.copies)


def copy_of(wrapped: bytes | None, sealed: bytes | None, aad: str) -> Copy | None:
    return None if wrapped is None or sealed is None else Copy(wrapped, sealed, aad)


def recoverable(vault: Vault, copies: Mapping[str, Copy]) -> list[str]:
    """Which copies from before the shredding the master key still opens."""
    reasons = []
    for kind, copy in copies.items():
        with contextlib.suppress(VaultError):
            vault.open(copy.wrapped, copy.sealed, aad=copy.aad)
            reasons.append(f"a copy of the {kind} made before the shredding opens with the master key")
    return reasons
