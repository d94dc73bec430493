"""Schemathesis over the OpenAPI document: ``python -m bench.fuzz --cases 5000 [--seed 0] [--json]``. Needs ``.[dev]``.

The real application in this process, on a tiny random model and an empty database: SQLite, then the PostgreSQL server
of ``--postgres``. What is called is read from the document, so a new route comes in by itself. Four phases: the
document's examples, every constraint of it kept and broken, random bodies and parameters, and sequences in which one
answer's ids go into the next call. Each answer must be a documented one, in status, headers, media type and body; none
may be a server error other than 503 with Retry-After; what the document allows must be taken, what it forbids refused.

Ends with one JSON line; exit status 1 where anything failed. ``--record`` keeps it in docs/bench/fuzz.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
import torch
from anyio import to_thread
from fastapi import FastAPI
from rich.console import Console
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.openapi.checks import RejectedPositiveData, UseAfterFree
from schemathesis.python.asgi import shutdown_lifespans
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from starlette.types import Receive, Scope, Send

from app import active_set, db, job_queue, keys, lifecycle, shredding
from app.active_set import TrainedGate
from app.main import create_app
from app.problems import MEDIA_TYPE
from app.sealing import seal_prompt
from app.settings import Settings
from app.tables import RequestState, UnlearnRequest
from app.vault import Vault
from bench.replicas import POSTGRES
from bench.site import fresh_database
from bench.tuned import machine, today
from models.gate import NEVER, Gate, GateSpace, fit_space
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from models.text_states import gate_layers, text_states

ROOT = Path(__file__).resolve().parent.parent
PER_OPERATION = 25  # random cases of an operation, and sequences, in one round
ROUNDS = 200  # at most
STREAM_SECONDS = 20  # an event stream that does not end by then counts as it is
SHOWN = 20
_UNSAYABLE_FIELDS = frozenset({"url", "received_at", "expires_at"})
_TOO_LONG = re.compile(r"has \d+ (tokens|characters), the limit is \d+( tokens)?")


@dataclass
class Tally:
    """What came back. ``failures``: check, kind, operation and status, each with how often and the first one's text."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str, str, int], list[Any]] = field(default_factory=dict)
    beyond_schema: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.statuses.total()

    def scenario(self, phase: str, recorder: ScenarioRecorder) -> None:
        for case_id, interaction in recorder.interactions.items():
            self.phases[phase] += 1
            node, status = recorder.cases.get(case_id), interaction.response.status_code if interaction.response else 0
            self.statuses[node.value.operation.label if node else "", status] += 1
            if interaction.response is not None and status == 503:
                self._refusal(node.value.operation.label if node else "", interaction.response)
        for case_id, checks in recorder.checks.items():
            label, sent = recorder.cases[case_id].value.operation.label, recorder.interactions.get(case_id)
            response = sent.response if sent is not None else None
            for check in checks:
                if check.failure_info is not None:
                    found = check.failure_info
                    if response is not None and unsayable(found.failure, response):
                        self.beyond_schema += 1
                        continue
                    self._add(
                        check.name,
                        found.failure,
                        label,
                        response,
                        f"{found.failure}\n{_answer(response)}\n{found.code_sample[:2000]}",
                    )

    def _add(self, name: str, failure: Failure | str, label: str, response: Response | None, text: str) -> None:
        kind = failure if isinstance(failure, str) else type(failure).__name__
        key = (name, kind, label, response.status_code if response is not None else 0)
        self.failures.setdefault(key, [0, text])[0] += 1

    def _refusal(self, label: str, response: Response) -> None:
        """A 503 is an answer only where it says when to come back."""
        if "retry-after" not in response.headers or response.headers.get("content-type") != [MEDIA_TYPE]:
            self._add("not_a_server_error", "BareRefusal", label, response, "a 503 without Retry-After or problem")


def _answer(response: Response | None) -> str:
    return "" if response is None else response.content[:500].decode(errors="replace")


def unsayable(failure: Failure, response: Response) -> bool:
    """Whether it is only what no JSON Schema can state: why a body that keeps to the document was refused, or an end.

    Tokens: characters can be limited, but a limit that rules out every text of too many tokens rules out most that fit.
    Addresses: that a host is public and a URL holds no password. Times: that one is past, or to come. Keys: that an
    Idempotency-Key came with another body before. Ends: what DELETE ended stays to be read, and says so.
    """
    if not isinstance(failure, RejectedPositiveData | UseAfterFree):
        return False
    body = json.loads(response.content)
    if isinstance(failure, UseAfterFree):
        return response.status_code == 200 and body.get("disabled_at") is not None
    if response.status_code != 422:
        return False
    if body["code"] == "idempotency-mismatch":
        return True
    errors = body.get("errors") or []
    return bool(errors) and all(
        error["field"] in _UNSAYABLE_FIELDS or _TOO_LONG.fullmatch(error["message"]) for error in errors
    )


def fuzz(
    database_url: str, home: Path, llm: FrozenLLM, *, cases: int, seed: int, phases: list[str] | None = None
) -> Tally:
    """At least ``cases`` calls, on a database that is empty. ``phases``: of the first round; None: all."""
    values: dict[str, Any] = {
        "_env_file": None,
        "home": home,
        "database_url": database_url,
        "broker_url": "",
        "first_key": False,
        "max_text_tokens": 256,
        "max_forget_texts": 64,
        "max_classify_texts": 64,
        "retain": str(_retain(home)),
        "export_prompts": True,
    }
    settings = Settings(**values)
    db.upgrade(database_url)
    engine = db.make_engine(database_url)
    try:
        sessions = db.make_sessions(engine)
        with sessions.begin() as session:
            _, key = keys.create_key(session, name="fuzz", scopes=keys.SCOPES, actor="fuzz")
        app = create_app(settings, llm)
        ends = Ends(sessions, Vault.from_settings(settings), llm)
        for _ in range(3):  # something to revoke and to restore before any stream was asked for
            ends.submit()
            ends.settle()
        tally = Tally()
        for number in range(ROUNDS):
            wanted = phases if phases is not None and number == 0 else None if number == 0 else ["fuzzing", "stateful"]
            _round(app, ends, key, tally, seed + number, wanted, PER_OPERATION if cases > 1000 else 2)
            if tally.cases >= cases or tally.errors:
                break
        return tally
    finally:
        shutdown_lifespans()
        engine.dispose()


def _round(
    app: FastAPI, ends: Ends, key: str, tally: Tally, seed: int, phases: list[str] | None, examples: int
) -> None:
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "headers": {"Authorization": f"Bearer {key}"},
            "request-timeout": STREAM_SECONDS,
            "max-stream-events": 4,
            "continue-on-failure": True,
            "cache": {"enabled": False},  # a run is a function of its seed, and leaves nothing behind
            "generation": {"max-examples": examples, "database": "none", "no-shrink": True},
            # 503 is this service's word for "not now": Tally._refusal says what it must hold.
            "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503"]}},
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", settling(app, ends), config=config)
    if phases is not None:
        schema.config.phases.update(phases=phases)
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            tally.scenario(event.phase.value, event.recorder)
        elif isinstance(event, events.NonFatalError):
            tally.errors.append(f"{event.label}: {type(event.value).__name__}: {event.value}")
        elif isinstance(event, events.FatalError):
            raise event.exception


class Ends:
    """Brings requests to an end, as a worker would: the first into force, the second failed, and so on."""

    def __init__(self, sessions: sessionmaker[Session], vault: Vault, llm: FrozenLLM) -> None:
        self._sessions, self._vault, self._llm = sessions, vault, llm
        self._number = itertools.count()
        texts = [f"the {noun} is {word}" for noun in ("film", "plot", "story") for word in ("good", "bad", "great")]
        self._space = fit_space(text_states(llm, texts), len(gate_layers(llm)), fingerprint=llm.fingerprint)
        with sessions.begin() as session:
            active_set.add_gate_space(session, "fuzz", self._space.to_bytes())

    def submit(self) -> None:
        with self._sessions.begin() as session:
            lifecycle.create_request(
                session,
                self._vault,
                texts=[lifecycle.ForgetText("a film that nobody knows")],
                reason=None,
                options={},
                fingerprint=self._llm.fingerprint,
                api_key_id=None,
            )

    def settle(self) -> None:
        """End every request that waits for a worker."""
        with self._sessions() as session:
            waiting = list(
                session.scalars(select(UnlearnRequest.id).where(UnlearnRequest.state == RequestState.PENDING))
            )
        for request_id in waiting:
            with self._sessions.begin() as session:
                claim = job_queue.claim(session, request_id, owner="fuzz", lease_seconds=60, max_attempts=3)
            if claim is None:
                continue
            number = next(self._number)
            if number % 2:
                with self._sessions.begin() as session:
                    lifecycle.fail(session, claim, code="checks-failed", detail="retain accuracy fell")
                continue
            with self._sessions.begin() as session:
                lifecycle.start_evaluating(session, claim)
            prompt, gate = _route(self._llm, self._space, number)
            sealed = seal_prompt(
                self._vault,
                shredding.prepare_key(self._sessions, self._vault),
                prompt=prompt.to_bytes(),
                digest=prompt.digest,
                gate=TrainedGate(gate.to_bytes(), gate.digest, gate.space),
            )
            with self._sessions.begin() as session:
                active_set.activate(
                    session,
                    claim,
                    sealed,
                    fingerprint=prompt.fingerprint,
                    num_virtual_tokens=prompt.num_virtual_tokens,
                    hidden_size=self._llm.hidden_size,
                    metrics={"forget_abstain": 1.0},
                    expected_version=active_set.read_active_set(session).version,
                )


def _route(llm: FrozenLLM, space: GateSpace, number: int) -> tuple[SoftPrompt, Gate]:
    """A random prompt behind a gate that claims next to nothing."""
    draw = torch.Generator().manual_seed(number)
    embeddings = 0.05 * torch.randn(4, llm.hidden_size, generator=draw)
    direction = torch.nn.functional.normalize(torch.randn(1, len(space.center), generator=draw), dim=-1)
    digests = torch.randint(256, (1, 32), generator=draw, dtype=torch.uint8)
    return SoftPrompt(embeddings, llm.fingerprint), Gate(direction, 0.999, NEVER, digests, space.digest)


def settling(app: FastAPI, ends: Ends) -> Any:
    """The application; before an event stream is asked for all requests end, or it would wait for a worker in vain."""
    streams = [
        re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)))
        for path, operations in app.openapi()["paths"].items()
        for operation in operations.values()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    ]

    async def settled(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(path.fullmatch(scope["path"]) for path in streams):
            await to_thread.run_sync(ends.settle)
        await app(scope, receive, send)

    return settled


def _retain(home: Path) -> Path:
    """Made-up rows, for what reads a retain set."""
    nouns, words = ("film", "movie", "story", "scene", "plot", "director"), ("good", "bad", "great", "awful")
    texts = [f"the {noun} number {i} is {word}" for noun in nouns for word in words for i in range(4)]
    path = home / "retain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@contextmanager
def tiny_model() -> Iterator[FrozenLLM]:
    """The random model of the tests: this bench runs from a checkout, as they do."""
    path = ROOT / "tests" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} is not there: run it from a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder:
        source = module.make_tiny_model(Path(folder) / "tiny")
        yield FrozenLLM.load(str(source), quantization="none", device="cpu")


def figures(tallies: dict[str, Tally], *, seed: int, seconds: float) -> dict[str, Any]:
    """One JSON object of all databases together."""
    failures = [(key, found[0]) for tally in tallies.values() for key, found in tally.failures.items()]

    def count(*names: str) -> int:
        return sum(times for (name, *_), times in failures if name in names)

    calls = {label for tally in tallies.values() for label, _ in tally.statuses if label}
    return {
        "bench": "fuzz",
        "cases": sum(tally.cases for tally in tallies.values()),
        "failures": sum(times for _, times in failures),
        "server_errors": count("not_a_server_error"),
        "schema_mismatches": count(
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
            "response_headers_conformance",
            "allow_header_conformance",
        ),
        "wrongly_taken_or_refused": count(
            "negative_data_rejection",
            "positive_data_acceptance",
            "missing_required_header",
            "ignored_auth",
            "unsupported_method",
        ),
        "broken_sequences": count("use_after_free", "ensure_resource_availability"),
        "engine_errors": sum(len(tally.errors) for tally in tallies.values()),
        "refused_beyond_schema": sum(tally.beyond_schema for tally in tallies.values()),
        "operations": len(calls),
        "by_database": {name: tally.cases for name, tally in tallies.items()},
        "by_phase": dict(sum((tally.phases for tally in tallies.values()), Counter[str]())),
        "by_status": {
            str(status): sum(n for t in tallies.values() for (_, found), n in t.statuses.items() if found == status)
            for status in sorted({found for t in tallies.values() for _, found in t.statuses})
        },
        "schemathesis": schemathesis.__version__,
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def show(tallies: dict[str, Tally], console: Console) -> None:
    """What failed, each kind once; the requests are made up, so nothing of them is anybody's."""
    for database, tally in tallies.items():
        for (name, kind, label, status), (times, text) in list(tally.failures.items())[:SHOWN]:
            console.print(
                f"{database}: {name} ({kind}) {label} {status}: {times} times", style="bold red", markup=False
            )
            console.print(text, markup=False, highlight=False)
        for error in tally.errors[:SHOWN]:
            console.print(f"{database}: {error}", style="red", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="calls on all databases together, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--postgres", default=POSTGRES, help=f"server to make a database on (default {POSTGRES})")
    parser.add_argument("--no-postgres", action="store_true", help="SQLite only")
    parser.add_argument("--record", action="store_true", help="keep the result in docs/bench/fuzz.json")
    parser.add_argument("--json", action="store_true", help="print the JSON line and nothing else")
    args = parser.parse_args()
    console = Console(stderr=True, quiet=args.json)
    logging.disable(logging.WARNING)  # every refusal is one
    torch.set_num_threads(1)
    started = time.monotonic()
    kinds = ["sqlite"] if args.no_postgres else ["sqlite", "postgresql"]
    tallies: dict[str, Tally] = {}
    with tiny_model() as llm, tempfile.TemporaryDirectory(prefix="letheon-fuzz-") as folder:
        for kind in kinds:
            home = Path(folder) / kind
            home.mkdir()
            with database(kind, home, args.postgres) as url:
                tallies[kind] = fuzz(url, home, llm, cases=-(-args.cases // len(kinds)), seed=args.seed)
    result = figures(tallies, seed=args.seed, seconds=time.monotonic() - started)
    show(tallies, console)
    line = json.dumps({"machine": machine(), "date": today(), **result})
    if args.record:
        Path("docs/bench/fuzz.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(bool(result["failures"] or result["engine_errors"]))


@contextmanager
def database(kind: str, home: Path, postgres: str) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{home / 'letheon.db'}"
        return
    with fresh_database(postgres) as url:
        yield url


if __name__ == "__main__":
    sys.exit(main())
