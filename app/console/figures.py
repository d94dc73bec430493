"""From what the database has of a request to what a page shows: curves, bars, checks with their limits. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from app.charts import Bar, Series, bar_chart, line_chart, percent
from app.receipt_format import wilson
from app.tables import RequestEvent, UnlearnRequest

MOST_POINTS = 240
_LOSSES = (("forget", "forget_loss"), ("retain", "retain_loss"), ("KL", "kl_loss"))


@dataclass(frozen=True)
class Check:
    """A row of the table of checks. ``kept`` is None while nothing is measured."""

    what: str
    found: str | None
    limit: str
    kept: bool | None


@dataclass(frozen=True)
class Progress:
    """Where a training stands, by its last progress event. ``tried``: which training this is, from 1."""

    step: int
    total: int
    phase: str
    seconds: float
    tried: int
    abstain: float | None
    retain: float | None
    curve: str


def progress_of(events: Iterable[RequestEvent]) -> Progress | None:
    """Of the newest training of these events; None before its first step."""
    points: list[dict[str, Any]] = []
    tried = 1
    for event in events:
        if event.type != "progress":
            tried += "tried" in event.data
            continue
        if points and event.data["step"] < points[-1]["step"]:  # another training, or one taken up again
            points = [point for point in points if point["step"] < event.data["step"]]
        points.append(event.data)
    if not points:
        return None
    last = points[-1]
    return Progress(
        step=last["step"],
        total=last["total_steps"],
        phase=last["phase"],
        seconds=last["elapsed_seconds"],
        tried=tried,
        abstain=last["forget_abstain"],
        retain=last["retain_accuracy"],
        curve=_curve(points),
    )


def empty_curve() -> str:
    """As large as the one that will take its place."""
    return _curve([{"step": 0, "forget_loss": 0.0, "retain_loss": 0.0, "kl_loss": 0.0}])


def _curve(points: list[dict[str, Any]]) -> str:
    every = -(-len(points) // MOST_POINTS)
    shown = [*points[:-1:every], points[-1]]
    series = [Series(name, [(point["step"], point[key]) for point in shown]) for name, key in _LOSSES]
    return line_chart(series, title="Loss while it learns", x="step", y="loss (running mean)", begin=0)


def bars(request: UnlearnRequest) -> str:
    """Before and after, each with the limit that it had to keep; the intervals are Wilson's, at 95 %."""
    found: Mapping[str, Any] = request.metrics or {}
    limits: Mapping[str, Any] = found.get("limits") or {}

    def bar(label: str, name: str, rows: int | None, limit: float | None) -> Bar:
        after = _rate(found.get(name))
        low, high = wilson(after, rows) if after is not None and rows else (None, None)
        return Bar(label, _rate(found.get(f"{name}_before")), after, low, high, limit)

    def least(name: str, allowed: str) -> float | None:
        before = found.get(f"{name}_before")
        return None if before is None or allowed not in limits else max(0.0, before - limits[allowed])

    rows = [
        bar("texts to forget: unknown", "forget_abstain", request.num_texts, limits.get("min_forget_abstain")),
        bar(
            "nearest other texts: right",
            "neighbour_accuracy",
            found.get("neighbour_rows"),
            least("neighbour_accuracy", "max_neighbour_drop"),
        ),
        bar(
            "all other texts: right",
            "retain_accuracy",
            found.get("retain_rows"),
            least("retain_accuracy", "max_retain_drop"),
        ),
        bar("held-out texts: right", "held_out_accuracy", found.get("held_out_rows"), None),
    ]
    return bar_chart(rows, title="Before and after")


def checks(found: Mapping[str, Any], limits: Mapping[str, Any]) -> list[Check]:
    """``limits``: those that the checks had, or will have."""
    passed = found.get("passed")

    def row(what: str, value: float | None, name: str, *, least: bool = False, rate: bool = True) -> Check | None:
        if name not in limits:
            return None
        shown = percent if rate else lambda number: f"{number:.3g}"
        bound = f"{'at least' if least else 'at most'} {shown(limits[name])}"
        if value is None:
            return Check(what, None, bound, None)
        kept = value >= limits[name] - 1e-9 if least else value <= limits[name] + 1e-9
        # A class of few rows may fall by more: one row of ten is ten percent. The checks know, and they passed.
        return Check(what, shown(value), bound, kept or bool(passed))

    classes = found.get("per_class") or {}
    worst = max((figures["before"] - figures["after"] for figures in classes.values()), default=None)
    rows = [
        row("Texts to forget answered “unknown”", found.get("forget_abstain"), "min_forget_abstain", least=True),
        row("Right answers lost on all other texts", _lost(found, "retain_accuracy"), "max_retain_drop"),
        row("… in the class that lost most", None if worst is None else max(0.0, worst), "max_class_drop"),
        row("… on the texts nearest to those to forget", _lost(found, "neighbour_accuracy"), "max_neighbour_drop"),
        row("Other texts that any gate in force claims", found.get("total_claim_rate"), "max_total_claim_rate"),
        row(
            "Largest vector of the prompt, relative to a word's",
            found.get("prompt_norm"),
            "max_prompt_norm",
            rate=False,
        ),
    ]
    return [one for one in rows if one is not None]


def _rate(value: float | None) -> float | None:
    return None if value is None else min(1.0, value)  # a weighed mean of ones may come out a bit above


def _lost(found: Mapping[str, Any], name: str) -> float | None:
    before, after = found.get(f"{name}_before"), found.get(name)
    return None if before is None or after is None else max(0.0, before - after)
