"""Webhooks: signed messages about state changes, and the log of their delivery."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from app import webhooks
from app.auth import Caller, ReaderCaller
from app.deps import DeliveryCursor, DeliveryId, Limit, ServiceDep, WebhookCursor, WebhookId
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    Forbidden,
    InvalidInput,
    KeyStoreAway,
    MalformedBody,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthenticated,
)
from app.problems import UnsupportedMediaType, problems
from app.schemas_webhooks import DeliveryOut, DeliveryPage, WebhookCreated, WebhookIn, WebhookOut, WebhookPage
from app.tables import DeliveryState, Webhook

router = APIRouter(tags=["webhooks"], responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited))


def _shown(webhook: Webhook, caller: Caller) -> WebhookOut:
    found = WebhookOut.model_validate(webhook)
    return found if webhook.api_key_id == caller.key_id else found.model_copy(update={"url": None})


@router.post(
    "/webhooks",
    status_code=201,
    response_model=WebhookCreated,
    responses=problems(
        MalformedBody, Conflict, BodyTimeout, BodyTooLarge, Overloaded, KeyStoreAway, UnsupportedMediaType
    ),
)
def create_webhook(body: WebhookIn, caller: ReaderCaller, service: ServiceDep) -> Any:
    """Be told of the state changes of your requests (scope `requests`), or with `all_requests` of everybody's.

    The answer holds the signing secret, for the only time.
    """
    with service.sessions.begin() as session:
        webhook, secret = webhooks.create_webhook(
            session,
            service.vault,
            api_key_id=caller.key_id,
            scopes=caller.scopes,
            url=body.url,
            states=body.states,
            all_requests=body.all_requests,
            private=service.settings.webhook_private,
        )
    return {**_shown(webhook, caller).model_dump(), "secret": secret}


@router.get("/webhooks", response_model=WebhookPage)
def list_webhooks(caller: ReaderCaller, service: ServiceDep, limit: Limit = 50, cursor: WebhookCursor = None) -> Any:
    """Your webhooks, newest first, disabled ones included; an admin sees everybody's, without their URLs."""
    with service.sessions() as session:
        items, next_cursor = webhooks.list_webhooks(session, of=caller.owner("admin"), limit=limit, cursor=cursor)
    return {"items": [_shown(webhook, caller) for webhook in items], "next_cursor": next_cursor}


@router.get("/webhooks/{webhook_id}", response_model=WebhookOut, responses=problems(NotFound))
def get_webhook(caller: ReaderCaller, webhook_id: WebhookId, service: ServiceDep) -> Any:
    """One webhook."""
    with service.sessions() as session:
        return _shown(webhooks.get_webhook(session, webhook_id, of=caller.owner("admin")), caller)


@router.delete("/webhooks/{webhook_id}", response_model=WebhookOut, responses=problems(NotFound))
def disable_webhook(caller: ReaderCaller, webhook_id: WebhookId, service: ServiceDep) -> Any:
    """End a webhook, for good; an admin may end anybody's. What waits for it is not sent; its log stays for a while."""
    with service.sessions.begin() as session:
        webhook = webhooks.disable_webhook(session, webhook_id, of=caller.owner("admin"), actor=caller.key_id)
    return _shown(webhook, caller)


@router.get("/webhooks/{webhook_id}/deliveries", response_model=DeliveryPage, responses=problems(NotFound))
def list_webhook_deliveries(
    caller: ReaderCaller,
    webhook_id: WebhookId,
    service: ServiceDep,
    limit: Limit = 50,
    cursor: DeliveryCursor = None,
    state: Annotated[DeliveryState | None, Query()] = None,
) -> Any:
    """The messages of a webhook and how their delivery went, newest first."""
    with service.sessions() as session:
        items, next_cursor = webhooks.list_deliveries(
            session, webhook_id, of=caller.owner("admin"), limit=limit, cursor=cursor, state=state
        )
    return {"items": items, "next_cursor": next_cursor}


@router.post(
    "/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryOut,
    responses=problems(NotFound, Conflict),
)
def redeliver(caller: ReaderCaller, webhook_id: WebhookId, delivery_id: DeliveryId, service: ServiceDep) -> Any:
    """Send a message once more, whatever became of it; it keeps its id. One that waits for another attempt goes now.

    409 while it is being sent, while another message of the webhook is due, and within five seconds of the last that
    was sent to it.
    """
    with service.sessions.begin() as session:
        return webhooks.redeliver(session, webhook_id, delivery_id, of=caller.owner("admin"))


@router.post(
    "/webhooks/{webhook_id}/test",
    status_code=202,
    response_model=DeliveryOut,
    responses=problems(NotFound, Conflict),
)
def ping_webhook(caller: ReaderCaller, webhook_id: WebhookId, service: ServiceDep) -> Any:
    """Send a `ping`; its delivery says whether it arrived."""
    with service.sessions.begin() as session:
        return webhooks.ping(session, webhook_id, of=caller.owner("admin"))
