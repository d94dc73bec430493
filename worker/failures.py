"""How a job can end other than well."""

from __future__ import annotations

from typing import Any

import torch

from app.errors import LetheonError
from models.self_tuning import Try
from models.training import TrainingResult


class JobFailed(Exception):
    """The request cannot be met; ``code`` and ``detail`` are for the client and hold no text."""

    def __init__(self, code: str, detail: str, metrics: dict[str, Any] | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.metrics = metrics


class ChecksFailed(JobFailed):
    """A trained prompt does not do what it must; ``metrics["missed"]`` says where (``models.self_tuning.Missed``)."""

    metrics: dict[str, Any]

    def __init__(self, detail: str, metrics: dict[str, Any]) -> None:
        super().__init__("checks-failed", detail, metrics)


class Stopped(Exception):
    """The job was told to stop (shutdown, cancellation or a lost lease) before it had an outcome."""


class DeviceLost(Exception):
    """Nothing can be trained here until another process begins anew; no fault of the request's, which waits."""


class SetUnreadable(Stopped):
    """The active set, or what came with it, cannot be read: no fault of this request's, which waits."""


def last_word(error: Exception) -> JobFailed:
    """What a client learns of an error that nobody foresaw: its kind, never its message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _no_memory_on_cpu(error):
        return JobFailed("out-of-memory", "training does not fit the memory of this worker")
    if isinstance(error, LetheonError):
        return JobFailed("internal", f"{error.code}: {error.detail}")
    return JobFailed("internal", f"training broke off with {type(error).__name__}")


def record_of(plan: Try, result: TrainingResult, failed: ChecksFailed) -> dict[str, Any]:
    """What is kept of a try that failed its checks: for the client, the auditor and the next attempt."""
    config, metrics = plan.config, failed.metrics
    knobs = {name: getattr(config, name) for name in ("alpha", "beta", "num_virtual_tokens", "seed")}
    names = ("forget_abstain", "prompt_abstain", "retain_accuracy", "retain_accuracy_before")
    figures = {name: metrics[name] for name in names if name in metrics}
    return {"missed": metrics["missed"], **knobs, **figures, "steps": result.steps, "seconds": round(result.seconds, 1)}


def _no_memory_on_cpu(error: Exception) -> bool:
    """torch has no type for it there, nor has oneDNN, which says this when it cannot make its code."""
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return "can't allocate memory" in said or said == "could not create a primitive"
