"""Whether a webhook's message is the server's: Standard Webhooks (https://www.standardwebhooks.com), version 1."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from letheon_client.errors import InvalidArgument, InvalidWebhook

_AS_SENT = ("utf-8", "surrogateescape")  # some servers hand on bytes that are no text so
_PREFIX = "whsec_"
_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


@dataclass(frozen=True)
class WebhookMessage:
    """What a webhook was told. ``id``: the same where the message comes again, so drop what you have seen."""

    id: str
    type: str  # "request.<state>" | "ping"
    timestamp: str
    data: dict[str, Any]


def verify_webhook(
    secret: str | Sequence[str], headers: Mapping[str, str], body: bytes, *, tolerance: float = 300.0
) -> WebhookMessage:
    """The message, where one of the secrets has signed it and that was within ``tolerance`` seconds of now.

    ``headers`` may have their names in any case; ``body`` is what came, byte for byte, before anybody parsed it. Raises
    InvalidWebhook for what is not to be believed, InvalidArgument for a secret or a body that cannot be one.
    """
    if not isinstance(body, bytes):
        raise InvalidArgument("body must be the bytes that came, not what was made of them")
    keys = [_key(one) for one in ([secret] if isinstance(secret, str) else secret)]
    if not keys or not tolerance >= 0:
        raise InvalidArgument("it takes a secret, and a tolerance of no less than 0 seconds")
    found = {name.lower(): value for name, value in headers.items() if name.lower() in _HEADERS}
    if len(found) < len(_HEADERS):
        raise InvalidWebhook("a header of a signed message is missing")
    message_id, sent_at, signatures = (found[name] for name in _HEADERS)
    if not (sent_at.isascii() and sent_at.isdecimal()):
        raise InvalidWebhook("the time of the message is none")
    signed = f"{message_id}.{sent_at}.".encode(*_AS_SENT) + body
    wanted = [b"v1," + base64.b64encode(hmac.digest(key, signed, sha256)) for key in keys]
    given = [signature.encode(*_AS_SENT) for signature in signatures.split(" ")]
    # All with all: how long it takes says nothing of which one it was.
    if not sum(hmac.compare_digest(one, other) for one in wanted for other in given):
        raise InvalidWebhook("no signature of the message is one of this secret")
    if abs(time.time() - int(sent_at)) > tolerance:
        raise InvalidWebhook("the message was signed too long ago, or a clock is wrong")
    try:
        said = json.loads(body)
        return WebhookMessage(message_id, said["type"], said["timestamp"], said["data"])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InvalidWebhook("the message is signed, and no message of a webhook") from None


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not key:
        raise InvalidArgument(f"a webhook's secret is {_PREFIX} and base64")  # and not a word of what it was
    return key
