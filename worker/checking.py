"""A trained prompt, measured in the very set that it would serve in: its gate, its figures, its evidence.

Nothing here moves a request or writes a row; what is found is the job's to act on (``worker.job``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from app.active_set import TrainedGate
from app.evidence import Found
from app.lifecycle import Claim
from app.stack import Stack
from models.canaries import make_canaries
from models.errors import DatasetError, NotFinite, TextTooLong
from models.evaluation import CheckReport
from models.examples import Example
from models.inference import Classifier
from models.routed_checks import RoutedReport
from models.soft_prompt import SoftPrompt
from models.surroundings import Surroundings
from models.training import TrainingResult
from worker.concatenated import check_stack
from worker.context import Context
from worker.evidence import of_gate, of_stack
from worker.failures import JobFailed
from worker.knobs import conditions
from worker.routed import Commit, fit_and_check, surroundings, trained_gate


@dataclass(frozen=True, repr=False)
class Checked:
    """``look`` makes the evidence, of the digests of all that was ever to be forgotten. Mode ``concatenate`` has no
    ``gate``."""

    report: CheckReport | RoutedReport
    gate: TrainedGate | None
    look: Callable[[set[bytes]], Found]


def check(
    context: Context,
    stack: Stack,
    prompt: SoftPrompt,
    forget: Sequence[Example],
    retain: Sequence[Example],
    around: Surroundings | None,
    earlier_canaries: Callable[[Stack], list[list[str]]],
) -> Checked:
    """Beside the prompts of ``stack``, by mode. Raises JobFailed, and what ``earlier_canaries`` raises."""
    try:
        if around is None or stack.routes is None:
            check_room(context, stack.prompts, prompt.num_virtual_tokens)
            prompts = [*stack.prompts, prompt]
            report = check_stack(context.llm, context.settings, prompts, forget, retain, earlier_canaries(stack))
            look = partial(of_stack, context, forget=forget, retain=retain, prompts=prompts)
            return Checked(report, None, look)
        fit, routed = fit_and_check(context.llm, context.settings, context.vault, around, stack.routes, prompt)
        return Checked(routed, trained_gate(fit), partial(of_gate, context, around=around, fit=fit, prompt=prompt))
    except TextTooLong as error:  # behind a stack that grew during the training
        raise JobFailed("text-too-long", str(error)) from None
    except NotFinite as error:  # and would be so again
        raise JobFailed("diverged", f"behind this prompt {error}; a lower learning_rate may help") from None


def figures(
    context: Context, claim: Claim, checked: Checked, result: TrainingResult, tries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What is kept with the request."""
    return {
        **checked.report.as_dict(),
        "mode": context.settings.mode,
        "steps": result.steps,
        "stopped": result.stopped,
        "training_seconds": round(result.seconds, 3),
        "resumed_from": result.resumed_from,
        "attempt": claim.attempt,
        "earlier_tries": list(tries),
        **conditions(context.settings, context.llm),
    }


def stand_ins(
    context: Context, stack: Stack, prompt: SoftPrompt, forget: Sequence[Example], retain: Sequence[Example]
) -> list[str]:
    """Mode ``concatenate``: what stands for the forget texts in later checks, when they are destroyed."""
    prompts = [*stack.prompts, prompt]
    return make_canaries(Classifier(context.llm), prompts, forget, retain, seed=context.settings.seed)


def look_around(context: Context, commit: Commit, forget: Sequence[Example], retain: Sequence[Example]) -> Surroundings:
    """What mode ``routed`` needs beside the prompt. Raises JobFailed, NotReady, VaultError."""
    settings = context.settings
    try:
        around = surroundings(context.llm, settings, commit, forget, retain, context.retain, context.cache)
    except DatasetError as error:
        raise JobFailed("too-few-retain-rows", str(error)) from None
    except TextTooLong as error:
        raise JobFailed("text-too-long", str(error)) from None
    if around.own_recall < settings.min_forget_abstain:
        detail = (
            f"a gate that may claim {settings.max_false_claim_rate:.2%} of the retain set reaches only "
            f"{around.own_recall:.1%} of these texts, and {settings.min_forget_abstain:.1%} are needed: they "
            "have too little in common. Send fewer, on one subject, or raise LETHEON_MAX_FALSE_CLAIM_RATE"
        )
        raise JobFailed("gate-too-narrow", detail)
    return around


def check_room(context: Context, stack: Sequence[SoftPrompt], num_virtual_tokens: int) -> None:
    """Every text that the service takes must fit behind all prompts of its context. Raises JobFailed."""
    tokens = num_virtual_tokens + sum(prompt.num_virtual_tokens for prompt in stack)
    room, wanted = context.llm.text_room(tokens), context.max_text_tokens
    if room < wanted:
        detail = (
            f"behind {tokens} virtual tokens, this prompt's included, the model has room for texts of "
            f"{max(0, room)} tokens, and the service takes texts of {wanted}: revoke prompts, ask for fewer "
            "virtual tokens, or lower LETHEON_MAX_TEXT_TOKENS"
        )
        raise JobFailed("active-set-full", detail)
