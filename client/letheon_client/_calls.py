"""What goes over the wire and how an answer is read: pure functions, shared by both clients."""

from __future__ import annotations

import ipaddress
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx2

from letheon_client._version import __version__
from letheon_client.errors import (
    ApiError,
    ForeignAnswer,
    InvalidAddress,
    InvalidArgument,
    Unreachable,
    error_class,
)
from letheon_client.types import FieldError, ForgetText, RequestFilter, Submitted

T = TypeVar("T")

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # an event stream sends a comment every 15 s, so this much silence is a dead connection
DRY_RUN_SECONDS = 600.0  # the server has a deadline of its own
USER_AGENT = f"letheon-client/{__version__} python/{platform.python_version()} httpx2/{httpx2.__version__}"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, whoever will answer it. ``repeatable``: sent twice, it does what it does once."""

    method: str
    path: str
    repeatable: bool
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = field(default=None, repr=False)  # texts
    timeout: float | None = None  # seconds; None: the client's

    def request(self, http: httpx2.Client | httpx2.AsyncClient, url: str) -> httpx2.Request:
        """To the server at ``url``."""
        own = http.timeout if self.timeout is None else httpx2.Timeout(self.timeout, connect=CONNECT_SECONDS)
        return http.build_request(
            self.method,
            url + self.path,
            params=dict(self.params),
            headers=dict(self.headers),
            content=self.content,
            timeout=own,
        )


def get(path: str, *, headers: Mapping[str, str] | None = None, timeout: float | None = None, **params: Any) -> Call:
    """Parameters that are None are left out."""
    return Call(method="GET", path=path, repeatable=True, params=_given(params), headers=headers or {}, timeout=timeout)


def post(
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    repeatable: bool = False,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    **params: Any,
) -> Call:
    """Fields and parameters that are None are left out. Raises InvalidArgument for what JSON cannot hold."""
    sent, content = dict(headers or {}), None
    if body is not None:
        content, sent["Content-Type"] = _json_bytes(_given(body)), "application/json"
    return Call(
        method="POST",
        path=path,
        repeatable=repeatable,
        params=_given(params),
        headers=sent,
        content=content,
        timeout=timeout,
    )


def event_stream(request_id: str, after: str, timeout: float = SILENCE_SECONDS) -> Call:
    """A request's events behind the one with the id ``after``."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"} | ({"Last-Event-ID": after} if after else {})
    return get(f"/unlearn-requests/{segment(request_id)}/events", headers=headers, timeout=timeout)


def listed(texts: str | Sequence[str | ForgetText]) -> list[str | ForgetText]:
    """One text is a list of one, not of its characters."""
    return [texts] if isinstance(texts, str) else list(texts)


def segment(value: str) -> str:
    """An id as one path segment. Raises InvalidArgument for what cannot be an id, such as a path."""
    if not value or not value.replace("_", "").isalnum() or not value.isascii():
        raise InvalidArgument("an id has letters, digits and underscores only")
    return value


def moment(value: str | datetime | None) -> str | None:
    """In RFC 3339. Raises InvalidArgument for a datetime without a zone."""
    if not isinstance(value, datetime):
        return value
    if value.utcoffset() is None:
        raise InvalidArgument("a time needs its zone, such as datetime.now(UTC) has")
    return value.isoformat()


def narrowed(where: RequestFilter) -> dict[str, Any]:
    """As parameters of a list. Raises InvalidArgument for a datetime without a zone."""
    if unknown := sorted(set(where) - set(RequestFilter.__annotations__)):
        raise TypeError(f"a list of requests is not narrowed by {', '.join(unknown)}")
    return {name: moment(cast(str | datetime, value)) for name, value in where.items()}


def addresses(given: str | Sequence[str]) -> tuple[str, ...]:
    """The servers' base URLs. Raises InvalidAddress."""
    urls = tuple(url.rstrip("/") for url in ([given] if isinstance(given, str) else given))
    if not urls:
        raise InvalidAddress("at least one address is needed")
    for url in urls:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018  # raises for what is no port
        except ValueError:
            raise InvalidAddress("an address must look like http://host:port") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidAddress("an address must look like http://host:port")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InvalidAddress("an address must not carry a user, password or query; the key is an argument")
    return urls


def client_options(urls: Sequence[str], api_key: str | None, timeout: float) -> dict[str, Any]:
    """For httpx2.Client and AsyncClient. Raises InvalidArgument for a key that no header can hold."""
    headers = {"User-Agent": USER_AGENT}
    api_key = (api_key or "").strip()  # a file that it came from may end in a newline
    if api_key:
        if not all("!" <= character <= "~" for character in api_key):
            raise InvalidArgument("an API key has visible ASCII characters only")
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "headers": headers,
        "timeout": httpx2.Timeout(timeout, connect=CONNECT_SECONDS),
        # A proxy of the environment cannot reach this machine's own server.
        "trust_env": not any(_is_loopback(urlsplit(url).hostname or "") for url in urls),
    }


def answer(response: httpx2.Response, kind: type[T]) -> T:
    """The JSON object of a good answer. ``kind`` is for the type checker. Raises ForeignAnswer."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ForeignAnswer(status=response.status_code)
    return cast(T, body)


def submitted(response: httpx2.Response) -> Submitted:
    """The request with what the headers say of it. Raises ForeignAnswer."""
    made: dict[str, Any] = answer(response, dict)
    made["duplicate"] = response.headers.get("Letheon-Duplicate") == "true"
    made["replayed"] = response.headers.get("Idempotency-Replayed") == "true"
    return cast(Submitted, made)


def problem(response: httpx2.Response) -> ApiError:
    """The error of any other answer."""
    status = response.status_code
    if status < 400:
        return ForeignAnswer(status=status)
    try:
        body = response.json()
    except ValueError:
        body = None
    ours = isinstance(body, dict) and isinstance(body.get("code"), str)
    found = body if ours else {}
    code = found.get("code") or f"http-{status}"
    retry = response.headers.get("Retry-After", "")
    return error_class(status, code)(
        " ".join(str(found.get("detail") or response.reason_phrase or "no detail").split()),
        status=status,
        code=code,
        errors=_field_errors(found.get("errors")),
        retry_after=float(retry) if retry.isdecimal() and len(retry) < 10 else None,
        request_id=response.headers.get("X-Request-ID"),
        problem=body if ours else None,
    )


def unreachable(url: str, error: httpx2.RequestError) -> Unreachable:
    """Without the exception's own text, which may quote the call; its type says enough."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Unreachable(f"no server answers at {url}", sent=False)
    if isinstance(error, httpx2.PoolTimeout):
        return Unreachable(f"too many calls to {url} are under way", sent=False)
    if isinstance(error, httpx2.TimeoutException):
        return Unreachable(f"the server at {url} did not answer in time", sent=True)
    return Unreachable(f"the connection to {url} broke ({type(error).__name__})", sent=True)


def origin(response: httpx2.Response) -> str:
    """Whose answer this is."""
    return f"{response.url.scheme}://{response.url.netloc.decode()}"


def _field_errors(found: Any) -> Sequence[FieldError]:
    entries = found if isinstance(found, list) else []
    return tuple(cast(FieldError, entry) for entry in entries if isinstance(entry, dict))


def _json_bytes(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # which would hold the text
        raise InvalidArgument("a text holds half a surrogate pair, which cannot be sent") from None
    except ValueError:
        raise InvalidArgument("a number is infinite or none, which cannot be sent") from None


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
