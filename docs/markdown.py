"""Bits of Markdown for the pages that are generated."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

MADE = "<!-- Made by `python -m docs.generate`: change the code, then run `make docs`. -->\n\n"


def cell(text: object) -> str:
    """Of a table: one line, and no bar that would end it."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell(part) for part in line) + " |\n" for line in lines) + "\n"


def code(text: object) -> str:
    return f"`{text}`"


def either(words: Sequence[str], last: str = "or") -> str:
    """``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def sentence(text: str) -> str:
    """Its full stop, where it has none."""
    return text if not text or text[-1] in ".:?!" else f"{text}."


def docstring(thing: object) -> str:
    """In Markdown: our docstrings mark code as reST does."""
    return (inspect.getdoc(thing) or "").replace("``", "`")
