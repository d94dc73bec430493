"""What breaks, and what is lost by it: ``python -m bench.faults [--quick | --full] [--only NAME …] [--json]``. With
``--record`` the result is kept in docs/bench/faults.json, with ``--json`` it is one line instead of a table.

Processes are killed, stopped and cut off on a tiny model: on PostgreSQL and Redis, a cluster and a server of the
bench's own, and on SQLite with a folder as broker. After each trial the database says what became of every request that
was accepted: ``lost``, neither in force nor in a stated end; ``doubled``, in force twice, or trained again without a
lease that was lost.

Each trial is kept under ``var/faults``: a run that broke off goes on, one with more trials adds to it, and a result is
of all that are kept. Another seed, or other source, begins anew. Exit status 1 where any trial failed. docs/faults.md
says what is tried.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from bench.fault_audit import alter_state, tamper
from bench.fault_backup import restore_backup
from bench.fault_canary import TOGETHER, search_deployment
from bench.fault_changes import kill_in_change
from bench.fault_judge import Outcome, block
from bench.fault_kills import kill_at_point, kill_whenever, stop_and_continue
from bench.fault_limits import run_out
from bench.fault_outages import deliver_many_times, flush_broker, kill_api, restart_postgres
from bench.fault_processes import FaultFailed
from bench.fault_site import BACKENDS, Bench, Site, open_bench
from bench.tuned import machine, today, write

OUT = Path("docs/bench/faults.json")
WORK = Path("var/faults")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    """``on_site``: a trial on a deployment that it shares with others; ``alone``, one that makes its own; ``together``:
    ``size`` trials at once, on one that they make."""

    name: str
    title: str
    quick: int
    full: int
    on_site: Callable[[Site, int, random.Random], Outcome] | None = None
    alone: Callable[[Bench, int, random.Random], Outcome] | None = None
    together: Callable[[Bench, Sequence[int], Sequence[random.Random]], list[Outcome]] | None = None
    size: int = 1
    backends: tuple[str, ...] = BACKENDS

    def backend(self, number: int) -> str:
        return self.backends[number % len(self.backends)]

    def next_of(self, left: Sequence[int]) -> list[int]:
        """The trials of one backend that come next: one, or those of ``left`` that are made together with the first."""
        place = len(self.backends) * self.size
        return [number for number in left if number // place == left[0] // place] if self.together else [left[0]]


FAULTS = (
    Fault("failpoints", "kill -9 at every named failpoint", 50, 300, on_site=kill_at_point),
    Fault("worker", "kill -9 of a worker at random moments", 20, 300, on_site=kill_whenever),
    Fault("stopped", "SIGSTOP for three leases, then SIGCONT", 10, 100, on_site=stop_and_continue),
    Fault("api", "kill -9 of an API around its commit", 20, 300, on_site=kill_api),
    Fault("changes", "kill -9 in approval, cancel, expiry, …", 64, 320, on_site=kill_in_change),
    Fault("duplicates", "one message delivered 10 times at once", 50, 1000, on_site=deliver_many_times),
    Fault("broker", "broker killed and flushed", 10, 100, on_site=flush_broker),
    Fault(
        "postgres", "PostgreSQL stopped at once and restarted", 5, 50, on_site=restart_postgres, backends=BACKENDS[:1]
    ),
    Fault("limits", "disk full, or memory limit, in training", 5, 30, alone=run_out),
    Fault("audit", "audit rows edited, deleted, reordered, cut off", 500, 10_000, on_site=tamper),
    Fault("state", "requests, prompts, active set altered by SQL", 100, 1_000, on_site=alter_state),
    Fault("backup", "an old backup restored", 10, 50, alone=restore_backup),
    Fault("canary", "search for a canary", 12, 60, together=search_deployment, size=TOGETHER),
)


class Kept:
    """Trials of one fault on disk, a line each, under a first line that says of which source and seed they are."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self._lock = path, threading.Lock()
        self.outcomes: dict[int, Outcome] = {}
        if path.exists():
            first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
            if first == json.dumps(head):
                whole = []
                for line in lines:
                    try:
                        found = json.loads(line)
                    except ValueError:  # cut off in the middle
                        continue
                    number = found.pop("trial")
                    self.outcomes[number] = Outcome(**found)
                    whole.append(line)
                write(path, "".join(f"{line}\n" for line in (first, *whole)).encode())
                return
        write(path, (json.dumps(head) + "\n").encode())

    def add(self, number: int, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes[number] = outcome
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"trial": number, **asdict(outcome)}) + "\n")


def source_digest() -> str:
    """Of all that a trial runs: results of other source are not these."""
    digest = hashlib.sha256()
    for folder in ("app", "worker", "models", "alembic", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder != "bench" or path.name.startswith("fault"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_fault(
    bench: Bench, fault: Fault, numbers: Sequence[int], seed: int, done: Callable[[int, Outcome], None]
) -> None:
    """The missing trials, those of each backend one after another in a thread of its own."""
    failures: list[BaseException] = []

    def lane(backend: str) -> None:
        try:
            run_lane(bench, fault, backend, [n for n in numbers if fault.backend(n) == backend], seed, done)
        except BaseException as error:
            failures.append(error)

    if any(fault.backend(n) == "postgresql" for n in numbers):
        bench.postgres  # noqa: B018  # started here, not by two threads at once
    threads = [threading.Thread(target=lane, args=(backend,)) for backend in fault.backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run_lane(
    bench: Bench, fault: Fault, backend: str, numbers: Sequence[int], seed: int, done: Callable[[int, Outcome], None]
) -> None:
    """A trial that cannot go on has failed, and the next one gets a new deployment."""
    left = list(numbers)
    while left:
        with ExitStack() as stack:
            site = stack.enter_context(bench.site(backend)) if fault.on_site else None
            while left:
                these = fault.next_of(left)
                left = [number for number in left if number not in these]
                draws = [random.Random(f"{seed}:{fault.name}:{number}") for number in these]
                try:
                    outcomes = trials(fault, bench, site, these, draws)
                except (FaultFailed, AssertionError) as error:
                    for number in these:
                        done(number, Outcome(kind="broke off", reasons=[f"trial {number} broke off: {error}"]))
                    break
                for number, outcome in zip(these, outcomes, strict=True):
                    done(number, outcome)


def trials(
    fault: Fault, bench: Bench, site: Site | None, numbers: Sequence[int], draws: Sequence[random.Random]
) -> list[Outcome]:
    if fault.together is not None:
        return fault.together(bench, numbers, draws)
    if fault.alone is not None:
        return [fault.alone(bench, numbers[0], draws[0])]
    assert fault.on_site is not None and site is not None
    return [fault.on_site(site, numbers[0], draws[0])]


def summary(blocks: dict[str, dict[str, Any]], outcomes: Sequence[Outcome], **about: Any) -> dict[str, Any]:
    return {
        "bench": "faults",
        "trials": len(outcomes),
        "failures": sum(outcome.failed for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "doubled": sum(outcome.doubled for outcome in outcomes),
        "tamper_missed": sum(outcome.missed for outcome in outcomes),
        "canary_leaks": sum(outcome.leaks for outcome in outcomes),
        "faults": blocks,
        **about,
    }


def table(result: dict[str, Any]) -> Table:
    made = Table("fault", "trials", "failures", "rate below (95 %)", "taken up within")
    titles = {fault.name: fault.title for fault in FAULTS}
    for name, found in result["faults"].items():
        taken = found["taken_up_seconds_max"]
        made.add_row(
            titles[name],
            str(found["trials"]),
            str(found["failures"]),
            f"{found['upper_95']:.2%}",
            "" if taken is None else f"{taken:.1f} s",
        )
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="some fifteen minutes on two idle cores (the default)")
    size.add_argument("--full", action="store_true", help="hours")
    size.add_argument("--trials", type=int, help="this many of each fault")
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], help="some of the faults")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--record", action="store_true", help=f"keep the result in {OUT}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=WORK, help=f"where trials are kept (default {WORK})")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All chosen faults. Raises FaultFailed where the bench itself cannot start."""
    chosen = [fault for fault in FAULTS if args.only is None or fault.name in args.only]
    counts = {fault.name: args.trials or (fault.full if args.full else fault.quick) for fault in chosen}
    head = {"seed": args.seed, "source": source_digest()}
    kept = {fault.name: Kept(args.work / f"{fault.name}.jsonl", head) for fault in chosen}
    missing = {
        fault.name: [n for n in range(counts[fault.name]) if n not in kept[fault.name].outcomes] for fault in chosen
    }
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar, ExitStack() as stack:
        deployment = stack.enter_context(open_bench()) if any(missing.values()) else None
        for fault in chosen:
            numbers = missing[fault.name]
            task = bar.add_task(fault.title, total=counts[fault.name], completed=counts[fault.name] - len(numbers))
            if not numbers:
                continue
            assert deployment is not None
            failed = 0

            def done(number: int, outcome: Outcome, name: str = fault.name, task: Any = task) -> None:
                nonlocal failed
                kept[name].add(number, outcome)
                failed += outcome.failed
                said = f"[red]{failed} failed[/]" if failed else ""
                bar.update(task, advance=1, description=f"{name} {said}")
                for reason in outcome.reasons:
                    bar.console.print(f"{name} {number} ({outcome.kind}): {reason}", markup=False, highlight=False)

            run_fault(deployment, fault, numbers, args.seed, done)
    # All that are kept, also where this run asked for fewer: more trials say more.
    outcomes = {name: [found.outcomes[n] for n in sorted(found.outcomes)] for name, found in kept.items()}
    return summary(
        {name: block(found) for name, found in outcomes.items()},
        [outcome for found in outcomes.values() for outcome in found],
        seconds=round(time.monotonic() - began, 1),
        **head,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.ERROR)
    disable_progress_bars()
    disable_progress_bar()
    console = Console(stderr=True)
    try:
        result = run(args, console)
    except FaultFailed as error:
        console.print(f"bench.faults: {error}", markup=False)
        return 1
    if args.record:
        write(OUT, (json.dumps({"machine": machine(), "date": today(), **result}) + "\n").encode())
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(table(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
