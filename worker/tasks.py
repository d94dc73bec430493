"""One training job, from claim to outcome. No transaction is open while it trains.

What can be proven hopeless (diverged, no retain rows, another model, …) fails at once. Everything else, from a lost
database to a bug, is left to the lease: the job stops, the reaper puts the request back when the lease expires, and the
attempt cap ends it. The lease's rest is the pause between attempts, another worker may do better than a broken one, and
the last attempt states what went wrong.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, job_queue, lifecycle
from app.errors import LeaseLost, LetheonError, StaleActiveSet
from app.lifecycle import CancelRequested, Claim
from app.settings import Settings
from app.tables import UnlearnRequest
from app.tracebacks import where
from app.vault import Vault
from models.errors import (
    CheckpointError,
    DatasetError,
    FingerprintMismatch,
    InvalidPrompt,
    TextTooLong,
    TrainingDiverged,
)
from models.evaluation import CheckLimits, CheckReport, check_prompts
from models.examples import Example
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from models.training import Progress, TrainingConfig, TrainingResult, train_soft_prompt
from worker.threads import TRANSIENT, Heartbeat

log = logging.getLogger("letheon.worker")

PROGRESS_SECONDS = 1.0
RETRY_SECONDS = 0.5
MAX_RECHECKS = 5

T = TypeVar("T")


class JobFailed(Exception):
    """The request cannot be met; ``code`` and ``detail`` are for the client and hold no text."""

    def __init__(self, code: str, detail: str, metrics: dict[str, Any] | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.metrics = metrics


class Stopped(Exception):
    """The job was told to stop (shutdown, cancellation or a lost lease) before it had a prompt."""


@dataclass(frozen=True, repr=False)
class Context:
    """What one worker process holds for all its jobs. ``stop`` is set when the process is to end."""

    settings: Settings
    sessions: sessionmaker[Session]
    vault: Vault
    llm: FrozenLLM
    retain: Sequence[Example]
    stop: threading.Event = field(default_factory=threading.Event)
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    retain_digests: Sequence[bytes] = field(init=False)

    @property
    def max_text_tokens(self) -> int:
        """The longest text that the service takes, as ``app.serving`` has it."""
        return self.llm.text_limit(self.settings.max_text_tokens, self.settings.num_virtual_tokens)

    def __post_init__(self) -> None:
        object.__setattr__(self, "retain_digests", [self.vault.digest(example.text) for example in self.retain])


def run_job(context: Context, request_id: str) -> bool:
    """Claim a request and see it through; False when there was nothing to claim.

    Never raises for a request's sake; the outcome is in the database.
    """
    settings = context.settings
    try:
        with context.sessions.begin() as session:
            claim = job_queue.claim(
                session,
                request_id,
                owner=context.owner,
                lease_seconds=settings.lease_seconds,
                max_attempts=settings.max_attempts,
            )
    except TRANSIENT as error:
        log.warning("%s: not claimed, it waits on (%s)", request_id, type(error).__name__)
        return False
    if claim is None:
        log.info("%s: nothing to do, it is taken, ended or unknown", request_id)
        return False
    log.info("%s: attempt %d starts", request_id, claim.attempt)
    try:
        with Heartbeat(
            context.sessions, claim, lease_seconds=settings.lease_seconds, every=settings.heartbeat_seconds
        ) as heartbeat:
            _Job(context, claim, heartbeat).run()
    except LeaseLost:
        log.warning("%s: attempt %d lost its lease; nothing more is written", request_id, claim.attempt)
    except Exception as error:
        # Nothing is hidden: type and frames are logged, and the request is still owed to the client (see above).
        log.error("%s: attempt %d broke off, left to its lease: %s", request_id, claim.attempt, where(error))
    return True


class _Job:
    """The steps of one attempt."""

    def __init__(self, context: Context, claim: Claim, heartbeat: Heartbeat) -> None:
        self.context = context
        self.claim = claim
        self.heartbeat = heartbeat
        self.settings = context.settings
        self.reporter = _Reporter(self)

    def run(self) -> None:
        """Train, check, then activate, fail, cancel or release. Raises LeaseLost, and whatever is left to the lease."""
        claim = self.claim
        try:
            outcome = self.train_and_activate()
        except CancelRequested:
            self.commit(lambda session: lifecycle.finish_cancelled(session, claim))
            outcome = "cancelled"
        except Stopped:
            outcome = self.end_stopped()
        except JobFailed as failure:
            self.end_failed(failure)
            outcome = f"failed ({failure.code})"
        except LeaseLost:
            raise
        except Exception as error:
            if claim.attempt < self.settings.max_attempts:
                raise
            log.error("%s: the last attempt broke off: %s", claim.request_id, where(error))
            self.end_failed(_last_word(error))
            outcome = "failed"
        log.info("%s: attempt %d ends: %s", claim.request_id, claim.attempt, outcome)

    def train_and_activate(self) -> str:
        request = self.commit(lambda session: lifecycle.get_request(session, self.claim.request_id))
        llm = self.context.llm
        if request.fingerprint != llm.fingerprint:
            raise JobFailed("fingerprint-mismatch", "the request was made for another model than this worker serves")
        texts = self.commit(lambda session: job_queue.open_texts(session, self.context.vault, self.claim))
        forget = [Example(item.text, item.label) for item in texts]
        retain = self.retain_set()
        result = self.train(request, forget, retain)
        if result.stopped == "cancelled":
            raise Stopped
        self.reporter.flush()
        self.commit(lambda session: lifecycle.start_evaluating(session, self.claim))
        self.reporter.phase("evaluating")
        return self.check_and_activate(result, forget, retain)

    def retain_set(self) -> list[Example]:
        """The operator's retain set without any text that was ever to be forgotten (promise 9). Raises JobFailed."""
        forgotten = self.commit(active_set.forgotten_digests)
        pairs = zip(self.context.retain, self.context.retain_digests, strict=True)
        retain = [example for example, digest in pairs if digest not in forgotten]
        if len(retain) < self.settings.min_retain_rows:
            detail = (
                f"{len(retain)} of {len(self.context.retain)} rows of the retain set were never to be forgotten; "
                f"{self.settings.min_retain_rows} are needed"
            )
            raise JobFailed("too-few-retain-rows", detail)
        return retain

    def train(self, request: UnlearnRequest, forget: list[Example], retain: list[Example]) -> TrainingResult:
        """Train from the last checkpoint, or from the start where it does not fit. Raises JobFailed.

        The deadline is one attempt's: what earlier attempts achieved is in the checkpoint.
        """
        config = training_config(self.settings, request.options)
        _, stack = self.read_stack()
        self.check_room(stack, config.num_virtual_tokens)
        stored = self.commit(lambda session: job_queue.load_checkpoint(session, self.context.vault, self.claim))
        seconds = float(request.options.get("training_deadline_seconds", self.settings.training_deadline_seconds))
        deadline = time.monotonic() + seconds

        def attempt(resume: bytes | None) -> TrainingResult:
            return train_soft_prompt(
                self.context.llm,
                forget,
                retain,
                config,
                stack=stack,
                teacher_dir=self.settings.home / "teacher",
                resume=resume,
                deadline=deadline,
                on_progress=self.reporter,
                should_stop=self.should_stop,
                on_checkpoint=self.save_checkpoint,
                checkpoint_seconds=self.settings.checkpoint_seconds,
            )

        try:
            try:
                return attempt(stored[1] if stored else None)
            except CheckpointError:
                # Another prompt became active meanwhile, or the retain set shrank: the run would not be the same one.
                log.info("%s: the checkpoint is of other data or another stack; from the start", request.id)
                return attempt(None)
        except (TrainingDiverged, InvalidPrompt):  # the latter when the very last step went off
            raise JobFailed("diverged", "the loss became infinite; a lower learning_rate may help") from None
        except DatasetError:
            raise JobFailed("too-few-retain-rows", "training needs a forget row and a retain row") from None
        except TextTooLong as error:
            raise JobFailed("text-too-long", str(error)) from None

    def check_room(self, stack: list[SoftPrompt], num_virtual_tokens: int) -> None:
        """Every text that the service takes must fit behind the whole stack. Raises JobFailed."""
        tokens = num_virtual_tokens + sum(prompt.num_virtual_tokens for prompt in stack)
        room, wanted = self.context.llm.text_room(tokens), self.context.max_text_tokens
        if room < wanted:
            detail = (
                f"behind {tokens} virtual tokens, this prompt's included, the model has room for texts of "
                f"{max(0, room)} tokens, and the service takes texts of {wanted}: revoke prompts, ask for fewer "
                "virtual tokens, or lower LETHEON_MAX_TEXT_TOKENS"
            )
            raise JobFailed("active-set-full", detail)

    def check_and_activate(self, result: TrainingResult, forget: list[Example], retain: list[Example]) -> str:
        """Check the prompt on the very stack it will serve in, then put it in force. Raises JobFailed, LeaseLost."""
        for _ in range(MAX_RECHECKS):
            version, stack = self.read_stack()
            self.check_room(stack, result.prompt.num_virtual_tokens)
            report = self.check([*stack, result.prompt], forget, retain)
            metrics = {
                **report.as_dict(),
                "steps": result.steps,
                "stopped": result.stopped,
                "training_seconds": round(result.seconds, 3),
                "resumed_from": result.resumed_from,
                "attempt": self.claim.attempt,
            }
            if not report.passed:
                raise JobFailed("checks-failed", "; ".join(report.violations), metrics)
            try:
                self.activate(result.prompt, metrics, version)
            except StaleActiveSet:
                log.info("%s: the active set moved during the checks; checking again", self.claim.request_id)
                continue
            return "active"
        raise JobFailed("active-set-busy", f"the active set moved during each of {MAX_RECHECKS} checks")

    def check(self, prompts: list[SoftPrompt], forget: list[Example], retain: list[Example]) -> CheckReport:
        """The figures of a stack. Raises JobFailed."""
        settings = self.settings
        limits = CheckLimits(settings.min_forget_abstain, settings.max_retain_drop, settings.max_class_drop)
        try:
            return check_prompts(
                self.context.llm,
                prompts,
                forget,
                retain,
                max_retain_rows=settings.check_retain_rows,
                seed=settings.seed,
                limits=limits,
            )
        except TextTooLong as error:  # behind a stack that grew during the training
            raise JobFailed("text-too-long", str(error)) from None

    def activate(self, prompt: SoftPrompt, metrics: dict[str, Any], version: int) -> None:
        self.commit(
            lambda session: active_set.activate(
                session,
                self.context.vault,
                self.claim,
                prompt=prompt.to_bytes(),
                digest=prompt.digest,
                fingerprint=prompt.fingerprint,
                num_virtual_tokens=prompt.num_virtual_tokens,
                hidden_size=prompt.embeddings.shape[1],
                metrics=metrics,
                expected_version=version,
            )
        )

    def read_stack(self) -> tuple[int, list[SoftPrompt]]:
        """The active set's version and its prompts, in order. Raises JobFailed when one is of another model."""
        view, rows = self.commit(active_set.read_stack)
        fingerprint = self.context.llm.fingerprint
        try:
            stack = [
                SoftPrompt.from_bytes(active_set.open_prompt(self.context.vault, row), fingerprint=fingerprint)
                for row in rows
            ]
        except FingerprintMismatch:
            detail = "a prompt in force belongs to another model; revoke it, or serve the model it was trained for"
            raise JobFailed("fingerprint-mismatch", detail) from None
        return view.version, stack

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Seal and store. A database that is away costs this checkpoint, not the job. Raises LeaseLost."""
        try:
            with self.context.sessions.begin() as session:
                job_queue.save_checkpoint(session, self.context.vault, self.claim, step=step, data=data)
        except TRANSIENT as error:
            log.warning("%s: checkpoint not stored (%s)", self.claim.request_id, type(error).__name__)

    def should_stop(self) -> bool:
        return self.context.stop.is_set() or self.heartbeat.cancelled.is_set() or self.heartbeat.lost.is_set()

    def end_stopped(self) -> str:
        """After a cooperative stop: a lost lease writes nothing, a cancellation ends, a shutdown hands back."""
        if self.heartbeat.lost.is_set():
            raise LeaseLost("the lease was lost during training", request_id=self.claim.request_id)
        if self.heartbeat.cancelled.is_set():
            self.commit(lambda session: lifecycle.finish_cancelled(session, self.claim))
            return "cancelled"
        self.commit(lambda session: lifecycle.release(session, self.claim))
        return "released"

    def end_failed(self, failure: JobFailed) -> None:
        self.commit(
            lambda session: lifecycle.fail(
                session, self.claim, code=failure.code, detail=failure.detail, metrics=failure.metrics
            )
        )

    def commit(self, work: Callable[[Session], T]) -> T:
        """``work`` in a transaction of its own, tried again while the database is away and the lease lasts.

        Safe to repeat: a write whose commit did happen raises LeaseLost the second time. Raises LeaseLost, and the
        database's error when it stays away for the length of a lease.
        """
        give_up = time.monotonic() + self.settings.lease_seconds
        while True:
            try:
                with self.context.sessions.begin() as session:
                    return work(session)
            except TRANSIENT as error:
                if self.heartbeat.lost.is_set() or time.monotonic() > give_up:
                    raise
                log.warning("%s: database away, trying again (%s)", self.claim.request_id, type(error).__name__)
            self.heartbeat.lost.wait(RETRY_SECONDS)


class _Reporter:
    """Writes progress rows: the first and the last of a phase, and at most one a second between."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._written_at: float | None = None
        self._last: Progress | None = None
        self._unwritten: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._last = self._unwritten = progress
        if self._written_at is None or time.monotonic() - self._written_at >= PROGRESS_SECONDS:
            self.flush()

    def phase(self, name: str) -> None:
        """Announce a phase that has no steps of its own."""
        if self._last is not None:
            self._unwritten = replace(self._last, phase=name)
            self.flush()

    def flush(self) -> None:
        """Write what is held back. Raises LeaseLost."""
        if self._unwritten is None:
            return
        row = {**self._unwritten.as_dict(), "attempt": self._job.claim.attempt}
        self._unwritten = None
        self._written_at = time.monotonic()
        try:
            with self._job.context.sessions.begin() as session:
                if job_queue.record_progress(session, self._job.claim, row):
                    self._job.heartbeat.cancelled.set()
        except TRANSIENT as error:
            log.warning("%s: progress not stored (%s)", self._job.claim.request_id, type(error).__name__)


def training_config(settings: Settings, options: dict[str, Any]) -> TrainingConfig:
    """The settings' knobs, overridden by those of the request's options that are knobs of the training."""
    names = {f.name for f in fields(TrainingConfig)}
    knobs = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    knobs |= {name: value for name, value in options.items() if name in names and value is not None}
    return TrainingConfig(**knobs)


def _last_word(error: Exception) -> JobFailed:
    """What a client learns of an error that nobody foresaw: its kind, never its message."""
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator has no type
    )
    if no_memory:
        return JobFailed("out-of-memory", "training does not fit the memory of this worker")
    if isinstance(error, LetheonError):
        return JobFailed("internal", f"{error.code}: {error.detail}")
    return JobFailed("internal", f"training broke off with {type(error).__name__}")
