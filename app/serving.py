"""Serving: the frozen model behind the active set. Fails closed: no confirmed active set, no answer."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from opentelemetry.trace import SpanContext
from sqlalchemy.orm import Session, sessionmaker

from app import db, tracing
from app.batching import Batcher
from app.errors import Busy, DeadlineExceeded, LetheonError, NotReady, Stuck
from app.metrics import Metrics, outcomes
from app.model_thread import keep_memory, leave_cores, take_cores
from app.settings import Settings
from app.stack import Stack, StackReader
from app.tracebacks import where
from app.vault import Vault
from models.device import PROBE, is_lost
from models.errors import ModelError, NotFinite
from models.inference import Classification, Classifier, Encoded, rows_of_a_pass
from models.llm import FrozenLLM
from models.routing import classify_routed

__all__ = ["Answer", "Encoded", "Serving"]

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
CHECK_SECONDS = 1.0  # that a probe waits for another that reads the active set; it asks again soon
CONFIRM_SECONDS = 5.0  # that a batch does at least: a prompt that is being loaded is worth it
STUCK = 10  # deadlines that one pass of a batch may take: after that it is not slow but lost
FAILED_BATCHES = 3  # one after another, and the fault is not with what was asked

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Question:
    """Texts of one call, since when (``time.monotonic()``) and in which span they wait."""

    texts: Sequence[Encoded]
    since: float
    span: SpanContext | None


@dataclass(frozen=True)
class Answer:
    """Classifications of one call, all made under one version of the active set."""

    results: list[Classification]
    active_set_version: int


@dataclass(frozen=True, repr=False)
class Work:
    """Something else for the model's thread to do, a batch of its own: no question waits longer than for another batch.

    What it raises is for its caller alone and says nothing of whether batches can be answered.
    """

    run: Callable[[Classifier, Stack], Any]

    def done(self, classifier: Classifier, stack: Callable[[], Stack]) -> tuple[Any, Exception | None]:
        try:
            return self.run(classifier, stack()), None
        except Exception as error:
            return None, error


class Serving:
    """Classifies behind the active set that the database names when a batch starts (promise 2)."""

    def __init__(
        self,
        llm: FrozenLLM,
        sessions: sessionmaker[Session],
        vault: Vault,
        settings: Settings,
        metrics: Metrics,
        *,
        alone: bool = False,
    ) -> None:
        self.llm = llm
        self._metrics = metrics
        self._settings = settings
        self._widest = settings.num_virtual_tokens
        self._sessions, self._vault = sessions, vault
        self._classifier = Classifier(
            llm, before_pass=lambda: self._batcher.step(), prefix_bytes=settings.prefix_cache_bytes
        )
        self._rows = rows_of_a_pass(llm, settings.max_batch_texts)
        self._lock = threading.Lock()  # the model thread and /readyz both confirm
        self._reader = StackReader(vault, fingerprint=llm.fingerprint, mode=settings.mode, device=llm.device)
        self._max_prompts = settings.max_prompts_per_query
        keep_memory()  # the batcher starts the model's thread (once more does nothing)
        cores = torch.get_num_threads()
        self._batcher: Batcher[Question | Work, Any] = Batcher(
            self._run,
            weigh=lambda item: settings.max_batch_texts if isinstance(item, Work) else len(item.texts),
            teaches=lambda item: not isinstance(item, Work),  # it may be a look at a version, or many passes
            max_batch=settings.max_batch_texts,
            max_queued=settings.max_queued_texts,
            begin=lambda: take_cores(cores),
        )
        if alone:
            leave_cores()  # this thread, too, and whoever else looks at a set before the model's thread does
        metrics.queue(lambda: self._batcher.queued, lambda: self._batcher.oldest)
        self._failed = 0  # batches since the last that was answered; read without a lock
        self._device_lost = False
        self._closing = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, args=(settings.active_set_poll_seconds,), name="active-set-watch", daemon=True
        )
        self._watcher.start()
        with suppress(NotReady):  # for `max_text_tokens`; a start does not wait for a set that can be served
            self._confirm()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.llm.verbalizer.labels)

    @property
    def max_text_tokens(self) -> int:
        """The longest text that fits behind the prompts in force.

        The worker puts none in force that leaves less room than is configured, but the configuration may have changed.
        """
        return self.llm.text_limit(self._settings.max_text_tokens, self._widest)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Texts as the model reads them; done by whoever asks, since all wait for the model's thread."""
        rows = self.llm.rows(texts)
        return [Encoded(row, self._vault.gate_digest(text)) for row, text in zip(rows, texts, strict=True)]

    @contextmanager
    def place(self, count: int, deadline: float) -> Iterator[Callable[[Sequence[Encoded]], Future[Answer]]]:
        """A place for so many texts until ``deadline`` (``time.monotonic()``); yields what queues them.

        The future also carries NotReady and DeadlineExceeded. Raises Overloaded, DeadlineExceeded, NotReady.
        """
        with self._batcher.place(count, deadline=deadline) as put:
            yield lambda texts: put(Question(texts, time.monotonic(), tracing.here()))

    def submit(self, texts: Sequence[Encoded], *, deadline: float = math.inf) -> Future[Answer]:
        """As ``place``, for texts that are ready."""
        with self.place(len(texts), deadline) as put:
            return put(texts)

    def work(self, run: Callable[[Classifier, Stack], T], *, deadline: float = math.inf) -> T:
        """Run it in the model's thread, between batches, and wait for it; it should take no longer than a batch does.

        Raises Overloaded, DeadlineExceeded, NotReady, and the ModelError that ``run`` raises.
        """
        found, error = self._batcher.submit(Work(run), deadline=deadline).result()
        if isinstance(error, LetheonError | ModelError):
            raise error
        if error is not None:
            log.error("a piece of work failed: %s", where(error))
            raise NotReady(f"the model failed on this ({type(error).__name__})") from None
        result: T = found
        return result

    def check_alive(self) -> None:
        """Raises Stuck when only a new process can help."""
        if not self._batcher.alive:
            raise Stuck("the model thread is not running")
        if self._batcher.silent > STUCK * self._settings.classify_deadline_seconds:
            raise Stuck("the model does not come back from a batch")
        if self._device_lost:
            raise Stuck("the model's device fails whatever it is asked")

    def check(self) -> None:
        """Raises NotReady when a classification would not be answered now, as Busy when waiting mends it."""
        try:
            self.check_alive()
        except Stuck as error:
            raise NotReady(error.detail) from None
        if self._batcher.running > self._settings.classify_deadline_seconds:
            raise Busy("the model has been busy with one batch for longer than any caller waits")
        if self._failed >= FAILED_BATCHES:
            raise NotReady(f"the model failed on its last {self._failed} batches")
        self._confirm(CHECK_SECONDS)

    def close(self) -> None:
        self._closing.set()
        self._batcher.close()
        self._watcher.join(CLOSE_SECONDS)

    def _run(self, items: list[Question | Work]) -> list[Any]:
        """One batch: questions, or a piece of work, which weighs as much as a full one."""
        questions = [item for item in items if isinstance(item, Question)]
        answers = iter(self._classify(questions)) if questions else iter(())
        found = [item.done(self._classifier, self._current) if isinstance(item, Work) else None for item in items]
        self._classifier.take_counts()  # of work: they are not the clients'
        for _, error in filter(None, found):
            self._look_at_device(error)
        return [next(answers) if done is None else done for done in found]

    def _classify(self, questions: list[Question]) -> list[Answer]:
        """One batch, in the model thread. Raises NotReady, which reaches every caller of the batch."""
        started = time.monotonic()
        stack = self._current()
        texts = [text for question in questions for text in question.texts]
        if not texts:
            return [Answer([], stack.view.version) for _ in questions]
        for question in filter(lambda question: question.texts, questions):  # ours have none
            self._metrics.waited(started - question.since)
            tracing.past("letheon.queue", started - question.since, question.span, texts=len(question.texts))
        links = [question.span for question in questions if question.span is not None]
        try:
            with tracing.span("letheon.batch", links=links, texts=len(texts), active_set_version=stack.view.version):
                flat = iter(self._answers(stack, texts))
        except DeadlineExceeded:
            raise  # no fault of the model
        except ModelError as error:
            # Numbers that are none may be one text's doing, which must not put the replica out of service.
            self._failed += not (isinstance(error, NotFinite) and self._answers_probe(stack))
            raise NotReady(str(error)) from error
        except Exception as error:
            self._failed += 1
            log.error("a batch failed: %s", where(error))
            self._look_at_device(error)
            raise NotReady(f"the model failed on this batch ({type(error).__name__})") from error
        finally:
            tokens, padding = self._classifier.take_counts()
        self._failed = 0
        seconds = time.monotonic() - started
        self._metrics.batch(texts=len(texts), seconds=seconds, tokens=tokens, padding=padding)
        return [Answer([next(flat) for _ in question.texts], stack.view.version) for question in questions]

    def _look_at_device(self, error: Exception | None) -> None:
        """Once it is lost it stays so, whatever it says later."""
        if error is not None and is_lost(self.llm, error):
            self._device_lost = True

    def _answers_probe(self, stack: Stack) -> bool:
        try:
            self._answers(stack, self.encode([PROBE]))
        except DeadlineExceeded:  # of the batch, in which nobody waits any more: nothing is known
            return True
        except Exception as error:  # of whatever kind, it is no answer
            log.error("nor does a text of our own get one: %s", where(error))
            return False
        return True

    def _answers(self, stack: Stack, texts: list[Encoded]) -> list[Classification]:
        if stack.routes is None:
            answers = self._classifier.classify(texts, stack.prompts, batch_size=self._rows)
            abstained = sum(answer.abstained for answer in answers) if stack.prompts else 0
            cleared = len(answers) - abstained if stack.prompts else 0
            base = 0 if stack.prompts else len(answers)
            self._metrics.answers(base=base, claimed=cleared, prompted_abstained=abstained, certain=0, guarded=0)
            return answers
        routed = classify_routed(
            self._classifier,
            stack.routes,
            texts,
            digest=None,
            max_prompts=self._max_prompts,
            batch_size=self._rows,
        )
        self._metrics.answers(**outcomes(routed))
        return [found.answer for found in routed]

    def _current(self) -> Stack:
        """As ``_confirm``, in the model's thread, which lets go of what is in force no more."""
        try:
            # As long as its callers wait: whoever reads the set now may be loading prompts.
            return self._confirm(max(CONFIRM_SECONDS, self._settings.classify_deadline_seconds))
        except NotReady as error:
            if isinstance(error.__cause__, Exception):  # the gates of a set are brought to the device
                self._look_at_device(error.__cause__)
            raise
        finally:
            self._classifier.keep(self._reader.held)

    def _confirm(self, patience: float = CONFIRM_SECONDS) -> Stack:
        """The stack in force now. One indexed query when nothing changed; otherwise loads what is not loaded yet.

        Raises NotReady for any failure whatever: an answer without the prompts would break the promise to forget. As
        Busy where the database does not answer, or another reads the set for more than ``patience`` seconds.
        """
        if not self._lock.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise Busy("the active set is being read, and that takes too long")
        try:
            with self._sessions() as session:
                db.impatient(session)
                stack = self._reader.read(session)
            self._widest = max(self._settings.num_virtual_tokens, stack.widest)
            self._metrics.active_set(stack.view.version, len(stack.members))
            return stack
        except NotReady:
            raise
        except ModelError as error:
            raise NotReady(str(error)) from error
        except Exception as error:
            log.error("the active set cannot be confirmed: %s", where(error))
            why = f"the active set cannot be read ({type(error).__name__})"
            if isinstance(error, db.UNANSWERED):
                raise Busy(f"{why}: the database is out of reach, or hangs") from error
            raise NotReady(why) from error
        finally:
            self._lock.release()

    def _watch(self, every: float) -> None:
        """Without traffic nobody asks for the active set, and a revoked prompt would stay in memory.

        Where every batch failed nobody may ask either, since this server is not ready: a text of ours shows when it is.
        """
        while not self._closing.wait(every):
            try:
                self.submit(self.encode([PROBE]) if self._failed >= FAILED_BATCHES else []).result()
            except LetheonError:
                continue
            except Exception as error:
                log.error("the active set is not watched: %s", where(error))
