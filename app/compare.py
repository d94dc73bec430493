"""The bare model's answer beside the one that is served, and what made the difference."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from app.errors import DeadlineExceeded, NotReady, Overloaded
from app.metrics import Outcome, outcome
from app.serving import Serving
from app.settings import Settings
from app.stack import Stack
from models.inference import Classification, Classifier, Encoded, answer_scores
from models.next_tokens import NextToken, likeliest, next_logits
from models.routing import Routes, classify_routed

__all__ = ["TOKENS", "Compared", "NextToken", "NextTokens", "a_turn", "compare"]

TOKENS = 10
_TRIES = 3
_AT_ONCE = threading.BoundedSemaphore(2)
"""Whoever compares holds one of the threads that all other routes share, for as long as the model takes."""


@dataclass(frozen=True)
class NextTokens:
    """The likeliest next tokens of the bare model, and behind the prompts that had the say.

    ``served`` None: no prompt had, so there is nothing else than the bare model. ``prompts``: their ids.
    """

    base: list[NextToken]
    served: list[NextToken] | None = None
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compared:
    """One text. ``prompts``: ids of those in force that had a say, best first; all of them in mode ``concatenate``.

    ``tokens``: where they were asked for.
    """

    base: Classification
    served: Classification
    decided: Outcome
    prompts: tuple[str, ...]
    tokens: NextTokens | None = None


@contextmanager
def a_turn() -> Iterator[None]:
    """To be held while texts are prepared and compared. Raises Overloaded."""
    if not _AT_ONCE.acquire(blocking=False):
        raise Overloaded("other texts are being compared", retry_after=5)
    try:
        yield
    finally:
        _AT_ONCE.release()


def compare(
    serving: Serving, settings: Settings, texts: Sequence[Encoded], *, tokens_of: int = 0
) -> tuple[int, list[Compared]]:
    """The active set's version and, for each text, both answers, all under that one version.

    ``tokens_of``: of so many texts, the first ones, also what the model would say next: a pass more for each prompt
    that had a say. Without time for that the answers come alone.
    Raises Overloaded, DeadlineExceeded, NotReady, ModelError.
    """
    deadline = time.monotonic() + settings.classify_deadline_seconds
    step = settings.max_batch_texts
    for _ in range(_TRIES):
        found = [
            serving.work(_both(texts[start : start + step], settings.max_prompts_per_query), deadline=deadline)
            for start in range(0, len(texts), step)
        ]
        said = _said(serving, texts[:tokens_of], settings.max_prompts_per_query, deadline)
        versions = {version for version, _ in [*found, *([said] if said else [])]}
        if len(versions) == 1:
            every = [one for _, part in found for one in part]
            tokens = said[1] if said else []
            return versions.pop(), [
                *(replace(one, tokens=its) for one, its in zip(every, tokens, strict=False)),
                *every[len(tokens) :],
            ]
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


def _said(
    serving: Serving, texts: Sequence[Encoded], most: int, deadline: float
) -> tuple[int, list[NextTokens]] | None:
    """None where there is no time for it: the answers do without."""
    if not texts:
        return None
    try:
        return serving.work(_tokens(texts, most), deadline=deadline)
    except (DeadlineExceeded, Overloaded):
        return None


def _tokens(texts: Sequence[Encoded], most: int) -> Callable[[Classifier, Stack], tuple[int, list[NextTokens]]]:
    """A piece of work of its own: two passes, and one for each prompt that had a say in any of the texts."""

    def tokens(classifier: Classifier, stack: Stack) -> tuple[int, list[NextTokens]]:
        llm, ids = classifier.llm, [member.id for member in stack.members]
        base = [NextTokens(row) for row in likeliest(llm, next_logits(classifier, texts), TOKENS)]
        if stack.routes is None:
            if not stack.prompts:
                return stack.view.version, base
            served = likeliest(llm, next_logits(classifier, texts, stack.prompts), TOKENS)
            pairs = zip(base, served, strict=True)
            return stack.view.version, [replace(b, served=s, prompts=tuple(ids)) for b, s in pairs]
        routed = classify_routed(classifier, stack.routes, texts, digest=None, max_prompts=most)
        asked = [() if one.guarded or one.certain else one.claims for one in routed]
        found = list(base)
        for i, (route, row) in _deciding(classifier, stack.routes, texts, asked).items():
            found[i] = replace(base[i], served=row, prompts=(ids[route],))
        return stack.view.version, found

    return tokens


def _deciding(
    classifier: Classifier, routes: Routes, texts: Sequence[Encoded], asked: Sequence[Sequence[int]]
) -> dict[int, tuple[int, list[NextToken]]]:
    """For each text that a prompt was ``asked`` about: the route that decided, and the tokens behind its prompt.

    That is the one that abstains most surely; where none does, the first. All texts of one prompt are one batch.
    """
    llm = classifier.llm
    best: dict[int, tuple[float, int, list[NextToken]]] = {}
    for route in sorted({route for claims in asked for route in claims}):
        mine = [i for i, claims in enumerate(asked) if route in claims]
        hidden = classifier.hidden([texts[i] for i in mine], [routes.routes[route].prompt])
        scores, tokens = answer_scores(llm, hidden), likeliest(llm, llm.logits(hidden).cpu(), TOKENS)
        for i, row, its in zip(mine, scores, tokens, strict=True):
            sure = float(row[-1]) if int(row.argmax()) == len(row) - 1 else 0.0
            first = route == asked[i][0]
            if i not in best or sure > best[i][0] or (sure == best[i][0] and first):
                best[i] = (sure, route, its)
    return {i: (route, its) for i, (_, route, its) in best.items()}


def _concatenated(served: Classification, prompted: bool) -> Outcome:
    if not prompted:
        return "base"
    return "abstained" if served.abstained else "cleared"
