"""From the settings to what the checks take, and to what is kept beside their figures."""

from __future__ import annotations

from typing import Any

from app.settings import Mode, Settings
from models.evaluation import CheckLimits
from models.llm import FrozenLLM


def check_limits(settings: Settings) -> CheckLimits:
    return CheckLimits(
        settings.min_forget_abstain,
        settings.max_retain_drop,
        settings.max_class_drop,
        settings.max_neighbour_drop,
        settings.max_prompt_norm,
    )


def conditions(settings: Settings, llm: FrozenLLM) -> dict[str, Any]:
    """What figures were found with, kept beside them: a receipt must not depend on the settings of a later day."""
    names = ("base", "adapter", "quantization", "dtype", "template")
    limits = ["min_forget_abstain", "max_retain_drop", "max_class_drop", "max_neighbour_drop", "max_prompt_norm"]
    if settings.mode == Mode.ROUTED:
        limits += ["max_false_claim_rate", "max_certain_claim_rate", "max_total_claim_rate"]
    words = {"labels": settings.labels, "generic_labels": settings.generic_labels}
    return {
        "identity": {**{name: llm.identity[name] for name in names}, **words},
        "limits": {name: getattr(settings, name) for name in limits},
    }
