"""A thin HTTP client of the service: what the command line and the demo use."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx2

from app.errors import InvalidInput, LetheonError

FINAL_STATES = frozenset({"active", "failed", "cancelled", "suspended", "revoked"})
CLASSIFY_BATCH = 64
_BUSY_TRIES = 5
_SILENCE_SECONDS = 60.0  # an event stream sends a comment every 15 s, so this much silence is a dead connection
_DRY_RUN_SECONDS = 600.0  # the server has a deadline of its own
_GIVE_UP_SECONDS = 120.0  # a server that restarts is back by then


class ApiError(LetheonError):
    """The server answered with a problem; ``status_code`` and ``problem_code`` say which, ``errors`` what exactly."""

    code: ClassVar[str] = "api-error"
    title: ClassVar[str] = "The server refused"

    def __init__(
        self,
        detail: str,
        *,
        status_code: int,
        problem_code: str,
        retry_after: float | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(detail)
        self.status_code = status_code
        self.problem_code = problem_code
        self.retry_after = retry_after
        self.errors = errors  # each {"field", "message", "limit"?}


class Unreachable(LetheonError):
    """No server answers at this address, or the connection broke."""

    code: ClassVar[str] = "unreachable"
    title: ClassVar[str] = "The server cannot be reached"


@dataclass(frozen=True)
class Event:
    """One server-sent event; ``id`` resumes the stream behind it."""

    id: str
    type: str  # "state" | "progress"
    data: dict[str, Any]


class Client:
    """Calls the HTTP API. Every method raises ApiError or Unreachable, with a message that fits on one line."""

    def __init__(self, url: str, api_key: str | None, *, timeout: float = 120.0) -> None:
        """Raises InvalidInput for an address that is no plain http(s) URL or that carries a password."""
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018  # raises for what is no port
        except ValueError:
            raise InvalidInput("LETHEON_URL must look like http://host:port") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput("LETHEON_URL must look like http://host:port")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InvalidInput("LETHEON_URL must not carry a user, password or query; the key goes in LETHEON_API_KEY")
        self.url = url.rstrip("/")
        api_key = (api_key or "").strip()  # a file that it came from may end in a newline
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            trust_env=not _is_loopback(parts.hostname),  # a proxy cannot reach this machine's own server
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        texts: Sequence[str | dict[str, Any]],
        *,
        reason: str | None = None,
        options: dict[str, Any] | None = None,
        received_at: str | None = None,
        expires_at: str | None = None,
        require_approval: bool = False,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Times in RFC 3339, with a zone. ``idempotency_key``: the same call again leads to the same request."""
        body: dict[str, Any] = {"forget_texts": list(texts)}
        if reason is not None:
            body["reason"] = reason
        if options:
            body["options"] = options
        body |= _params(received_at=received_at, expires_at=expires_at)
        if require_approval:
            body["require_approval"] = True
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._call("POST", "/unlearn-requests", json=body, headers=headers)

    def dry_run(
        self, texts: Sequence[str | dict[str, Any]], *, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What ``submit`` would do; nothing is stored."""
        body = {"forget_texts": list(texts), **({"options": options} if options else {})}
        timeout = httpx2.Timeout(_DRY_RUN_SECONDS, connect=10.0)
        return self._call("POST", "/unlearn-requests", params={"dry_run": "true"}, json=body, timeout=timeout)

    def show(self, request_id: str) -> dict[str, Any]:
        return self._call("GET", f"/unlearn-requests/{_segment(request_id)}")

    def receipt(self, request_id: str) -> dict[str, Any]:
        return self._call("GET", f"/unlearn-requests/{_segment(request_id)}/receipt")

    def report(self, request_id: str, report_format: str) -> bytes:
        """The file that the server gives out: ``json``, ``html`` or ``pdf``."""
        path = f"/unlearn-requests/{_segment(request_id)}/report"
        return self._request("GET", path, params={"format": report_format}).content

    def list(self, *, limit: int = 50, cursor: str | None = None, state: str | None = None) -> dict[str, Any]:
        return self._call("GET", "/unlearn-requests", params=_params(limit=limit, cursor=cursor, state=state))

    def cancel(self, request_id: str) -> dict[str, Any]:
        return self._call("POST", f"/unlearn-requests/{_segment(request_id)}/cancel")

    def approve(self, request_id: str) -> dict[str, Any]:
        return self._call("POST", f"/unlearn-requests/{_segment(request_id)}/approve")

    def reject(self, request_id: str, *, reason: str) -> dict[str, Any]:
        return self._call("POST", f"/unlearn-requests/{_segment(request_id)}/reject", json={"reason": reason})

    def events(self, request_id: str, *, after: str = "") -> Iterator[Event]:
        """The events behind ``after`` until the server ends the stream; does not reconnect."""
        headers = {"Last-Event-ID": after} if after else {}
        path = f"/unlearn-requests/{_segment(request_id)}/events"
        timeout = httpx2.Timeout(_SILENCE_SECONDS, connect=10.0)
        try:
            with self._http.sse(path, headers=headers, timeout=timeout) as source:
                if source.response.status_code != 200:
                    source.response.read()
                    raise _problem(source.response)
                for event in source:
                    data = event.json() if event.data else None
                    if isinstance(data, dict):
                        yield Event(event.id, event.event, data)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None

    def wait(
        self,
        request_id: str,
        on_event: Callable[[Event], None] | None = None,
        *,
        give_up_seconds: float = _GIVE_UP_SECONDS,
    ) -> dict[str, Any]:
        """Follow a request until it is active or has ended, and return it.

        A broken connection or a restarting server is tried again behind the last event, for ``give_up_seconds``.
        """
        last = ""
        lost_since: float | None = None
        while True:
            try:
                for event in self.events(request_id, after=last):
                    last, lost_since = event.id or last, None
                    if on_event is not None:
                        on_event(event)
                request = self.show(request_id)  # the stream ended: because all is said, or the server stops
                lost_since = None
                if request["state"] in FINAL_STATES:
                    return request
            except (Unreachable, ApiError) as error:
                if isinstance(error, ApiError) and error.status_code < 500 and error.status_code != 429:
                    raise
                lost_since = lost_since if lost_since is not None else time.monotonic()
                if time.monotonic() - lost_since > give_up_seconds:
                    raise
            time.sleep(0.5)

    # --- classify, prompts, health -----------------------------------------------------------------------------------

    def classify(
        self,
        texts: Sequence[str],
        *,
        scores: bool = False,
        min_version: int | None = None,
        on_done: Callable[[int], None] | None = None,
        batch: int = CLASSIFY_BATCH,
    ) -> dict[str, Any]:
        """Classify any number of texts, in calls of ``batch``; waits and tries again when the server is at capacity.

        ``active_set_versions`` names every version that answered: one, unless the set changed in between.
        """
        results: list[Any] = []
        versions: list[int] = []
        for start in range(0, len(texts), batch):
            body = _classify_body(texts[start : start + batch], scores, min_version)
            answer = self._call_when_free("POST", "/classify", json=body)
            results += answer["results"]
            if answer["active_set_version"] not in versions:
                versions.append(answer["active_set_version"])
            if on_done is not None:
                on_done(len(results))
        return {"results": results, "active_set_versions": versions}

    def classify_call(
        self, texts: Sequence[str], *, scores: bool = False, min_version: int | None = None
    ) -> dict[str, Any]:
        """One call, not tried again, as the server answers it; may be used from several threads."""
        return self._call("POST", "/classify", json=_classify_body(texts, scores, min_version))

    def prompts(self, *, limit: int = 50, cursor: str | None = None, state: str | None = None) -> dict[str, Any]:
        return self._call("GET", "/admin/prompts", params=_params(limit=limit, cursor=cursor, state=state))

    def revoke(self, prompt_id: str, *, reason: str, code: str = "other") -> dict[str, Any]:
        """The prompt; its state is still what it was where another admin has to agree."""
        body = {"code": code, "reason": reason}
        return self._call("POST", f"/admin/prompts/{_segment(prompt_id)}/revoke", json=body)

    def withdraw_revoke(self, prompt_id: str) -> dict[str, Any]:
        return self._call("POST", f"/admin/prompts/{_segment(prompt_id)}/revoke/withdraw")

    def active_sets(self, *, limit: int = 50, before: int | None = None) -> dict[str, Any]:
        return self._call("GET", "/admin/active-sets", params=_params(limit=limit, before=before))

    def restore(self, version: int, *, reason: str) -> dict[str, Any]:
        return self._call("POST", f"/admin/active-sets/{version}/restore", json={"reason": reason})

    def earlier_version(self) -> int | None:
        """The newest version of the active set that differs from the one in force."""
        before: int | None = None
        current: str | None = None
        while True:
            page = self.active_sets(limit=200, before=before)
            for entry in page["items"]:
                current = current or entry["digest"]
                if entry["digest"] != current:
                    return int(entry["version"])
            before = page["next_before"]
            if before is None:
                return None

    def export_prompt(self, prompt_id: str, kind: str) -> bytes:
        """A prompt in clear: ``peft`` and ``vllm`` are zip files, ``safetensors`` is a tensor."""
        path = f"/admin/prompts/{_segment(prompt_id)}/export"
        return self._request("GET", path, params={"format": kind}).content

    # --- webhooks ----------------------------------------------------------------------------------------------------

    def create_webhook(self, url: str, *, states: Sequence[str] = (), all_requests: bool = False) -> dict[str, Any]:
        body = {"url": url, "states": [*states], "all_requests": all_requests}
        return self._call("POST", "/webhooks", json=body)

    def webhooks(self, *, limit: int = 50, cursor: str | None = None) -> dict[str, Any]:
        return self._call("GET", "/webhooks", params=_params(limit=limit, cursor=cursor))

    def disable_webhook(self, webhook_id: str) -> dict[str, Any]:
        return self._call("DELETE", f"/webhooks/{_segment(webhook_id)}")

    def webhook_deliveries(
        self, webhook_id: str, *, limit: int = 50, cursor: str | None = None, state: str | None = None
    ) -> dict[str, Any]:
        params = _params(limit=limit, cursor=cursor, state=state)
        return self._call("GET", f"/webhooks/{_segment(webhook_id)}/deliveries", params=params)

    def redeliver(self, webhook_id: str, delivery_id: str) -> dict[str, Any]:
        return self._call("POST", f"/webhooks/{_segment(webhook_id)}/deliveries/{_segment(delivery_id)}/redeliver")

    def ping_webhook(self, webhook_id: str) -> dict[str, Any]:
        return self._call("POST", f"/webhooks/{_segment(webhook_id)}/test")

    def ready(self) -> bool:
        """Whether the server would classify now; False while it starts or when it cannot be reached."""
        try:
            self._call("GET", "/readyz")
        except (ApiError, Unreachable):
            return False
        return True

    # --- plumbing ----------------------------------------------------------------------------------------------------

    def _call_when_free(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        for attempt in range(_BUSY_TRIES):
            try:
                return self._call(method, path, **arguments)
            except ApiError as error:
                if error.problem_code not in ("overloaded", "rate-limited") or attempt == _BUSY_TRIES - 1:
                    raise
                time.sleep(min(error.retry_after or 1.0, 30.0))
        raise AssertionError("unreachable")

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._request(method, path, **arguments)
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ApiError("the answer is not Letheon's: is the address right?", status_code=0, problem_code="foreign")
        return body

    def _request(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None
        if response.status_code >= 300:
            raise _problem(response)
        return response

    def _unreachable(self, error: httpx2.TransportError) -> Unreachable:
        # The exception's own text may quote the request; its type says enough.
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return Unreachable(
                f"no server answers at {self.url}: start one with `letheon serve`, or set LETHEON_URL to where it runs"
            )
        if isinstance(error, httpx2.TimeoutException):
            return Unreachable(f"the server at {self.url} did not answer in time")
        return Unreachable(f"the connection to {self.url} broke ({type(error).__name__})")


def _problem(response: httpx2.Response) -> ApiError:
    """One line out of a problem response: code, detail and, for a wrong key, what to do."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    code = str(body.get("code") or f"http-{response.status_code}")
    detail = str(body.get("detail") or response.reason_phrase or "no detail")
    if response.status_code == 401:
        detail += "; set LETHEON_API_KEY to a key of `letheon keys create`"
    retry = response.headers.get("Retry-After", "")
    errors = body.get("errors")
    return ApiError(
        f"{code} ({response.status_code}): {' '.join(detail.split())}",
        status_code=response.status_code,
        problem_code=code,
        retry_after=float(retry) if retry.isdecimal() and len(retry) < 10 else None,
        errors=[error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else (),
    )


def _classify_body(texts: Sequence[str], scores: bool, min_version: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {"texts": list(texts)}
    if scores:
        body["scores"] = True
    if min_version is not None:
        body["min_version"] = min_version
    return body


def _segment(value: str) -> str:
    """An id as one path segment. Raises InvalidInput for what cannot be an id, such as a path."""
    if not value or not value.replace("_", "").isalnum() or not value.isascii():
        raise InvalidInput("an id has letters, digits and underscores only")
    return value


def _params(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
