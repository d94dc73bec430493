"""What the command line prints: results on stdout, everything else (bars, hints, errors) on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from typer.core import TyperGroup

from app.errors import LetheonError
from app.pull import Report
from letheon_client import Event, LetheonClientError, Unauthenticated, Unreachable
from models.errors import ModelError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def stderr() -> Console:
    """Made when used: a console keeps the stream that it found when it was made."""
    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    # Without a terminal rich assumes 80 columns and would break ids in two.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def emit(document: Any) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")


def note(message: str) -> None:
    stderr().print(escape(message), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "id")
    for row in rows:
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    stdout().print(table)


class CommandGroup(TyperGroup):
    """Turns the errors that are made for people into one line on stderr and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LetheonError as error:
            fail(error.detail)
        except LetheonClientError as error:
            fail(told(error))
        except ModelError as error:
            fail(str(error))
        except ValidationError as error:  # of the settings; without the value, which may be a secret
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            fail(f"configuration: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
        except SettingsError as error:  # a list that is not JSON
            fail(f"configuration: {error}")
        except UnicodeEncodeError:  # half a surrogate pair, or a key that is no ASCII
            fail("a text, key or option holds a character that cannot be sent")
        except OSError as error:  # a file that is missing, a folder that is not writable, a full disk
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}")


def told(error: LetheonClientError) -> str:
    """The error in one line, with what to do about it on a command line."""
    if isinstance(error, Unauthenticated):
        return f"{error}; set LETHEON_API_KEY to a key of `letheon keys create`"
    if isinstance(error, Unreachable) and not error.sent:
        return f"{error}: start one with `letheon serve`, or set LETHEON_URL to where it runs"
    return str(error)


def fail(message: str) -> None:
    """Print the error line and leave with status 1."""
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(1)


def bar(*extra: ProgressColumn) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), *(extra or (MofNCompleteColumn(),)), TimeElapsedColumn()]
    return Progress(*columns, console=stderr())


@contextmanager
def byte_bar() -> Iterator[Report]:
    """A reporter for ``app.pull``: a bar for each thing that is done."""
    with bar(DownloadColumn()) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield report


class RequestBar:
    """The bar of one erasure request, fed with its events."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("submitted", total=None)

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.type == "state":
            self._progress.update(self._task, description=str(data.get("state")))
        elif event.type == "progress":
            text = str(data.get("phase", "training"))
            figures = (("loss", "loss", "{:.3f}"), ("forget_abstain", "abstain", "{:.0%}"))
            for key, name, form in (*figures, ("retain_accuracy", "retain", "{:.0%}")):
                if isinstance(data.get(key), int | float):
                    text += f"  {name} {form.format(data[key])}"
            self._progress.update(
                self._task, description=text, completed=data.get("step", 0), total=data.get("total_steps")
            )


@contextmanager
def request_bar() -> Iterator[RequestBar]:
    with bar() as progress:
        yield RequestBar(progress)


def percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"
