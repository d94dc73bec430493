"""Limits on texts that depend on the configuration or the model. Errors name field, limit and count, never the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.problems import MAX_ERRORS, invalid
from app.serving import Serving

_CHARACTERS_PER_TOKEN = 64
"""Far above what any text reaches; saves tokenising megabytes only to refuse them."""


def check_count(field: str, count: int, limit: int) -> None:
    """Raises InvalidInput when there are more than ``limit``."""
    if count > limit:
        raise invalid([{"field": field, "message": f"has {count} items, the limit is {limit}", "limit": limit}])


def check_texts(
    serving: Serving, texts: Sequence[tuple[str, str]], *, labels: Sequence[tuple[str, str | None]] = ()
) -> None:
    """Raises InvalidInput naming every (field, text) over the token limit and every label that is not one."""
    errors: list[dict[str, Any]] = []
    limit = serving.max_text_tokens
    for field, text in texts:
        if len(text) > limit * _CHARACTERS_PER_TOKEN:
            message = f"has {len(text)} characters, the limit is {limit} tokens"
        elif (count := serving.llm.count_tokens(text)) > limit:
            message = f"has {count} tokens, the limit is {limit}"
        else:
            continue
        errors.append({"field": field, "message": message, "limit": limit})
    allowed = ", ".join(serving.labels)
    errors += [
        {"field": field, "message": f"must be one of {allowed}"}
        for field, label in labels
        if label is not None and label not in serving.labels
    ]
    if errors:
        raise invalid(errors[:MAX_ERRORS], omitted=max(0, len(errors) - MAX_ERRORS))
