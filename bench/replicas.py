"""Several replicas, one active set: ``python -m bench.replicas [--replicas 4] [--rounds 200] [--record | --json]``.

Real ``letheon serve --no-worker`` processes on a fresh PostgreSQL database, with clients on each of them all the time.
A round puts a prompt in force (through the worker's own functions; committed is acknowledged), now and then restores
the set without it and with it again, and revokes it (through the API of any replica). What hides the text is in turn
the guard, the gate, and the prompt itself, which was taught to abstain on it. After every acknowledgement
all replicas are asked at once for a text whose answer the change decides, until each has confirmed the new version.
Every answer, the other clients' too, is judged by its version and by its label (``bench.consistency``).

Half way through one replica is killed (-9) and later started again. Ends with one JSON line; exit status 1 where
anything was stale or broken, nothing was killed or nobody answered then, or fewer rounds than asked for were run.
``--json`` prints the recorded result and computes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app import active_set
from app.pull import reviews_dir
from app.settings import Settings, get_settings
from bench.clients import PAUSE, Connection, Reply, Sample, drive, encode
from bench.consistency import Answer, Change, judge
from bench.probes import Probes, find_probes
from bench.routing_cost import quantile
from bench.site import Replica, Site, add_space, deployed, put_in_force
from bench.tuned import parse, record
from models.examples import read_examples

POSTGRES = "postgresql://postgres@127.0.0.1:5432/postgres"
STANDING, PROBES, OTHERS = 2, 4, 6  # texts hidden throughout, now and then, and never
KINDS = ("guard", "certain", "taught")  # of the rounds, in turn (``Probes.route``)
CONFIRM_SECONDS = 120.0
AFTER_KILL_SECONDS = 10.0


class BenchFailed(Exception):
    """The bench cannot go on; the message says why."""


@dataclass(frozen=True)
class Options:
    """``clients``: on each replica. ``down``: seconds that the killed replica stays away; None kills none."""

    rounds: int = 200
    minutes: float = 60.0
    clients: int = 2
    down: float | None = AFTER_KILL_SECONDS
    min_version: bool = False
    seed: int = 0


@dataclass
class Run:
    """What is asked, of whom, and what came back. ``samples``: by replica; a sample's ``body`` is a text's index."""

    site: Site
    probes: Probes
    options: Options
    alive: list[Replica]
    history: list[Change]
    samples: list[list[Sample]]
    confirmed: dict[str, list[float]] = field(default_factory=dict)  # kind of change → seconds
    rounds: int = 0
    seconds: float = 0.0
    killed: tuple[Replica, float] | None = None
    back: float = math.inf  # when the killed replica was ready again
    revival: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.options.seed)

    async def round(self, number: int) -> None:
        """Puts one prompt in force and takes it out again."""
        probe = STANDING + self.draw.randrange(PROBES)
        least = self.options.min_version and number % 2 == 1
        route = self.probes.route(probe, KINDS[number % len(KINDS)], self.site.vault, seed=100 + number)
        without, prompt = self.history[-1], ""

        async def activate() -> tuple[int, float]:
            nonlocal prompt
            site, texts = self.site, [self.probes.texts[probe]]
            prompt, version, acknowledged = await asyncio.to_thread(
                put_in_force, site.sessions, site.vault, site.settings, route, texts
            )
            return version, acknowledged

        async def restore(version: int) -> tuple[int, float]:
            answer = await self.admin(f"/admin/active-sets/{version}/restore")
            return int(answer["version"]), time.perf_counter()

        async def revoke() -> tuple[int, float]:
            await self.admin(f"/admin/prompts/{prompt}/revoke")
            return self.history[-1].version + 1, time.perf_counter()  # nobody else changes this set

        await self.change("activate", activate, probe, without.hidden | {probe}, least)
        if number % 4 == 3:
            behind = self.history[-1].version
            await self.change("restore", lambda: restore(without.version), probe, without.hidden, least)
            await self.change("restore", lambda: restore(behind), probe, without.hidden | {probe}, least)
        await self.change("revoke", revoke, probe, without.hidden, least)
        self.rounds += 1

    async def change(
        self,
        kind: str,
        operation: Callable[[], Awaitable[tuple[int, float]]],
        probe: int,
        hidden: frozenset[int],
        least: bool,
    ) -> None:
        """Do it, note it, and see it confirmed by every living replica."""
        alive = list(self.alive)
        # Open beforehand, so that the first question is on its way as soon as the change is acknowledged.
        connections = [await Connection.open(replica.url) for replica in alive]
        started = time.perf_counter()
        version, acknowledged = await operation()
        self.history.append(Change(version, started, acknowledged, hidden))
        body: dict[str, Any] = {"texts": [self.probes.texts[probe]]}
        if least:
            body["min_version"] = version
        ends = await asyncio.gather(
            *(self.confirm(*pair, probe, body, version) for pair in zip(alive, connections, strict=True))
        )
        self.confirmed.setdefault(kind, []).append(max(ends) - acknowledged)

    async def confirm(
        self, replica: Replica, connection: Connection, probe: int, body: dict[str, Any], version: int
    ) -> float:
        """Ask until an answer names ``version``; when it did. Raises BenchFailed."""
        request = encode(replica.url, self.site.key, body)
        end = time.perf_counter() + CONFIRM_SECONDS
        while time.perf_counter() < end:
            sample = await ask_once(replica, connection, request, probe)
            self.samples[replica.number].append(sample)
            if sample.status == 200 and sample.answer["active_set_version"] >= version:
                connection.close()
                return sample.end
            if sample.status != 200:
                await asyncio.sleep(sample.retry_after or PAUSE)
            if not connection.usable:
                connection = await Connection.open(replica.url)
        raise BenchFailed(f"replica {replica.number} did not confirm version {version} in {CONFIRM_SECONDS:.0f} s")

    async def admin(self, path: str) -> dict[str, Any]:
        """POST to any living replica; what it answers. Raises BenchFailed."""
        replica = self.draw.choice(self.alive)
        request = encode(replica.url, self.site.key, {"reason": "bench"}, path)
        while True:
            connection = await Connection.open(replica.url)
            reply = await connection.ask(request)
            connection.close()
            answer: dict[str, Any] = json.loads(reply.body)
            if reply.status == 200:
                return answer
            if reply.status != 503 or reply.retry_after is None:
                raise BenchFailed(f"{path}: replica {replica.number} says {reply.status} {answer.get('code')}")
            self.samples[replica.number].append(refusal(reply))
            await asyncio.sleep(reply.retry_after)

    async def warm_up(self) -> None:
        """Every text once from every replica; judged like the rest."""
        for text, replica in ((t, r) for t in range(len(self.probes.texts)) for r in self.alive):
            connection = await Connection.open(replica.url)
            request = encode(replica.url, self.site.key, {"texts": [self.probes.texts[text]]})
            self.samples[replica.number].append(await ask_once(replica, connection, request, text))
            connection.close()

    def kill(self) -> None:
        replica = self.alive.pop(self.draw.randrange(len(self.alive)))
        self.killed = (replica, time.perf_counter())
        replica.kill()
        self.revival = asyncio.create_task(self._revive(replica))

    async def _revive(self, replica: Replica) -> None:
        await asyncio.sleep(self.options.down or 0)
        self.site.restart(replica)
        await asyncio.to_thread(self.site.wait_ready, replica)
        self.back = time.perf_counter()
        self.alive.append(replica)


async def ask_once(replica: Replica, connection: Connection, request: bytes, text: int) -> Sample:
    start = time.perf_counter()
    try:
        reply = await connection.ask(request)
    except OSError as error:
        return Sample(start, time.perf_counter(), text, 0, error=type(error).__name__)
    return Sample(start, time.perf_counter(), text, reply.status, reply.retry_after, reply.body)


def refusal(reply: Reply) -> Sample:
    now = time.perf_counter()
    return Sample(now, now, 0, reply.status, reply.retry_after, reply.body)


async def run(site: Site, probes: Probes, options: Options, first: Change, console: Console) -> Run:
    """All rounds, with clients on every replica meanwhile. Raises BenchFailed, SiteFailed."""
    now = Run(site, probes, options, list(site.replicas), [first], [[] for _ in site.replicas])
    await now.warm_up()
    until = asyncio.Event()
    bodies = [{"texts": [text]} for text in probes.texts]
    traffic = [
        asyncio.create_task(
            drive(r.url, site.key, bodies, clients=options.clients, seconds=math.inf, until=until, seed=r.number)
        )
        for r in site.replicas
    ]
    began = time.monotonic()
    try:
        end = began + 60 * options.minutes
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("rounds", total=options.rounds)
            # The last one is for all replicas together, the one that was away too.
            while now.rounds < options.rounds - 1 and time.monotonic() < end:
                if options.down is not None and now.killed is None and now.rounds >= options.rounds // 2:
                    now.kill()
                await now.round(now.rounds)
                progress.update(task, completed=now.rounds)
            if now.revival is not None:
                await now.revival
            await now.round(now.rounds)
    finally:
        now.seconds = time.monotonic() - began
        until.set()
        found = await asyncio.gather(*traffic)
        if now.revival is not None:
            now.revival.cancel()
    for replica, samples in zip(site.replicas, found, strict=True):
        now.samples[replica.number] += samples
    with site.sessions() as session:
        if active_set.read_active_set(session).version != now.history[-1].version:
            raise BenchFailed("the active set was changed by somebody else")
    return now


def figures(now: Run) -> dict[str, Any]:
    """Counts over all answers."""
    answers: list[Answer] = []
    counts = dict.fromkeys(("errors_5xx_other", "errors_other", "refused_503", "broken_connections"), 0)
    victim, killed = now.killed if now.killed is not None else (None, math.inf)
    for number, samples in enumerate(now.samples):
        for s in samples:
            if s.status == 200:
                answer = s.answer
                (found,) = answer["results"]
                answers.append(Answer(number, s.start, s.end, s.body, answer["active_set_version"], found["label"]))
            elif s.refused:
                counts["refused_503"] += 1
            elif s.status >= 500:
                counts["errors_5xx_other"] += 1
            elif s.status:
                counts["errors_other"] += 1
            elif victim is None or number != victim.number or s.end < killed or s.start > now.back:
                counts["broken_connections"] += 1
    verdicts = judge(answers, now.history, now.probes.labels)
    judged = list(zip(answers, verdicts, strict=True))
    result: dict[str, Any] = {
        "replicas": len(now.samples),
        "rounds": now.rounds,
        "acknowledgements": len(now.history) - 1,
        "answers_checked": len(answers),
        "stale_by_version": sum(v.stale_version for v in verdicts),
        "stale_by_label": sum(v.stale_label for v in verdicts),
        "ahead": sum(v.ahead for v in verdicts),
        **counts,
        "kills": int(victim is not None),
    }
    if victim is not None:
        others = [a for a in answers if a.replica != victim.number and a.started >= killed]
        again = [(a, v) for a, v in judged if a.replica == victim.number and a.started >= killed]
        # At once many may have asked the new process: none of the answers that can have been its first may be stale.
        first_end = min((a.ended for a, _ in again), default=math.inf)
        result |= {
            "answered_after_kill": sum(a.ended <= killed + AFTER_KILL_SECONDS for a in others),
            "seconds_away": round(now.back - killed, 1),
            "versions_missed": sum(killed < change.acknowledged < now.back for change in now.history),
            "answers_after_restart": len(again),
            "first_answers_after_restart_stale": sum(v.stale or v.ahead for a, v in again if a.started <= first_end),
        }
    result |= {
        "min_version": now.options.min_version,
        "clients": now.options.clients * len(now.samples),
        "threads_per_replica": now.site.threads,
        "seconds": round(now.seconds, 1),
    }
    for kind, seconds in now.confirmed.items():
        for q in (50, 99):
            result[f"{kind}_confirmed_p{q}_ms"] = round(1000 * quantile(seconds, q / 100), 1)
    return result


def trial(
    settings: Settings, texts: Sequence[str], *, replicas: int, postgres: str, options: Options, console: Console
) -> Run:
    """From an empty database to everything that was answered. Raises NoProbes, SiteFailed, BenchFailed."""
    probes = find_probes(settings, texts, STANDING + PROBES + OTHERS, teach=range(STANDING, STANDING + PROBES))
    threads = max(1, (os.cpu_count() or 1) // replicas)
    with deployed(settings, postgres=postgres, threads=threads) as site:
        add_space(site.sessions, "bench", probes.space)
        version, acknowledged = 0, time.perf_counter()
        for text in range(STANDING):
            route = probes.route(text, "guard", site.vault, seed=text)
            placed = put_in_force(site.sessions, site.vault, site.settings, route, [probes.texts[text]])
            _, version, acknowledged = placed
        first = Change(version, acknowledged, acknowledged, frozenset(range(STANDING)))
        console.print(f"starting {replicas} replicas, {threads} thread(s) each")
        site.start(replicas)
        return asyncio.run(run(site, probes, options, first, console))


FAULTS = (
    "stale_by_version",
    "stale_by_label",
    "ahead",
    "errors_5xx_other",
    "errors_other",
    "broken_connections",
    "first_answers_after_restart_stale",
)


def faults(result: dict[str, Any], options: Options) -> list[str]:
    """Names of the figures for which the bench has failed: what it was to show was broken, or was not tried."""
    found = [name for name in FAULTS if result.get(name)]
    if options.down is not None and not result["kills"]:
        found.append("kills")
    if result["kills"] and not result["answered_after_kill"]:
        found.append("answered_after_kill")
    if result["rounds"] < options.rounds:
        found.append("rounds")
    return found


def show(result: dict[str, Any], wrong: Sequence[str], console: Console) -> None:
    table = Table(title="replicas on one PostgreSQL")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in result.items():
        table.add_row(name, f"[bold red]{value}[/]" if name in wrong else str(value))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no new round begins")
    parser.add_argument("--clients", type=int, default=2, help="on each replica")
    parser.add_argument("--postgres", default=POSTGRES, help=f"server to make the database on (default {POSTGRES})")
    parser.add_argument("--min-version", action="store_true", help="ask with `min_version` in every other round")
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="keep the result where --out says")
    args = parse(parser, Path("docs/bench/replicas.json"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes and the database go, too
    console = Console(stderr=True)
    settings = get_settings()
    texts = [e.text for e in read_examples(str(reviews_dir(settings.home) / "held_out.jsonl"), labels=settings.labels)]
    options = Options(
        rounds=args.rounds,
        minutes=args.minutes,
        clients=args.clients,
        down=None if args.no_kill else AFTER_KILL_SECONDS,
        min_version=args.min_version,
        seed=args.seed,
    )
    now = trial(settings, texts, replicas=args.replicas, postgres=args.postgres, options=options, console=console)
    result = {"bench": "replicas", **figures(now)}
    wrong = faults(result, options)
    show(result, wrong, console)
    if args.record:
        record(args, result)
    else:
        print(json.dumps(result))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
