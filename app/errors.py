"""Typed exceptions of the service. ``app.main`` maps them, once, to RFC 9457 problem responses.

Messages name fields, limits and ids. They never carry a forget text, a classified text, a key or a tensor.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LetheonError(Exception):
    """Base of every error a client may see: an HTTP status, a stable ``code`` and a safe ``detail``."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra  # further members of the problem object; JSON-serialisable, no texts


class InvalidInput(LetheonError):
    status, code, title = 422, "invalid-input", "The request is not valid"


class BodyTooLarge(LetheonError):
    status, code, title = 413, "body-too-large", "The request body is too large"


class MalformedBody(LetheonError):
    status, code, title = 400, "malformed-body", "The request body is not valid UTF-8 JSON"


class Unauthenticated(LetheonError):
    status, code, title = 401, "unauthenticated", "A valid API key is required"


class Forbidden(LetheonError):
    status, code, title = 403, "forbidden", "The API key lacks a scope"


class SameKey(Forbidden):
    """What takes two persons was asked for twice with one key."""

    code, title = "same-key", "Another person's API key is needed"


class ExportsOff(Forbidden):
    """The operator has not said that prompts may leave the service."""

    code, title = "exports-off", "This server does not export prompts"


class NotFound(LetheonError):
    status, code, title = 404, "not-found", "No such resource"


class Conflict(LetheonError):
    """The resource is in a state that does not allow this."""

    status, code, title = 409, "conflict", "The resource's state does not allow this"


class Overloaded(LetheonError):
    """Bounded queue full; ``extra['retry_after']`` seconds becomes the Retry-After header."""

    status, code, title = 503, "overloaded", "The server is at capacity"


class RateLimited(LetheonError):
    """Too many calls by one key; ``extra['retry_after']`` seconds becomes the Retry-After header."""

    status, code, title = 429, "rate-limited", "Too many requests"


class QuotaExceeded(LetheonError):
    """What a key may ask for in a day, or have in force, is used up; ``extra['limit']`` says how much that is."""

    status, code, title = 429, "quota-exceeded", "The quota of this API key is used up"


class IdempotencyMismatch(LetheonError):
    """The key came with another body before."""

    status, code, title = 422, "idempotency-mismatch", "The Idempotency-Key belongs to another body"


class IdempotencyInFlight(LetheonError):
    """The call that came with this key first is not done yet."""

    status, code, title = 409, "idempotency-in-flight", "The first call with this Idempotency-Key is still under way"


class HeadTooLarge(LetheonError):
    status, code, title = 431, "head-too-large", "The request line and the headers are too large"


class HeadTimeout(LetheonError):
    """A request line or headers that do not arrive."""

    status, code, title = 408, "head-timeout", "The request took too long"


class BodyTimeout(LetheonError):
    """A body that does not arrive."""

    status, code, title = 408, "body-timeout", "The request body took too long"


class ClientGone(LetheonError):
    """Nobody is left to hear the answer; the status is for the log, as nginx has it."""

    status, code, title = 499, "client-gone", "The client closed the connection"


class DeadlineExceeded(LetheonError):
    """No answer within the time that the client or the server allows for one."""

    status, code, title = 503, "deadline-exceeded", "No answer in time"


class NotReady(LetheonError):
    """Fail closed: the active set cannot be confirmed or a prompt does not load. Never serve unprompted."""

    status, code, title = 503, "not-ready", "The active set cannot be confirmed"


class Busy(NotReady):
    """Not ready for now, and a new process would be no more so."""


class KeyStoreAway(NotReady):
    """The key store does not answer: nothing can be sealed, and nothing opened that is not in memory yet."""

    code, title = "keystore-away", "The key store does not answer"


class Stuck(LetheonError):
    """The model thread is gone or does not come back, or its device is lost: only a new process helps."""

    status, code, title = 503, "stuck", "The model thread does not run"


class ModeMismatch(NotReady):
    """A prompt in force was trained for another mode than the service runs in."""

    status, code, title = 503, "mode-mismatch", "A prompt in force is of another mode"


class VaultError(LetheonError):
    """A sealed value cannot be opened: wrong master key, shredded key, or altered data."""

    status, code, title = 500, "vault", "Sealed data cannot be opened"


class KeyDestroyed(VaultError):
    """What it sealed was shredded, and is gone for good."""


class ShareMissing(VaultError):
    """The key store has never heard of the share, or there is no key store: nothing says that it was shredded."""


class WrongMasterKey(VaultError):
    """None of the master keys opens the wrapped key, or it was altered, or its share was."""


class LeaseLost(LetheonError):
    """The caller no longer holds the request (lease expired, another attempt runs, or it ended)."""

    status, code, title = 409, "lease-lost", "The training lease was lost"


class StaleActiveSet(LetheonError):
    """The active set changed since the prompt was checked; check again, then activate."""

    status, code, title = 409, "stale-active-set", "The active set has changed"


class MissingExtra(LetheonError):
    """A setting asks for something whose packages are an optional extra that is not installed."""

    status, code, title = 500, "missing-extra", "An optional package is not installed"
