"""Makes the reference pages out of the code: settings, command line, HTTP API, problems, Python client.

python -m docs.generate            # write those that have changed
python -m docs.generate --check    # only name them, and exit with status 1 if there are any
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AliasChoices

import letheon_client
from app import cli, settings
from app.settings import Settings
from docs.generate_api import api_page, problems_page
from docs.markdown import MADE, code, docstring, either, sentence, table

DOCS = Path(__file__).resolve().parent

# --- settings --------------------------------------------------------------------------------------------------------

API = {
    *("host", "port", "max_connections", "first_key", "max_body_bytes", "max_held_body_bytes", "body_seconds"),
    *("max_forget_texts", "prefix_cache_bytes", "compile"),
    *("max_classify_texts", "max_training_steps", "max_queued_texts", "max_batch_texts", "classify_deadline_seconds"),
    *("rate_per_minute", "classify_texts_per_minute", "requests_per_day", "texts_per_day", "active_prompts"),
    "max_event_streams",
    *("revoke_needs_two", "deadline_months", "dry_run_seconds", "export_prompts"),
    *("console_session_hours", "active_set_poll_seconds"),
}
WORKER = {
    *("idempotency_hours", "audit_checkpoint_seconds", "webhook_timeout_seconds", "webhook_attempts"),
    *("webhook_log_days", "precision", "beta", "learning_rate", "seed", "training_deadline_seconds"),
    *("checkpoint_seconds", "max_retain_drop", "max_class_drop", "max_neighbour_drop", "max_prompt_norm"),
    *("check_retain_rows", "max_tries", "held_out", "lease_seconds", "heartbeat_seconds"),
    *("reaper_seconds", "max_attempts"),
}
"""What one kind of process alone reads. Everything else: set it alike for both."""

OTHERS = [
    ("LETHEON_URL", "command line", "Where the server is; several replicas separated by commas. Default: this host."),
    ("LETHEON_API_KEY", "command line", "The key to send. Read from the environment only, never from `.env`."),
    ("LETHEON_BIND", "compose", "Address that the gateway's port is bound to. Default `127.0.0.1`."),
    ("POSTGRES_PASSWORD", "compose", "Of the database's user; letters and digits."),
    ("PIP_ARGS", "compose", "Options for pip while the image is built."),
    ("LETHEON_RAY_MIN_REPLICAS", "Ray Serve", "Replicas that always run. This one and its like: [Ray Serve][ray]."),
    ("LETHEON_RAY_MAX_REPLICAS", "Ray Serve", "Replicas at most."),
    ("LETHEON_RAY_TARGET", "Ray Serve", "Requests in progress per replica to scale towards."),
    ("LETHEON_RAY_MAX_ONGOING", "Ray Serve", "Requests in progress per replica at most."),
    ("LETHEON_RAY_CPUS", "Ray Serve", "CPUs of a replica."),
    ("LETHEON_RAY_GPUS", "Ray Serve", "GPUs of a replica; may be a fraction."),
    ("OTEL_…", "API, worker", "OpenTelemetry's own, with `LETHEON_TRACES`: [traces](metrics.md#traces)."),
    ("FORWARDED_ALLOW_IPS", "API", "uvicorn's own: proxies whose `X-Forwarded-…` are believed."),
    ("HF_HOME", "API, worker", "Where models and data sets of a hub are kept; the hub library's own."),
    ("OMP_NUM_THREADS", "API, worker", "Threads of torch on a CPU."),
    ("LETHEON_FAILPOINT", "tests", "Kills or stops a process at a named point. Not for production."),
    ("LETHEON_EXIT_WITH_PARENT", "internal", "Set by `letheon serve` for its worker."),
    ("LETHEON_TEST_POSTGRES", "tests", "URL of a PostgreSQL for the test suite."),
    ("LETHEON_TEST_REDIS", "tests", "URL of a Redis for the test suite."),
    ("LETHEON_TEST_HAPROXY", "tests", "The `haproxy` to test the gateway with."),
]
"""Variables that are no settings."""

_TYPES = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "bool": "`true` or `false`",
    "Path": "path",
    "SecretStr": "secret",
    "list[str]": "JSON list",
    "list[SecretStr]": "JSON list of secrets",
}


def settings_page() -> str:
    page = [
        MADE,
        "# Settings\n\n",
        "Every setting is an environment variable, or a line of the file `.env` in the folder where the command runs; "
        "the environment comes first. A value that is not allowed ends the start with one line that names the setting "
        "and not the value. All processes of a deployment should have the same; *read by* says which of them look at "
        "it: the API (`letheon serve`), the worker (`letheon worker`, and the one that `letheon serve` starts), or "
        "both. The command line reads what it needs to find database and server.\n\n",
    ]
    for title, intro, names in sections():
        rows = [(variable(name), description(name), value(name), reader(name)) for name in names]
        page += [f"## {title}\n\n", f"{intro}\n\n" if intro else ""]
        page.append(table(("variable", "what it does", "value", "read by"), rows))
    page.append("## Other variables\n\nThese are no settings, so they are not read from `.env` by Letheon itself.\n\n")
    page.append(table(("variable", "read by", "what it does"), [(code(name), who, what) for name, who, what in OTHERS]))
    return "".join(page) + "[ray]: deployment.md#ray-serve\n"


def sections() -> Iterator[tuple[str, str, list[str]]]:
    """Title, introduction and fields of each part of ``app/settings.py``: a comment that stands alone begins one."""
    title, names = "", list[str]()
    for line in Path(settings.__file__).read_text(encoding="utf-8").splitlines():
        comment, field = re.fullmatch(r"    # (.+)", line), re.match(r"    (\w+): ", line)
        if comment:
            if names:
                yield *_title(title), names
            title, names = comment[1], []
        elif field and field[1] in Settings.model_fields:
            names.append(field[1])
    if names:  # comments of functions further down begin nothing
        yield *_title(title), names


def _title(comment: str) -> tuple[str, str]:
    title, _, intro = comment.partition(". ")
    return title.removesuffix("."), re.sub(r"\bdecision (\d+)", _decision, intro)


def _decision(found: re.Match[str]) -> str:
    (path,) = (DOCS / "decisions").glob(f"{int(found[1]):04d}-*.md")
    return f"[decision {found[1]}](decisions/{path.name})"


def variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return either([code(choice) for choice in alias.choices[::-1]])
    return code(f"LETHEON_{name.upper()}")


def description(name: str) -> str:
    found = Settings.model_fields[name].description
    if not found:
        raise ValueError(f"the setting {name} has no description")
    return found


def value(name: str) -> str:
    """What it may be, and its default."""
    field = Settings.model_fields[name]
    return f"{sentence(', '.join(filter(None, [_kind(field.annotation), limits(field.metadata)])))} {_default(name)}"


def _kind(annotation: Any) -> str:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return either([code(member.value) for member in annotation])
    if kinds and all(isinstance(kind, str) for kind in kinds):
        return either([code(kind) for kind in kinds])
    if kinds and not str(annotation).startswith("list["):
        (annotation,) = kinds
    name = annotation.__name__ if annotation.__class__ is type else str(annotation)
    return _TYPES[re.sub(r"\b\w+\.", "", name)]


def limits(metadata: list[Any]) -> str:
    """``1 to 12``, ``above 0``, …"""
    found = {type(limit): limit for limit in metadata}
    low = f"{found[Ge].ge:,}" if Ge in found else None
    high = f"{found[Le].le:,}" if Le in found else f"{found[Lt].lt:,}" if Lt in found else None
    if low is not None:
        return f"{low} to {high}" if high is not None else f"at least {low}"
    above = f"above {found[Gt].gt:,}" if Gt in found else ""
    return ", ".join(filter(None, [above, f"at most {high}" if high is not None else ""]))


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if default is None:
        return "Default: unset."
    if default in ("", []):
        return "Default: empty."
    if isinstance(default, list):
        default = str(default).replace("'", '"')
    if isinstance(default, bool):
        default = str(default).lower()
    size = f" ({default // 2**20} MiB)" if name.endswith("_bytes") else ""
    return f"Default: {code(default)}{size}."


def reader(name: str) -> str:
    return "API" if name in API else "worker" if name in WORKER else "API, worker"


# --- the command line ------------------------------------------------------------------------------------------------


def cli_page() -> str:
    root = typer.main.get_command(cli.app)
    page = [
        MADE,
        "# Command line\n\n",
        "`letheon COMMAND --help` says the same. Results go to stdout, bars, hints and errors to stderr; `--json` "
        "makes stdout one JSON document. Exit status 0 is success, 1 an error in one line, 2 a wrong command line, 130 "
        "an interruption; others are named below. `requests`, `classify`, `prompts`, `active-sets`, `webhooks` and "
        "`receipt get` talk to a server (`LETHEON_URL`, `LETHEON_API_KEY`); all else works on the files and the "
        "database that are [configured](settings.md) where the command runs.\n\n",
    ]
    for path, command in commands(root, "letheon"):
        page.append(f"{'###' if path.count(' ') > 1 else '##'} {path}\n\n{command_help(path, command)}")
    return "".join(page)


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, groups first."""
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")


def command_help(path: str, command: Any) -> str:
    shown = f"{inspect.cleandoc(command.help or '')}\n\n".replace("``", "`")
    if hasattr(command, "commands"):
        return shown
    params = [param for param in command.params if param.name != "help"]
    named = [param for param in params if param.param_type_name == "argument"]
    usage = [path, *(["[OPTIONS]"] if len(named) < len(params) else []), *(_metavar(param) for param in named)]
    rows = [(code(_metavar(param)), _about(param)) for param in named if getattr(param, "help", None)]
    for param in params:
        if param.param_type_name == "option":
            names = "`, `".join([*param.opts, *param.secondary_opts])
            takes = "" if param.is_flag else f" {_takes(param)}"
            rows.append((f"`{names}`{takes}", _about(param)))
    return f"```text\n{' '.join(usage)}\n```\n\n{shown}" + (table(("", ""), rows) if rows else "")


def _metavar(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[]")
    name += "..." if param.nargs == -1 else ""
    return name if param.required else f"[{name}]"


def _takes(param: Any) -> str:
    """What an option's value may be."""
    kind = param.type_descriptor.annotation
    kind = get_args(kind)[0] if str(kind).startswith("list[") else kind
    if not isinstance(kind, type):
        return either([code(choice) for choice in get_args(kind)])
    if issubclass(kind, Enum):
        return either([code(choice.value) for choice in kind])
    word = {int: "number", float: "number", str: "text", Path: "path"}[kind]
    bounds = limits([Ge(param.min)] * (param.min is not None) + [Le(param.max)] * (param.max is not None))
    return f"{word}, {bounds}" if bounds else word


def _about(param: Any) -> str:
    said = [sentence(getattr(param, "help", None) or "")]
    default = getattr(param.default, "value", param.default)
    if param.required:
        said.append("Required.")
    elif param.param_type_name == "option" and not (param.is_flag or callable(default) or default in (None, "", ())):
        said.append(f"Default: {code(default)}.")
    return " ".join(filter(None, said))


# --- the Python client -----------------------------------------------------------------------------------------------


class _Plain:
    """An annotation as it was written."""

    def __init__(self, text: object) -> None:
        self._text = text if isinstance(text, str) else getattr(text, "__name__", str(text))

    def __repr__(self) -> str:
        return self._text


def client_page() -> str:
    client = letheon_client.Letheon
    page = [
        MADE,
        "# Python client: every method\n\n",
        "How to use it, what is retried and what is raised: [the Python client](client.md). `AsyncLetheon` has the "
        "same methods as coroutines, `iter_…` and `events` as asynchronous iterators. Answers are `TypedDict`s of "
        "`letheon_client.types`, field for field the [schemas of the API](api.md#schemas).\n\n",
        f"## Letheon\n\n{_signature('Letheon', client.__init__)}{docstring(client)}\n\n",
        f"{docstring(client.__init__)}\n\n",
    ]
    for name, method in vars(client).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            page.append(f"### {name}\n\n{_signature(name, method)}{docstring(method)}".rstrip("\n") + "\n\n")
    retry = letheon_client.Retry
    page.append(f"## Retry\n\n{_signature('Retry', retry.__init__)}{docstring(retry)}\n\n")
    page.append("`ONCE` is the one that asks every address once.\n\n## Errors\n\n")
    errors = [getattr(letheon_client, name) for name in letheon_client.__all__]
    page.append(
        table(
            ("class", "is a", "what it means"),
            (
                (code(kind.__name__), code(kind.__bases__[0].__name__), docstring(kind).split("\n\n")[0])
                for kind in errors
                if isinstance(kind, type) and issubclass(kind, Exception)
            ),
        )
    )
    return "".join(page).rstrip("\n") + "\n"


def _signature(name: str, function: Callable[..., Any]) -> str:
    found = inspect.signature(function)
    kept = [
        param.replace(annotation=_Plain(param.annotation)) if param.annotation is not param.empty else param
        for param in found.parameters.values()
        if param.name != "self"
    ]
    returns = found.return_annotation if name[0].islower() else found.empty
    shown = found.replace(
        parameters=kept, return_annotation=_Plain(returns) if returns is not found.empty else found.empty
    )
    line = f"{name}{shown}"
    if len(line) > 100:
        inner = ",\n    ".join(_parameters(shown))
        arrow = f" -> {_Plain(returns)!r}" if returns is not found.empty else ""
        line = f"{name}(\n    {inner},\n){arrow}"
    return f"```python\n{line}\n```\n\n"


def _parameters(found: inspect.Signature) -> list[str]:
    parts: list[str] = []
    for param in found.parameters.values():
        if param.kind is param.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(str(param))
    return parts


# --- all pages -------------------------------------------------------------------------------------------------------

PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "api.md": api_page,
    "problems.md": problems_page,
    "client-reference.md": client_page,
}


def stale() -> dict[str, str]:
    """Name → what it should hold, of the pages that differ from the code."""
    made = {name: page().rstrip("\n") + "\n" for name, page in PAGES.items()}
    return {
        name: text
        for name, text in made.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != text
    }


def main(arguments: list[str]) -> int:
    found = stale()
    for name, text in found.items():
        print(f"docs/{name}")
        if "--check" not in arguments:
            (DOCS / name).write_text(text, encoding="utf-8")
    return 1 if found and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
