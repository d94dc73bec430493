"""Metrics for Prometheus. They tell how much is asked and forgotten, so they need a key of their own scope."""

from __future__ import annotations

from functools import partial

import anyio
from fastapi import APIRouter, Request, Response

from app.auth import Credentials, presented_key
from app.deps import ServiceDep
from app.errors import Forbidden, RateLimited, Unauthenticated
from app.problems import Unavailable, problems

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(Unauthenticated, Forbidden, RateLimited, Unavailable),
    },
)
async def scrape(credentials: Credentials, service: ServiceDep, request: Request) -> Response:
    """What docs/metrics.md lists, in Prometheus' text format or, if asked for, OpenMetrics; scope `metrics`."""
    answer = partial(service.scrapes.answer, presented_key(credentials), request.headers.get("accept", ""))
    try:
        content, content_type = await anyio.to_thread.run_sync(answer, limiter=service.scrapes.threads)
    except TimeoutError:
        raise Unavailable("the database does not answer") from None
    return Response(content, headers={"Content-Type": content_type})
