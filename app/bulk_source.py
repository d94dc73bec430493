"""The file, or the standard input, that is classified in bulk: its bytes as numbered lines, its lines as rows."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from app.bulk_rows import (
    ANSWER_FIELDS,
    MAX_ROW_BYTES,
    Broken,
    Row,
    RowFormat,
    Table,
    is_json_line,
    json_rows,
    text_rows,
)
from app.errors import InvalidInput

_BY_SUFFIX = {".jsonl": RowFormat.JSONL, ".ndjson": RowFormat.JSONL, ".csv": RowFormat.CSV, ".tsv": RowFormat.TSV}
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, repr=False)
class Source:
    """An open input."""

    name: str
    rows: Iterator[Row]
    columns: tuple[str, ...] | None  # of CSV: its header, without ANSWER_FIELDS
    size: int | None  # bytes, for a bar; None where nobody knows


@contextmanager
def open_rows(path: Path, *, form: RowFormat | None = None, text_column: str | None = None) -> Iterator[Source]:
    """Open a file, or standard input for ``-``; gzip is recognised by its first bytes.

    Without ``form`` the name decides, or the first line: JSONL if it is JSON, else every line is a text.
    Raises InvalidInput for what is empty, no UTF-8 or has no column of texts; OSError.
    """
    if str(path) == "-":
        yield _source("standard input", sys.stdin.buffer, form, text_column)
    else:
        with path.open("rb") as file:
            yield _source(str(path), file, form or _form_of(path), text_column)


def _form_of(path: Path) -> RowFormat | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return _BY_SUFFIX.get(suffixes[-1]) if suffixes else None


def _source(name: str, file: IO[bytes], form: RowFormat | None, text_column: str | None) -> Source:
    counted = _Counted(file)
    plain = io.BufferedReader(counted, 2**16)
    zipped = plain.peek(2)[:2] == _GZIP
    lines = _numbered(gzip.GzipFile(fileobj=plain) if zipped else plain)
    try:
        first = next(((number, line) for number, line in lines if line.strip()), None)
        if first is None:
            raise InvalidInput(f"{name} is empty")
        form = form or _form_of_line(first[1])
        if form is None or b"\0" in first[1]:
            raise InvalidInput(f"{name} is not UTF-8 text")
        lines = chain([first], lines)
        columns = None
        if form in (RowFormat.CSV, RowFormat.TSV):
            table = Table(lines, "," if form is RowFormat.CSV else "\t", text_column, first_line=first[0])
            columns = tuple(column for column in table.header if column not in ANSWER_FIELDS)
            rows = table.rows(counted.position)
        elif form is RowFormat.JSONL:
            rows = json_rows(lines, text_column, counted.position)
        else:
            rows = text_rows(lines, counted.position)
    except Broken as error:
        raise InvalidInput(f"{name}, {error.detail}") from None
    return Source(name, _until_broken(rows, counted), columns, _size(file))


class _Counted(io.RawIOBase):
    """Counts the bytes that are read through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0

    def position(self) -> int:
        return self.count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: bytes = self._file.read1(len(buffer))  # type: ignore[attr-defined]  # read() of a pipe waits for all
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


def _size(file: IO[bytes]) -> int | None:
    try:
        found = os.fstat(file.fileno())
    except (OSError, ValueError):  # standard input that is no file
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _numbered(stream: io.BufferedReader[Any] | gzip.GzipFile) -> Iterator[tuple[int, bytes]]:
    """Physical lines. Of one over MAX_ROW_BYTES, that many bytes and one more."""
    number = 0
    while True:
        try:
            line = stream.readline(MAX_ROW_BYTES + 1)
            rest = line if len(line) > MAX_ROW_BYTES else b"\n"
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(2**16)
        except (gzip.BadGzipFile, zlib.error, EOFError):
            raise Broken(f"line {number + 1}: the gzip data is cut short or damaged") from None
        except OSError as error:
            raise Broken(f"line {number + 1}: cannot be read ({error.strerror})") from None
        if not line:
            return
        number += 1
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _form_of_line(line: bytes) -> RowFormat | None:
    try:
        return RowFormat.JSONL if is_json_line(line.decode().strip()) else RowFormat.LINES
    except UnicodeDecodeError:
        return None


def _until_broken(rows: Iterator[Row], counted: _Counted) -> Iterator[Row]:
    try:
        yield from rows
    except Broken as error:
        place, _, fault = error.detail.partition(": ")
        yield Row(place, None, fault, {}, 0, counted.count, broken=True)
