"""Probes. Neither needs a key, and neither tells more than yes or no and why."""

from __future__ import annotations

from typing import Any

from anyio import CapacityLimiter, fail_after, to_thread
from fastapi import APIRouter

from app.deps import ServiceDep
from app.errors import Busy, NotReady, Stuck
from app.problems import problems
from app.schemas import Health, Readiness

router = APIRouter(tags=["health"])
READY_SECONDS = 4.0  # less than who asks waits (Kubernetes: 5), who would hear nothing else
_probes = CapacityLimiter(2)  # threads of their own: what other routes wait for has no say in them


@router.get("/livez", response_model=Health, responses=problems(Stuck))
async def livez(service: ServiceDep) -> Any:
    """The process answers, and its model thread lives: otherwise start it anew."""
    service.serving.check_alive()
    return {"status": "alive"}


@router.get("/readyz", response_model=Readiness, responses=problems(NotReady))
async def readyz(service: ServiceDep) -> Any:
    """A classification would be answered now: the model thread runs and the active set can be confirmed.

    `degraded` names what else is broken: to take this server out of service would mend nothing.
    """
    try:
        with fail_after(READY_SECONDS):
            # A thread that is left behind waits for a second at most, but for the one that hangs in the database.
            await to_thread.run_sync(service.serving.check, limiter=_probes, abandon_on_cancel=True)
    except TimeoutError:
        raise Busy("the active set was not confirmed in time") from None
    keystore = service.vault.keystore
    return {"status": "ready", "degraded": [] if keystore is None or keystore.answers else ["key-store"]}
