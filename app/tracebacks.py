"""What may be logged of an exception that nobody expected."""

from __future__ import annotations

import traceback
from pathlib import Path


def where(error: BaseException) -> str:
    """Type and innermost frames of an exception, without its message: a message may quote what was sent."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-8:])
    return " < ".join([type(error).__name__, *(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)])
