"""How a token is written on a page: what cannot be seen is made visible, what could disturb a page is spelled out."""

from __future__ import annotations

import unicodedata

_SEEN = {" ": "␣", "\n": "↵", "\t": "⇥"}
_LONGEST = 24
_PARTIAL = "\ufffd"


def visible(text: str, token: int) -> str:
    """``text`` of a token with this id: a space as ``␣``, control and format characters as ``\\u200b``."""
    if not text:
        return f"token {token}"
    if set(text) == {_PARTIAL}:
        return f"part of a character, token {token}"
    shown = "".join(_seen(character) for character in text[:_LONGEST])
    return shown + "…" if len(text) > _LONGEST else shown


def _seen(character: str) -> str:
    if character in _SEEN:
        return _SEEN[character]
    kind = unicodedata.category(character)
    if kind[0] in "CZ":  # control, format (which turns the direction of writing), private, unassigned, other spaces
        return f"\\u{ord(character):04x}"
    return f"◌{character}" if kind[0] == "M" else character  # else it would sit on whatever stands before it
