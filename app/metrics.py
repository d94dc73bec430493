"""What one application counts and times for Prometheus: never a text, an id or a key.

Every label comes from a closed set, so what clients send can neither be read here nor multiply the series. What the
database knows is read when somebody scrapes (``app.scrape``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from app.recent import Recent

Refusal = Literal["overloaded", "deadline", "not-ready", "disconnected"]
Outcome = Literal["base", "cleared", "abstained", "certain", "guarded"]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)


class Decided(Protocol):
    """``models.routing.Routed``, as far as it is counted here."""

    @property
    def answer(self) -> Any: ...
    @property
    def base(self) -> Any: ...
    @property
    def claims(self) -> tuple[int, ...]: ...
    @property
    def guarded(self) -> bool: ...
    @property
    def certain(self) -> bool: ...


def outcome(found: Decided) -> Outcome:
    """How one text of mode ``routed`` was answered; exactly one holds."""
    if found.guarded:
        return "guarded"
    if found.certain:
        return "certain"
    if not found.claims:
        return "base"
    # Not `answer.abstained`: the bare model may say `unknown` by itself.
    return "cleared" if found.answer is found.base else "abstained"


def outcomes(decided: Iterable[Decided]) -> dict[str, int]:
    """The keywords of ``Metrics.answers`` for a batch of mode ``routed``."""
    counts = dict.fromkeys(get_args(Outcome), 0)
    for found in decided:
        counts[outcome(found)] += 1
    return {
        "base": counts["base"],
        "claimed": counts["cleared"],
        "prompted_abstained": counts["abstained"],
        "certain": counts["certain"],
        "guarded": counts["guarded"],
    }


class Metrics:
    """The metrics of one application, in a registry of its own. Every method may be called from any thread."""

    def __init__(self) -> None:
        # When each series began, once more for every one of them: nothing here reads it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.recent = Recent()
        ProcessCollector(registry=self.registry)
        self._http = Histogram(
            "letheon_http_request_duration_seconds",
            "Seconds from a request's first byte to the end of its answer, by method, route template and status.",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._waited = Histogram(
            "letheon_queue_wait_seconds",
            "Seconds that a classification waited for its batch.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._queue_texts = Gauge(
            "letheon_queue_texts", "Texts that wait to be classified, in this process.", registry=self.registry
        )
        self._queue_age = Gauge(
            "letheon_queue_oldest_seconds",
            "Age of the oldest classification that waits in this process; 0 when none does.",
            registry=self.registry,
        )
        self._batch_texts = Histogram("letheon_batch_texts", "Texts in a batch.", buckets=TEXTS, registry=self.registry)
        self._batch_seconds = Histogram(
            "letheon_batch_duration_seconds", "Seconds of a batch.", buckets=SECONDS, registry=self.registry
        )
        self._tokens = Counter(
            "letheon_batch_tokens", "Tokens of texts that the model computed.", registry=self.registry
        )
        self._padding = Counter(
            "letheon_batch_padding_tokens",
            "Tokens that the model computed for the shape of a batch only.",
            registry=self.registry,
        )
        classified = Counter(
            "letheon_classified_texts",
            "Classified texts by how they were answered.",
            ("outcome",),
            registry=self.registry,
        )
        self._outcomes = _by_label(classified, get_args(Outcome))
        refused = Counter("letheon_refused", "Classifications that got no answer.", ("reason",), registry=self.registry)
        self._refused = _by_label(refused, get_args(Refusal))
        self._version = Gauge(
            "letheon_active_set_version", "The active set that this process answers behind.", registry=self.registry
        )
        self._prompts = Gauge(
            "letheon_active_set_prompts", "Prompts of the active set in this process.", registry=self.registry
        )
        self._compiled = Gauge(
            "letheon_compiled", "1 when batches run on compiled layers (LETHEON_COMPILE).", registry=self.registry
        )

    def compiled(self, kept: bool) -> None:
        """Whether batches run on compiled layers; 0 until it is said."""
        self._compiled.set(kept)

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request. ``method`` of METHODS or ``(other)``; ``route`` a template; ``status`` 0: the client left."""
        self._http.labels(method, route, str(status) if status else "none").observe(seconds)

    def waited(self, seconds: float) -> None:
        """A classification has left the queue after this long."""
        self._waited.observe(seconds)

    def queue(self, texts: Callable[[], int], age: Callable[[], float]) -> None:
        """``texts`` that wait now, ``age`` of the oldest in seconds (0: none waits); both are asked at each scrape."""
        self._queue_texts.set_function(texts)
        self._queue_age.set_function(age)

    def batch(self, *, texts: int, seconds: float, tokens: int, padding: int) -> None:
        """One batch; its shape had ``tokens`` of texts and ``padding`` beside them."""
        self._batch_texts.observe(texts)
        self._batch_seconds.observe(seconds)
        self._tokens.inc(tokens)
        self._padding.inc(padding)

    def answers(self, *, base: int, claimed: int, prompted_abstained: int, certain: int, guarded: int) -> None:
        """Texts that were answered, each counted once; ``claimed``: those that a gate claimed and its prompt cleared.

        In mode ``concatenate``, which has no gates: ``base`` without a prompt in force, else ``claimed`` or
        ``prompted_abstained``.
        """
        counts = {
            "base": base,
            "cleared": claimed,
            "abstained": prompted_abstained,
            "certain": certain,
            "guarded": guarded,
        }
        for name, count in counts.items():
            if count:
                self._outcomes[name].inc(count)
        self.recent.add(sum(counts.values()), prompted_abstained + certain + guarded)

    def refused(self, reason: Refusal) -> None:
        """A classification that was not answered, and why."""
        self._refused[reason].inc()

    def active_set(self, version: int, prompts: int) -> None:
        """What this process answers behind from now on."""
        self._version.set(version)
        self._prompts.set(prompts)


def _by_label(counter: Counter, values: Iterable[str]) -> dict[str, Counter]:
    """The counters of all label values: each is there, at 0, before it first counts, as a rate needs it."""
    return {value: counter.labels(value) for value in values}
