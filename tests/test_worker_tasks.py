"""One job in this process: a real tiny model, a real database, every way a job can end."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from worker_kit import MARKER, forget_texts, wait_for, write_retain

from app import active_set, db, job_queue, lifecycle
from app.knobs import training_config
from app.lifecycle import Claim
from app.metrics import Metrics
from app.serving import Serving
from app.settings import Mode, Settings
from app.stack import Stack, StackReader
from app.tables import GateSpace, Prompt, RequestEvent, UnlearnRequest
from app.vault import Vault
from models.examples import Example, read_examples
from models.gate_rows import GateRows
from models.inference import Classification
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from models.surroundings import Surroundings
from models.training import planned_steps
from worker.context import Context
from worker.failures import DeviceLost
from worker.job import Job
from worker.routed import surroundings
from worker.tasks import run_job
from worker.threads import Heartbeat

Sessions = sessionmaker[Session]
ROUTED_ONLY = pytest.mark.parametrize("mode", [Mode.ROUTED])
CONCATENATE_ONLY = pytest.mark.parametrize("mode", [Mode.CONCATENATE])
UNMEETABLE = {"max_retain_drop": -2.0}
"""A random model may pass any honest limit by luck; this one it cannot (the settings would refuse it)."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    path = make_tiny_model(tmp_path_factory.mktemp("model"))
    return FrozenLLM.load(str(path), quantization="none", device="cpu")


@pytest.fixture(params=list(Mode))
def mode(request: pytest.FixtureRequest) -> Mode:
    """A test of one mode only says so with ``parametrize``, which goes before these."""
    found: Mode = request.param
    return found


@pytest.fixture
def context(llm: FrozenLLM, sessions: Sessions, vault: Vault, tmp_path: Path, mode: Mode) -> Context:
    """A worker with lax checks and a short training."""
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        mode=mode,
        num_virtual_tokens=4,
        max_steps=6,
        max_tries=1,
        lease_seconds=5,
        heartbeat_seconds=0.2,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
        max_neighbour_drop=1,
    )
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    return Context(settings=settings, sessions=sessions, vault=vault, llm=llm, retain=retain)


def changed(context: Context, **knobs: Any) -> Context:
    """The same worker with other settings."""
    return Context(
        settings=context.settings.model_copy(update=knobs),
        sessions=context.sessions,
        vault=context.vault,
        llm=context.llm,
        retain=context.retain,
    )


def submit(context: Context, *, texts: list[lifecycle.ForgetText] | None = None, **options: Any) -> str:
    with context.sessions.begin() as session:
        return lifecycle.create_request(
            session,
            context.vault,
            texts=texts or forget_texts(),
            reason=None,
            options={"check_every": 1_000_000, **options},
            fingerprint=context.llm.fingerprint,
            api_key_id=None,
        ).id


def request(context: Context, request_id: str) -> UnlearnRequest:
    with context.sessions() as session:
        return lifecycle.get_request(session, request_id)


def progress(context: Context, request_id: str) -> list[dict[str, Any]]:
    with context.sessions() as session:
        query = select(RequestEvent).where(RequestEvent.request_id == request_id).order_by(RequestEvent.id)
        return [event.data for event in session.scalars(query) if event.type == "progress"]


def take(context: Context, request_id: str, *, lease: float = 5) -> Claim:
    with context.sessions.begin() as session:
        claim = job_queue.claim(session, request_id, owner="test", lease_seconds=lease, max_attempts=9)
    assert claim is not None
    return claim


def assert_failed(context: Context, request_id: str, code: str) -> UnlearnRequest:
    row = request(context, request_id)
    assert row.failure is not None and (row.state, row.failure["code"]) == ("failed", code)
    assert MARKER not in row.failure["detail"]
    assert row.wrapped_key is None and row.sealed_texts is None
    with context.sessions() as session:
        assert session.scalars(select(Prompt).where(Prompt.request_id == request_id)).one_or_none() is None
    return row


# --- a job that ends well --------------------------------------------------------------------------------------------


def test_a_request_is_trained_checked_and_activated(
    context: Context, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bare = context.settings.home / "teacher" / "gate-of-an-older-version.npz"  # its rows had plain digests for names
    bare.parent.mkdir(parents=True)
    bare.write_bytes(b"x")
    request_id = submit(context)
    run_job(context, request_id)
    assert not bare.parent.exists()

    row = request(context, request_id)
    assert row.state == "active" and row.attempt == 1 and row.wrapped_key is None
    assert row.metrics is not None
    assert row.metrics["steps"] == 6 and row.metrics["stopped"] == "max_steps" and row.metrics["passed"] is True
    with context.sessions() as session:
        view, _ = active_set.read_members(session)
        (prompt,) = active_set.active_prompts(session)
    assert (prompt.request_id, prompt.mode, row.metrics["mode"]) == (request_id, mode, mode)
    stored = SoftPrompt.from_bytes(active_set.open_prompt(context.vault, prompt), fingerprint=context.llm.fingerprint)
    assert stored.digest == prompt.digest and stored.num_virtual_tokens == 4
    assert (prompt.sealed_gate is None) == (prompt.gate_space is None) == (mode == Mode.CONCATENATE)
    steps = progress(context, request_id)
    assert steps[0]["step"] == 1 and steps[-2]["step"] == 6  # the first and the last, however fast it went
    assert (steps[-2]["phase"], steps[-1]["phase"]) == ("training", "evaluating")
    # What is kept for the next request: the rows that every request of this mode reads, and no others.
    kept = {file.name.partition("-")[0] for file in (context.settings.home / "rows").iterdir()}
    assert kept == ({"gate"} if mode == Mode.ROUTED else {"teacher"})
    assert MARKER not in caplog.text and request_id in caplog.text
    assert view.version > 0


def test_weights_are_the_same_after_a_job(context: Context) -> None:
    before = context.llm.weights_digest()
    run_job(context, submit(context))
    assert context.llm.weights_digest() == before


def test_a_second_job_joins_the_first(context: Context) -> None:
    first, second = submit(context), submit(context)
    run_job(context, first)
    run_job(context, second)
    with context.sessions() as session:
        assert [prompt.request_id for prompt in active_set.active_prompts(session)] == [first, second]


def test_a_request_is_done_once(context: Context) -> None:
    request_id = submit(context)
    assert run_job(context, request_id)
    before = request(context, request_id).updated_at
    assert not run_job(context, request_id)
    assert request(context, request_id).updated_at == before
    assert not run_job(context, "req_unknown")


def test_the_deadline_ends_the_training_and_the_checks_decide(context: Context) -> None:
    request_id = submit(context, max_steps=1_000_000)
    run_job(changed(context, training_deadline_seconds=0.5), request_id)
    row = request(context, request_id)
    assert row.state == "active" and row.metrics is not None and row.metrics["stopped"] == "deadline"

    late = submit(context, max_steps=1_000_000)
    run_job(changed(context, training_deadline_seconds=0.5, **UNMEETABLE), late)
    assert_failed(context, late, "checks-failed")


def test_the_options_of_a_request_override_the_settings(context: Context) -> None:
    assert training_config(changed(context, precision="exact").settings, {}).precision == "exact"
    unset = changed(context, mode=Mode.ROUTED, max_steps=None).settings
    assert [planned_steps(training_config(unset, {}, subjects=n), 128) for n in (1, 5)] == [96, 384]
    assert training_config(context.settings, {"max_steps": 3}, subjects=5).max_steps == 3
    config = training_config(context.settings, {"max_steps": 3, "alpha": 0.1, "seed": None, "unknown": 1})
    assert (config.max_steps, config.alpha, config.seed, config.num_virtual_tokens) == (3, 0.1, 0, 4)
    request_id = submit(context, num_virtual_tokens=7, max_steps=2)
    run_job(context, request_id)
    with context.sessions() as session:
        assert active_set.active_prompts(session)[0].num_virtual_tokens == 7


# --- a job that ends in a stated failure -----------------------------------------------------------------------------


def test_failed_checks_leave_the_figures_and_no_prompt(context: Context, mode: Mode) -> None:
    request_id = submit(context, max_steps=1)
    with context.sessions() as session:
        before = active_set.read_active_set(session)
    run_job(changed(context, **UNMEETABLE), request_id)
    row = assert_failed(context, request_id, "checks-failed")
    assert row.metrics is not None and row.metrics["passed"] is False and row.metrics["violations"]
    own = "worst_class_accuracy" if mode == Mode.CONCATENATE else "total_claim_rate"
    assert {"forget_abstain", "retain_accuracy", own} <= set(row.metrics)
    with context.sessions() as session:
        assert active_set.read_active_set(session) == before


def test_a_request_for_another_model_is_refused(context: Context) -> None:
    with context.sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            context.vault,
            texts=forget_texts(),
            reason=None,
            options={},
            fingerprint="0" * 64,
            api_key_id=None,
        ).id
    run_job(context, request_id)
    assert_failed(context, request_id, "fingerprint-mismatch")
    assert progress(context, request_id) == []


def test_a_retain_set_of_forget_texts_only_is_refused(context: Context) -> None:
    shouted = [replace(example, text=f" {example.text.upper()} ") for example in context.retain]
    request_id = submit(context, texts=[lifecycle.ForgetText(e.text, e.label) for e in shouted])
    run_job(context, request_id)
    assert_failed(context, request_id, "too-few-retain-rows")


def test_a_retain_set_of_few_different_texts_is_refused(context: Context) -> None:
    """However many rows they fill."""

    def worker(different: int) -> Context:
        return Context(
            settings=context.settings.model_copy(update={"min_retain_rows": 20}),
            sessions=context.sessions,
            vault=context.vault,
            llm=context.llm,
            retain=[*context.retain[:different]] * 10,
        )

    request_id = submit(context)
    run_job(worker(19), request_id)
    row = assert_failed(context, request_id, "too-few-retain-rows")
    assert row.failure is not None
    assert row.failure["detail"].startswith("19 different texts of the 190 rows") and "20 are" in row.failure["detail"]
    enough = submit(context)
    run_job(worker(20), enough)
    assert request(context, enough).state == "active"


def test_texts_of_other_live_requests_are_left_out_of_the_retain_set(context: Context) -> None:
    theirs = context.retain[3]
    submit(context, texts=[lifecycle.ForgetText(theirs.text)])
    claim = take(context, submit(context, texts=[lifecycle.ForgetText(context.retain[5].text)]))
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        retain = Job(context, claim, heartbeat).retain_set([])
    assert len(retain) == len(context.retain) - 2
    assert theirs not in retain and context.retain[5] not in retain


def test_a_training_that_diverges_fails(context: Context) -> None:
    request_id = submit(context, alpha=1e39)
    run_job(context, request_id)
    assert_failed(context, request_id, "diverged")


@pytest.mark.parametrize("check_every", [1, 1_000_000])
def test_a_prompt_behind_which_nothing_is_finite_fails_at_once(
    context: Context, llm: FrozenLLM, check_every: int
) -> None:
    """In a look at how far the training is, or in the checks after it. It would be so again: no other attempt."""
    context = changed(context, precision="exact")  # steps on the model itself: a bfloat16 copy has no such hook
    steps = 0

    def spoil(module: object, args: object, out: Any) -> Any:
        nonlocal steps
        steps += torch.is_grad_enabled()
        return out if torch.is_grad_enabled() or steps < min(check_every, 6) else out * math.nan

    request_id = submit(context, check_every=check_every)
    with llm.decoder.norm.register_forward_hook(spoil):
        run_job(context, request_id)
    assert_failed(context, request_id, "diverged")
    assert request(context, request_id).attempt == 1


def test_a_device_that_is_lost_ends_the_worker_and_costs_no_attempt(context: Context, llm: FrozenLLM) -> None:
    """Each request that waits would use up its attempts in the same process."""

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    request_id = submit(context)
    with llm.decoder.norm.register_forward_pre_hook(lost), pytest.raises(DeviceLost):
        run_job(context, request_id)
    waiting = request(context, request_id)
    assert (waiting.state, waiting.attempt) == ("pending", 0)
    run_job(context, request_id)
    assert request(context, request_id).state == "active"


def test_a_text_that_does_not_fit_fails_without_quoting_it(context: Context) -> None:
    request_id = submit(context, texts=[lifecycle.ForgetText(f"{MARKER} " * 400)])
    run_job(context, request_id)
    assert_failed(context, request_id, "text-too-long")


def test_an_unforeseen_error_is_left_to_the_lease_and_the_last_attempt_states_it(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Context(
        settings=context.settings.model_copy(update={"max_attempts": 2, "lease_seconds": 0.4}),
        sessions=context.sessions,
        vault=Vault(bytes(32)),  # another master key: it cannot open the texts
        llm=context.llm,
        retain=context.retain,
    )
    request_id = submit(context)
    run_job(stranger, request_id)
    row = request(context, request_id)
    assert row.state == "training" and row.sealed_texts is not None  # still owed; another worker may have the key
    assert "WrongMasterKey <" in caplog.text
    time.sleep(0.5)
    run_job(stranger, request_id)
    row = assert_failed(context, request_id, "internal")
    assert row.failure is not None and "wrong master key" in row.failure["detail"]


def test_a_damaged_prompt_of_another_request_costs_a_waiting_one_nothing(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    run_job(context, submit(context))
    with context.sessions.begin() as session:
        (row,) = session.scalars(select(Prompt))
        prompt_id, sound = row.id, row.sealed
        assert sound is not None
        row.sealed = sound[:-1] + bytes([sound[-1] ^ 1])
    waiting = submit(context)
    impatient = changed(context, max_attempts=1)
    for _ in range(3):
        assert not run_job(impatient, waiting)
    assert f"prompt {prompt_id} cannot be loaded" in caplog.text

    # Another request, damaged after it was claimed: handed back, its attempt not counted.
    claim = take(context, caught := submit(context))
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        assert not Job(impatient, claim, heartbeat).run()
    for request_id in (waiting, caught):
        row_now = request(context, request_id)
        assert (row_now.state, row_now.attempt) == ("pending", 0) and row_now.sealed_texts is not None

    with context.sessions.begin() as session:
        session.get_one(Prompt, prompt_id).sealed = sound
    for request_id in (waiting, caught):
        assert run_job(impatient, request_id)
        assert request(context, request_id).state == "active"


def test_an_unknown_label_ends_as_internal_with_its_type_only(context: Context) -> None:
    bad = [*context.retain[:40], Example(f"{MARKER} again", f"label of {MARKER}")]
    broken = Context(
        settings=context.settings.model_copy(update={"max_attempts": 1}),
        sessions=context.sessions,
        vault=context.vault,
        llm=context.llm,
        retain=bad,
    )
    request_id = submit(context)
    run_job(broken, request_id)
    assert_failed(context, request_id, "internal")


def test_memory_that_runs_out_is_named(context: Context) -> None:
    request_id = submit(context, retain_batch=10**13)
    run_job(changed(context, max_attempts=1), request_id)
    assert_failed(context, request_id, "out-of-memory")


def test_a_database_error_that_stays_is_not_tried_for_ever(context: Context) -> None:
    brief = changed(context, lease_seconds=1.0)
    claim = take(context, submit(context))
    began = time.monotonic()
    with Heartbeat(context.sessions, claim, lease_seconds=60, every=1) as heartbeat, pytest.raises(DBAPIError):
        Job(brief, claim, heartbeat).commit(lambda session: session.execute(text("SELECT 1 FROM nowhere")))
    assert time.monotonic() - began < 60


# --- a prompt that fails its checks ----------------------------------------------------------------------------------

# It learns slowly, and no gate decides in the prompt's place.
PATIENT = {
    "min_forget_abstain": 0.9,
    "max_tries": 60,
    "max_steps": 4,
    "max_false_claim_rate": 1,
    "max_certain_claim_rate": 0,
    "max_total_claim_rate": 1,
}


def states(context: Context, request_id: str) -> list[str]:
    with context.sessions() as session:
        query = select(RequestEvent).where(RequestEvent.request_id == request_id).order_by(RequestEvent.id)
        return [event.data["state"] for event in session.scalars(query) if event.type == "state"]


def test_what_failed_its_checks_is_trained_again_until_it_passes(context: Context) -> None:
    request_id = submit(context)
    run_job(changed(context, **PATIENT), request_id)
    row = request(context, request_id)
    assert row.state == "active" and row.attempt == 1 and row.metrics is not None
    tries = row.metrics["earlier_tries"]
    assert tries and all(found["missed"] == ["forget"] and found["forget_abstain"] < 0.9 for found in tries)
    assert [found["seed"] for found in tries] == list(range(len(tries)))
    assert all(later["alpha"] <= earlier["alpha"] for earlier, later in pairwise(tries))
    assert row.metrics["forget_abstain"] >= 0.9 and row.metrics["missed"] == []
    assert states(context, request_id) == ["pending", *["training", "evaluating"] * (len(tries) + 1), "active"]


def test_after_the_last_try_the_request_fails_and_says_what_was_tried(context: Context) -> None:
    request_id = submit(context)
    run_job(changed(context, **PATIENT | {"max_tries": 3, "max_steps": 1, "learning_rate": 1e-9}), request_id)
    row = assert_failed(context, request_id, "checks-failed")
    assert row.metrics is not None and len(row.metrics["earlier_tries"]) == 2
    assert states(context, request_id) == ["pending", *["training", "evaluating"] * 3, "failed"]


@ROUTED_ONLY
def test_a_prompt_that_learns_nothing_is_left_to_its_gate_with_a_warning(context: Context) -> None:
    alone = {"max_certain_claim_rate": 1, "max_steps": 1, "learning_rate": 1e-9}
    request_id = submit(context)
    run_job(changed(context, **PATIENT | alone), request_id)
    row = request(context, request_id)
    assert row.state == "active" and row.metrics is not None
    assert (row.metrics["earlier_tries"], row.metrics["violations"], row.metrics["missed"]) == ([], [], [])
    assert row.metrics["forget_abstain"] == 1 > 0.9 > row.metrics["prompt_abstain"]
    assert row.metrics["warnings"][0].startswith("the prompt's own forget abstain rate")


def test_a_worker_that_takes_over_goes_on_with_the_same_try(context: Context) -> None:
    """Stopped in the middle of the second try: neither the first try nor what the second had is lost."""
    patient = changed(context, **PATIENT, checkpoint_seconds=0.001)

    class StopInSecondTry(Job):
        def should_stop(self) -> bool:
            tried = self.commit(lambda session: lifecycle.list_tries(session, self.claim.request_id))
            return bool(tried) and self.reporter._last is not None and self.reporter._last.step == 2

    claim = take(context, request_id := submit(context))
    with Heartbeat(context.sessions, claim, lease_seconds=60, every=10) as heartbeat:
        StopInSecondTry(patient, claim, heartbeat).run()
    assert states(context, request_id) == ["pending", "training", "evaluating", "training", "pending"]
    run_job(changed(patient, max_tries=2), request_id)
    row = request(context, request_id)
    assert row.metrics is not None
    assert len(row.metrics["earlier_tries"]) == 1 and row.metrics["resumed_from"] == 2


# --- a job that is stopped -------------------------------------------------------------------------------------------


@pytest.fixture
def running(context: Context) -> Iterator[tuple[Context, str, threading.Thread]]:
    """A job without an end in a thread, in mid-training."""
    endless = changed(context, checkpoint_seconds=0.1, lease_seconds=60)
    request_id = submit(context, max_steps=1_000_000)
    thread = threading.Thread(target=run_job, args=(endless, request_id))
    thread.start()
    wait_for(lambda: progress(context, request_id), "progress")
    yield endless, request_id, thread
    endless.stop.set()
    thread.join(120)
    assert not thread.is_alive()


def test_a_cancellation_stops_the_training_and_shreds(running: tuple[Context, str, threading.Thread]) -> None:
    context, request_id, thread = running
    with context.sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="test")
    thread.join(120)
    row = request(context, request_id)
    assert row.state == "cancelled" and row.wrapped_key is None and row.sealed_texts is None


def test_a_shutdown_hands_the_request_back_with_its_checkpoint(
    running: tuple[Context, str, threading.Thread],
) -> None:
    context, request_id, thread = running
    context.stop.set()
    thread.join(120)
    row = request(context, request_id)
    assert (row.state, row.attempt, row.lease_owner) == ("pending", 0, None)
    claim = take(context, request_id)
    with context.sessions() as session:
        checkpoint = job_queue.load_checkpoint(session, context.vault, claim)
    assert checkpoint is not None and checkpoint[0] > 0


def test_a_job_whose_request_was_taken_writes_nothing_more(
    running: tuple[Context, str, threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    context, request_id, thread = running
    with context.sessions.begin() as session:  # the lease runs out and another worker claims, in one moment
        row = lifecycle.lock_request(session, request_id)
        row.attempt, row.lease_owner = row.attempt + 1, "another"
    count = len(progress(context, request_id))
    thread.join(120)
    assert "lost its lease" in caplog.text
    row = request(context, request_id)
    assert (row.state, row.lease_owner) == ("training", "another") and len(progress(context, request_id)) == count


def test_a_database_restart_does_not_end_the_job(
    running: tuple[Context, str, threading.Thread], database_url: str
) -> None:
    context, request_id, thread = running
    if database_url.startswith("sqlite"):  # the worst a file can do: someone else holds the write lock
        other = db.make_engine(database_url)
        with other.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            time.sleep(1)
            connection.rollback()
        other.dispose()
    else:
        for _ in range(5):
            with psycopg.connect(database_url, autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            time.sleep(0.2)
    before = request(context, request_id).progress
    wait_for(lambda: request(context, request_id).progress != before, "progress after the restart")
    assert thread.is_alive()


@CONCATENATE_ONLY  # a routed prompt is trained alone, whatever else is in force
def test_a_checkpoint_of_another_stack_starts_over(context: Context) -> None:
    request_id = submit(context, max_steps=30)
    endless = changed(context, checkpoint_seconds=0.01)

    class StopSoon(Job):
        def should_stop(self) -> bool:
            return self.reporter._last is not None and self.reporter._last.step >= 5

    claim = take(context, request_id)
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        StopSoon(endless, claim, heartbeat).run()
    assert request(context, request_id).state == "pending"
    run_job(context, submit(context))  # another prompt becomes active
    run_job(context, request_id)
    row = request(context, request_id)
    assert row.state == "active" and row.metrics is not None and row.metrics["resumed_from"] == 0


def test_the_checks_are_repeated_when_the_active_set_moves(context: Context, mode: Mode) -> None:
    seen: list[tuple[int, int]] = []

    class Overtaken(Job):
        """Another request becomes active after the first check."""

        def read_stack(self) -> Stack:
            self.stack = super().read_stack()
            return self.stack

        def activate(self, *what: Any) -> None:
            metrics, version = what[-2:]
            if mode == Mode.ROUTED:
                assert metrics["active_requests"] == len(self.stack.prompts) + 1
            seen.append((len(self.stack.prompts), version))
            if len(seen) == 1:
                run_job(context, submit(context))
            super().activate(*what)

    request_id = submit(context)
    claim = take(context, request_id)
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        Overtaken(context, claim, heartbeat).run()
    assert request(context, request_id).state == "active"
    assert seen == [(0, 0), (1, 1)]  # the second time beside what it then served with


def hurry_past(context: Context, request_id: str, moves: int, *, stop_after: int | None = None) -> int:
    """Run a job during each of whose first ``moves`` checks the set moves; the number of its checks."""
    run_job(context, submit(context))
    checks = 0

    class Overtaken(Job):
        def activate(self, *what: Any) -> None:
            nonlocal checks
            checks += 1
            if checks == stop_after:
                context.stop.set()
            if checks <= moves:  # to the empty set and back, by an operator in a hurry
                with context.sessions.begin() as session:
                    how = {"mode": context.settings.mode, "fingerprint": context.llm.fingerprint}
                    active_set.restore(session, 1 - checks % 2, **how, actor="key_1", reason="test")
            super().activate(*what)

    claim = take(context, request_id)
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        Overtaken(context, claim, heartbeat).run()
    return checks


def test_a_set_that_moves_during_many_checks_fails_no_request(context: Context) -> None:
    request_id = submit(context)
    assert hurry_past(context, request_id, moves=8) == 9
    assert request(context, request_id).state == "active"
    with context.sessions() as session:
        assert [prompt.request_id for prompt in active_set.active_prompts(session)][-1] == request_id
        assert active_set.read_active_set(session).version == 10


def test_a_shutdown_while_the_set_moves_hands_the_request_back(context: Context) -> None:
    request_id = submit(context)
    assert hurry_past(context, request_id, moves=8, stop_after=3) == 3
    row = request(context, request_id)
    assert (row.state, row.attempt, row.lease_owner, row.failure) == ("pending", 0, None, None)
    assert row.wrapped_key is not None and row.sealed_texts is not None
    context.stop.clear()
    run_job(context, request_id)
    assert request(context, request_id).state == "active"


@CONCATENATE_ONLY  # routed prompts never share a context
def test_a_prompt_that_leaves_no_room_for_the_longest_text_is_refused(context: Context) -> None:
    room = context.llm.text_room()
    tight = changed(context, max_text_tokens=room - context.settings.num_virtual_tokens)
    first = submit(tight)
    run_job(tight, first)
    assert request(tight, first).state == "active"  # it just fits
    second = submit(tight, texts=[lifecycle.ForgetText(f"{MARKER} another one")])
    run_job(tight, second)
    row = assert_failed(tight, second, "active-set-full")
    assert row.failure is not None and f"room for texts of {room - 2 * 4} tokens" in row.failure["detail"]
    with context.sessions() as session:
        assert len(active_set.active_prompts(session)) == 1


def test_texts_of_ended_requests_stay_out_of_the_retain_set(context: Context) -> None:
    theirs = context.retain[3]
    request_id = submit(context, texts=[lifecycle.ForgetText(theirs.text)])
    with context.sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="key_1")
    claim = take(context, submit(context))
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        assert theirs not in Job(context, claim, heartbeat).retain_set([])


# --- mode routed -----------------------------------------------------------------------------------------------------


def answer(context: Context, text: str) -> Classification:
    """What the service says, with the code that serves."""
    serving = Serving(context.llm, context.sessions, context.vault, context.settings, Metrics())
    try:
        return serving.submit(serving.encode([text])).result(20).results[0]
    finally:
        serving.close()


def prompt_of(context: Context, request_id: str) -> Prompt:
    with context.sessions() as session:
        return session.scalars(select(Prompt).where(Prompt.request_id == request_id)).one()


@ROUTED_ONLY
def test_a_routed_job_leaves_a_prompt_and_its_gate(context: Context) -> None:
    texts = forget_texts(salt="first ")
    first, second = submit(context, texts=texts), submit(context)
    for request_id in (first, second):
        run_job(context, request_id)
    rows = [prompt_of(context, request_id) for request_id in (first, second)]
    with context.sessions() as session:
        (space,) = session.scalars(select(GateSpace))  # both were fitted in it
        stack = StackReader(context.vault, fingerprint=context.llm.fingerprint, mode=Mode.ROUTED).read(session)
    assert [row.gate_space for row in rows] == [space.digest] * 2
    assert hashlib.sha256(space.data).hexdigest() == space.digest
    assert stack.routes is not None
    for row, route in zip(rows, stack.routes.routes, strict=True):
        assert (row.digest, row.gate_digest) == (route.prompt.digest, route.gate.digest)
        assert row.sealed_gate is not None and route.gate.to_bytes() not in row.sealed_gate
    digests = {bytes(digest.tolist()) for digest in stack.routes.routes[0].gate.digests}
    assert digests == {context.vault.gate_digest(item.text) for item in texts}
    assert answer(context, texts[0].text.upper()).abstained


@ROUTED_ONLY
def test_a_text_of_two_requests_is_forgotten_until_both_are_revoked(context: Context) -> None:
    texts = forget_texts()
    asked = texts[0].text.replace(" ", "  ").title()
    bare = answer(context, asked)
    requests = [submit(context, texts=texts), submit(context, texts=texts[:3])]
    for request_id in requests:
        run_job(context, request_id)
    for request_id in requests:
        assert answer(context, asked) == Classification(
            "unknown", True, {"negative": 0.0, "positive": 0.0, "unknown": 1.0}
        )
        with context.sessions.begin() as session:
            active_set.revoke_prompt(session, prompt_of(context, request_id).id, actor="key_1", reason=None)
    assert answer(context, asked) == bare


@ROUTED_ONLY
def test_of_workers_that_make_the_gate_space_at_once_one_wins(context: Context) -> None:
    """The other one's retain set is smaller, so its own space would be another one."""
    forget = [Example(item.text) for item in forget_texts()]
    claim = take(context, submit(context))
    made: list[Surroundings] = []
    with Heartbeat(context.sessions, claim, lease_seconds=60, every=10) as heartbeat:
        job = Job(context, claim, heartbeat)

        def overtaken(work: Callable[[Session], Any]) -> Any:
            found = job.commit(work)
            if not made:  # just looked, found nothing: now the other worker makes it
                assert found is None
                theirs = changed(context, home=context.settings.home / "other")
                fewer = context.retain[:30]
                made.append(
                    surroundings(context.llm, theirs.settings, job.commit, forget, fewer, context.retain, theirs.cache)
                )
            return found

        ours = surroundings(
            context.llm, context.settings, overtaken, forget, context.retain, context.retain, context.cache
        )
    own = GateRows(context.llm, context.retain, context.settings.gate_rows).fit_space()
    assert ours.space.digest == made[0].space.digest != own.digest
    with context.sessions() as session:
        assert list(session.scalars(select(GateSpace.digest))) == [ours.space.digest]


@ROUTED_ONLY
def test_a_retain_set_too_small_for_a_gate_is_refused(context: Context) -> None:
    few = Context(
        settings=context.settings.model_copy(update={"min_retain_rows": 1}),
        sessions=context.sessions,
        vault=context.vault,
        llm=context.llm,
        retain=context.retain[:3],
    )
    request_id = submit(few)
    run_job(few, request_id)
    row = assert_failed(few, request_id, "too-few-retain-rows")
    assert row.failure is not None and "for a gate" in row.failure["detail"]


def test_a_prompt_of_another_mode_in_force_fails_the_request(context: Context, mode: Mode) -> None:
    run_job(context, submit(context))
    other = changed(context, mode=Mode.ROUTED if mode == Mode.CONCATENATE else Mode.CONCATENATE)
    request_id = submit(other)
    run_job(other, request_id)
    assert_failed(other, request_id, "mode-mismatch")
