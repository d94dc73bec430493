"""The operations. ``_client.py`` is made of this file by ``python client/make_sync.py``."""

from __future__ import annotations

import uuid
from asyncio import sleep
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar, Unpack

from letheon_client._async_transport import AsyncTransport
from letheon_client._calls import (
    DRY_RUN_SECONDS,
    SILENCE_SECONDS,
    Call,
    answer,
    event_stream,
    get,
    listed,
    moment,
    narrowed,
    post,
    segment,
    submitted,
)
from letheon_client._retries import ONCE, Retry
from letheon_client._waiting import Watch
from letheon_client.errors import ApiError, LetheonClientError, Unreachable
from letheon_client.types import (
    ActiveSet,
    ActiveSetPage,
    AuditCheckpoint,
    AuditEntry,
    AuditPage,
    Classified,
    Delivery,
    DeliveryPage,
    DeliveryState,
    DryRun,
    Event,
    Evidence,
    EvidencePicture,
    ExportFormat,
    ForgetText,
    ManyClassified,
    Prompt,
    PromptPage,
    PromptState,
    PublicKey,
    Report,
    ReportFormat,
    RequestFilter,
    RequestState,
    RevokeCode,
    RevokedPrompt,
    SignedReceipt,
    Submitted,
    TrainingOptions,
    UnlearnRequest,
    UnlearnRequestPage,
    Webhook,
    WebhookCreated,
    WebhookPage,
)

T = TypeVar("T")


class AsyncLetheon:
    """A client of one deployment, for use as a context manager.

    ``base_url``: of the server, or of several replicas, which are tried in turn. Every method raises ApiError (one
    class for each kind of problem) and Unreachable; InvalidArgument before anything is sent. What is safe to send
    again is sent again, as far as ``retry`` allows. ``timeout``: seconds for each answer.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        api_key: str | None = None,
        *,
        retry: Retry = Retry(),  # noqa: B008  # frozen
        timeout: float = 120.0,
    ) -> None:
        """Raises InvalidArgument for addresses that are no plain http(s) URLs or carry a password, and wrong keys."""
        self._transport = AsyncTransport(base_url, api_key, timeout)
        self._retry = retry

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.base_urls)})"  # without the key

    @property
    def base_urls(self) -> tuple[str, ...]:
        return self._transport.urls

    async def __aenter__(self) -> AsyncLetheon:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def submit(
        self,
        texts: str | Sequence[str | ForgetText],
        *,
        reason: str | None = None,
        options: TrainingOptions | None = None,
        received_at: str | datetime | None = None,
        expires_at: str | datetime | None = None,
        require_approval: bool = False,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """Ask to forget texts. However often it is sent again on the way, it makes one request.

        ``idempotency_key``: your own name for this call, when another process may repeat it; a new one by default.
        Times have a zone.
        """
        body = {
            "forget_texts": listed(texts),
            "reason": reason,
            "options": options or None,
            "received_at": moment(received_at),
            "expires_at": moment(expires_at),
            "require_approval": require_approval or None,
        }
        key = idempotency_key if idempotency_key is not None else str(uuid.uuid4())
        call = post("/unlearn-requests", body, repeatable=True, headers={"Idempotency-Key": key})
        return submitted(await self._transport.send(call, self._retry))

    async def dry_run(
        self,
        texts: str | Sequence[str | ForgetText],
        *,
        options: TrainingOptions | None = None,
        require_approval: bool = False,
    ) -> DryRun:
        """What ``submit`` would do; nothing is stored."""
        body = {
            "forget_texts": listed(texts),
            "options": options or None,
            "require_approval": require_approval or None,
        }
        call = post("/unlearn-requests", body, repeatable=True, timeout=DRY_RUN_SECONDS, dry_run="true")
        return await self._json(call, DryRun)

    async def get_request(self, request_id: str) -> UnlearnRequest:
        return await self._json(get(f"/unlearn-requests/{segment(request_id)}"), UnlearnRequest)

    async def list_requests(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        state: RequestState | None = None,
        **where: Unpack[RequestFilter],
    ) -> UnlearnRequestPage:
        """A page, newest first."""
        call = get("/unlearn-requests", limit=limit, cursor=cursor, state=state, **narrowed(where))
        return await self._json(call, UnlearnRequestPage)

    def iter_requests(
        self, *, state: RequestState | None = None, page_size: int = 200, **where: Unpack[RequestFilter]
    ) -> AsyncIterator[UnlearnRequest]:
        """All of them, newest first; a page is asked for when it is needed."""
        params = {"limit": page_size, "state": state, **narrowed(where)}
        return self._items("/unlearn-requests", "cursor", UnlearnRequest, **params)

    async def cancel(self, request_id: str) -> UnlearnRequest:
        """A waiting request ends at once; a running one stops at its next step."""
        return await self._json(post(f"/unlearn-requests/{segment(request_id)}/cancel"), UnlearnRequest)

    async def approve(self, request_id: str) -> UnlearnRequest:
        """Agree to a request that awaits approval, with another key than the one that asked."""
        return await self._json(post(f"/unlearn-requests/{segment(request_id)}/approve"), UnlearnRequest)

    async def reject(self, request_id: str, *, reason: str) -> UnlearnRequest:
        """End a request that awaits approval; its texts are destroyed."""
        call = post(f"/unlearn-requests/{segment(request_id)}/reject", {"reason": reason})
        return await self._json(call, UnlearnRequest)

    async def receipt(self, request_id: str) -> SignedReceipt:
        """What was done about a request, signed. Raises Conflict while it is open."""
        return await self._json(get(f"/unlearn-requests/{segment(request_id)}/receipt"), SignedReceipt)

    async def report(self, request_id: str) -> Report:
        """The same in plain words, around the receipt. Raises Conflict while the request is open."""
        return await self._json(get(f"/unlearn-requests/{segment(request_id)}/report"), Report)

    async def report_file(self, request_id: str, kind: ReportFormat) -> bytes:
        """The report as a file: `html` and `pdf` are to be kept or printed."""
        return await self._bytes(get(f"/unlearn-requests/{segment(request_id)}/report", format=kind))

    async def evidence(self, request_id: str) -> Evidence:
        """Points of the picture and the membership attack. Raises Conflict where there is none, and says why."""
        return await self._json(get(f"/unlearn-requests/{segment(request_id)}/evidence"), Evidence)

    async def evidence_picture(self, request_id: str, kind: EvidencePicture) -> bytes:
        """The same as SVG."""
        return await self._bytes(get(f"/unlearn-requests/{segment(request_id)}/evidence/{kind}.svg"))

    async def events(self, request_id: str, *, after: str = "") -> AsyncGenerator[Event]:
        """The events behind the one with the id ``after``, until the server ends the stream or the connection breaks.

        ``wait`` takes a broken stream up again.
        """
        async with aclosing(self._transport.events(event_stream(request_id, after), self._retry)) as stream:
            async for event in stream:
                if event is not None:
                    yield event

    async def wait(
        self,
        request_id: str,
        on_progress: Callable[[Event], None] | None = None,
        *,
        check: bool = False,
        timeout_seconds: float | None = None,
        give_up_seconds: float = 120.0,
    ) -> UnlearnRequest:
        """Follow a request until it is active or has ended, and return it.

        A broken stream is taken up behind the last event; without streams the request is polled. A server that is
        away is waited for, ``give_up_seconds`` long. ``check``: raises RequestFailed unless it is active in the end.
        Raises WaitTimedOut after ``timeout_seconds``.
        """
        watch = Watch(on_progress, timeout_seconds)
        patient = replace(self._retry, attempts=1_000_000, longest_delay=5.0)
        while True:
            await self._follow(request_id, watch)
            call = get(f"/unlearn-requests/{segment(request_id)}", timeout=watch.within(SILENCE_SECONDS))
            patient = replace(patient, give_up_seconds=watch.within(give_up_seconds))
            request = await self._json(call, UnlearnRequest, patient)
            if watch.missed_the_end(request):  # it came while the connection was broken
                await self._follow(request_id, watch)
            if watch.ended(request, check=check):
                return request
            await sleep(watch.pause())

    # --- classify ----------------------------------------------------------------------------------------------------

    async def classify(
        self,
        texts: str | Sequence[str],
        *,
        scores: bool = False,
        min_version: int | None = None,
        timeout_seconds: float | None = None,
    ) -> Classified:
        """One call, of as many texts as the server takes (256 by default), all answered under one active set.

        ``min_version``: Unavailable unless the active set has this version or a later one; other replicas are asked.
        ``timeout_seconds``: the server's own deadline for it; Unavailable (`deadline-exceeded`) after it.
        """
        body = {
            "text": texts if isinstance(texts, str) else None,
            "texts": None if isinstance(texts, str) else list(texts),
            "scores": scores or None,
            "min_version": min_version,
            "timeout_seconds": timeout_seconds,
        }
        return await self._json(post("/classify", body, repeatable=True), Classified)

    async def classify_many(
        self,
        texts: Sequence[str],
        *,
        scores: bool = False,
        min_version: int | None = None,
        batch: int = 64,
        on_done: Callable[[int], None] | None = None,
    ) -> ManyClassified:
        """Any number of texts, in calls of ``batch``; ``on_done`` hears how many are answered."""
        found: ManyClassified = {"results": [], "active_set_versions": []}
        for start in range(0, len(texts), batch):
            part = await self.classify(texts[start : start + batch], scores=scores, min_version=min_version)
            found["results"] += part["results"]
            if part["active_set_version"] not in found["active_set_versions"]:
                found["active_set_versions"].append(part["active_set_version"])
            if on_done is not None:
                on_done(len(found["results"]))
        return found

    # --- prompts and active sets -------------------------------------------------------------------------------------

    async def get_prompt(self, prompt_id: str) -> Prompt:
        return await self._json(get(f"/admin/prompts/{segment(prompt_id)}"), Prompt)

    async def list_prompts(
        self, *, limit: int = 50, cursor: str | None = None, state: PromptState | None = None
    ) -> PromptPage:
        """A page, newest first."""
        return await self._json(get("/admin/prompts", limit=limit, cursor=cursor, state=state), PromptPage)

    def iter_prompts(self, *, state: PromptState | None = None, page_size: int = 200) -> AsyncIterator[Prompt]:
        """All of them, newest first."""
        return self._items("/admin/prompts", "cursor", Prompt, limit=page_size, state=state)

    async def revoke(self, prompt_id: str, *, reason: str, code: RevokeCode = "other") -> RevokedPrompt:
        """Un-forget. The prompt's state is still what it was where another admin has to agree."""
        call = post(f"/admin/prompts/{segment(prompt_id)}/revoke", {"code": code, "reason": reason})
        return await self._json(call, RevokedPrompt)

    async def withdraw_revoke(self, prompt_id: str) -> Prompt:
        """Take back a revoke that nobody has agreed to."""
        return await self._json(post(f"/admin/prompts/{segment(prompt_id)}/revoke/withdraw"), Prompt)

    async def export_prompt(self, prompt_id: str, kind: ExportFormat) -> bytes:
        """In clear, where the server allows it: `peft` and `vllm` are zip files, `safetensors` is a tensor."""
        return await self._bytes(get(f"/admin/prompts/{segment(prompt_id)}/export", format=kind))

    async def get_active_set(self, version: int) -> ActiveSet:
        return await self._json(get(f"/admin/active-sets/{int(version)}"), ActiveSet)

    async def list_active_sets(self, *, limit: int = 50, before: int | None = None) -> ActiveSetPage:
        """A page: the set in force first, then those before it."""
        return await self._json(get("/admin/active-sets", limit=limit, before=before), ActiveSetPage)

    def iter_active_sets(self, *, page_size: int = 200) -> AsyncIterator[ActiveSet]:
        """All of them, the one in force first."""
        return self._items("/admin/active-sets", "before", ActiveSet, limit=page_size)

    async def restore(self, version: int, *, reason: str) -> ActiveSet:
        """Put an earlier set in force. What was forgotten since comes back, until another restore."""
        call = post(f"/admin/active-sets/{int(version)}/restore", {"reason": reason})
        return await self._json(call, ActiveSet)

    # --- audit -------------------------------------------------------------------------------------------------------

    async def list_audit(self, *, limit: int = 50, before: int | None = None, subject: str | None = None) -> AuditPage:
        """A page, newest first; ``subject``: entries of this id only."""
        return await self._json(get("/admin/audit", limit=limit, before=before, subject=subject), AuditPage)

    def iter_audit(self, *, subject: str | None = None, page_size: int = 200) -> AsyncIterator[AuditEntry]:
        """All entries, newest first."""
        return self._items("/admin/audit", "before", AuditEntry, limit=page_size, subject=subject)

    async def export_audit(self) -> AsyncGenerator[bytes]:
        """The whole log, a JSON object a line, in pieces. Raises Unreachable when it breaks before its last line."""
        async with aclosing(self._transport.chunks(get("/admin/audit/export"), self._retry)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def audit_checkpoint(self) -> AuditCheckpoint:
        """Kept elsewhere, it proves a later cut or rewrite."""
        return await self._json(get("/admin/audit/checkpoint"), AuditCheckpoint)

    async def audit_public_key(self) -> PublicKey:
        """What receipts, exports and checkpoints are signed by."""
        return await self._json(get("/admin/audit/public-key"), PublicKey)

    # --- webhooks ----------------------------------------------------------------------------------------------------

    async def create_webhook(
        self, url: str, *, states: Sequence[RequestState] = (), all_requests: bool = False
    ) -> WebhookCreated:
        """``states``: tell of these only. The answer holds the signing secret, for the only time."""
        body = {"url": url, "states": list(states), "all_requests": all_requests}
        return await self._json(post("/webhooks", body), WebhookCreated)

    async def get_webhook(self, webhook_id: str) -> Webhook:
        return await self._json(get(f"/webhooks/{segment(webhook_id)}"), Webhook)

    async def list_webhooks(self, *, limit: int = 50, cursor: str | None = None) -> WebhookPage:
        """A page, newest first."""
        return await self._json(get("/webhooks", limit=limit, cursor=cursor), WebhookPage)

    def iter_webhooks(self, *, page_size: int = 200) -> AsyncIterator[Webhook]:
        """All of them, newest first."""
        return self._items("/webhooks", "cursor", Webhook, limit=page_size)

    async def disable_webhook(self, webhook_id: str) -> Webhook:
        """End it, for good."""
        call = Call(method="DELETE", path=f"/webhooks/{segment(webhook_id)}", repeatable=True)
        return await self._json(call, Webhook)

    async def list_deliveries(
        self, webhook_id: str, *, limit: int = 50, cursor: str | None = None, state: DeliveryState | None = None
    ) -> DeliveryPage:
        """A page of what was sent and how that went, newest first."""
        call = get(f"/webhooks/{segment(webhook_id)}/deliveries", limit=limit, cursor=cursor, state=state)
        return await self._json(call, DeliveryPage)

    def iter_deliveries(
        self, webhook_id: str, *, state: DeliveryState | None = None, page_size: int = 200
    ) -> AsyncIterator[Delivery]:
        """All of them, newest first."""
        path = f"/webhooks/{segment(webhook_id)}/deliveries"
        return self._items(path, "cursor", Delivery, limit=page_size, state=state)

    async def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a message once more."""
        return await self._json(
            post(f"/webhooks/{segment(webhook_id)}/deliveries/{segment(delivery_id)}/redeliver"), Delivery
        )

    async def ping_webhook(self, webhook_id: str) -> Delivery:
        """Send a ping; its delivery says whether it arrived."""
        return await self._json(post(f"/webhooks/{segment(webhook_id)}/test"), Delivery)

    # --- health ------------------------------------------------------------------------------------------------------

    async def ready(self) -> bool:
        """Whether a server would classify now; False while it starts or when none can be reached."""
        return await self._says_yes("/readyz")

    async def live(self) -> bool:
        """Whether a server's process is in order."""
        return await self._says_yes("/livez")

    async def metrics(self) -> str:
        """One server's, in Prometheus' text format."""
        return (await self._transport.send(get("/metrics"), self._retry)).text

    # --- plumbing ----------------------------------------------------------------------------------------------------

    async def _json(self, call: Call, kind: type[T], retry: Retry | None = None) -> T:
        return answer(await self._transport.send(call, retry or self._retry), kind)

    async def _bytes(self, call: Call) -> bytes:
        return (await self._transport.send(call, self._retry)).content

    async def _follow(self, request_id: str, watch: Watch) -> None:
        """Hand on events for as long as the stream lasts."""
        if not watch.may_stream():
            return
        call = event_stream(request_id, watch.last, timeout=watch.within(SILENCE_SECONDS))
        try:
            async with aclosing(self._transport.events(call, ONCE)) as stream:
                async for event in stream:
                    watch.streamed(event)
                    if not watch.may_stream():
                        break
        except (ApiError, Unreachable):
            pass  # what is wrong shows when the request is asked for, or is over by then

    async def _items(self, path: str, cursor: str, kind: type[T], **params: Any) -> AsyncIterator[T]:
        """Of all pages; ``kind`` is for the type checker."""
        after = None
        while True:
            page = await self._json(get(path, **params, **{cursor: after}), dict[str, Any])
            for item in page["items"]:
                yield item
            after = page[f"next_{cursor}"]
            if after is None:
                return

    async def _says_yes(self, path: str) -> bool:
        try:
            await self._transport.send(get(path), ONCE)
        except LetheonClientError:
            return False
        return True
