"""Serving: the frozen model behind the active set. Fails closed: no confirmed active set, no answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sqlalchemy.orm import Session, sessionmaker

from app import active_set
from app.active_set import ActiveSetView
from app.batching import Batcher
from app.errors import NotReady
from app.settings import Settings
from app.tables import Prompt
from app.tracebacks import where
from app.vault import Vault
from models.errors import ModelError
from models.inference import Classification, Classifier
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

MAX_BATCH_TEXTS = 64


@dataclass(frozen=True)
class Answer:
    """Classifications of one call, all made under one version of the active set."""

    results: list[Classification]
    active_set_version: int


@dataclass(frozen=True)
class _Stack:
    view: ActiveSetView
    prompts: tuple[SoftPrompt, ...]


class Serving:
    """Classifies behind the active set that the database names when a batch starts (promise 2)."""

    def __init__(self, llm: FrozenLLM, sessions: sessionmaker[Session], vault: Vault, settings: Settings) -> None:
        self.llm = llm
        # Room for one prompt at least; the worker puts none in force that leaves less (`Context.max_text_tokens`).
        self.max_text_tokens = llm.text_limit(settings.max_text_tokens, settings.num_virtual_tokens)
        self._sessions, self._vault = sessions, vault
        self._classifier = Classifier(llm)
        self._lock = threading.Lock()  # the model thread and /readyz both confirm
        self._stack: _Stack | None = None
        self._batcher: Batcher[Sequence[str], Answer] = Batcher(
            self._classify, weigh=len, max_batch=MAX_BATCH_TEXTS, max_queued=settings.max_queued_texts
        )

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.llm.verbalizer.labels)

    def submit(self, texts: Sequence[str]) -> Future[Answer]:
        """Queue texts; the future also carries NotReady. Raises Overloaded, NotReady."""
        return self._batcher.submit(texts)

    def check(self) -> None:
        """Raises NotReady when a classification would not be answered now."""
        if not self._batcher.alive:
            raise NotReady("the model thread is not running")
        self._confirm()

    def close(self) -> None:
        self._batcher.close()

    def _classify(self, jobs: list[Sequence[str]]) -> list[Answer]:
        """One batch, in the model thread. Raises NotReady, which reaches every caller of the batch."""
        stack = self._confirm()
        texts = [text for job in jobs for text in job]
        try:
            flat = iter(self._classifier.classify(texts, stack.prompts))
        except ModelError as error:
            raise NotReady(str(error)) from error
        except Exception as error:
            log.error("a batch failed: %s", where(error))
            raise NotReady(f"the model failed on this batch ({type(error).__name__})") from error
        return [Answer([next(flat) for _ in job], stack.view.version) for job in jobs]

    def _confirm(self) -> _Stack:
        """The stack in force now. One indexed query when nothing changed; otherwise loads what is not loaded yet.

        Raises NotReady for any failure whatever: an answer without the prompts would break the promise to forget.
        """
        with self._lock:
            try:
                with self._sessions() as session:
                    if self._stack is not None and active_set.read_active_set(session) == self._stack.view:
                        return self._stack
                    view, rows = active_set.read_stack(session)
                loaded = {prompt.digest: prompt for prompt in self._stack.prompts} if self._stack else {}
                # What is not in `rows` is dropped with the old stack.
                self._stack = _Stack(view, tuple(loaded.get(row.digest) or self._load(row) for row in rows))
                return self._stack
            except NotReady:
                raise
            except Exception as error:
                log.error("the active set cannot be confirmed: %s", where(error))
                raise NotReady(f"the active set cannot be read ({type(error).__name__})") from error

    def _load(self, row: Prompt) -> SoftPrompt:
        try:
            return SoftPrompt.from_bytes(active_set.open_prompt(self._vault, row), fingerprint=self.llm.fingerprint)
        except Exception as error:
            log.error("prompt %s does not load: %s", row.id, where(error))
            raise NotReady(f"prompt {row.id} cannot be loaded ({type(error).__name__})") from error
