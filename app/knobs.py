"""From the settings to what a training takes: the worker trains with it, a dry run counts with it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from app.settings import Mode, Settings
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
