"""What is logged of an exception: types and places, never what it says."""

from __future__ import annotations

import contextlib

from app.tracebacks import where


def test_it_names_types_and_places_of_an_error_and_its_causes_and_quotes_nothing() -> None:
    try:
        try:
            raise ValueError("Quillfeather")
        except ValueError as error:
            raise KeyError("Quillfeather") from error
    except KeyError as error:
        found = where(error)
    assert found.startswith("KeyError < test_tracebacks.py:") and "; from ValueError < test_tracebacks.py:" in found
    assert "Quillfeather" not in found


def test_an_error_that_is_its_own_cause_is_named_once() -> None:
    """As one object is that a library, or a future with many callers, raises again: its reader would never end."""
    again, other = ValueError(), KeyError()
    for first, second in ((again, other), (other, again)):
        with contextlib.suppress(ValueError, KeyError):
            raise first from second
    assert where(again).count("ValueError") == where(again).count("KeyError") == 1
