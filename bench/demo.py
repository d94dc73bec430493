"""``make demo``: a real server, a real erasure request, and the same texts classified before and after.

It works in LETHEON_HOME (``var``) like ``letheon serve`` does, so that what it leaves can be looked at with the command
line. A rerun revokes the prompts of earlier demos first, since "before" has to mean "not yet forgotten".
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.cli_output import bar, request_bar
from app.defaults import resolve_model
from app.errors import LetheonError
from app.pull import reviews_dir
from app.settings import Settings, get_settings
from letheon_client import Event, ForgetText, Letheon, LetheonClientError
from letheon_client.types import UnlearnRequest

PERSON = "Spielberg"
"""Of the people named in the training split, the one with the most sentences (21)."""
MIN_FORGET = 20
RETAIN_ROWS = 200
HELD_OUT_ROWS = 300
SEED = 20
REASON = "letheon demo"
START_SECONDS = 300.0
MIN_ABSTAIN, MAX_HELD_OUT_DROP, MAX_SECONDS = 0.9, 0.02, 480.0
"""What the demo is to show on two cores; what it misses, it says."""

console = Console(highlight=False)


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Texts with their true labels."""

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Groups:
    """What is asked to be forgotten, what must stay, and what was never shown to the training."""

    forget: Rows
    retain: Rows  # of the training split, not naming the person
    held_out: Rows  # of the held-out split, not naming the person
    unseen: Rows  # of the held-out split, naming the person

    def items(self) -> list[tuple[str, Rows]]:
        return [("forget", self.forget), ("retain", self.retain), ("held_out", self.held_out), ("unseen", self.unseen)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--person", default=PERSON, help=f"forget the sentences that name this person ({PERSON})")
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    arguments = parser.parse_args()
    # Embedded whatever this shell has set: the demo must not train, revoke or make keys in a real deployment.
    for name in ("DATABASE_URL", "BROKER_URL"):
        os.environ[name] = os.environ[f"LETHEON_{name}"] = ""
    settings = get_settings()
    # Signals that end the demo must end its server too, so they become an exception that runs `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(settings, arguments.person, keep=arguments.keep)
    except (DemoFailed, LetheonError, LetheonClientError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        return 130


def run(settings: Settings, person: str, *, keep: bool) -> int:
    began = time.monotonic()
    groups = pick(reviews_dir(settings.home), person)
    stop_earlier(settings.home)
    key = make_key()
    server: Server | None = None
    kept = False
    try:
        server = Server(settings.home, free_port())
        with Letheon(server.url, key["key"]) as client:
            server.wait_until_ready(client)
            revoke_earlier(client)
            console.print(f"\n[bold]Before.[/] The model classifies {sum(len(r) for _, r in groups.items())} texts.")
            before = classify(client, groups)
            console.print(f"\n[bold]The request.[/] Forget {len(groups.forget)} review sentences that name {person}.")
            submitted = time.monotonic()
            request, seconds_to_active = forget(client, groups.forget, REASON, submitted)
            active = request["state"] == "active"
            after = classify(client, groups) if active else {}
            report = {
                "person": person,
                "state": request["state"],
                **figures(groups, before, after),
                "seconds_to_active": round(seconds_to_active, 1) if active else None,
                "seconds_total": round(time.monotonic() - began, 1),
                "model": describe_model(settings),
                "quantization": settings.quantization,
                "num_virtual_tokens": active_tokens(client, request["id"]) if active else settings.num_virtual_tokens,
                "request": {name: request[name] for name in ("id", "attempt", "metrics", "failure")},
            }
            report["missed"] = missed(report) if active else None
        path = settings.home / "demo.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        show(groups, before, after, report)
        console.print(f"\nFigures: {path}")
        if not active:
            failure = request["failure"] or {"code": request["state"], "detail": "it did not become active"}
            raise DemoFailed(f"the request did not become active: {failure['code']}: {failure['detail']}")
        if keep:
            kept = True
            server.keep(key["key"], person)
        return 0
    finally:
        if server is not None and not kept:
            server.stop()
        if not kept:
            cli("keys", "revoke", key["id"], "--json")


# --- the texts -------------------------------------------------------------------------------------------------------


def pick(folder: Path, person: str) -> Groups:
    """Split the reviews by whether they name ``person`` as a whole word. Raises DemoFailed when too few do."""
    names = re.compile(rf"\b{re.escape(person)}\b", re.IGNORECASE)
    train, held_out = read(folder / "train.jsonl"), read(folder / "held_out.jsonl")
    named = [row for row in train if names.search(row["text"])]
    if len(named) < MIN_FORGET:
        raise DemoFailed(f"only {len(named)} training sentences name {person}; the demo asks for {MIN_FORGET}")
    others = [row for row in train if not names.search(row["text"])]
    apart = [row for row in held_out if not names.search(row["text"])]
    sample = random.Random(SEED)
    return Groups(
        forget=rows(named),
        retain=rows(sample.sample(others, min(RETAIN_ROWS, len(others)))),
        held_out=rows(sample.sample(apart, min(HELD_OUT_ROWS, len(apart)))),
        unseen=rows([row for row in held_out if names.search(row["text"])]),
    )


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DemoFailed(f"{path} is missing: run `letheon data pull`")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def rows(items: Sequence[dict[str, str]]) -> Rows:
    return Rows([item["text"] for item in items], [item["label"] for item in items])


# --- the server ------------------------------------------------------------------------------------------------------


class Server:
    """``letheon serve`` as a process of its own, logging to a file."""

    def __init__(self, home: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.home = home
        self.log = home / "demo-server.log"
        command = [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self, client: Letheon) -> None:
        """Raises DemoFailed when the server ends or takes too long."""
        end = time.monotonic() + START_SECONDS
        with console.status(f"Starting the server at {self.url} (its log: {self.log})"):
            while not client.ready():
                if self.process.poll() is not None:
                    raise DemoFailed(f"the server ended with status {self.process.returncode}:\n{self._last_lines()}")
                if time.monotonic() > end:
                    raise DemoFailed(f"the server was not ready within {START_SECONDS:.0f} s:\n{self._last_lines()}")
                time.sleep(0.25)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def keep(self, key: str, person: str) -> None:
        """Leave it running: note where it is for the next demo, and tell how to use it."""
        note = self.home / "demo-server.json"
        note.write_text(json.dumps({"pid": self.process.pid, "url": self.url}) + "\n")
        # Printed plainly: this is for pasting into a shell.
        print(f"\nThe server goes on at {self.url} (process {self.process.pid}; documentation: {self.url}/docs).")
        print(f"  export LETHEON_URL={self.url} LETHEON_API_KEY={key}")
        print(f'  letheon classify "{person} has made a masterpiece."')
        print("  letheon prompts list")
        print("  letheon prompts revoke ID --reason 'to see it come back'")
        print(f"  kill {self.process.pid}    # stops server and worker")

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def stop_earlier(home: Path) -> None:
    """Stop the server that an earlier ``KEEP=1`` left: two workers would share the cores and the queue."""
    note = home / "demo-server.json"
    if not note.is_file():
        return
    earlier = json.loads(note.read_text())
    with Letheon(earlier["url"], timeout=5) as client:
        # Process ids are used again; only one that still answers at its address is ours to stop.
        if client.ready():
            console.print(f"Stopping the server of an earlier demo at {earlier['url']}")
            os.kill(earlier["pid"], signal.SIGTERM)
            end = time.monotonic() + 120
            while client.ready() and time.monotonic() < end:
                time.sleep(0.25)
    note.unlink()


def revoke_earlier(client: Letheon) -> None:
    """Take the prompts of earlier demos out of force; other active prompts stay and are reported."""
    others = 0
    for prompt in list(client.iter_prompts(state="active")):
        if (client.get_request(prompt["request_id"])["reason"] or "").startswith(REASON):
            client.revoke(prompt["id"], reason="a new demo begins")
        else:
            others += 1
    if others:
        console.print(f"[yellow]Note:[/] {others} active prompt(s) that are not the demo's are in force throughout.")


def make_key() -> dict[str, Any]:
    scopes = [part for scope in ("requests", "classify", "admin") for part in ("--scope", scope)]
    made: dict[str, Any] = cli("keys", "create", "demo", *scopes, "--json")
    return made


def cli(*arguments: str) -> Any:
    """Run a ``letheon`` command and return its JSON document. Raises DemoFailed."""
    done = subprocess.run([sys.executable, "-m", "app.cli", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoFailed(f"`letheon {arguments[0]} {arguments[1]}` failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- before, request, after ------------------------------------------------------------------------------------------


def classify(client: Letheon, groups: Groups) -> dict[str, list[str]]:
    """Group → answers, through the API."""
    answers = {}
    with bar() as progress:
        task = progress.add_task("classifying", total=sum(len(group) for _, group in groups.items()))
        base = 0  # texts of the groups that are done

        def on_done(count: int) -> None:
            progress.update(task, completed=base + count)

        for name, group in groups.items():
            answer = client.classify_many(group.texts, on_done=on_done, batch=32)
            answers[name] = [result["label"] for result in answer["results"]]
            base += len(group)
    return answers


def forget(client: Letheon, group: Rows, reason: str, submitted: float) -> tuple[UnlearnRequest, float]:
    """Submit and follow; the ended request and the seconds from ``submitted`` to its last state."""
    texts: list[ForgetText] = [
        {"text": text, "label": label} for text, label in zip(group.texts, group.labels, strict=True)
    ]
    request: UnlearnRequest = client.submit(texts, reason=reason)
    ended = submitted
    with request_bar() as show_event:

        def on_event(event: Event) -> None:
            nonlocal ended
            ended = time.monotonic()
            show_event(event)

        request = client.wait(request["id"], on_event)
    return request, ended - submitted


def active_tokens(client: Letheon, request_id: str) -> int:
    prompts = client.iter_prompts(state="active")
    return next(prompt["num_virtual_tokens"] for prompt in prompts if prompt["request_id"] == request_id)


def figures(groups: Groups, before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, Any]:
    """Abstain rates where the person is named, accuracy elsewhere; None where there is no answer."""
    result: dict[str, Any] = {}
    for name, group in groups.items():
        measure = "abstain" if name in ("forget", "unseen") else "accuracy"
        for when, answers in (("before", before), ("after", after)):
            got = answers.get(name)
            rate: float | None = None
            if got:
                wanted = ["unknown"] * len(got) if measure == "abstain" else group.labels
                rate = sum(a == b for a, b in zip(got, wanted, strict=True)) / len(got)
            result[f"{name}_{measure}_{when}"] = None if rate is None else round(rate, 4)
        result[f"{name}_rows"] = len(group)
    return result


def missed(report: dict[str, Any]) -> list[str]:
    """What an active prompt still falls short of: activation checks the training data, these look at the held-out."""
    dropped = report["held_out_accuracy_before"] - report["held_out_accuracy_after"]
    found = []
    if report["forget_abstain_after"] < MIN_ABSTAIN:
        found.append(f"only {report['forget_abstain_after']:.1%} of the forget texts answer `unknown`")
    if dropped > MAX_HELD_OUT_DROP + 1e-9:
        found.append(f"held-out accuracy fell by {dropped:.3f}, more than {MAX_HELD_OUT_DROP}")
    if report["seconds_to_active"] > MAX_SECONDS:
        found.append(f"it took {report['seconds_to_active']:.0f} s to become active, more than {MAX_SECONDS:.0f}")
    return found


def describe_model(settings: Settings) -> str:
    source, adapter = resolve_model(settings)
    return Path(source).name + (f" + {Path(adapter).name}" if adapter else "")


def show(groups: Groups, before: dict[str, list[str]], after: dict[str, list[str]], report: dict[str, Any]) -> None:
    texts = Table(title="\nThe same texts, before and after", title_justify="left")
    texts.add_column("forget?", width=7)
    # Fixed widths: a long text that must not wrap would otherwise squeeze the other columns to nothing.
    texts.add_column("text", no_wrap=True, overflow="ellipsis", width=max(20, console.width - 47))
    for column in ("truth", "before", "after"):
        texts.add_column(column, width=8)
    for name, mark, count in (("forget", "yes", 5), ("retain", "no", 2), ("held_out", "no", 2)):
        group = dict(groups.items())[name]
        for i in range(min(count, len(group))):
            now = after[name][i] if after else "-"
            shown = f"[bold magenta]{now}[/]" if now == "unknown" else now
            texts.add_row(mark, escape(group.texts[i]), group.labels[i], before[name][i], shown)
    console.print(texts)
    summary = Table(title="\nWhat changed", title_justify="left")
    for column in ("", "texts", "before", "after"):
        summary.add_column(column, justify="left" if not column else "right")
    for title, name, measure in (
        ("Answers `unknown`: the texts to forget", "forget", "abstain"),
        ("Answers `unknown`: unseen texts naming the person", "unseen", "abstain"),
        ("Right answers: training texts to retain", "retain", "accuracy"),
        ("Right answers: held-out texts", "held_out", "accuracy"),
    ):
        values = [report[f"{name}_{measure}_{when}"] for when in ("before", "after")]
        cells = ["-" if value is None else f"{value:.1%}" for value in values]
        summary.add_row(title, str(report[f"{name}_rows"]), *cells)
        if name == "forget" and (metrics := report["request"]["metrics"]):
            own = [metrics.get(f"forget_abstain{when}") for when in ("_before", "")]
            cells = ["-" if value is None else f"{value:.1%}" for value in own]
            summary.add_row("  the same without the guard that knows these texts", str(report["forget_rows"]), *cells)
    console.print(summary)
    taken = report["seconds_to_active"]
    console.print(
        f"{report['model']}, {report['quantization']}, {report['num_virtual_tokens']} virtual tokens; "
        + (f"active {taken:.0f} s after the submit, " if taken is not None else "")
        + f"{report['seconds_total']:.0f} s in all."
    )
    for shortfall in report["missed"] or []:
        console.print(f"[yellow]Short of what this demo is to show:[/] {shortfall}.")


if __name__ == "__main__":
    sys.exit(main())
