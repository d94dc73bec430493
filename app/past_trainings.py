"""What trainings have taken so far: the only honest basis of an estimate of the next one."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.tables import UnlearnRequest

NEWEST = 50


@dataclass(frozen=True)
class Pace:
    """``seconds`` of a step: the median of so many ``trainings``. ``steps``: the median of what they took in all."""

    seconds: float
    steps: int
    trainings: int


def read_pace(session: Session, *, fingerprint: str, mode: str) -> Pace | None:
    """Of this model's newest trainings in this mode, whether they came into force or not; None: there are none."""
    query = (
        select(UnlearnRequest.metrics)
        .where(UnlearnRequest.fingerprint == fingerprint, UnlearnRequest.finished_at.is_not(None))
        .order_by(UnlearnRequest.id.desc())
        .limit(NEWEST)
    )
    paces, steps = [], []
    for metrics in session.scalars(query):
        if not metrics or metrics.get("mode") != mode:
            continue
        own = metrics.get("steps", 0) - metrics.get("resumed_from", 0)  # the seconds are those of the last attempt
        seconds = metrics.get("training_seconds", 0.0)
        if own > 0 and seconds > 0:
            paces.append(seconds / own)
            steps.append(metrics["steps"])
    return Pace(statistics.median(paces), int(statistics.median(steps)), len(paces)) if paces else None
