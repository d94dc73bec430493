"""What routes are given: the parts of the running service, as ``Annotated`` dependencies.

No dependency hands out an open session. A route opens its own, so that its transaction is committed (or rolled back)
before the response is made; code behind a dependency's ``yield`` runs after the response was sent.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Path, Query, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from app.dry_run import DryRuns
from app.errors import NotFound
from app.event_streams import EventStreams
from app.key_lookups import KeyLookups
from app.key_uses import KeyUses
from app.metrics import Metrics
from app.rate_limits import RateLimits
from app.scrape import Scrapes
from app.serving import Serving
from app.settings import Settings
from app.vault import Vault


@dataclass(frozen=True)
class Service:
    """Everything that lives from start to shutdown."""

    settings: Settings
    engine: Engine
    readers: Engine  # for keys and the active set alone
    sessions: sessionmaker[Session]
    vault: Vault
    celery: Celery
    serving: Serving
    metrics: Metrics
    scrapes: Scrapes
    rates: RateLimits
    streams: EventStreams
    key_uses: KeyUses
    key_lookups: KeyLookups
    dry_runs: DryRuns
    stopping: asyncio.Event  # set when the server begins to shut down: event streams end


async def get_service(request: Request) -> Service:  # async: FastAPI would send anything else to a thread
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]

_ID = re.compile(r"[a-z]{3}_[0-9a-f]{28}")


def _known_form(resource_id: str) -> str:
    # PostgreSQL refuses a NUL in a parameter, so nothing but an id's own form reaches the database.
    if not _ID.fullmatch(resource_id):
        raise NotFound("there is nothing with this id")
    return resource_id


def _request_id(request_id: Annotated[str, Path(examples=["req_019aa5b0c2d41f2e3d4c5b6a7988"])]) -> str:
    return _known_form(request_id)


def _prompt_id(prompt_id: Annotated[str, Path(examples=["prm_019aa5b0c2d41f2e3d4c5b6a7988"])]) -> str:
    return _known_form(prompt_id)


def _webhook_id(webhook_id: Annotated[str, Path(examples=["whk_019aa5b0c2d41f2e3d4c5b6a7988"])]) -> str:
    return _known_form(webhook_id)


def _delivery_id(delivery_id: Annotated[str, Path(examples=["dlv_019aa5b0c2d41f2e3d4c5b6a7988"])]) -> str:
    return _known_form(delivery_id)


RequestId = Annotated[str, Depends(_request_id)]
PromptId = Annotated[str, Depends(_prompt_id)]
WebhookId = Annotated[str, Depends(_webhook_id)]
DeliveryId = Annotated[str, Depends(_delivery_id)]
Limit = Annotated[int, Query(ge=1, le=200, description="Items per page.")]
# PostgreSQL refuses a NUL in a parameter; the floor checks the rest.
RequestCursor = Annotated[
    str | None, Query(pattern=r"^req_[0-9a-f]{28}$", description="`next_cursor` of the page before.")
]
PromptCursor = Annotated[
    str | None, Query(pattern=r"^prm_[0-9a-f]{28}$", description="`next_cursor` of the page before.")
]
WebhookCursor = Annotated[
    str | None, Query(pattern=r"^whk_[0-9a-f]{28}$", description="`next_cursor` of the page before.")
]
DeliveryCursor = Annotated[
    str | None, Query(pattern=r"^dlv_[0-9a-f]{28}$", description="`next_cursor` of the page before.")
]
