"""From the settings to what training and checks take."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from app.settings import Mode, Settings
from models.evaluation import CheckLimits
from models.surroundings import ROUTED_TRAINING
from models.training import TrainingConfig


def training_config(settings: Settings, options: dict[str, Any]) -> TrainingConfig:
    """The mode's defaults, then the settings' knobs, then those of the request's options that are the training's."""
    names = {f.name for f in fields(TrainingConfig)}
    knobs = {name: getattr(settings, name) for name in names if getattr(settings, name, None) is not None}
    knobs |= {name: value for name, value in options.items() if name in names and value is not None}
    return replace(ROUTED_TRAINING if settings.mode == Mode.ROUTED else TrainingConfig(), **knobs)


def check_limits(settings: Settings) -> CheckLimits:
    return CheckLimits(settings.min_forget_abstain, settings.max_retain_drop, settings.max_class_drop)
