"""One attempt at a request, from its texts to an outcome. No transaction is open while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from app import active_set, approval, evidence, job_queue, lifecycle, shredding
from app.active_set import SealedPrompt, TrainedGate
from app.errors import (
    KeyDestroyed,
    KeyStoreAway,
    LeaseLost,
    ModeMismatch,
    NotReady,
    ShareMissing,
    StaleActiveSet,
    VaultError,
)
from app.evidence import Found
from app.failpoints import failpoint
from app.knobs import training_config
from app.lifecycle import CancelRequested, Claim
from app.sealing import seal_prompt
from app.settings import Mode
from app.stack import Stack
from app.tracebacks import where
from app.tracing import span
from models import finished
from models.device import is_lost
from models.errors import (
    CheckpointError,
    DatasetError,
    FingerprintMismatch,
    InvalidPrompt,
    NotFinite,
    TextTooLong,
    TrainingDiverged,
)
from models.examples import Example
from models.self_tuning import Try, next_try
from models.soft_prompt import SoftPrompt
from models.surroundings import Surroundings
from models.training import Progress, TrainingResult, train_soft_prompt
from worker import checking
from worker.concatenated import open_all_canaries
from worker.context import UNREADABLE, Context, retain_set, stack_reader
from worker.failures import ChecksFailed, DeviceLost, JobFailed, SetUnreadable, Stopped, last_word, record_of
from worker.reporting import Reporter
from worker.threads import TRANSIENT, Heartbeat

log = logging.getLogger("letheon.worker")

RETRY_SECONDS = 0.5

T = TypeVar("T")


class Job:
    """The steps of one attempt."""

    def __init__(self, context: Context, claim: Claim, heartbeat: Heartbeat) -> None:
        self.context = context
        self.claim = claim
        self.heartbeat = heartbeat
        self.settings = context.settings
        self.reporter = Reporter(context.sessions, claim, cancelled=heartbeat.cancelled)
        self.deadline = float("inf")
        self.needs_approval = False
        self.key: bytes | None = None  # prepared for the prompt that is about to come into force
        # In mode routed a prompt shares its context with no other; else it is trained behind those in force.
        self.alone = self.settings.mode == Mode.ROUTED

    def run(self) -> bool:
        """Train, check, then activate, fail, cancel or release; False when it was handed back and has to wait.

        Raises LeaseLost, and whatever is left to the lease.
        """
        claim, waits = self.claim, False
        try:
            outcome = self.train_and_activate()
        except CancelRequested:
            outcome = self.end_cancelled()
        except (
            Stopped,
            ShareMissing,
            KeyStoreAway,
        ) as stopped:  # this worker's key store is not the request's, or away
            waits = isinstance(stopped, SetUnreadable | ShareMissing | KeyStoreAway)
            why = f": {stopped.detail}" if isinstance(stopped, ShareMissing | KeyStoreAway) else ""
            outcome = self.end_stopped() + why
        except JobFailed as failure:
            self.end_failed(failure)
            outcome = f"failed ({failure.code})"
        except LeaseLost:
            raise
        except Exception as error:
            if is_lost(self.context.llm, error):
                self.end_stopped()  # or each request that waits would use up its attempts here
                raise DeviceLost from error
            if claim.attempt < self.settings.max_attempts:
                raise
            log.error("%s: the last attempt broke off: %s", claim.request_id, where(error))
            self.end_failed(last_word(error))
            outcome = "failed"
        log.info("%s: attempt %d ends: %s", claim.request_id, claim.attempt, outcome)
        return not waits

    def train_and_activate(self) -> str:
        request = self.commit(lambda session: lifecycle.get_request(session, self.claim.request_id))
        llm = self.context.llm
        if request.fingerprint != llm.fingerprint:
            raise JobFailed("fingerprint-mismatch", "the request was made for another model than this worker serves")
        self.needs_approval = approval.needed(request, always=self.settings.require_approval)
        approved = self.commit(lambda session: approval.approved_digest(session, request))
        texts = self.commit(lambda session: job_queue.open_texts(session, self.context.vault, self.claim))
        failpoint("texts.read")
        forget = [Example(item.text, item.label) for item in texts]
        self.read_stack()  # of another mode or model: better known before the training than after
        retain = self.retain_set(forget)
        with span("letheon.gate"):
            around = self.look_around(forget, retain) if self.alone else None
        near = retain if around is None else around.near
        subjects = 1 if around is None else around.subjects
        first = training_config(self.settings, request.options, subjects=subjects)
        seconds = float(request.options.get("training_deadline_seconds", self.settings.training_deadline_seconds))
        self.deadline = time.monotonic() + seconds
        # Also those of attempts before this one: what was tried is not tried again.
        tries = self.commit(lambda session: lifecycle.list_tries(session, self.claim.request_id))
        max_tries = max(self.settings.max_tries, len(tries) + 1)  # the try that was under way is seen through
        plan = next_try(first, [found["missed"] for found in tries], max_tries=max_tries)
        assert plan is not None
        prompt: SoftPrompt | None = None
        while True:
            with span("letheon.train"):
                result = self.train(plan, prompt, forget, near)
            if result.stopped == "cancelled":
                raise Stopped
            failpoint("train.done")
            self.reporter.flush()
            if approved not in (None, result.prompt.digest):  # trained anew: nobody has agreed to this one
                self.needs_approval = True
            if self.needs_approval:
                self.keep(result, plan.config.seed)
            self.commit(lambda session: lifecycle.start_evaluating(session, self.claim), at="evaluating")
            self.reporter.phase("evaluating")
            try:
                with span("letheon.checks"):
                    return self.check_and_activate(result, forget, retain, around, tries)
            except ChecksFailed as failed:
                if result.stopped == "imported":
                    raise  # this prompt was asked for, not one that is trained in its place
                tries = [*tries, record_of(plan, result, failed)]
                plan = next_try(first, [found["missed"] for found in tries], max_tries=self.settings.max_tries)
                if plan is None or time.monotonic() > self.deadline or not self.has_room(plan):
                    raise
            log.info("%s: try %d failed its checks", self.claim.request_id, len(tries))
            self.commit(partial(lifecycle.start_again, claim=self.claim, tried=tries[-1]), at="again")
            prompt = result.prompt

    def retain_set(self, forget: Sequence[Example]) -> list[Example]:
        return retain_set(self.context, self.commit(active_set.forgotten_digests), forget)

    def look_around(self, forget: list[Example], retain: list[Example]) -> Surroundings:
        """Raises JobFailed, SetUnreadable."""
        try:
            return checking.look_around(self.context, self.commit, forget, retain)
        except (NotReady, VaultError) as error:  # the gate space that all gates share
            raise self.unreadable(error) from None

    def train(
        self, plan: Try, prompt: SoftPrompt | None, forget: list[Example], retain: list[Example]
    ) -> TrainingResult:
        """Train from the last checkpoint, or from the start where it does not fit; not at all where it is of the end.

        Raises JobFailed.

        ``prompt``: what the try before ended with, where there was one in this attempt. The deadline is one attempt's:
        what earlier attempts achieved is in the checkpoint.
        """
        stack = () if self.alone else self.read_stack().prompts
        checking.check_room(self.context, stack, plan.config.num_virtual_tokens)
        stored = self.commit(lambda session: job_queue.load_checkpoint(session, self.context.vault, self.claim))
        if stored is not None:
            done = finished.unpack(stored[1], fingerprint=self.context.llm.fingerprint, seed=plan.config.seed)
            if done is not None:
                return done

        def attempt(resume: bytes | None) -> TrainingResult:
            return train_soft_prompt(
                self.context.llm,
                forget,
                retain,
                plan.config,
                stack=stack,
                start=prompt if plan.goes_on else None,
                # Near rows are other ones for every request: nothing of them is worth keeping.
                cache=None if self.alone else self.context.cache,
                resume=resume,
                deadline=self.deadline,
                on_progress=self.step_done,
                should_stop=self.should_stop,
                on_checkpoint=self.save_checkpoint,
                checkpoint_seconds=self.settings.checkpoint_seconds,
            )

        try:
            try:
                return attempt(stored[1] if stored else None)
            except CheckpointError:
                # Of the try before, or of other data: another prompt became active meanwhile, the retain set shrank.
                log.info("%s: the checkpoint is of another run; from the start", self.claim.request_id)
                return attempt(None)
        except (TrainingDiverged, NotFinite, InvalidPrompt):  # the last when the very last step went off
            raise JobFailed("diverged", "the loss became infinite; a lower learning_rate may help") from None
        except DatasetError:
            raise JobFailed("too-few-retain-rows", "training needs a forget row and a retain row") from None
        except TextTooLong as error:
            raise JobFailed("text-too-long", str(error)) from None

    def has_room(self, plan: Try) -> bool:
        try:
            stack = () if self.alone else self.read_stack().prompts
            checking.check_room(self.context, stack, plan.config.num_virtual_tokens)
        except JobFailed:
            return False
        return True

    def check_and_activate(
        self,
        result: TrainingResult,
        forget: list[Example],
        retain: list[Example],
        around: Surroundings | None,
        tries: Sequence[dict[str, Any]],
    ) -> str:
        """Check the prompt in the very set it will serve in, then put it in force.

        As often as the set moves meanwhile: that others are busy is no reason to fail anyone. ``tries``: those before
        this one. Raises ChecksFailed, JobFailed, LeaseLost, Stopped.
        """
        found: Found | None = None
        while not self.should_stop():
            stack = self.read_stack()
            checked = checking.check(self.context, stack, result.prompt, forget, retain, around, self.earlier_canaries)
            gate, canaries = checked.gate, list[str]()
            metrics = checking.figures(self.context, self.claim, checked, result, tries)
            if not checked.report.passed:
                raise ChecksFailed("; ".join(checked.report.violations), metrics)
            if self.settings.evidence_texts:
                if found is None or gate is None:  # of a gate only once: whatever else is in force, it is the same
                    with span("letheon.evidence"):
                        found = checked.look(self.commit(active_set.forgotten_digests))
                metrics |= found.figures
            if self.needs_approval:
                waits = partial(self.await_approval, prompt=result.prompt, gate=gate, metrics=metrics, found=found)
                self.commit(waits, at="await_approval")
                return "awaiting approval"
            if gate is None:
                canaries = checking.stand_ins(self.context, stack, result.prompt, forget, retain)
            try:
                self.activate(result.prompt, gate, canaries, found, metrics, stack.view.version)
            except StaleActiveSet:
                log.info("%s: the active set moved during the checks; checking again", self.claim.request_id)
                continue
            return "active"
        raise Stopped

    def await_approval(
        self,
        session: Session,
        prompt: SoftPrompt,
        gate: TrainedGate | None,
        metrics: dict[str, Any],
        found: Found | None,
    ) -> None:
        key = job_queue.read_key(session, self.claim)
        sealed = evidence.seal(self.context.vault, self.claim.request_id, key, found)  # before anything is locked
        lifecycle.hold(session, self.claim)
        evidence.save(session, self.claim.request_id, sealed)
        gate_digest = gate.digest if gate else None
        approval.await_approval(
            session, self.claim, metrics=metrics, prompt_digest=prompt.digest, gate_digest=gate_digest
        )

    def earlier_canaries(self, stack: Stack) -> list[list[str]]:
        try:
            return self.commit(partial(open_all_canaries, vault=self.context.vault, stack=stack))
        except UNREADABLE as error:
            raise self.unreadable(error) from None

    def activate(
        self,
        prompt: SoftPrompt,
        gate: TrainedGate | None,
        canaries: Sequence[str],
        found: Found | None,
        metrics: dict[str, Any],
        version: int,
    ) -> None:
        """Raises StaleActiveSet, LeaseLost."""

        def sealed() -> tuple[SealedPrompt, evidence.Sealed | None]:
            if self.key is None:  # once: where the set moves, the next activation takes it
                self.key = shredding.prepare_key(self.context.sessions, self.context.vault)
            data = prompt.to_bytes()
            made = seal_prompt(
                self.context.vault, self.key, prompt=data, digest=prompt.digest, gate=gate, canaries=canaries
            )
            return made, evidence.seal(self.context.vault, self.claim.request_id, self.key, found)

        def put_in_force(session: Session) -> None:
            active_set.activate(
                session,
                self.claim,
                made,
                fingerprint=prompt.fingerprint,
                num_virtual_tokens=prompt.num_virtual_tokens,
                hidden_size=prompt.embeddings.shape[1],
                metrics=metrics,
                expected_version=version,
            )
            evidence.save(session, self.claim.request_id, shown)

        while True:
            try:
                made, shown = self.patiently(sealed)
                failpoint("prompt.sealed")
                self.commit(put_in_force, at="activate")
                return
            except KeyDestroyed:  # the set has been moving for a day, and the key was given up
                self.key = None

    def read_stack(self) -> Stack:
        """The active set as it is now. Raises JobFailed when it is of another model or mode, SetUnreadable."""
        try:
            return self.commit(stack_reader(self.context).read)
        except FingerprintMismatch:
            detail = "a prompt in force belongs to another model; revoke it, or serve the model it was trained for"
            raise JobFailed("fingerprint-mismatch", detail) from None
        except ModeMismatch as error:
            raise JobFailed(error.code, error.detail) from None
        except UNREADABLE as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: Exception) -> SetUnreadable:
        log.error("%s: the active set cannot be read any more: %s", self.claim.request_id, where(error))
        return SetUnreadable()

    def step_done(self, progress: Progress) -> None:
        failpoint("train.step")
        self.reporter(progress)

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Seal and store. A database or key store that is away costs a checkpoint, not the job. Raises LeaseLost."""
        try:
            with self.context.sessions.begin() as session:
                job_queue.save_checkpoint(session, self.context.vault, self.claim, step=step, data=data)
                session.flush()
                failpoint("checkpoint.before_commit")
        except (*TRANSIENT, KeyStoreAway) as error:
            log.warning("%s: checkpoint not stored (%s)", self.claim.request_id, type(error).__name__)
        else:
            failpoint("checkpoint.after_commit")

    def keep(self, result: TrainingResult, seed: int) -> None:
        """Store a training that is done as the checkpoint: what is approved later is this prompt. Raises LeaseLost."""
        data = finished.pack(result, seed=seed)
        self.commit(
            lambda session: job_queue.save_checkpoint(
                session, self.context.vault, self.claim, step=result.steps, data=data
            ),
            at="keep",
        )

    def should_stop(self) -> bool:
        return self.context.stop.is_set() or self.heartbeat.cancelled.is_set() or self.heartbeat.lost.is_set()

    def end_stopped(self) -> str:
        """After a cooperative stop: a lost lease writes nothing, a cancellation ends, a shutdown hands back."""
        if self.heartbeat.lost.is_set():
            raise LeaseLost("the lease was lost during training", request_id=self.claim.request_id)
        if self.heartbeat.cancelled.is_set():
            return self.end_cancelled()
        self.commit(lambda session: lifecycle.release(session, self.claim), at="release")
        return "released"

    def end_cancelled(self) -> str:
        self.commit(lambda session: lifecycle.finish_cancelled(session, self.claim), at="cancel")
        return "cancelled"

    def end_failed(self, failure: JobFailed) -> None:
        self.commit(
            lambda session: lifecycle.fail(
                session, self.claim, code=failure.code, detail=failure.detail, metrics=failure.metrics
            ),
            at="fail",
        )

    def commit(self, work: Callable[[Session], T], *, at: str = "") -> T:
        """``work`` in a transaction of its own, ``patiently``. ``at`` names the failpoints around the commit.

        Safe to repeat: a write whose commit did happen raises LeaseLost the second time. Raises LeaseLost.
        """

        def once() -> T:
            with self.context.sessions.begin() as session:
                done = work(session)
                if at:
                    failpoint(f"{at}.before_commit")
            if at:
                failpoint(f"{at}.after_commit")
            return done

        return self.patiently(once)

    def patiently(self, work: Callable[[], T]) -> T:
        """Tried again while the database or the key store is away, for a lease; then raises its error."""
        give_up = time.monotonic() + self.settings.lease_seconds
        while True:
            try:
                return work()
            except (*TRANSIENT, KeyStoreAway) as error:
                if self.heartbeat.lost.is_set() or time.monotonic() > give_up:
                    raise
                log.warning("%s: a database is away, trying again (%s)", self.claim.request_id, type(error).__name__)
            self.heartbeat.lost.wait(RETRY_SECONDS)
