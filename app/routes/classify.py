"""Classification behind the active set."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from app.auth import ClassifyCaller
from app.deps import ServiceDep
from app.errors import (
    BodyTooLarge,
    Forbidden,
    InvalidInput,
    MalformedBody,
    NotReady,
    Overloaded,
    Unauthenticated,
)
from app.limits import check_count, check_texts
from app.problems import UnsupportedMediaType, invalid, problems
from app.schemas import ClassifyIn, ClassifyOut

router = APIRouter(tags=["classify"])


@router.post(
    "/classify",
    response_model=ClassifyOut,
    response_model_exclude_none=True,
    responses=problems(
        MalformedBody,
        Unauthenticated,
        Forbidden,
        BodyTooLarge,
        UnsupportedMediaType,
        InvalidInput,
        NotReady,
        Overloaded,
    ),
)
async def classify(body: ClassifyIn, caller: ClassifyCaller, service: ServiceDep) -> Any:
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
    await run_in_threadpool(check_texts, service.serving, fields)
    answer = await asyncio.wrap_future(service.serving.submit([text for _, text in fields]))
    results = []
    for found in answer.results:
        result: dict[str, Any] = {"label": found.label, "abstained": found.abstained}
        if body.scores:
            result |= {"confidence": found.confidence, "scores": found.probabilities}
        results.append(result)
    return {"results": results, "active_set_version": answer.active_set_version}
