"""``letheon requests | classify``: commands that talk to a running server over HTTP."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from app import bulk, cli_bulk, cli_dry_run
from app.bulk_rows import TEXT_FIELDS, RowFormat, is_json_line
from app.cli_bulk import BulkOptions
from app.cli_output import CommandGroup, JsonOption, bar, emit, note, percent, print_table, request_bar
from app.errors import InvalidInput
from app.report_schemas import ReportFormat
from app.settings import get_settings
from letheon_client import ONCE, ForgetText, InvalidAddress, Letheon, Retry, TrainingOptions
from letheon_client.types import RequestFilter, RequestState, UnlearnRequest

CLASSIFY_BATCH = 64
_CLASSIFY_RETRY = Retry(first_delay=0.1)  # many texts wait for their turn

requests = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Erasure requests.")

FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="JSONL (strings or {text, label}) or plain lines; - reads standard input."),
]


def make_client(retry: Retry = ONCE) -> Letheon:
    """The client that LETHEON_URL and LETHEON_API_KEY describe. The key is never an option: `ps` would show it.

    A person is told at once what is wrong, and can type the command again. LETHEON_URL may name several replicas,
    separated by commas.
    """
    settings = get_settings()
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host  # noqa: S104
    if ":" in host:
        host = f"[{host}]"
    url = os.environ.get("LETHEON_URL") or f"http://{host}:{settings.port}"
    try:
        return Letheon(url.split(","), os.environ.get("LETHEON_API_KEY"), retry=retry)
    except InvalidAddress as error:
        raise InvalidInput(f"LETHEON_URL: {error}") from None


@requests.command("submit")
def submit(
    file: FileOption = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text to forget; repeatable. It stays in your shell's history: prefer --file -."),
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Kept with the request; no personal data here.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Training option, such as max_steps=200; repeatable.")
    ] = None,
    received: Annotated[
        str | None, typer.Option(help="When the person asked, such as 2026-11-20T09:30:00+01:00. Default: now.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When to revoke it by itself, such as 2027-01-31T00:00:00Z. Default: never.")
    ] = None,
    require_approval: Annotated[
        bool, typer.Option("--require-approval", help="Another person's key has to agree before it is in force.")
    ] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Your name for this call: run again with it, it makes no second request.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Follow the request until it is active or has ended.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do, and store nothing. Exit status 1 if it would fail.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask the server to forget texts. With --wait, exit status 1 unless the request becomes active."""
    items: list[str | ForgetText] = [*(text or []), *(read_texts(file) if file is not None else [])]
    if not items:
        raise InvalidInput("nothing to forget: give --file FILE, --file - (standard input) or --text TEXT")
    if dry_run:
        cli_dry_run.run(make_client(), items, parse_options(option or []), as_json=as_json)
        return
    with make_client() as client:
        request: UnlearnRequest = client.submit(
            items,
            reason=reason,
            options=parse_options(option or []),
            received_at=received,
            expires_at=expires,
            require_approval=require_approval,
            idempotency_key=idempotency_key,
        )
        if wait:
            request = follow(client, request["id"])
    if as_json:
        emit(request)
    else:
        print_request(request)
    if wait and request["state"] != "active":
        raise typer.Exit(1)


@requests.command("list")
def list_requests(
    state: Annotated[RequestState | None, typer.Option(help="Only requests in this state.")] = None,
    id_prefix: Annotated[str | None, typer.Option("--id", help="Only ids that begin so, such as req_019aa5.")] = None,
    asked_by: Annotated[str | None, typer.Option(help="Only what this API key asked for (its id).")] = None,
    received_from: Annotated[str | None, typer.Option(help="Received then or later: 2026-11-01T00:00:00Z.")] = None,
    received_before: Annotated[str | None, typer.Option(help="Received before that.")] = None,
    due_before: Annotated[str | None, typer.Option(help="Not yet in force or over, and due before that.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    cursor: Annotated[str | None, typer.Option(help="next_cursor of the page before.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Requests, newest first. All that is given must hold."""
    given = {
        "id_prefix": id_prefix,
        "api_key_id": asked_by,
        "received_from": received_from,
        "received_before": received_before,
        "due_before": due_before,
    }
    where = cast(RequestFilter, {name: value for name, value in given.items() if value is not None})
    with make_client() as client:
        page = client.list_requests(limit=limit, cursor=cursor, state=state, **where)
    if as_json:
        emit(page)
        return
    rows = [
        (r["id"], r["state"], r["num_texts"], r["created_at"][:19], r["failure"] and r["failure"]["code"], r["reason"])
        for r in page["items"]
    ]
    print_table(("id", "state", "texts", "created (UTC)", "failure", "reason"), rows)
    if page["next_cursor"]:
        note(f"more: --cursor {page['next_cursor']}")


@requests.command("show")
def show(
    request_id: str,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow it until it is active or has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """State, progress and figures of one request."""
    with make_client() as client:
        request = follow(client, request_id) if wait else client.get_request(request_id)
    emit(request) if as_json else print_request(request)


@requests.command("report")
def report(
    request_id: str,
    report_format: Annotated[
        ReportFormat, typer.Option("--format", help="html and pdf are single files, to be kept or printed.")
    ] = ReportFormat.JSON,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file. Default: stdout.")] = None,
) -> None:
    """What was asked, done and measured, in plain words around the signed receipt. There is one once it has ended."""
    with make_client() as client:
        data = client.report_file(request_id, report_format.value)
    if out is None:
        sys.stdout.buffer.write(data)
        return
    out.write_bytes(data)
    note(f"{out}: {len(data):,} bytes; letheon receipt extract {out} takes the signed receipt out of it")


@requests.command("cancel")
def cancel(request_id: str, as_json: JsonOption = False) -> None:
    """Cancel a request that is not active yet."""
    with make_client() as client:
        request = client.cancel(request_id)
    emit(request) if as_json else print_request(request)


@requests.command("approve")
def approve(request_id: str, as_json: JsonOption = False) -> None:
    """Agree to a request that awaits approval (scope `approve`, and not with the key that asked for it)."""
    with make_client() as client:
        request = client.approve(request_id)
    emit(request) if as_json else print_request(request)


@requests.command("reject")
def reject(
    request_id: str,
    reason: Annotated[str, typer.Option(help="Why; goes into the record.")],
    as_json: JsonOption = False,
) -> None:
    """End a request that awaits approval; its texts are destroyed."""
    with make_client() as client:
        request = client.reject(request_id, reason=reason)
    emit(request) if as_json else print_request(request)


def classify(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="JSONL, CSV, TSV (each also gzipped) or plain lines; - is standard input."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Stream to this .jsonl, .csv or .tsv file; - streams JSON lines to stdout."
        ),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Ask for confidence and scores (scope `scores`).")] = False,
    min_version: Annotated[
        int | None, typer.Option(min=0, help="Take answers by this version of the active set, or a later one, only.")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help=f"Column or field of the texts. Default: the first of {', '.join(TEXT_FIELDS)}."),
    ] = None,
    input_format: Annotated[
        RowFormat | None, typer.Option("--format", help="Of --file. Default: by its name, else by its first line.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help=f"Rows of one call. Default: {CLASSIFY_BATCH}.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=64, help=f"Calls in flight. Default: {bulk.CONCURRENCY}.")
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds to try again for, while the server is full, restarts or is gone. "
            f"Default: {bulk.PATIENCE_SECONDS:.0f}.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be classified.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again where the output is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Classify texts with the running server.

    Without --output: a table, or with --json one document, of up to 1,000 texts.

    With --output: any number of rows, in constant memory. A row is written as it was read, with the fields
    letheon_label, letheon_abstained, letheon_active_set_version (and letheon_confidence, letheon_scores), or with
    letheon_error where it cannot be classified; fields of these names in the input are an earlier run's and give way.
    CSV needs a header and keeps its columns; JSON lines written as CSV have the fields of the first 100 rows.

    Run the same command again after an interruption, of whatever kind: it goes on where it stopped. (Not with
    --overwrite, which begins again each time.) What it was asked is kept in OUTPUT.run.json.

    Exit status: 0 every row is answered, 1 stopped with an error, 3 done, but some rows have a letheon_error,
    130 interrupted.
    """
    if output is not None:
        if file is None or texts:
            raise InvalidInput("--output goes with --file, and not with texts as arguments")
        with make_client() as client:
            cli_bulk.classify_file(
                client,
                file,
                output,
                BulkOptions(scores, min_version, text_column, input_format),
                batch=batch or CLASSIFY_BATCH,
                window=concurrency or bulk.CONCURRENCY,
                patience=bulk.PATIENCE_SECONDS if patience is None else patience,
                strict=strict,
                overwrite=overwrite,
                as_json=as_json,
            )
        return
    if strict or overwrite or not (batch is concurrency is patience is None):
        raise InvalidInput("--batch, --concurrency, --patience, --strict and --overwrite go with --output")
    items = [*(texts or []), *(cli_bulk.few_texts(file, input_format, text_column) if file is not None else [])]
    if not items:
        raise InvalidInput("nothing to classify: give texts, --file FILE or --file - (standard input)")
    with make_client(_CLASSIFY_RETRY) as client, bar() as progress:
        task = progress.add_task("classifying", total=len(items), visible=len(items) > 64)
        answer = client.classify_many(
            items,
            scores=scores,
            min_version=min_version,
            batch=CLASSIFY_BATCH,
            on_done=lambda done: progress.update(task, completed=done),
        )
    if as_json:
        emit(answer)
        return
    columns = ["label", "text"]
    rows: list[list[object]] = [[r["label"], _shorten(t)] for r, t in zip(answer["results"], items, strict=True)]
    if scores:
        columns.insert(1, "confidence")
        for row, result in zip(rows, answer["results"], strict=True):
            row.insert(1, percent(result.get("confidence")))
    print_table(columns, rows)


def follow(client: Letheon, request_id: str) -> UnlearnRequest:
    """Show a bar until the request is active or has ended; on Ctrl-C, say how to come back to it."""
    try:
        with request_bar() as update:
            return client.wait(request_id, update)
    except KeyboardInterrupt:
        note(f"the request goes on; come back with: letheon requests show {request_id} --wait")
        raise typer.Exit(130) from None


def read_texts(path: Path) -> list[str | ForgetText]:
    """Texts of a file or of standard input: JSONL when the name or the first line says so, else plain lines.

    Raises InvalidInput naming the line, never its content.
    """
    name = "standard input" if str(path) == "-" else str(path)
    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InvalidInput(f"{name} is not UTF-8") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InvalidInput(f"{name} is empty")
    if path.suffix.lower() not in (".jsonl", ".ndjson") and not is_json_line(numbered[0][1]):
        return [line for _, line in numbered]
    items: list[str | ForgetText] = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidInput(f"{name}, line {number}: not JSON") from None
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            item: ForgetText = {"text": row["text"]}
            if row.get("label") is not None:
                item["label"] = row["label"]
            items.append(item)
        elif isinstance(row, str):
            items.append(row)
        else:
            raise InvalidInput(f"{name}, line {number}: needs a JSON string or an object with a text")
    return items


def parse_options(pairs: list[str]) -> TrainingOptions:
    """``name=value`` pairs; the value is JSON. Raises InvalidInput."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            options[name] = json.loads(value, parse_constant=_no_constant)
            json.dumps(options[name], allow_nan=False)  # 1e999 is read as infinite
        except ValueError:
            equals = ""
        if not equals or not name:
            raise InvalidInput("--option takes name=number, such as max_steps=200")
    return cast(TrainingOptions, options)  # the server says what is wrong with them


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def print_request(request: UnlearnRequest) -> None:
    rows: list[tuple[str, object]] = [
        ("id", request["id"]),
        ("state", request["state"] + (" (cancel requested)" if request["cancel_requested"] else "")),
        ("texts", request["num_texts"]),
        ("created", request["created_at"]),
        ("received", request.get("received_at")),
        ("due", f"{request.get('due_at') or ''}{' (overdue)' if request.get('overdue') else ''}"),
        ("expires", request.get("expires_at")),
        ("approval", _approval(request)),
        ("finished", request["finished_at"]),
        ("attempt", request["attempt"]),
    ]
    progress = request.get("progress") or {}
    if progress.get("total_steps"):
        rows.append(("step", f"{progress.get('step')} of {progress['total_steps']}"))
    for name, value in (request.get("metrics") or {}).items():
        rows.append((name, f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)))
    failure = request.get("failure")
    if failure:
        rows.append(("failure", f"{failure['code']}: {failure['detail']}"))
    print_table(("", "request"), rows)


def _approval(request: UnlearnRequest) -> str:
    if not request.get("approval_required"):
        return "not needed"
    if request.get("approved_by"):
        return f"by {request['approved_by']} at {request['approved_at']}"
    waits = request["state"] == "awaiting_approval"
    return f"missing: letheon requests approve {request['id']}" if waits else "needed once it is trained"


def _shorten(text: str, width: int = 100) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
