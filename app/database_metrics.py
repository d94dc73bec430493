"""What the database tells Prometheus: the queue of requests, the trainings under way, the prompts, the webhooks.

Every replica reads the same rows, so a query over several takes the ``max``, never the ``sum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import ColumnElement, case, func, select, text
from sqlalchemy.orm import Session

from app.tables import (
    OPEN,
    RUNNING,
    ActiveSet,
    DeliveryState,
    Evidence,
    PendingShred,
    Prompt,
    PromptState,
    RequestState,
    UnlearnRequest,
    WebhookDelivery,
)

STATEMENT_MILLISECONDS = 2000
DUE_SOON = timedelta(days=7)


@dataclass(frozen=True)
class Seen:
    """One reading. ``…_seconds`` are ages, None where there is nothing to have one."""

    requests: Mapping[str, int]
    prompts: Mapping[str, int]
    version: int | None
    attempts: int
    lease_expiries: int
    pending_seconds: float | None
    open_seconds: float | None
    lease_left: float | None  # of the running training that has the least left; below 0: nobody renews it
    step_seconds: float | None
    steps_done: int
    steps_planned: int
    deliveries: Mapping[str, int]
    overdue_seconds: float | None
    overdue: int = 0
    due_soon: int = 0
    shred_seconds: float | None = None  # what is to be destroyed: since when, at the longest
    evidence: Mapping[str, int] = field(default_factory=dict)


def observe(session: Session, now: datetime) -> Seen:
    """Four grouped queries and two rows; begins the transaction, which must be a new one, and only reads."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SET TRANSACTION READ ONLY"))
        session.execute(text(f"SET LOCAL statement_timeout = {STATEMENT_MILLISECONDS}"))
    row = UnlearnRequest

    def running_steps(name: str) -> ColumnElement[int]:
        # Case by case: the JSON of the many requests that have ended is not parsed.
        return func.coalesce(func.sum(case((row.state.in_(RUNNING), row.progress[name].as_integer()))), 0)

    rows = session.execute(
        select(
            row.state,
            func.count().label("requests"),
            func.min(row.created_at).label("created_at"),
            func.min(row.updated_at).label("updated_at"),
            func.coalesce(func.sum(row.attempt), 0).label("attempts"),
            func.coalesce(func.sum(row.lease_expiries), 0).label("lease_expiries"),
            func.min(row.lease_expires_at).label("lease_expires_at"),
            func.min(func.coalesce(row.last_step_at, row.started_at)).label("last_step_at"),
            func.coalesce(func.sum(case((row.due_at <= now, 1))), 0).label("overdue"),
            func.coalesce(func.sum(case((row.due_at <= now + DUE_SOON, 1))), 0).label("due"),
            func.min(case((row.shred_at <= now, row.shred_at))).label("shred_at"),
            running_steps("step").label("done"),
            running_steps("total_steps").label("planned"),
        ).group_by(row.state)
    ).all()
    states = {found.state: found for found in rows}
    running = [states[state] for state in RUNNING if state in states]
    unfinished = [states[state] for state in OPEN if state in states]
    pending = states.get(RequestState.PENDING)
    counted = session.execute(select(Prompt.state, func.count()).group_by(Prompt.state))
    prompts: dict[str, int] = dict(counted.all())

    message = WebhookDelivery
    sent = session.execute(select(message.state, func.count(), func.min(message.next_at)).group_by(message.state)).all()
    deliveries = {found[0]: found[1] for found in sent}

    to_shred = [session.scalar(select(func.min(PendingShred.at))), *(found.shred_at for found in rows)]

    absent = Evidence.sealed.is_(None)
    made: dict[bool, int] = {bool(a): n for a, n in session.execute(select(absent, func.count()).group_by(absent))}

    def ago(moment: datetime | None) -> float | None:
        return None if moment is None else max(0.0, (now - moment).total_seconds())

    lease = min((found.lease_expires_at for found in running if found.lease_expires_at is not None), default=None)
    return Seen(
        requests={state.value: states[state].requests if state in states else 0 for state in RequestState},
        prompts={state.value: prompts.get(state, 0) for state in PromptState},
        version=session.scalar(select(ActiveSet.version)),
        attempts=sum(found.attempts for found in rows),
        lease_expiries=sum(found.lease_expiries for found in rows),
        # A row that waits is not touched, so it was last changed when it began to wait.
        pending_seconds=ago(pending.updated_at if pending else None),
        open_seconds=ago(min((found.created_at for found in unfinished), default=None)),
        lease_left=None if lease is None else (lease - now).total_seconds(),
        step_seconds=ago(min((found.last_step_at for found in running), default=None)),
        steps_done=sum(found.done for found in running),
        steps_planned=sum(found.planned for found in running),
        deliveries={state.value: deliveries.get(state, 0) for state in DeliveryState},
        overdue_seconds=ago(min((found[2] for found in sent if found[2] is not None), default=None)),
        overdue=sum(found.overdue for found in unfinished),
        due_soon=sum(found.due - found.overdue for found in unfinished),
        shred_seconds=ago(min((moment for moment in to_shred if moment is not None), default=None)),
        evidence={"kept": made.get(False, 0), "absent": made.get(True, 0)},
    )


_GAUGES: tuple[tuple[str, str, Callable[[Seen], float | None]], ...] = (
    (
        "letheon_requests_pending_oldest_seconds",
        "How long the request that waits longest has waited for a worker; 0 when none waits.",
        lambda seen: seen.pending_seconds or 0.0,
    ),
    (
        "letheon_requests_open_oldest_seconds",
        "Age of the oldest request that is neither active nor ended; 0 when there is none.",
        lambda seen: seen.open_seconds or 0.0,
    ),
    (
        "letheon_requests_overdue",
        "Requests past their deadline that are neither active nor ended.",
        lambda seen: seen.overdue,
    ),
    (
        "letheon_requests_due_soon",
        "Requests whose deadline is within seven days and that are neither active nor ended.",
        lambda seen: seen.due_soon,
    ),
    (
        "letheon_shredding_overdue_seconds",
        "How long texts have outlived their time, or a key share its shredding, at the longest; 0 when none has.",
        lambda seen: seen.shred_seconds or 0.0,
    ),
    (
        "letheon_requests_attempts",
        "Attempts of all requests together; one that a worker handed back when it stopped does not count.",
        lambda seen: seen.attempts,
    ),
    (
        "letheon_training_lease_left_seconds",
        "What is left of the lease that ends first; below 0 its worker is gone. Absent when nothing trains.",
        lambda seen: seen.lease_left,
    ),
    (
        "letheon_training_step_age_seconds",
        "Time since the training that is silent longest reported progress. Absent when nothing trains.",
        lambda seen: seen.step_seconds,
    ),
    (
        "letheon_training_steps_done",
        "Steps done by the trainings under way, together.",
        lambda seen: seen.steps_done,
    ),
    (
        "letheon_training_steps_planned",
        "Steps planned by the trainings under way, together; the last ones may not be needed.",
        lambda seen: seen.steps_planned,
    ),
    (
        "letheon_webhook_overdue_seconds",
        "How long the webhook message that is due longest has been due; 0 when none is.",
        lambda seen: seen.overdue_seconds or 0.0,
    ),
    (
        "letheon_database_active_set_version",
        "The active set that the database names.",
        lambda seen: seen.version,
    ),
)


def families(seen: Seen | None) -> Iterator[Metric]:
    """The metrics of a reading. None: the database did not answer; then each family is there, without a value."""
    yield GaugeMetricFamily(
        "letheon_database_up", "1 when the database answered this scrape, else 0.", value=float(seen is not None)
    )
    requests = GaugeMetricFamily("letheon_requests", "Unlearn requests by state.", labels=["state"])
    prompts = GaugeMetricFamily("letheon_prompts", "Prompts by state.", labels=["state"])
    deliveries = GaugeMetricFamily(
        "letheon_webhook_deliveries", "Messages to webhooks in the log, by state.", labels=["state"]
    )
    evidence = GaugeMetricFamily(
        "letheon_evidence",
        "Requests by whether their evidence is kept, or absent because it could not be made.",
        labels=["state"],
    )
    expiries = CounterMetricFamily(
        "letheon_lease_expiries",
        "Attempts that ended because nobody renewed their lease: the worker was lost, or broke off.",
    )
    gauges = [(GaugeMetricFamily(name, documentation), read) for name, documentation, read in _GAUGES]
    if seen is not None:
        for state, count in seen.requests.items():
            requests.add_metric([state], count)
        for state, count in seen.prompts.items():
            prompts.add_metric([state], count)
        for state, count in seen.deliveries.items():
            deliveries.add_metric([state], count)
        for state, count in seen.evidence.items():
            evidence.add_metric([state], count)
        expiries.add_metric([], seen.lease_expiries)
        for family, read in gauges:
            value = read(seen)
            if value is not None:
                family.add_metric([], value)
    yield from (requests, prompts, deliveries, evidence, expiries, *(family for family, _ in gauges))
