"""What may be logged of an exception that nobody expected."""

from __future__ import annotations

import traceback
from pathlib import Path


def where(error: BaseException) -> str:
    """Types and frames of an exception and its causes, without messages: a message may quote what was sent."""
    parts: list[str] = []
    seen: set[int] = set()  # one object that is raised twice may be its own cause
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        frames = reversed(traceback.extract_tb(link.__traceback__)[-8:])
        parts.append(
            " < ".join([type(link).__name__, *(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)])
        )
        link = link.__cause__ or link.__context__
    return "; from ".join(parts)
