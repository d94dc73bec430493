"""Serving: the frozen model behind the active set. Fails closed: no confirmed active set, no answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.orm import Session, sessionmaker

from app.batching import Batcher
from app.errors import NotReady, Overloaded
from app.settings import Settings
from app.stack import Stack, StackReader
from app.tracebacks import where
from app.vault import Vault
from models.errors import ModelError
from models.inference import Classification, Classifier
from models.llm import FrozenLLM
from models.routing import classify_routed

log = logging.getLogger(__name__)

MAX_BATCH_TEXTS = 64
CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """Classifications of one call, all made under one version of the active set."""

    results: list[Classification]
    active_set_version: int


class Serving:
    """Classifies behind the active set that the database names when a batch starts (promise 2)."""

    def __init__(self, llm: FrozenLLM, sessions: sessionmaker[Session], vault: Vault, settings: Settings) -> None:
        self.llm = llm
        self._settings = settings
        self._widest = settings.num_virtual_tokens
        self._sessions, self._vault = sessions, vault
        self._classifier = Classifier(llm)
        self._lock = threading.Lock()  # the model thread and /readyz both confirm
        self._reader = StackReader(vault, fingerprint=llm.fingerprint, mode=settings.mode)
        self._max_prompts = settings.max_prompts_per_query
        self._batcher: Batcher[Sequence[str], Answer] = Batcher(
            self._classify, weigh=len, max_batch=MAX_BATCH_TEXTS, max_queued=settings.max_queued_texts
        )
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

    def submit(self, texts: Sequence[str]) -> Future[Answer]:
        """Queue texts; the future also carries NotReady. Raises Overloaded, NotReady."""
        return self._batcher.submit(texts)

    def check(self) -> None:
        """Raises NotReady when a classification would not be answered now."""
        if not self._batcher.alive:
            raise NotReady("the model thread is not running")
        self._confirm()

    def close(self) -> None:
        self._closing.set()
        self._batcher.close()
        self._watcher.join(CLOSE_SECONDS)

    def _classify(self, jobs: list[Sequence[str]]) -> list[Answer]:
        """One batch, in the model thread. Raises NotReady, which reaches every caller of the batch."""
        try:
            stack = self._confirm()
        finally:
            self._classifier.keep(self._reader.held)
        texts = [text for job in jobs for text in job]
        try:
            flat = iter(self._answers(stack, texts))
        except ModelError as error:
            raise NotReady(str(error)) from error
        except Exception as error:
            log.error("a batch failed: %s", where(error))
            raise NotReady(f"the model failed on this batch ({type(error).__name__})") from error
        return [Answer([next(flat) for _ in job], stack.view.version) for job in jobs]

    def _answers(self, stack: Stack, texts: list[str]) -> list[Classification]:
        if not texts:
            return []
        if stack.routes is None:
            return self._classifier.classify(texts, stack.prompts)
        routed = classify_routed(
            self._classifier, stack.routes, texts, digest=self._vault.gate_digest, max_prompts=self._max_prompts
        )
        return [found.answer for found in routed]

    def _confirm(self) -> Stack:
        """The stack in force now. One indexed query when nothing changed; otherwise loads what is not loaded yet.

        Raises NotReady for any failure whatever: an answer without the prompts would break the promise to forget.
        """
        with self._lock:
            try:
                with self._sessions() as session:
                    stack = self._reader.read(session)
                self._widest = max(self._settings.num_virtual_tokens, stack.widest)
                return stack
            except NotReady:
                raise
            except ModelError as error:
                raise NotReady(str(error)) from error
            except Exception as error:
                log.error("the active set cannot be confirmed: %s", where(error))
                raise NotReady(f"the active set cannot be read ({type(error).__name__})") from error

    def _watch(self, every: float) -> None:
        """Without traffic nobody asks for the active set, and a revoked prompt would stay in memory."""
        while not self._closing.wait(every):
            try:
                self._batcher.submit([]).result()
            except (NotReady, Overloaded):
                continue
