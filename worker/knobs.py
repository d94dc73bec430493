"""From the settings to what training and checks take."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from app.settings import Mode, Settings
from models.evaluation import CheckLimits
from models.llm import FrozenLLM
from models.surroundings import MIXED_EPOCHS, ROUTED_TRAINING
from models.training import TrainingConfig


def training_config(settings: Settings, options: dict[str, Any], *, subjects: int = 1) -> TrainingConfig:
    """The mode's defaults, then the settings' knobs, then those of the request's options that are the training's.

    ``subjects``: what the forget texts are on, as their gate has it; a mixed request trains longer.
    """
    default = TrainingConfig()
    if settings.mode == Mode.ROUTED:
        default = ROUTED_TRAINING if subjects == 1 else replace(ROUTED_TRAINING, min_epochs=MIXED_EPOCHS)
    names = {f.name for f in fields(TrainingConfig)}
    knobs = {name: getattr(settings, name) for name in names if getattr(settings, name, None) is not None}
    knobs |= {name: value for name, value in options.items() if name in names and value is not None}
    return replace(default, **knobs)


def check_limits(settings: Settings) -> CheckLimits:
    return CheckLimits(settings.min_forget_abstain, settings.max_retain_drop, settings.max_class_drop)


def conditions(settings: Settings, llm: FrozenLLM) -> dict[str, Any]:
    """What figures were found with, kept beside them: a receipt must not depend on the settings of a later day."""
    names = ("base", "adapter", "quantization", "dtype", "template")
    limits = ["min_forget_abstain", "max_retain_drop", "max_class_drop"]
    if settings.mode == Mode.ROUTED:
        limits += ["max_false_claim_rate", "max_certain_claim_rate", "max_total_claim_rate"]
    words = {"labels": settings.labels, "generic_labels": settings.generic_labels}
    return {
        "identity": {**{name: llm.identity[name] for name in names}, **words},
        "limits": {name: getattr(settings, name) for name in limits},
    }
