"""One job in this process: a real tiny model, a real database, every way a job can end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from worker_kit import MARKER, forget_texts, wait_for, write_retain

from app import active_set, db, job_queue, lifecycle
from app.lifecycle import Claim
from app.settings import Settings
from app.tables import Prompt, RequestEvent, UnlearnRequest
from app.vault import Vault
from models.evaluation import CheckReport
from models.examples import Example, read_examples
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from worker import tasks
from worker.tasks import Context, run_job, training_config
from worker.threads import Heartbeat

Sessions = sessionmaker[Session]
UNMEETABLE = {"max_retain_drop": -2.0}
"""A random model may pass any honest limit by luck; this one it cannot (the settings would refuse it)."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    path = make_tiny_model(tmp_path_factory.mktemp("model"))
    return FrozenLLM.load(str(path), quantization="none", device="cpu")


@pytest.fixture
def context(llm: FrozenLLM, sessions: Sessions, vault: Vault, tmp_path: Path) -> Context:
    """A worker with lax checks and a short training."""
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        num_virtual_tokens=4,
        max_steps=6,
        lease_seconds=5,
        heartbeat_seconds=0.2,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
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


def test_a_request_is_trained_checked_and_activated(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    request_id = submit(context)
    run_job(context, request_id)

    row = request(context, request_id)
    assert row.state == "active" and row.attempt == 1 and row.wrapped_key is None
    assert row.metrics is not None
    assert row.metrics["steps"] == 6 and row.metrics["stopped"] == "max_steps" and row.metrics["passed"] is True
    with context.sessions() as session:
        view, prompts = active_set.read_stack(session)
    assert len(prompts) == 1 and prompts[0].request_id == request_id
    stored = SoftPrompt.from_bytes(
        active_set.open_prompt(context.vault, prompts[0]), fingerprint=context.llm.fingerprint
    )
    assert stored.digest == prompts[0].digest and stored.num_virtual_tokens == 4
    steps = progress(context, request_id)
    assert steps[0]["step"] == 1 and steps[-2]["step"] == 6  # the first and the last, however fast it went
    assert (steps[-2]["phase"], steps[-1]["phase"]) == ("training", "evaluating")
    assert any((context.settings.home / "teacher").iterdir())
    assert MARKER not in caplog.text and request_id in caplog.text
    assert view.version > 0


def test_weights_are_the_same_after_a_job(context: Context) -> None:
    before = context.llm.weights_digest()
    run_job(context, submit(context))
    assert context.llm.weights_digest() == before


def test_a_second_job_is_trained_on_the_stack_of_the_first(context: Context) -> None:
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
    config = training_config(context.settings, {"max_steps": 3, "alpha": 0.1, "seed": None, "unknown": 1})
    assert (config.max_steps, config.alpha, config.seed, config.num_virtual_tokens) == (3, 0.1, 0, 4)
    request_id = submit(context, num_virtual_tokens=7, max_steps=2)
    run_job(context, request_id)
    with context.sessions() as session:
        assert active_set.active_prompts(session)[0].num_virtual_tokens == 7


# --- a job that ends in a stated failure -----------------------------------------------------------------------------


def test_failed_checks_leave_the_figures_and_no_prompt(context: Context) -> None:
    request_id = submit(context, max_steps=1)
    with context.sessions() as session:
        before = active_set.read_active_set(session)
    run_job(changed(context, **UNMEETABLE), request_id)
    row = assert_failed(context, request_id, "checks-failed")
    assert row.metrics is not None and row.metrics["passed"] is False and row.metrics["violations"]
    assert {"forget_abstain", "retain_accuracy", "worst_class_accuracy"} <= set(row.metrics)
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


def test_texts_of_other_live_requests_are_left_out_of_the_retain_set(context: Context) -> None:
    theirs = context.retain[3]
    submit(context, texts=[lifecycle.ForgetText(theirs.text)])
    claim = take(context, submit(context, texts=[lifecycle.ForgetText(context.retain[5].text)]))
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        retain = tasks._Job(context, claim, heartbeat).retain_set()
    assert len(retain) == len(context.retain) - 2
    assert theirs not in retain and context.retain[5] not in retain


def test_a_training_that_diverges_fails(context: Context) -> None:
    request_id = submit(context, alpha=1e39)
    run_job(context, request_id)
    assert_failed(context, request_id, "diverged")


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
    assert "VaultError <" in caplog.text
    time.sleep(0.5)
    run_job(stranger, request_id)
    row = assert_failed(context, request_id, "internal")
    assert row.failure is not None and "wrong master key" in row.failure["detail"]


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
        tasks._Job(brief, claim, heartbeat).commit(lambda session: session.execute(text("SELECT 1 FROM nowhere")))
    assert time.monotonic() - began < 5


# --- a job that is stopped -------------------------------------------------------------------------------------------


@pytest.fixture
def running(context: Context) -> Iterator[tuple[Context, str, threading.Thread]]:
    """A job without an end in a thread, in mid-training."""
    endless = changed(context, checkpoint_seconds=0.1)
    request_id = submit(context, max_steps=1_000_000)
    thread = threading.Thread(target=run_job, args=(endless, request_id))
    thread.start()
    wait_for(lambda: progress(context, request_id), "progress")
    yield endless, request_id, thread
    endless.stop.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_cancellation_stops_the_training_and_shreds(running: tuple[Context, str, threading.Thread]) -> None:
    context, request_id, thread = running
    with context.sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="test")
    thread.join(20)
    row = request(context, request_id)
    assert row.state == "cancelled" and row.wrapped_key is None and row.sealed_texts is None


def test_a_shutdown_hands_the_request_back_with_its_checkpoint(
    running: tuple[Context, str, threading.Thread],
) -> None:
    context, request_id, thread = running
    context.stop.set()
    thread.join(20)
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
    thread.join(20)
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
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            time.sleep(0.2)
    before = request(context, request_id).progress
    wait_for(lambda: request(context, request_id).progress != before, "progress after the restart")
    assert thread.is_alive()


def test_a_checkpoint_of_another_stack_starts_over(context: Context) -> None:
    request_id = submit(context, max_steps=30)
    endless = changed(context, checkpoint_seconds=0.01)

    class StopSoon(tasks._Job):
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


def test_the_checks_are_repeated_when_the_active_set_moves(context: Context) -> None:
    stacks: list[int] = []

    class Overtaken(tasks._Job):
        """Another request becomes active during the first check."""

        def check(self, prompts: list[SoftPrompt], forget: list[Example], retain: list[Example]) -> CheckReport:
            report = super().check(prompts, forget, retain)
            stacks.append(len(prompts))
            if len(stacks) == 1:
                run_job(context, submit(context))
            return report

    request_id = submit(context)
    claim = take(context, request_id)
    with Heartbeat(context.sessions, claim, lease_seconds=5, every=1) as heartbeat:
        Overtaken(context, claim, heartbeat).run()
    assert request(context, request_id).state == "active"
    assert stacks == [1, 2]  # the second time on the stack it then served in


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
        assert theirs not in tasks._Job(context, claim, heartbeat).retain_set()
