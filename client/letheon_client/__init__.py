"""Typed client of Letheon: ``Letheon`` and, for asyncio, ``AsyncLetheon``, with the same methods."""

from letheon_client._async_client import AsyncLetheon
from letheon_client._client import Letheon
from letheon_client._retries import ONCE, Retry
from letheon_client._version import __version__
from letheon_client._waiting import FINAL_STATES
from letheon_client._webhooks import WebhookMessage, verify_webhook
from letheon_client.errors import (
    CODES,
    ApiError,
    BadRequest,
    Conflict,
    Forbidden,
    ForeignAnswer,
    InvalidAddress,
    InvalidArgument,
    InvalidWebhook,
    LetheonClientError,
    NotFound,
    QuotaExceeded,
    RateLimited,
    RequestFailed,
    ServerError,
    Unauthenticated,
    Unavailable,
    Unreachable,
    WaitTimedOut,
)
from letheon_client.types import Event, ForgetText, TrainingOptions

__all__ = [
    "CODES",
    "FINAL_STATES",
    "ONCE",
    "ApiError",
    "AsyncLetheon",
    "BadRequest",
    "Conflict",
    "Event",
    "Forbidden",
    "ForeignAnswer",
    "ForgetText",
    "InvalidAddress",
    "InvalidArgument",
    "InvalidWebhook",
    "Letheon",
    "LetheonClientError",
    "NotFound",
    "QuotaExceeded",
    "RateLimited",
    "RequestFailed",
    "Retry",
    "ServerError",
    "TrainingOptions",
    "Unauthenticated",
    "Unavailable",
    "Unreachable",
    "WaitTimedOut",
    "WebhookMessage",
    "__version__",
    "verify_webhook",
]
