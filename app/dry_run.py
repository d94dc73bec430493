"""What a request would do, before it is made: nothing is stored, and no text of either side is in the answer.

The gate is fitted as the worker fits it, on the same rows. What needs the model runs in its thread, a batch's worth at
a time, so a question waits for one such piece at most. One dry run at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sqlalchemy.orm import Session, sessionmaker
from torch import Tensor

from app import active_set
from app.defaults import NotConfigured
from app.errors import DeadlineExceeded, NotFound, NotReady, Overloaded, VaultError
from app.knobs import training_config
from app.past_trainings import read_pace
from app.retain_set import RetainSet
from app.schemas import Failure, UnlearnRequestIn
from app.schemas_dry_run import BlastRadiusOut, CostOut, DryRunOut, ForgetSetOut, GateOut, RetainOverlapOut
from app.serving import Serving
from app.settings import Mode, Settings
from app.stack import Stack
from app.vault import Vault, letters
from models.errors import DatasetError, ModelError, TextTooLong
from models.gate import GateSpace, best_cosines, fit_space
from models.gate_fit import GateFit, fit_gate
from models.inference import Classifier, Encoded
from models.metrics import wilson
from models.near_copies import NEAR, side_by_side, signature, similarities
from models.recording import layers_of
from models.routed_checks import reach_warnings
from models.routing import classify_routed
from models.text_states import gate_layers, text_states
from models.training import planned_steps

log = logging.getLogger(__name__)


@dataclass(repr=False)
class _Run:
    """One dry run on its way. ``texts`` as they were sent; ``unique``: as the worker would have them."""

    texts: list[str]
    unique: list[str]
    options: dict[str, Any]
    deadline: float
    answers: bool
    obstacles: list[Failure]
    warnings: list[str]

    def check(self) -> None:
        """Raises DeadlineExceeded."""
        if time.monotonic() > self.deadline:
            raise DeadlineExceeded("no report in the time allowed; ask again, what was read is kept", retry_after=1)


class DryRuns:
    """Holds the retain set from the first dry run on, and the early states of the rows that gates are fitted with."""

    def __init__(self, serving: Serving, sessions: sessionmaker[Session], vault: Vault, settings: Settings) -> None:
        self._serving, self._sessions, self._vault, self._settings = serving, sessions, vault, settings
        self._llm = serving.llm
        self._lock = threading.Lock()
        self._retain: RetainSet | None = None
        deepest = max(1, gate_layers(self._llm)[-1])
        # Early states take a part of the layers, so as many more rows make a batch's worth.
        self._at_once = settings.max_batch_texts * max(1, len(layers_of(self._llm)) // deepest)

    def report(self, body: UnlearnRequestIn, *, answers: bool) -> DryRunOut:
        """``answers``: also say how the texts are answered today.

        Raises Overloaded (another one runs, or the queue is full), DeadlineExceeded, NotReady.
        """
        if not self._lock.acquire(blocking=False):
            raise Overloaded("another dry run is under way", retry_after=5)
        try:
            pairs = list(dict.fromkeys((item.text, item.label) for item in body.forget_texts))
            run = _Run(
                texts=[item.text for item in body.forget_texts],
                unique=[text for text, _ in pairs],
                options=body.options.model_dump(exclude_none=True) if body.options else {},
                deadline=time.monotonic() + self._settings.dry_run_seconds,
                answers=answers,
                obstacles=[],
                warnings=[],
            )
            return self._report(run)
        finally:
            self._lock.release()

    def _report(self, run: _Run) -> DryRunOut:
        version, forget = self._forget_set(run)
        retain, overlap, kept = self._load(run), None, list[int]()
        if retain is not None:
            overlap, kept = self._overlap(run, retain)
        fit, blast = None, None
        if self._settings.mode == Mode.CONCATENATE:
            run.warnings.append("in mode concatenate there is no gate: every query runs behind the prompt")
        elif retain is not None and not run.obstacles:
            fit, blast = self._gate(run, retain, kept)
        return DryRunOut(
            mode=self._settings.mode,
            fingerprint=self._llm.fingerprint,
            active_set_version=version,
            forget=forget,
            retain=overlap,
            gate=GateOut(
                own_recall=fit.own_recall,
                subjects=len(fit.gate.directions),
                unseen_claimed=fit.unseen_claimed,
                unseen_certain=fit.unseen_certain,
            )
            if fit
            else None,
            blast_radius=blast,
            cost=self._cost(run, len(fit.gate.directions) if fit else 1),
            obstacles=run.obstacles,
            warnings=run.warnings,
        )

    # --- the forget texts --------------------------------------------------------------------------------------------

    def _forget_set(self, run: _Run) -> tuple[int, ForgetSetOut]:
        """The active set's version, and the texts among themselves and as they are answered. Raises NotReady."""
        first: dict[bytes, int] = {}
        equal = [i for i, text in enumerate(run.texts) if first.setdefault(self._vault.digest(text), i) != i]
        rest = sorted(first.values())
        own = side_by_side([signature(letters(run.texts[i])) for i in rest])
        near = []
        for place, found in enumerate(similarities(own, own)):
            run.check()
            if (found[:place] >= NEAR).any():
                near.append(rest[place])
        known: list[bool] = []
        version = self._work(run, lambda classifier, stack: stack.view.version)
        encoded, step = self._serving.encode(run.texts if run.answers else []), self._settings.max_batch_texts
        for start in range(0, len(encoded), step):
            try:
                version, answers = self._work(run, self._unknown(encoded[start : start + step]))
            except TextTooLong:  # they fitted when they were checked
                raise NotReady("the active set has changed meanwhile; ask again") from None
            known += answers
        places = [i for i, unknown in enumerate(known) if unknown]
        return version, ForgetSetOut(
            texts=len(run.texts),
            different=len(run.unique),
            exact_duplicates=equal,
            near_duplicates=near,
            already_unknown=places if run.answers else None,
            already_unknown_share=len(places) / len(run.texts) if run.answers else None,
        )

    def _unknown(self, texts: Sequence[Encoded]) -> Callable[[Classifier, Stack], tuple[int, list[bool]]]:
        most = self._settings.max_prompts_per_query

        def answers(classifier: Classifier, stack: Stack) -> tuple[int, list[bool]]:
            if stack.routes is None:
                found = classifier.classify(texts, stack.prompts)
            else:
                routed = classify_routed(classifier, stack.routes, texts, digest=None, max_prompts=most)
                found = [one.answer for one in routed]
            return stack.view.version, [answer.abstained for answer in found]

        return answers

    # --- the retain set ----------------------------------------------------------------------------------------------

    def _load(self, run: _Run) -> RetainSet | None:
        if self._retain is None:
            try:
                self._retain = RetainSet(self._settings, self._vault, self._llm)
            except (NotConfigured, DatasetError) as error:
                log.warning("dry run: %s", error)  # names a file or a row, which are not the client's business
                run.warnings.append("this server can read no retain set (its log says why), so nothing is said of it")
                return None
            run.check()
        return self._retain

    def _overlap(self, run: _Run, retain: RetainSet) -> tuple[RetainOverlapOut, list[int]]:
        """What the request has in common with the retain set, and the rows that would be left were it the only one.

        Rows that earlier requests took count like all others, here and for the gate: or whoever sends a text much like
        a row could see by the figures whether somebody has asked to forget that row.
        """
        digests = [self._vault.digest(text) for text in run.texts]
        guards = [self._vault.gate_digest(text) for text in run.texts]
        by_digest, by_guard = set(digests), set(guards)
        pairs = zip(retain.digests, retain.guard, strict=True)
        kept = [i for i, (digest, guard) in enumerate(pairs) if digest not in by_digest and guard not in by_guard]
        in_rows = by_digest.intersection(retain.digests) | by_guard.intersection(retain.guard)
        repeated = len(retain.rows) - len(kept)
        others = retain.signatures[:, kept]
        near, near_texts = torch.zeros(len(kept), dtype=torch.bool).numpy(), []
        spelled = side_by_side([signature(letters(text)) for text in run.texts])
        for place, found in enumerate(similarities(others, spelled)):
            run.check()
            like = found >= NEAR
            if like.any():
                near |= like
                near_texts.append(place)
        overlap = RetainOverlapOut(
            rows=len(retain.rows),
            withheld=repeated,
            withheld_share=repeated / len(retain.rows),
            texts=[i for i in range(len(run.texts)) if digests[i] in in_rows or guards[i] in in_rows],
            near_rows=int(near.sum()),
            near_texts=near_texts,
        )
        different = len({retain.rows[i].text for i in kept})
        if different < self._settings.min_retain_rows:
            detail = f"{different} different retain texts are left; {self._settings.min_retain_rows} are needed"
            run.obstacles.append(Failure(code="too-few-retain-rows", detail=detail))
        if near_texts:
            run.warnings.append(
                f"{overlap.near_rows} retain rows are much like these texts and stay in the retain set: they teach "
                "what is to be forgotten"
            )
        return overlap, kept

    # --- the gate ----------------------------------------------------------------------------------------------------

    def _gate(self, run: _Run, retain: RetainSet, kept: list[int]) -> tuple[GateFit | None, BlastRadiusOut | None]:
        space_rows, calibration, check = retain.chosen(kept)
        if min(len(space_rows), len(calibration), len(check)) < 2:
            run.obstacles.append(
                Failure(code="too-few-retain-rows", detail="the retain set has too few different texts for a gate")
            )
            return None, None
        try:
            space = self._space(run, retain, space_rows)
            states = self._read(run, run.unique)
            fit = fit_gate(
                states,
                self._states(run, retain, calibration),
                space,
                digests=[],
                max_false_claims=self._settings.max_false_claim_rate,
                max_certain_claims=self._settings.max_certain_claim_rate or None,
            )
            checked = self._states(run, retain, check)
        except TextTooLong as error:
            run.obstacles.append(Failure(code="text-too-long", detail=str(error)))
            return None, None
        run.check()
        claimed = best_cosines(space.points(checked), fit.gate.directions) > fit.gate.threshold
        before = self._work(run, lambda classifier, stack: _claims(stack, checked))
        total = int((claimed | before).sum()) / len(check)
        share = wilson(int(claimed.sum()), len(check))
        self._judge(run, fit, total, len(check))
        return fit, BlastRadiusOut(
            rows=len(check),
            claimed=int(claimed.sum()),
            share=share.mean,
            low=share.low,
            high=share.high,
            share_with_active_set=total if run.answers else None,
        )

    def _judge(self, run: _Run, fit: GateFit, total: float, rows: int) -> None:
        settings = self._settings
        if fit.own_recall < settings.min_forget_abstain:
            detail = (
                f"a gate that may claim {settings.max_false_claim_rate:.2%} of the retain set reaches only "
                f"{fit.own_recall:.1%} of these texts, and {settings.min_forget_abstain:.1%} are needed"
            )
            run.obstacles.append(Failure(code="gate-too-narrow", detail=detail))
        if total > max(settings.max_total_claim_rate, 1 / rows) + 1e-9:  # as the checks have it
            found = f"{total:.4f}" if run.answers else "more"
            detail = (
                f"all gates together would claim {found} of the retain rows; {settings.max_total_claim_rate} may be"
            )
            run.obstacles.append(Failure(code="checks-failed", detail=detail))
        run.warnings += reach_warnings(fit)

    def _space(self, run: _Run, retain: RetainSet, rows: list[int]) -> GateSpace:
        """The one that gates share, or, before the first of them, what the worker would make. Raises NotReady."""
        try:
            with self._sessions() as session:
                digest = active_set.find_gate_space(session, retain.space_source)
                data = active_set.read_gate_space(session, digest) if digest is not None else None
            if data is not None:
                return GateSpace.from_bytes(data, fingerprint=self._llm.fingerprint)
        except (ModelError, VaultError, NotFound) as error:
            raise NotReady("the gate space that all gates share cannot be read") from error
        states = self._states(run, retain, rows)
        return fit_space(states, len(gate_layers(self._llm)), fingerprint=self._llm.fingerprint)

    def _states(self, run: _Run, retain: RetainSet, rows: Sequence[int]) -> Tensor:
        return retain.states(rows, lambda texts: self._read(run, texts), self._at_once)

    def _read(self, run: _Run, texts: Sequence[str]) -> Tensor:
        """Early states (n, D), a piece at a time. Raises TextTooLong."""
        parts = []
        for start in range(0, len(texts), self._at_once):
            parts.append(self._work(run, _early(texts[start : start + self._at_once])))
        return torch.cat(parts)

    def _work(self, run: _Run, work: Callable[[Classifier, Stack], Any]) -> Any:
        """In the model's thread. Raises NotReady, Overloaded, DeadlineExceeded, TextTooLong."""
        run.check()
        try:
            return self._serving.work(work, deadline=run.deadline)
        except TextTooLong:
            raise
        except (ModelError, VaultError) as error:
            raise NotReady(str(error)) from error

    # --- what it would cost ------------------------------------------------------------------------------------------

    def _cost(self, run: _Run, subjects: int) -> CostOut:
        steps = planned_steps(training_config(self._settings, run.options, subjects=subjects), len(run.unique))
        with self._sessions() as session:
            pace = read_pace(session, fingerprint=self._llm.fingerprint, mode=self._settings.mode)
        if pace is None:
            return CostOut(
                planned_steps=steps,
                seconds_per_step=None,
                seconds=None,
                basis="no training of this model in this mode has ended yet",
            )
        return CostOut(
            planned_steps=steps,
            seconds_per_step=round(pace.seconds, 4),
            seconds=round(pace.seconds * steps, 1),
            basis=f"the median of the newest {pace.trainings} trainings of this model in this mode, which took "
            f"{pace.steps} steps; texts of other lengths take other times",
        )


def _early(texts: Sequence[str]) -> Callable[[Classifier, Stack], Tensor]:
    return lambda classifier, stack: text_states(classifier.llm, texts, prefix=classifier.prefix(()))


def _claims(stack: Stack, states: Tensor) -> Tensor:
    """Which of the states (N, D) any gate in force claims, (N,) bool."""
    if stack.routes is None or not len(stack.routes):
        return torch.zeros(len(states), dtype=torch.bool)
    return (stack.routes.margins(states) > 0).any(1)
