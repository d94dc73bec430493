"""A request's evidence, made between its checks and its activation, while its texts are still there.

Nothing depends on it: where it cannot be made the request goes on, and the evidence says that it is absent and of what
kind of error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

from app.evidence import Found
from app.tracebacks import where
from models.evidence import (
    Views,
    as_document,
    choose,
    held_out_figures,
    make_evidence,
    routed_views,
    stacked_views,
    texts_of,
)
from models.examples import Example
from models.gate_fit import GateFit
from models.inference import Classifier
from models.routing import Route, Routes
from models.soft_prompt import SoftPrompt
from models.surroundings import Surroundings
from worker.context import Context

log = logging.getLogger("letheon.worker")

VERSION = 1
SOFTWARE = ("letheon", "torch", "transformers")


def of_gate(context: Context, forgotten: set[bytes], around: Surroundings, fit: GateFit, prompt: SoftPrompt) -> Found:
    """Mode ``routed``: by the request's gate and prompt alone, so it does not depend on what else is in force."""
    routes = Routes([Route(prompt, fit.gate)], {around.space.digest: around.space}, fingerprint=context.llm.fingerprint)

    def views(texts: Sequence[str]) -> Views:
        return routed_views(Classifier(context.llm), routes, texts)

    return gather(context, forgotten, around.forget, around.check, prompt, views)


def of_stack(
    context: Context,
    forgotten: set[bytes],
    forget: Sequence[Example],
    retain: Sequence[Example],
    prompts: Sequence[SoftPrompt],
) -> Found:
    """Mode ``concatenate``: behind all ``prompts``, of which the request's is the last."""

    def views(texts: Sequence[str]) -> Views:
        return stacked_views(Classifier(context.llm), prompts, texts)

    return gather(context, forgotten, forget, retain, prompts[-1], views)


def gather(
    context: Context,
    forgotten: set[bytes],
    forget: Sequence[Example],
    retain: Sequence[Example],
    prompt: SoftPrompt,
    views: Callable[[Sequence[str]], Views],
) -> Found:
    """``forgotten``: keyed digests of all that was ever to be forgotten, which is no text to compare with."""
    settings, started = context.settings, time.monotonic()
    try:
        others = unrelated(context, forgotten, forget) or None
        rows = choose(forget, retain, others, count=settings.evidence_texts, seed=settings.seed)
        labels = context.llm.verbalizer.labels
        seen = views(texts_of(rows))
        held_out = held_out_figures(rows, seen, labels)
        made = make_evidence(rows, seen, labels, seed=settings.seed)
        document = {
            "version": VERSION,
            "mode": settings.mode.value,
            "prompt_digest": prompt.digest,
            "seed": settings.seed,
            **as_document(made),
            "software": {name: version(name) for name in SOFTWARE},
            "seconds": round(time.monotonic() - started, 3),
        }
    except Exception as error:
        log.warning("no evidence, and it goes on without: %s", where(error))
        return Found(None, type(error).__name__[:60])
    return Found(document, held_out=held_out)


def unrelated(context: Context, forgotten: set[bytes], forget: Sequence[Example]) -> list[Example]:
    """The held-out rows that nobody ever asked to forget, and that no guard would take for one of these texts."""
    guarded = {context.vault.gate_digest(example.text) for example in forget}
    pairs = zip(context.held_out, context.held_out_digests, strict=True)
    return [
        row for row, digest in pairs if digest not in forgotten and context.vault.gate_digest(row.text) not in guarded
    ]
