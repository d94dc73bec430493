"""What a request in mode ``routed`` needs beside its prompt: a gate, retain rows near it, checks of the whole set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import active_set
from app.active_set import TrainedGate
from app.settings import Settings
from app.vault import Vault
from models.examples import Example
from models.gate import GateSpace
from models.gate_fit import GateFit, fit_gate
from models.gate_rows import GateRows, space_source
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routed_checks import RoutedLimits, RoutedReport, check_routes
from models.routing import Route, Routes
from models.row_cache import CacheFolder
from models.soft_prompt import SoftPrompt
from models.surroundings import Surroundings, look_around
from worker.knobs import check_limits

Commit = Callable[[Callable[[Session], Any]], Any]


def surroundings(
    llm: FrozenLLM,
    settings: Settings,
    commit: Commit,
    forget: Sequence[Example],
    retain: Sequence[Example],
    whole_retain: Sequence[Example],
    cache: CacheFolder,
) -> Surroundings:
    """Read the rows, and find the gate space in the database or make it. Raises DatasetError, TextTooLong."""
    rows = GateRows(llm, retain, settings.gate_rows, cache)
    source = space_source(llm, whole_retain, settings.gate_rows)
    space = _find_space(llm, commit, source)
    if space is None:
        data = rows.fit_space().to_bytes()
        with suppress(IntegrityError):  # another worker was first, and its space is the one
            commit(lambda session: active_set.add_gate_space(session, source, data))
        space = _find_space(llm, commit, source) or GateSpace.from_bytes(data, fingerprint=llm.fingerprint)
    return look_around(llm, rows, space, forget, max_false_claims=settings.max_false_claim_rate)


def _find_space(llm: FrozenLLM, commit: Commit, source: str) -> GateSpace | None:
    digest = commit(lambda session: active_set.find_gate_space(session, source))
    if digest is None:
        return None
    data = commit(lambda session: active_set.read_gate_space(session, digest))
    return GateSpace.from_bytes(data, fingerprint=llm.fingerprint)


def fit_and_check(
    llm: FrozenLLM, settings: Settings, vault: Vault, around: Surroundings, others: Routes, prompt: SoftPrompt
) -> tuple[GateFit, RoutedReport]:
    """Fit the gate, then check the set as it would be with this request. Raises TextTooLong."""
    fit = fit_gate(
        around.states,
        around.calibration_states,
        around.space,
        digests=sorted({vault.gate_digest(e.text) for e in around.forget}),
        max_false_claims=settings.max_false_claim_rate,
        max_certain_claims=settings.max_certain_claim_rate or None,
    )
    routes = others.plus(Route(prompt, fit.gate), around.space)
    limits = RoutedLimits(
        check_limits(settings),
        settings.max_total_claim_rate,
        settings.max_prompts_per_query,
    )
    report = check_routes(
        Classifier(llm),
        others,
        routes,
        fit,
        around.forget,
        around.check,
        around.check_states,
        max_retain_rows=settings.check_retain_rows,
        seed=settings.seed,
        limits=limits,
    )
    return fit, report


def trained_gate(fit: GateFit) -> TrainedGate:
    return TrainedGate(fit.gate.to_bytes(), fit.gate.digest, fit.gate.space)
