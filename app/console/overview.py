"""The first page: what is in force, what is owed by when, what is asked, and whether all is well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from app import active_set, request_counts
from app.auth import Caller
from app.charts import Series, line_chart
from app.console.access import AnyCaller
from app.console.pages import render
from app.console.requests import SHOWS
from app.deps import Service, ServiceDep
from app.errors import LetheonError
from app.keys import READS_ALL
from app.recent import BUCKET_SECONDS, Bucket
from app.tables import OPEN, RUNNING, PromptState, utcnow
from app.words import STATES

router = APIRouter()

DEADLINES = 6
MINUTE = round(60 / BUCKET_SECONDS)


@dataclass(frozen=True)
class Traffic:
    """Of this replica: texts per second and the share answered `unknown` over the last minute.

    ``picture``: of the last five; None where nothing was asked.
    """

    per_second: float
    unknown: float | None
    picture: str | None


@router.get("/")
def overview(request: Request, caller: AnyCaller, service: ServiceDep) -> Any:
    """Whoever has a key sees it; figures on everybody's requests only who may list those or scrape metrics."""
    owner = caller.owner(*READS_ALL)
    with service.sessions() as session:
        view = active_set.read_active_set(session)
        reads_requests = caller.may("requests", *READS_ALL)
        counts = request_counts.count_requests(session, owner=owner) if reads_requests else {}
        owed = request_counts.list_deadlines(session, limit=DEADLINES, owner=owner) if reads_requests else []
        prompts = request_counts.count_prompts(session) if caller.may("auditor", "admin") else None
    return render(
        request.scope,
        "overview.html",
        caller=caller,
        view=view,
        prompts=prompts,
        in_force=None if prompts is None else prompts[PromptState.ACTIVE],
        states=[(state, words, counts[state], SHOWS.get(state)) for state, words in STATES.items() if state in counts],
        waiting=sum(counts.get(state, 0) for state in OPEN),
        running=sum(counts.get(state, 0) for state in RUNNING),
        owed=owed,
        overdue=sum(row.due_at is not None and row.due_at <= utcnow() for row in owed),
        everybody=owner is None,
        reads_requests=reads_requests,
        traffic=_traffic(service, caller),
        health=_health(service),
        words=STATES,
    )


def _health(service: Service) -> str | None:
    """Why no classification would be answered now; None when one would, as /readyz has it."""
    try:
        service.serving.check()
    except LetheonError as error:
        return error.detail
    return None


def _traffic(service: Service, caller: Caller) -> Traffic | None:
    if not caller.may("metrics"):
        return None
    buckets = service.metrics.recent.read()
    last = buckets[-MINUTE:]
    texts, unknown = sum(b.texts for b in last), sum(b.unknown for b in last)
    return Traffic(
        per_second=texts / 60,
        unknown=unknown / texts if texts else None,
        picture=_picture(buckets) if any(b.texts for b in buckets) else None,
    )


def _picture(buckets: list[Bucket]) -> str:
    def points(values: list[int]) -> list[tuple[float, float]]:
        ends = [(i + 1 - len(values)) * BUCKET_SECONDS / 60 for i in range(len(values))]
        return [(at, value / BUCKET_SECONDS) for at, value in zip(ends, values, strict=True)]

    series = [
        Series("answered", points([b.texts for b in buckets])),
        Series("of these “unknown”, for a request", points([b.unknown for b in buckets])),
    ]
    return line_chart(series, title="Texts per second, this replica", x="minutes", y="texts per second")
