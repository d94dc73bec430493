"""The rows of a file that is classified in bulk: read one at a time, whatever its size.

A row that cannot be classified is a row all the same: it carries its fault, and the rows behind it are read on.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Any

from app.errors import InvalidInput

MAX_ROW_BYTES = 16 * 2**20
"""Of one row, all its fields and line breaks: what bounds the memory where a file has no line ends at all."""
MAX_TEXT_BYTES = 2**20
"""Far above what a model reads at once; a body that holds one such text stays below the server's limit."""
MAX_DEPTH = 100  # of a JSON value: what can be read can be written again, however deep the stack is just then
TEXT_FIELDS = ("text", "sentence", "review", "content")
"""Where a text is looked for, in this order: the same as in a retain set (``models.examples``)."""
ANSWER_FIELDS = (
    "letheon_label",
    "letheon_abstained",
    "letheon_confidence",
    "letheon_scores",
    "letheon_active_set_version",
    "letheon_error",
)
"""What an output adds to a row. In an input they are an earlier run's, and give way."""


class RowFormat(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    LINES = "lines"


@dataclass(frozen=True, repr=False, slots=True)  # no repr: a text must not reach a traceback by accident
class Row:
    """One row. Either ``text`` or ``fault`` is None; a fault never quotes the row."""

    place: str  # "line 17"
    text: str | None
    fault: str | None
    kept: dict[str, Any]  # its fields, for the output: JSON values; strings where the input is CSV
    size: int  # bytes
    end: int  # bytes of the file (compressed, if it is) that were read when this row was complete
    broken: bool = False  # nothing behind it can be read

    def told(self) -> str:
        """Place and fault, on one line."""
        return f"{self.place}: {self.fault}"


Position = Callable[[], int]
"""How many bytes of the file are read."""


class Broken(InvalidInput):
    """The file cannot be read on; its message begins with the place."""


def is_json_line(line: str) -> bool:
    """An object, even a broken one, or a whole JSON string. A list is taken for text nowhere: it is refused as JSON."""
    if line.startswith(("{", "[{", '["')):
        return True
    try:
        return isinstance(json.loads(line), str)
    except (ValueError, RecursionError):
        return False


# --- plain lines and JSON lines --------------------------------------------------------------------------------------


def text_rows(lines: Iterable[tuple[int, bytes]], position: Position) -> Iterator[Row]:
    for number, line in lines:
        text, fault = _decoded(line)
        if fault is None and not text:
            continue
        kept = {} if fault else {"text": text}
        checked = (None, fault) if fault else _checked(text)
        yield Row(f"line {number}", *checked, kept, len(line), position())


def json_rows(lines: Iterable[tuple[int, bytes]], column: str | None, position: Position) -> Iterator[Row]:
    for number, raw in lines:
        line, fault = _decoded(raw)
        if fault is None and not line:
            continue
        text: str | None = None
        kept: dict[str, Any] = {}
        if fault is None:
            try:
                value = json.loads(line, parse_constant=_refuse, parse_float=_finite)
            except (ValueError, RecursionError):
                fault = "not JSON"
            else:
                text, fault, kept = _json_row(value, column)
        yield Row(f"line {number}", text, fault, kept, len(raw), position())


def _json_row(value: Any, column: str | None) -> tuple[str | None, str | None, dict[str, Any]]:
    if isinstance(value, str):
        value = {"text": value}
        column = "text"
    if not isinstance(value, dict):
        return None, "needs a JSON string or an object with a text", {}
    if _deeper_than(value, MAX_DEPTH):
        return None, f"is nested more than {MAX_DEPTH} levels deep", {}
    kept = {name: part for name, part in value.items() if name not in ANSWER_FIELDS}
    return *_text_of(value, column), kept


def _refuse(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError("1e999 could not be written again")
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    for _ in range(levels):
        inner: list[Any] = []
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        if not inner:
            return False
        value = inner
    return True


def _decoded(line: bytes) -> tuple[str, str | None]:
    """The stripped line, or its fault."""
    if len(line) > MAX_ROW_BYTES:
        return "", f"over the limit of {MAX_ROW_BYTES} bytes"
    try:
        return line.decode().strip(), None
    except UnicodeDecodeError:
        return "", "not UTF-8"


def _text_of(fields: Mapping[str, Any], column: str | None) -> tuple[str | None, str | None]:
    """The text among the fields, or why there is none."""
    names = TEXT_FIELDS if column is None else (column,)
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is None:
        return None, f"needs a text in {' or '.join(names)}"
    if not isinstance(value, str):
        return None, "the text must be a string"
    return _checked(value)


def _checked(text: str) -> tuple[str | None, str | None]:
    if not text.strip():
        return None, "the text must not be blank"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return None, "the text must not contain half a surrogate pair"
    if size > MAX_TEXT_BYTES:
        return None, f"the text has {size} bytes, the limit is {MAX_TEXT_BYTES}"
    return text, None


# --- CSV -------------------------------------------------------------------------------------------------------------


def csv_records(lines: Iterator[str], delimiter: str) -> Any:
    """A csv.reader without its limit of 128 KiB a field, which is one for the process: MAX_ROW_BYTES holds instead."""
    csv.field_size_limit(4 * MAX_ROW_BYTES)
    return csv.reader(lines, delimiter=delimiter)


class _Feed:
    """Lines for csv.reader, which asks for more of them while a quote is open."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        self._lines = lines
        self.size = 0  # bytes, since the record began
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for _, line in self._lines:
            self.size += len(line)
            if self.size > MAX_ROW_BYTES:
                raise OverflowError
            return line.decode(errors="surrogateescape")
        self.ended = True
        raise StopIteration


class Table:
    """A CSV file behind its header. Raises Broken where the header cannot be used."""

    def __init__(
        self, lines: Iterator[tuple[int, bytes]], delimiter: str, text_column: str | None, *, first_line: int
    ) -> None:
        self._feed = _Feed(lines)
        self._before = first_line - 1
        self._reader = csv_records(self._feed, delimiter)
        place, cells = self._next() or ("line 1", [])
        if cells is None or not _is_unicode(cells) or any("\0" in cell for cell in cells):
            raise Broken(f"{place}: the header is not UTF-8 CSV")
        # Names are not repeated: in a file without a header they are the first row, a text among them.
        seen: dict[str, int] = {}
        for number, cell in enumerate(cells, start=1):
            if seen.setdefault(cell, number) != number:
                raise Broken(f"{place}: columns {seen[cell]} and {number} of the header have the same name")
        names = TEXT_FIELDS if text_column is None else (text_column,)
        column = next((name for name in names if name in seen), None)
        if column is None:
            hint = "; --text-column names another" if text_column is None else ""
            raise Broken(f"{place}: the header has no column {' or '.join(names)}{hint}")
        self.header: list[str] = cells
        self._column = column

    def rows(self, position: Position) -> Iterator[Row]:
        while (record := self._next()) is not None:
            place, cells = record
            text: str | None = None
            fault: str | None = None
            if cells is None:
                cells, fault = [], "a bare carriage return outside quotes"
            elif not _is_unicode(cells):
                cells = [cell.encode(errors="surrogateescape").decode(errors="replace") for cell in cells]
                fault = "not UTF-8"
            elif len(cells) > len(self.header):
                fault = f"has {len(cells)} columns, the header {len(self.header)}"
            # A row that is too short lacks its last fields: some spreadsheets leave out what is empty.
            fields = dict(zip_longest(self.header, cells[: len(self.header)], fillvalue=""))
            if fault is None:
                text, fault = _checked(fields[self._column])
            kept = {name: cell for name, cell in fields.items() if name not in ANSWER_FIELDS}
            yield Row(place, text, fault, kept, self._feed.size, position())

    def _next(self) -> tuple[str, list[str] | None] | None:
        """The next record that is no blank line; its cells are None where it is not CSV. None at the end."""
        while True:
            place = f"line {self._before + self._reader.line_num + 1}"
            self._feed.size = 0
            try:
                cells: list[str] | None = next(self._reader, None)
            except csv.Error:
                return place, None
            except OverflowError:
                raise Broken(f"{place}: over the limit of {MAX_ROW_BYTES} bytes; is a quote not closed?") from None
            if cells is None:
                return None
            if self._feed.ended:  # csv.reader takes the end of the file for the closing quote
                raise Broken(f"{place}: a quote is opened and never closed")
            if cells:
                return place, cells


def _is_unicode(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True
