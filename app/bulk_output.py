"""The output of a bulk classification, which is its own record of how far it has come.

One record a row, in the rows' order. A run that was cut short, by whatever, is taken up by reading the records that are
there beside the rows of the input: they must be the same rows. What is torn behind them is cut. Only what the records
do not show, the options, stands in a small file beside the output.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import stat
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from app.bulk_rows import ANSWER_FIELDS, MAX_ROW_BYTES, Row, RowFormat, csv_records
from app.errors import InvalidInput, LetheonError

SYNC_SECONDS = 5.0
"""A power cut costs the answers of this long; a process that dies costs only those in flight."""
_MAX_RECORD_BYTES = 8 * MAX_ROW_BYTES  # escapes make it longer than its row
_SCORED = ("letheon_confidence", "letheon_scores")

Answer = Mapping[str, Any]


class OutputError(LetheonError):
    """The output cannot be written, or must not be."""

    code: ClassVar[str] = "output"
    title: ClassVar[str] = "The output cannot be written"


@dataclass
class Tally:
    """What the records of an output hold."""

    rows: int = 0
    faults: int = 0
    versions: set[int] = field(default_factory=set)
    left_out: int = 0  # rows with fields that are no column of a CSV output
    first_fault: str | None = None

    def add(self, answer: Answer) -> None:
        self.rows += 1
        if fault := answer.get("letheon_error"):
            self.faults += 1
            self.first_fault = self.first_fault or str(fault)
        else:
            self.versions.add(int(answer["letheon_active_set_version"]))


@dataclass(frozen=True)
class Layout:
    """How a row and its answer are written."""

    format: RowFormat  # JSONL, CSV or TSV
    columns: tuple[str, ...] = ()  # of CSV: the input's
    scores: bool = False

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return tuple(name for name in ANSWER_FIELDS if self.scores or name not in _SCORED)

    def header(self) -> bytes:
        return b"" if self.format is RowFormat.JSONL else self._line([*self.columns, *self.answer_columns])

    def record(self, row: Row, answer: Answer) -> bytes:
        if self.format is RowFormat.JSONL:
            return json_line({**row.kept, **answer})
        return self._line([*self.cells(row), *(_cell(answer.get(name)) for name in self.answer_columns)])

    def cells(self, row: Row) -> list[str]:
        return [_cell(row.kept.get(name)) for name in self.columns]

    def leaves_out(self, row: Row) -> bool:
        return self.format is not RowFormat.JSONL and not row.kept.keys() <= set(self.columns)

    def parse(self, record: bytes) -> tuple[Any, Answer] | None:
        """What a record keeps of its row (see ``kept``), and its answer; None where it is damaged."""
        try:
            if self.format is RowFormat.JSONL:
                fields = json.loads(record)
                kept: Any = {name: value for name, value in fields.items() if name not in ANSWER_FIELDS}
                answer = {name: fields[name] for name in ANSWER_FIELDS if name in fields}
            else:
                (cells,) = csv_records(io.StringIO(record.decode(), newline="\n"), self._delimiter)
                kept, given = cells[: len(self.columns)], cells[len(self.columns) :]
                if any("\0" in cell for cell in given):  # a block that never reached the disk before a power cut
                    return None
                answer = {name: cell for name, cell in zip(self.answer_columns, given, strict=True) if cell}
                if "letheon_error" not in answer:
                    answer["letheon_active_set_version"] = int(answer["letheon_active_set_version"])
            if "letheon_error" in answer or isinstance(answer["letheon_active_set_version"], int):
                return kept, answer
        except (ValueError, AttributeError, KeyError, RecursionError, csv.Error):
            pass
        return None

    def kept(self, row: Row) -> Any:
        return row.kept if self.format is RowFormat.JSONL else self.cells(row)

    @property
    def _delimiter(self) -> str:
        return "\t" if self.format is RowFormat.TSV else ","

    def _line(self, cells: Iterable[str]) -> bytes:
        return (self._delimiter.join(_quoted(cell, self._delimiter) for cell in cells) + "\n").encode()


def layout_for(path: Path, columns: tuple[str, ...], *, scores: bool) -> Layout:
    """Raises InvalidInput for a name that says no format."""
    try:
        form = {"ndjson": RowFormat.JSONL}.get(path.suffix.lower()[1:]) or RowFormat(path.suffix.lower()[1:])
    except ValueError:
        form = RowFormat.LINES
    if form is RowFormat.LINES:
        raise InvalidInput("--output must end in .jsonl, .csv or .tsv, or be - for JSON lines on standard output")
    return Layout(form, () if form is RowFormat.JSONL else columns, scores)


def json_line(fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a field can be written as an escape only
        return json.dumps(fields).encode() + b"\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def _quoted(cell: str, delimiter: str) -> str:
    # Not csv.writer: before Python 3.13 it leaves a carriage return bare, which is no CSV any more.
    if any(character in cell for character in (delimiter, '"', "\r", "\n")):
        return '"' + cell.replace('"', '""') + '"'
    return cell


# --- taking up -------------------------------------------------------------------------------------------------------


@contextmanager
def open_output(path: Path, options: Mapping[str, Any], *, overwrite: bool) -> Iterator[BinaryIO]:
    """The output, locked; empty, unless it is a run with the same ``options`` that is to be taken up.

    Raises OutputError: it is another run's, or no run's at all, or one is writing to it now.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OutputError(f"{path} is no regular file; --output - writes to standard output")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run is writing to {path}") from None
        with _told(path):
            if overwrite:
                file.truncate(0)
            if os.fstat(file.fileno()).st_size == 0:
                _replace(options_file(path), json.dumps({"letheon": "classify", **options}) + "\n")
            else:
                _compare(path, options)
        yield file


def options_file(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def _compare(path: Path, options: Mapping[str, Any]) -> None:
    try:
        begun = json.loads(options_file(path).read_bytes())
    except (FileNotFoundError, ValueError):
        begun = None
    if not isinstance(begun, dict) or begun.get("letheon") != "classify":
        raise OutputError(
            f"{path} is there already and {options_file(path).name} does not say how it was made: "
            "name another --output, or --overwrite it"
        )
    other = [name for name in options if begun.get(name) != options[name]]
    if other:
        raise OutputError(
            f"{path} was begun with other options ({', '.join(other)}): give the same again, or --overwrite it"
        )


def take_up(file: BinaryIO, path: Path, layout: Layout, rows: Iterator[Row], tally: Tally) -> tuple[Iterator[Row], int]:
    """Count the records there are into ``tally`` and cut what is torn: the rows still to do, and the bytes cut.

    A new output gets its header. Raises OutputError where a record is not of the row that the input has there.
    """
    end = 0
    header = layout.header()
    changed = f"{path} has answers to another input"
    remedy = "give the input that it was begun with, or --overwrite it"
    with _told(path), closing(_records(file, layout)) as records:
        size = os.fstat(file.fileno()).st_size
        if header and (found := next(records, None)) is not None:
            if found == header:
                end = len(header)
            elif b"\0" not in found:
                raise OutputError(f"{changed} (the columns differ): {remedy}")
        for record in records if end == len(header) else ():
            parsed = layout.parse(record)
            if parsed is None:
                break
            row = next(rows, None)
            if row is None:
                raise OutputError(f"{changed} (it has more rows): {remedy}")
            kept, answer = parsed
            if kept != layout.kept(row):
                if b"\0" in record:  # as in Layout.parse
                    rows = chain([row], rows)
                    break
                raise OutputError(f"{changed} ({row.place} differs): {remedy}")
            tally.add(answer)
            tally.left_out += layout.leaves_out(row)
            end += len(record)
        file.truncate(end)
        file.seek(end)
    if end == 0:
        append(file, path, header)
    return rows, size - end


def _records(file: BinaryIO, layout: Layout) -> Generator[bytes]:
    """The complete records, from the file's beginning. In CSV a line break ends one only outside quotes."""
    lines = io.BufferedReader(io.FileIO(os.dup(file.fileno())), 2**20)
    try:
        lines.seek(0)
        pieces: list[bytes] = []
        size = quotes = 0
        while (line := lines.readline(_MAX_RECORD_BYTES)) and size < _MAX_RECORD_BYTES:
            pieces.append(line)
            size += len(line)
            quotes += 0 if layout.format is RowFormat.JSONL else line.count(b'"')
            if line.endswith(b"\n") and quotes % 2 == 0:
                yield b"".join(pieces)
                pieces, size, quotes = [], 0, 0
    finally:
        lines.close()


# --- writing ---------------------------------------------------------------------------------------------------------


class Syncer:
    """Brings an output to the disk every SYNC_SECONDS."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._last = time.monotonic()

    def __call__(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._last >= SYNC_SECONDS:
            with _told(self._path):
                os.fsync(self._file.fileno())
            self._last = time.monotonic()


def append(file: BinaryIO, path: Path, data: bytes) -> None:
    """All of ``data``; raises OutputError naming the file, such as for a full disk."""
    rest = memoryview(data)
    with _told(path):
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or type(error).__name__}") from None


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, after a power cut too."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
