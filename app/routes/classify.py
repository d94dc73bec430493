"""Classification behind the active set."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from anyio import CapacityLimiter, fail_after, to_thread
from fastapi import APIRouter, Request

from app.auth import ClassifyCaller, seconds_to_know
from app.deps import ServiceDep
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    LetheonError,
    MalformedBody,
    NotReady,
    Overloaded,
    RateLimited,
    Unauthenticated,
)
from app.limits import check_count, encode_texts
from app.metrics import Refusal
from app.problems import Unavailable, UnsupportedMediaType, invalid, problems
from app.schemas import ClassifyIn, ClassifyOut
from app.serving import Answer, Serving

router = APIRouter(tags=["classify"])
FEW_CHARACTERS = 500  # make tokens in less time than it takes to hand them to a thread and back
_encoders = CapacityLimiter(max(2, os.cpu_count() or 1))  # threads that make tokens; other routes have their own

REFUSALS: dict[type[LetheonError], Refusal] = {
    Overloaded: "overloaded",
    DeadlineExceeded: "deadline",
    ClientGone: "disconnected",
    NotReady: "not-ready",
}


@router.post(
    "/classify",
    response_model=ClassifyOut,
    response_model_exclude_none=True,
    responses=problems(
        MalformedBody,
        Unauthenticated,
        Forbidden,
        BodyTimeout,
        BodyTooLarge,
        UnsupportedMediaType,
        InvalidInput,
        RateLimited,
        NotReady,
        Overloaded,
        DeadlineExceeded,
        Unavailable,
    ),
)
async def classify(body: ClassifyIn, caller: ClassifyCaller, service: ServiceDep, request: Request) -> Any:
    """A label for each text, or `unknown`. 503 when the active set cannot be confirmed: never an unprompted answer.

    Scores leak the forgotten label of an abstained text, so they need a scope of their own.
    """
    # Not a sync def: waiting for the model would hold one of the worker threads that all other routes share.
    if (body.text is None) == (body.texts is None):
        raise invalid([{"field": "body", "message": "needs exactly one of text and texts"}])
    if body.scores:
        caller.require("scores")
    if body.texts is None:
        fields = [("text", body.text or "")]
    else:
        check_count("texts", len(body.texts), service.settings.max_classify_texts)
        fields = [(f"texts[{i}]", text) for i, text in enumerate(body.texts)]
    take = partial(service.rates.take_texts, caller.key_id, caller.limits, len(fields))
    allowed = min(body.timeout_seconds or math.inf, service.settings.classify_deadline_seconds)
    deadline = time.monotonic() + allowed - seconds_to_know(request.scope)
    try:
        answer = await _answer(request, service.serving, fields, deadline, take)
        if answer.active_set_version < (body.min_version or 0):
            raise NotReady(
                f"the active set has version {answer.active_set_version}, which is below min_version",
                active_set_version=answer.active_set_version,
            )
    except tuple(REFUSALS) as error:
        service.metrics.refused(next(reason for kind, reason in REFUSALS.items() if isinstance(error, kind)))
        raise
    results = []
    for found in answer.results:
        result: dict[str, Any] = {"label": found.label, "abstained": found.abstained}
        if body.scores:
            result |= {"confidence": found.confidence, "scores": found.probabilities}
        results.append(result)
    return {"results": results, "active_set_version": answer.active_set_version}


async def _answer(
    request: Request, serving: Serving, fields: list[tuple[str, str]], deadline: float, take: Callable[[], None]
) -> Answer:
    """Whoever stops waiting leaves the queue. ``take``: what it takes of the key's allowance, once there is a place.

    Raises InvalidInput, DeadlineExceeded, NotReady, Overloaded, ClientGone, RateLimited.
    """
    with serving.place(len(fields), deadline) as put:  # before any work: what is refused costs nothing
        take()  # nor its caller any allowance
        if sum(len(text) for _, text in fields) <= FEW_CHARACTERS:
            texts = encode_texts(serving, fields)
        else:
            try:
                with fail_after(max(0.0, deadline - time.monotonic())):
                    texts = await to_thread.run_sync(encode_texts, serving, fields, limiter=_encoders)
            except TimeoutError:
                raise DeadlineExceeded("no answer in the time allowed; the server is busy") from None
        future = put(texts)
    answer: asyncio.Future[Any] = asyncio.wrap_future(future)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        wait = max(0.0, deadline - time.monotonic())
        await asyncio.wait({answer, gone}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            found: Answer = answer.result()
            return found
        if gone.done():
            raise ClientGone("the client has closed the connection")
        raise DeadlineExceeded("no answer in the time allowed; the server is busy")
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
