"""A file of a million rows through the API, killed on the way: ``python -m bench.bulk [--rows 1000000] [--kills 3]``.

``letheon classify --file rows.jsonl --output answers.jsonl`` against a ``letheon serve --no-worker``, both real
processes, behind a tiny model: what is measured is a row's way, not the model's time. One text's request is in force,
and ``FAULTY`` rows have no text. The command is ended by kill -9 at ``--kills`` random moments and typed again;
the server is killed and started again once while the command waits for it.

Then the whole output is read beside the rows: each has to be there once, in its place, with its own fields and the
answer of its text. The resident memory of the command and of the server is read five times a second: what counts is
the largest of the command's last run, and of its first tenth. Ends with one JSON line; exit status 1 where a row is
``lost``, ``doubled`` or ``wrong``, or where the command takes more than ``GROWTH`` of what it took at first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from app.settings import Settings, get_settings
from bench.fault_model import make_model
from bench.probes import Probes, find_probes
from bench.site import Site, add_space, deployed, put_in_force
from bench.tuned import parse, record
from models.template import ABSTAIN

WORDS = ("film", "movie", "plot", "story", "scene", "director", "acting", "good", "bad", "great", "awful", "very")
TEXTS = 64  # different ones
FAULTY = 100  # rows without a text, in all
GROWTH = 1.25  # of the resident memory of the first tenth of the rows
FAULTS = ("lost", "doubled", "wrong", "grows")
SAMPLE_SECONDS = 0.2
SAID, TOLD = "said.json", "told.txt"


class BulkFailed(Exception):
    """The command ended otherwise than it should; the message holds the end of what it said."""


@dataclass
class Memory:
    """Resident bytes of a process: ``at`` of the output's share that is written."""

    at: list[tuple[float, int]] = field(default_factory=list)

    def most(self, start: float, end: float) -> float:
        """MiB; of the shares between."""
        return max((rss for share, rss in self.at if start <= share <= end), default=0) / 2**20


def sentences(count: int) -> list[str]:
    """Different texts, the same each time."""
    draw = random.Random(0)
    return list({" ".join(draw.choices(WORDS, k=draw.randint(3, 12))): None for _ in range(count)})


def rows(count: int) -> Iterator[tuple[int, int | None]]:
    """Each row's number and which text it has; None where it has none."""
    draw = random.Random(1)
    step = max(count // FAULTY, 2)
    for number in range(count):
        text = draw.randrange(TEXTS)
        yield number, None if number % step == step - 1 else text


def write_rows(path: Path, texts: Sequence[str], count: int) -> None:
    with path.open("w", encoding="utf-8") as out:
        for number, text in rows(count):
            kept = {"id": number, "note": f"row {number}"}
            out.write(json.dumps(kept if text is None else {**kept, "text": texts[text]}) + "\n")


def judge(output: Path, probes: Probes, count: int) -> dict[str, int]:
    """Rows ``lost``, ``doubled`` and ``wrong``: out of place, with other fields, or another text's answer."""
    lost = doubled = wrong = 0
    seen = bytearray(count)
    with output.open(encoding="utf-8") as lines:
        for line, expected in zip_longest(lines, rows(count)):
            if line is None:
                break
            found = json.loads(line)
            number = found.get("id")
            if not (isinstance(number, int) and 0 <= number < count):
                wrong += 1
                continue
            doubled += seen[number]
            seen[number] = 1
            wrong += expected is None or number != expected[0] or not _right(found, expected[1], probes)
    lost = count - sum(seen)
    return {"lost": lost, "doubled": doubled, "wrong": wrong}


def _right(found: dict[str, Any], text: int | None, probes: Probes) -> bool:
    """Whether a row of the output has its own note and its text's answer. Text 0 is the one that is forgotten."""
    if found.get("note") != f"row {found['id']}":
        return False
    if text is None:
        return "letheon_error" in found and "letheon_label" not in found
    label = ABSTAIN if text == 0 else probes.labels[text]
    return bool(found.get("text") == probes.texts[text] and found.get("letheon_label") == label)


@contextmanager
def watched(pid: Callable[[], int], output: Path, size: int, memory: Memory) -> Iterator[None]:
    """Reads the process's memory until this ends; ``size``: of the whole output, about."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            with suppress(psutil.Error):  # it is gone, and another may take its place
                memory.at.append((_share(output, size), psutil.Process(pid()).memory_info().rss))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _share(output: Path, size: int) -> float:
    return output.stat().st_size / size if output.exists() else 0.0


@contextmanager
def classify(site: Site, source: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, as anyone types it; ended with the block. What it says is beside the output."""
    command = [sys.executable, "-m", "app.cli", "classify", "--file", str(source), "--output", str(output), "--json"]
    environment = {**os.environ, "LETHEON_URL": site.replicas[0].url, "LETHEON_API_KEY": site.key}
    with output.with_name(SAID).open("wb") as said, output.with_name(TOLD).open("wb") as told:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=told)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def measure(settings: Settings, count: int, kills: int, *, seed: int, console: Console) -> dict[str, Any]:
    """From an empty database to the figures. Raises NoProbes, SiteFailed, BulkFailed."""
    with tempfile.TemporaryDirectory(prefix="letheon-bulk-") as folder:
        at = Path(folder)
        model = make_model(at / "model")
        settings = settings.model_copy(
            update={"model": str(model), "adapter": "", "quantization": "none", "device": "cpu"}
        )
        probes = find_probes(settings, sentences(20 * TEXTS), TEXTS, furthest=1.0)
        source, output = at / "rows.jsonl", at / "answers.jsonl"
        write_rows(source, probes.texts, count)
        with deployed(settings, postgres=None) as site:
            add_space(site.sessions, "bench", probes.space)
            route = probes.route(0, "guard", site.vault, seed=0)
            put_in_force(site.sessions, site.vault, site.settings, route, [probes.texts[0]])
            site.start(1)
            found = _runs(site, source, output, kills, random.Random(seed), console)
        judged = judge(output, probes, count)
        return {"rows": count, "input_mb": round(source.stat().st_size / 2**20, 1), **found, **judged}


def _runs(site: Site, source: Path, output: Path, kills: int, draw: random.Random, console: Console) -> dict[str, Any]:
    """The command until it is done: killed at random shares of the output, the server once between two of them."""
    size = int(2.1 * source.stat().st_size)  # what the answers add; only the moments of the kills depend on it
    server, ends = Memory(), sorted(draw.uniform(0.02, 0.9) for _ in range(kills))
    away = draw.uniform(0.02, 0.9)
    seconds, runs = 0.0, 0
    while True:
        memory, runs = Memory(), runs + 1
        started = time.perf_counter()
        with (
            classify(site, source, output) as command,
            watched(lambda: command.pid, output, size, memory),
            watched(lambda: site.replicas[0].process.pid, output, size, server),
        ):
            while command.poll() is None:
                share = _share(output, size)
                if away < share:
                    away = 2.0
                    site.replicas[0].kill()
                    site.restart(site.replicas[0])
                    console.print(f"{share:.0%}: the server is killed and starts again")
                if ends and ends[0] < share:
                    ends.pop(0)
                    command.kill()
                    console.print(f"{share:.0%}: the command is killed")
                time.sleep(0.05)
        seconds += time.perf_counter() - started
        if command.returncode != -signal.SIGKILL:
            break
    if command.returncode != 3 or away < 2.0:  # some rows have no text; and the server was to be killed
        raise BulkFailed(f"status {command.returncode}: {output.with_name(TOLD).read_text(errors='replace')[-800:]}")
    summary = json.loads(output.with_name(SAID).read_text())
    first, most = memory.most(0.0, memory.at[0][0] + 0.1), memory.most(0.0, 9.9)
    return {
        "runs": runs,
        "killed": runs - 1,
        "server_killed": 1,
        "faulty": summary["errors"],
        "seconds": round(seconds, 1),
        "rows_per_second": round(summary["rows"] / seconds),
        "output_mb": round(output.stat().st_size / 2**20, 1),
        "command_rss_first_mb": round(first, 1),
        "command_rss_most_mb": round(most, 1),
        "server_rss_most_mb": round(server.most(0.0, 9.9), 1),
        "grows": most > GROWTH * first,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=3, help="of the command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--record", action="store_true", help="keep the result where --out says")
    args = parse(parser, Path("docs/bench/bulk.json"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes and the files go, too
    console = Console(stderr=True)
    found = measure(get_settings(), args.rows, args.kills, seed=args.seed, console=console)
    result = {"bench": "bulk", **found}
    console.print(result)
    if args.record:
        record(args, result)
    else:
        print(json.dumps(result))
    return int(any(result[name] for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
