"""Rows of a request from what a person pastes or uploads: the good ones are kept, each bad one says what is wrong.

Everything is in memory, and goes back to the person who sent it and nowhere else.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from app.bulk_rows import Broken, Row, Table, json_rows, text_rows
from app.limits import text_errors
from app.schemas import MAX_ENTRIES
from app.serving import Serving

LABEL_FIELDS = ("label", "sentiment", "label_text")
"""Where a label is looked for, in this order: the same as in a retain set (``models.examples``)."""
BOM = b"\xef\xbb\xbf"
MAX_ROWS = MAX_ENTRIES
MENDABLE = 500
"""Bad rows that a page shows, to be mended in it; each takes fields of the form that comes back."""
_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)  # no repr: a text must not reach a traceback by accident
class Entry:
    """A text to forget and where it stood; ``fault`` says what is wrong with ``field``, and which limit it passed."""

    place: str
    text: str
    label: str | None
    field: str = ""
    fault: str | None = None
    limit: int | None = None


class Unreadable(Exception):
    """The file as a whole. The message quotes nothing of it."""


def read_pasted(text: str) -> list[Entry]:
    """One text a line; a label may follow behind a tab, as in two columns of a spreadsheet. Raises Unreadable."""
    entries = []
    for row in _few(text_rows(_lines(text.encode("utf-8", "surrogatepass")), lambda: 0)):
        body, tab, label = (row.text or "").rpartition("\t")
        entries.append(_entry(replace(row, text=body or None, kept={"label": label}) if tab else row, "pasted, "))
    return entries


def read_file(name: str, data: bytes, labels: Sequence[str]) -> list[Entry]:
    """A ``.csv``, ``.tsv`` or ``.jsonl`` file. Raises Unreadable."""
    ending = name.rpartition(".")[2].lower()
    data = data.removeprefix(BOM)
    if ending not in ("csv", "tsv", "jsonl", "ndjson"):
        raise Unreadable("its name must end in .csv, .tsv or .jsonl")
    if not data.strip():
        raise Unreadable("it is empty")
    try:
        if ending in ("jsonl", "ndjson"):
            rows = _few(json_rows(_lines(data), None, lambda: 0))
        else:
            header = data.partition(b"\n")[0]
            # Spreadsheets of half the world write semicolons.
            comma = ";" if b";" in header and b"," not in header else ","
            table = Table(_lines(data), "\t" if ending == "tsv" else comma, None, first_line=1)
            rows = _few(table.rows(lambda: 0))
    except Broken as error:
        raise Unreadable(error.detail) from None
    return [_entry(row, "", labels) for row in rows]


def read_kept(value: str) -> list[Entry]:
    """Good rows, as ``keep`` wrote them into the form. Raises Unreadable."""
    try:
        rows = _few(json.loads(value or "[]"))
        return [
            Entry(_clean(str(place)), _clean(str(text)), None if label is None else _clean(str(label)))
            for place, text, label in rows
        ]
    except (ValueError, TypeError, RecursionError):
        raise Unreadable("the rows that this form held are damaged") from None


def keep(entries: Sequence[Entry]) -> str:
    return json.dumps([[entry.place, entry.text, entry.label] for entry in entries], ensure_ascii=False)


def examine(serving: Serving, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Good ones and bad ones, by the model's limits and the labels as well as by their own faults."""
    whole = [entry for entry in entries if entry.fault is None]
    found = text_errors(
        serving,
        [(f"{i} text", entry.text) for i, entry in enumerate(whole)],
        labels=[(f"{i} label", entry.label) for i, entry in enumerate(whole)],
    )
    faults: dict[int, dict[str, Any]] = {}
    for error in found:
        number, _, field = error["field"].partition(" ")
        faults.setdefault(int(number), {"field": field, "fault": error["message"], "limit": error.get("limit")})
    checked = iter(replace(entry, **faults.get(i, {})) for i, entry in enumerate(whole))
    everything = [next(checked) if entry.fault is None else entry for entry in entries]
    return [e for e in everything if e.fault is None], [e for e in everything if e.fault is not None]


def mended(places: Sequence[str], texts: Sequence[str], labels: Sequence[str], left_out: Sequence[str]) -> list[Entry]:
    """Bad rows as they come back, without those ``left_out``, by number: two files have a line 3 each."""
    rows = enumerate(zip(places, texts, labels, strict=False))
    entries = [Entry(p, text.strip(), label or None) for i, (p, text, label) in rows if str(i) not in left_out]
    return [e if e.text else replace(e, field="text", fault="the text must not be blank") for e in entries]


def _entry(row: Row, where: str, labels: Sequence[str] = ()) -> Entry:
    label = next((row.kept[name] for name in LABEL_FIELDS if row.kept.get(name) not in (None, "")), None)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        label = labels[label]  # some data sets number their labels
    elif isinstance(label, str) and label not in labels and _counts(label) and int(label) < len(labels):
        label = labels[int(label)]
    shown = row.text if row.text is not None else str(row.kept.get("text", ""))
    fault, field = row.fault, "text"
    if fault is None and label is not None and not isinstance(label, str):
        fault, field, label = "the label must be a string", "label", None
    named = label.strip() if isinstance(label, str) else None
    for name, value in (("text", shown), ("label", named or "")):
        if fault is None and _clean(value) != value:  # a page could not show it
            fault, field = "must not contain half a surrogate pair", name
    return Entry(
        where + row.place, _clean(shown), None if named is None else _clean(named), field if fault else "", fault
    )


def _counts(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 6


def _clean(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _few(rows: Iterable[_T]) -> list[_T]:
    """Raises Unreadable for more than MAX_ROWS, before anything is made of them."""
    found = list(islice(rows, MAX_ROWS + 1))
    if len(found) > MAX_ROWS:
        raise Unreadable(f"it has more than {MAX_ROWS} rows; split it, or ask with the API")
    return found


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    return iter(enumerate(io.BytesIO(data), start=1))
