"""Webhooks and the log of their deliveries, as they go over the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from app.schemas import Body, FewEntries, Row
from app.tables import DeliveryState, RequestState
from app.webhook_urls import MAX_URL


class WebhookIn(Body):
    """Where to, and of what."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"url": "https://example.com/letheon", "states": ["active", "failed"]}]}
    )

    url: str = Field(
        max_length=MAX_URL,
        description="`https://`, of a public address. Only its owner sees it again.",
        json_schema_extra={"format": "uri"},
    )
    states: Annotated[list[Annotated[RequestState, Field(strict=False)]], FewEntries] = Field(
        default=[], max_length=len(RequestState), description="Tell of these states only; empty: of all."
    )
    all_requests: bool = Field(
        default=False, description="Tell of everybody's requests; needs the scope `admin`, `auditor` or `approve`."
    )


class WebhookOut(Row):
    """A webhook as it stands, without its secret."""

    id: str
    api_key_id: str
    url: str | None = Field(description="Null for all but its owner: a URL may hold a secret of its receiver.")
    states: list[RequestState]
    all_requests: bool
    created_at: datetime
    disabled_at: datetime | None


class WebhookCreated(WebhookOut):
    """The new webhook, and what its messages are signed with."""

    secret: str = Field(description="`whsec_…`. Shown only now.")


class WebhookPage(BaseModel):
    items: list[WebhookOut]
    next_cursor: str | None = Field(description="Ask again with this as `cursor`; null on the last page.")


class DeliveryOut(Row):
    """One message, and how its delivery went."""

    id: str = Field(description="The `webhook-id` header of every attempt.")
    webhook_id: str
    request_id: str | None = Field(description="Null for a ping.")
    state: DeliveryState
    attempts: int
    next_at: datetime | None = Field(
        description="When it is tried next or, while it is sent, when its sender counts as lost; else null."
    )
    created_at: datetime
    delivered_at: datetime | None
    last_status: int | None = Field(description="What the receiver answered last.")
    last_error: str | None = Field(description="A kind: `status`, `timeout`, `name`, `address`, `tls`, …")
    payload: dict[str, Any] = Field(description="The body that is sent, as JSON.")


class DeliveryPage(BaseModel):
    items: list[DeliveryOut]
    next_cursor: str | None = Field(description="Ask again with this as `cursor`; null on the last page.")
