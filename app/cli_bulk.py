"""``letheon classify --file … --output …``: the bar, the notes and the exit status around a streamed run."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from app.bulk import Answer, Asker, classify_rows, until_fault
from app.bulk_output import Syncer, Tally, append, json_line, layout_for, open_output, take_up
from app.bulk_rows import Row, RowFormat
from app.bulk_source import Source, open_rows
from app.cli_output import emit, note, stderr
from app.errors import InvalidInput, LetheonError
from letheon_client import Letheon, LetheonClientError

TABLE_ROWS = 1000
"""More than this is no table for people; and a document that is made at once does not stay small."""
SOME_FAULTS, INTERRUPTED = 3, 130  # exit status
_LOOK_AHEAD_ROWS = 100
_RATE_SECONDS = 30.0

Batch = list[tuple[Row, Answer]]


@dataclass(frozen=True)
class BulkOptions:
    """What an output depends on besides its rows; an output is taken up with the same only."""

    scores: bool
    min_version: int | None
    text_column: str | None
    format: RowFormat | None


def few_texts(file: Path, form: RowFormat | None, text_column: str | None) -> list[str]:
    """The texts of a file that is small. Raises InvalidInput for a larger one and for the first row that has none."""
    with open_rows(file, form=form, text_column=text_column) as source:
        texts = []
        for row in islice(source.rows, TABLE_ROWS + 1):
            if row.text is None:
                raise InvalidInput(f"{source.name}, {row.told()}")
            texts.append(row.text)
    if len(texts) > TABLE_ROWS:
        raise InvalidInput(
            f"{source.name} has more than {TABLE_ROWS} rows: name a file with --output, "
            "or --output - for JSON lines on standard output"
        )
    return texts


def classify_file(
    client: Letheon,
    file: Path,
    output: Path,
    options: BulkOptions,
    *,
    batch: int,
    window: int,
    patience: float,
    strict: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Stream ``file`` to ``output``, or what is left of it.

    Raises LetheonError, LetheonClientError, and typer.Exit where rows have faults or the run is interrupted.
    """
    to_stdout = str(output) == "-"
    if to_stdout and (as_json or overwrite):
        raise InvalidInput("--output - writes the rows to standard output: no --json, no --overwrite")
    if str(file) != "-" and output.exists() and output.samefile(file):
        raise InvalidInput("--output must not be the input itself")
    tally = Tally()
    try:
        with (
            open_rows(file, form=options.format, text_column=options.text_column) as source,
            _bar(source.size, shown=not (to_stdout and sys.stdout.isatty())) as bar,
        ):
            asker = Asker(
                partial(client.classify, scores=options.scores, min_version=options.min_version),
                batch=batch,
                min_version=options.min_version or 0,
                patience=patience,
                on_wait=bar.waits,
            )

            def run(rows: Iterator[Row], write: Callable[[Batch], None]) -> None:
                bar.begins(tally.rows)
                with closing(classify_rows(rows, asker, window=window)) as answered:
                    for done in until_fault(source.name, answered, strict=strict):
                        write(done)
                        for _, answer in done:
                            tally.add(answer)
                        bar.done(tally.rows, done[-1][0].end if done else 0)

            if to_stdout:
                run(source.rows, _print_lines)
            else:
                _into_file(output, source, options, tally, bar, run, strict=strict, overwrite=overwrite)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        emit(_summary(tally, output))
    else:
        note(_told(tally, None if to_stdout else output))
    if tally.faults:
        raise typer.Exit(SOME_FAULTS)


def _into_file(
    output: Path,
    source: Source,
    options: BulkOptions,
    tally: Tally,
    bar: _Bar,
    run: Callable[[Iterator[Row], Callable[[Batch], None]], None],
    *,
    strict: bool,
    overwrite: bool,
) -> None:
    """Take the output up, or begin it, and ``run`` what is left."""
    columns, rows = source.columns, bar.reads(source.rows)
    if columns is None:
        columns, rows = _look_ahead(rows)
    layout = layout_for(output, columns, scores=options.scores)
    with open_output(output, asdict(options), overwrite=overwrite) as target:
        rows, cut = take_up(target, output, layout, rows, tally)
        if tally.rows or cut:
            damage = f", and {cut} torn or damaged bytes that are cut" if cut else ""
            bar.says(f"{output} has {tally.rows:,} rows{damage}: going on behind them")
        if strict and tally.first_fault is not None:
            raise InvalidInput(f"{source.name}, {tally.first_fault}")
        sync = Syncer(target, output)

        def write(done: Batch) -> None:
            append(target, output, b"".join(layout.record(row, answer) for row, answer in done))
            tally.left_out += sum(layout.leaves_out(row) for row, _ in done)
            sync()

        try:
            run(rows, write)
        except (LetheonError, LetheonClientError, KeyboardInterrupt):
            again = "without --overwrite " if overwrite else ""  # with it they would be lost
            bar.says(f"{output} has {tally.rows:,} rows; the same command again {again}goes on behind them")
            raise
        finally:
            sync(now=True)


def _look_ahead(rows: Iterator[Row]) -> tuple[tuple[str, ...], Iterator[Row]]:
    """The columns of a CSV made of rows that have no header: the fields of the first rows, in order of appearance."""
    first = list(islice(rows, _LOOK_AHEAD_ROWS))
    columns = dict.fromkeys(name for row in first for name in row.kept)
    return tuple(columns) or ("text",), chain(first, rows)


def _print_lines(done: Batch) -> None:
    out = sys.stdout.buffer
    out.write(b"".join(json_line({**row.kept, **answer}) for row, answer in done))
    out.flush()


def _summary(tally: Tally, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "rows": tally.rows,
        "errors": tally.faults,
        "active_set_versions": sorted(tally.versions),
    }


def _told(tally: Tally, output: Path | None) -> str:
    versions = sorted(tally.versions)
    told = f"{tally.rows:,} rows" + (f" in {output}" if output else "")
    if tally.faults:
        told += f", {tally.faults:,} of them not classified: their letheon_error says why"
    if len(versions) == 1:
        told += f"; active set {versions[0]}"
    elif versions:
        many = (
            ", ".join(map(str, versions))
            if len(versions) <= 8
            else f"{len(versions)} from {versions[0]} to {versions[-1]}"
        )
        told += f"; the active set changed meanwhile: versions {many}"
    if tally.left_out:
        told += f"; {tally.left_out:,} rows had fields that the first {_LOOK_AHEAD_ROWS} have not: these are left out"
    return told


# --- the bar ---------------------------------------------------------------------------------------------------------


class _Bar:
    """Bytes of the input, since nobody knows its rows; on a terminal only. Elsewhere just the notes."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self._progress, self._total = progress, total
        self._task = progress.add_task("reading", total=None, rows="", rate="")
        self._recent: deque[tuple[float, int]] = deque()
        self._read = 0
        self._told_waiting = False

    def reads(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._read = row.end
            yield row

    def begins(self, rows: int) -> None:
        """Behind what an earlier run did, so that this one's rate is its own."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(
            "classifying", total=self._total, completed=self._read, rows=f"{rows:,} rows", rate=""
        )
        self._recent.append((monotonic(), rows))

    def done(self, rows: int, end: int) -> None:
        now = monotonic()
        while len(self._recent) > 1 and now - self._recent[0][0] > _RATE_SECONDS:
            self._recent.popleft()
        then, before = self._recent[0]
        self._recent.append((now, rows))
        self._progress.update(
            self._task,
            completed=end,
            rows=f"{rows:,} rows",
            rate=f"{(rows - before) / max(now - then, 1e-3):,.0f} rows/s",
        )

    def waits(self, why: str | None) -> None:
        """From the threads of the calls."""
        if not self._progress.disable:
            self._progress.update(self._task, description="classifying" if why is None else f"waiting: {why[:60]}")
        elif why is not None and not self._told_waiting:
            note(f"waiting: {why}")
        self._told_waiting = why is not None

    def says(self, message: str) -> None:
        if self._progress.disable:
            note(message)
        else:
            self._progress.console.print(escape(message), soft_wrap=True)


@contextmanager
def _bar(total: int | None, *, shown: bool) -> Iterator[_Bar]:
    console = stderr()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, redirect_stdout=False) as progress:
        yield _Bar(progress, total)
