"""The bare model's answer beside the one that is served, and what made the difference."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from app.errors import NotReady, Overloaded
from app.metrics import Outcome, outcome
from app.serving import Serving
from app.settings import Settings
from app.stack import Stack
from models.inference import Classification, Classifier, Encoded
from models.routing import classify_routed

__all__ = ["Compared", "a_turn", "compare"]

_TRIES = 3
_AT_ONCE = threading.BoundedSemaphore(2)
"""Whoever compares holds one of the threads that all other routes share, for as long as the model takes."""


@dataclass(frozen=True)
class Compared:
    """One text. ``prompts``: ids of those in force that had a say, best first; all of them in mode ``concatenate``."""

    base: Classification
    served: Classification
    decided: Outcome
    prompts: tuple[str, ...]


@contextmanager
def a_turn() -> Iterator[None]:
    """To be held while texts are prepared and compared. Raises Overloaded."""
    if not _AT_ONCE.acquire(blocking=False):
        raise Overloaded("other texts are being compared", retry_after=5)
    try:
        yield
    finally:
        _AT_ONCE.release()


def compare(serving: Serving, settings: Settings, texts: Sequence[Encoded]) -> tuple[int, list[Compared]]:
    """The active set's version and, for each text, both answers, all under that one version.

    Raises Overloaded, DeadlineExceeded, NotReady, ModelError.
    """
    deadline = time.monotonic() + settings.classify_deadline_seconds
    step = settings.max_batch_texts
    for _ in range(_TRIES):
        found = [
            serving.work(_both(texts[start : start + step], settings.max_prompts_per_query), deadline=deadline)
            for start in range(0, len(texts), step)
        ]
        versions = {version for version, _ in found}
        if len(versions) == 1:
            return versions.pop(), [one for _, part in found for one in part]
    raise NotReady("the active set changes faster than it can be compared")


def _both(texts: Sequence[Encoded], most: int) -> Callable[[Classifier, Stack], tuple[int, list[Compared]]]:
    def answers(classifier: Classifier, stack: Stack) -> tuple[int, list[Compared]]:
        ids = [member.id for member in stack.members]
        if stack.routes is not None:
            routed = classify_routed(classifier, stack.routes, texts, digest=None, max_prompts=most)
            known = [stack.routes.known_by(text.digest) if text.digest else () for text in texts]
            had_a_say = [dict.fromkeys([*k, *one.claims]) for k, one in zip(known, routed, strict=True)]
            return stack.view.version, [
                Compared(one.base, one.answer, outcome(one), tuple(ids[i] for i in say))
                for one, say in zip(routed, had_a_say, strict=True)
            ]
        base = classifier.classify(texts)
        served = classifier.classify(texts, stack.prompts) if stack.prompts else base
        pairs = zip(base, served, strict=True)
        return stack.view.version, [Compared(b, s, _concatenated(s, bool(ids)), tuple(ids)) for b, s in pairs]

    return answers


def _concatenated(served: Classification, prompted: bool) -> Outcome:
    if not prompted:
        return "base"
    return "abstained" if served.abstained else "cleared"
