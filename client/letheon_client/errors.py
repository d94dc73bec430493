"""What the client raises. No message and no repr holds a text, a key or a body that was sent."""

from __future__ import annotations

from collections.abc import Sequence

from letheon_client.types import FieldError, Problem, UnlearnRequest


class LetheonClientError(Exception):
    """Base of all errors of this package."""


class InvalidArgument(LetheonClientError, ValueError):
    """Refused before anything was sent."""


class InvalidAddress(InvalidArgument):
    """No plain http(s) URL, or one that carries a password."""


class Unreachable(LetheonClientError):
    """No server answers, or the connection broke. ``sent``: whether a server may have got the call and acted on it."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ApiError(LetheonClientError):
    """The server answered with a problem (RFC 9457); its ``code`` is stable, ``errors`` say which fields are wrong.

    ``retry_after``: seconds after which it may be otherwise. ``problem``: the whole object, None where it was not
    Letheon that answered. ``request_id``: what the server's log has it under.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
        request_id: str | None = None,
        problem: Problem | None = None,
    ) -> None:
        super().__init__(f"{code} ({status}): {detail}")
        self.detail = detail
        self.status = status
        self.code = code
        self.errors = errors
        self.retry_after = retry_after
        self.request_id = request_id
        self.problem = problem


class BadRequest(ApiError):
    """The call itself is wrong: the same one again will be refused again."""


class Unauthenticated(ApiError):
    """No API key, or one that is not in force."""


class Forbidden(ApiError):
    """The API key lacks a scope, or it takes another person's key."""


class NotFound(ApiError):
    """There is nothing with this id, or it is another key's."""


class Conflict(ApiError):
    """The resource's state does not allow this."""


class RateLimited(ApiError):
    """Too many calls; they were tried again as far as ``Retry`` allows."""


class QuotaExceeded(ApiError):
    """What the key may ask for in a day, or have in force, is used up."""


class Unavailable(ApiError):
    """The server cannot answer now; ``not-ready`` means that it fails closed."""


class ServerError(ApiError):
    """Something is broken on the server."""


class ForeignAnswer(ApiError):
    """Something answered, and not as Letheon does; redirects too, which are not followed: the key is not for others."""

    def __init__(self, *, status: int) -> None:
        super().__init__("the answer is not Letheon's: is the address right?", status=status, code="foreign")


class RequestFailed(LetheonClientError):
    """``wait(check=True)``: the request ended, or stands, otherwise than ``active``; ``request`` says how and why."""

    def __init__(self, request: UnlearnRequest) -> None:
        failure = request["failure"]
        why = f": {failure['code']}: {failure['detail']}" if failure else ""
        super().__init__(f"{request['id']} is {request['state']}{why}")
        self.request = request


class WaitTimedOut(LetheonClientError, TimeoutError):
    """``wait(timeout_seconds=…)``: it goes on, and ``request`` is how it stood last."""

    def __init__(self, request: UnlearnRequest) -> None:
        super().__init__(f"{request['id']} is still {request['state']}")
        self.request = request


class InvalidWebhook(LetheonClientError, ValueError):
    """``verify_webhook``: not signed with this secret, or too old. Answer 4xx, and believe none of it."""


CODES: dict[str, type[ApiError]] = {
    "malformed-body": BadRequest,
    "body-timeout": BadRequest,
    "body-too-large": BadRequest,
    "unsupported-media-type": BadRequest,
    "invalid-input": BadRequest,
    "idempotency-mismatch": BadRequest,
    "unauthenticated": Unauthenticated,
    "forbidden": Forbidden,
    "exports-off": Forbidden,
    "same-key": Forbidden,
    "not-found": NotFound,
    "conflict": Conflict,
    "idempotency-in-flight": Conflict,
    "rate-limited": RateLimited,
    "quota-exceeded": QuotaExceeded,
    "overloaded": Unavailable,
    "deadline-exceeded": Unavailable,
    "keystore-away": Unavailable,
    "not-ready": Unavailable,
    "stuck": Unavailable,
    "unavailable": Unavailable,
    "audit-broken": ServerError,
}
"""Every code in the server's OpenAPI document."""

_STATUSES: dict[int, type[ApiError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def error_class(status: int, code: str) -> type[ApiError]:
    """By the code; by the status where a proxy or a newer server has one that is not known here."""
    return CODES.get(code) or _STATUSES.get(status) or (ServerError if status >= 500 else BadRequest)
