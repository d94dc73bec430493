"""What an entry of the audit log states of the rows that it tells of, so that these can be held against it.

All of it is ids, digests, counts and times, and stands in the entry alone: events and messages to clients lack it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from app.audit_chain import iso
from app.tables import Prompt, UnlearnRequest

CREATED = (
    "created_at",
    "received_at",
    "due_at",
    "expires_at",
    "approval_required",
    "fingerprint",
    "set_digest",
    "texts_digest",
    "options_digest",
)
"""Of a request, from its first entry on; none of it changes, but that an approval may be required later."""
ACTIVATED = ("mode", "fingerprint", "num_virtual_tokens", "hidden_size", "gate_digest", "gate_space")
"""Of a prompt, beside its own digest, from its activation on."""


def json_digest(value: Any) -> str | None:
    """SHA-256 of a JSON value in its one spelling, as it is read back from any database; None of None.

    Not ``signing.canonical``: SQLite keeps a figure that is no number, and that is no reason to refuse a change.
    """
    if value is None:
        return None
    plain = json.loads(json.dumps(value))  # as it is read back: lists for tuples, and names are strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def texts_digest(digests: Iterable[bytes]) -> bytes:
    """Over the keyed digests of the texts, in order, so nobody without the key can try texts against it."""
    # In order here: a database may order bytes in ways of its own.
    return hashlib.sha256(b"letheon set v1\0" + b"".join(sorted(digests))).digest()


def of_request(request: UnlearnRequest, digests: Iterable[bytes]) -> dict[str, Any]:
    """``CREATED``. ``digests``: the keyed ones of its texts."""
    return {
        "created_at": iso(request.created_at),
        "received_at": time_or_none(request.received_at),
        "due_at": time_or_none(request.due_at),
        "expires_at": time_or_none(request.expires_at),
        "approval_required": request.approval_required,
        "fingerprint": request.fingerprint,
        "set_digest": request.set_digest.hex() if request.set_digest else None,
        "texts_digest": texts_digest(digests).hex(),
        "options_digest": json_digest(request.options),
    }


def of_prompt(prompt: Prompt) -> dict[str, Any]:
    """``ACTIVATED``, and the digest of the figures that it was activated with."""
    return {**{name: getattr(prompt, name) for name in ACTIVATED}, "metrics_digest": json_digest(prompt.metrics)}


def key_digest(name: str, secret_digest: bytes, created_at: datetime) -> str | None:
    """Of what makes an API key that one, its name included; scopes, limits and times stand in its entry as they are."""
    return json_digest({"created_at": iso(created_at), "name": name, "secret_digest": secret_digest.hex()})


def time_or_none(at: datetime | None) -> str | None:
    return None if at is None else iso(at)
