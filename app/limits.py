"""Limits on texts that depend on the configuration or the model. Errors name field, limit and count, never the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.problems import MAX_ERRORS, invalid
from app.schemas import TrainingOptions
from app.serving import Encoded, Serving
from app.settings import Settings

_CHARACTERS_PER_TOKEN = 64
"""Far above what any text reaches; saves tokenising megabytes only to refuse them."""


def check_count(field: str, count: int, limit: int) -> None:
    """Raises InvalidInput when there are more than ``limit``."""
    if count > limit:
        raise invalid([{"field": field, "message": f"has {count} items, the limit is {limit}", "limit": limit}])


def check_steps(settings: Settings, options: TrainingOptions | None) -> None:
    """Raises InvalidInput when a request asks for more training steps than the server takes."""
    limit = settings.max_training_steps
    if options is not None and options.max_steps is not None and options.max_steps > limit:
        raise invalid([{"field": "options.max_steps", "message": f"must be at most {limit}", "limit": limit}])


def check_texts(
    serving: Serving, texts: Sequence[tuple[str, str]], *, labels: Sequence[tuple[str, str | None]] = ()
) -> None:
    """Raises InvalidInput naming every (field, text) over the token limit and every label that is not one."""
    _refuse(text_errors(serving, texts, labels=labels))


def text_errors(
    serving: Serving, texts: Sequence[tuple[str, str]], *, labels: Sequence[tuple[str, str | None]] = ()
) -> list[dict[str, Any]]:
    """What ``check_texts`` would name: field, message and, if it is one, the limit."""
    _, errors = _encode(serving, texts)
    allowed = ", ".join(serving.labels)
    return errors + [
        {"field": field, "message": f"must be one of {allowed}"}
        for field, label in labels
        if label is not None and label not in serving.labels
    ]


def encode_texts(serving: Serving, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
    """The texts as the model reads them. Raises InvalidInput naming every (field, text) over the token limit."""
    encoded, errors = _encode(serving, texts)
    _refuse(errors)
    return encoded


def _encode(serving: Serving, texts: Sequence[tuple[str, str]]) -> tuple[list[Encoded], list[dict[str, Any]]]:
    limit = serving.max_text_tokens
    long = [len(text) > limit * _CHARACTERS_PER_TOKEN for _, text in texts]
    encoded = serving.encode(["" if skip else text for skip, (_, text) in zip(long, texts, strict=True)])
    errors: list[dict[str, Any]] = []
    for skip, (field, text), found in zip(long, texts, encoded, strict=True):
        count = serving.llm.text_tokens(found.row)
        if skip:
            message = f"has {len(text)} characters, the limit is {limit} tokens"
        elif count > limit:
            message = f"has {count} tokens, the limit is {limit}"
        else:
            continue
        errors.append({"field": field, "message": message, "limit": limit})
    return encoded, errors


def _refuse(errors: list[dict[str, Any]]) -> None:
    if errors:
        raise invalid(errors[:MAX_ERRORS], omitted=max(0, len(errors) - MAX_ERRORS))
