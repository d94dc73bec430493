"""Probes. Neither needs a key, and neither tells more than yes or no and why."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app.deps import ServiceDep
from app.errors import NotReady
from app.problems import problems
from app.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/livez", response_model=Health)
async def livez() -> Any:
    """The process answers."""
    return {"status": "alive"}


@router.get("/readyz", response_model=Health, responses=problems(NotReady))
def readyz(service: ServiceDep) -> Any:
    """A classification would be answered now: the model thread runs and the active set can be confirmed."""
    service.serving.check()
    return {"status": "ready"}
