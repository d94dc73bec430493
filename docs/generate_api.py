"""The pages on the HTTP API: operations and schemas, of the OpenAPI document; kinds of problems, of the exceptions."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import app
from app import report
from app.errors import LetheonError
from app.main import create_app
from app.problems import MEDIA_TYPE, URN
from app.settings import Settings
from docs.markdown import MADE, code, docstring, either, sentence, table

TAGS = {
    "unlearn requests": "Erasure requests",
    "classify": "Classification",
    "webhooks": "Webhooks",
    "admin": "Prompts and active sets",
    "audit": "Audit log",
    "health": "Health",
    "metrics": "Metrics",
}
FAILURES = report.FAILURES | {
    "expired": "its date of expiry came before it was in force",
    "internal": "what nobody foresaw: the worker's log has the kind of error and the place",
    "key-destroyed": "a backup was restored from before its texts were shredded",
    "mode-mismatch": "a prompt in force was trained for the other mode",
}
HIDDEN = {"Problem", "FieldError"}
"""Schemas that have a page of their own."""
ANYWHERE = {
    "head-timeout": "Before a request is one.",
    "head-too-large": "Before a request is one.",
    "cross-site": "The console's pages that change something.",
    "internal": "Any operation; the server's log has it under the answer's `X-Request-ID`.",
    "mode-mismatch": "Operations that name `not-ready`.",
    "model": "Operations that ask the model.",
    "vault": "Operations that read what is sealed.",
}
"""Where a client may meet a kind that no operation names."""
INSIDE = {
    "bad-failpoint": "The start of a server or worker with a wrong `LETHEON_FAILPOINT` (tests only).",
    "client-gone": "The access log, as 499: the client hung up, so nobody hears an answer.",
    "lease-lost": "Inside a worker: another one has taken its request over.",
    "missing-extra": "The start, where `LETHEON_TRACES` is set and the extra `otel` is not installed.",
    "not-configured": "The start of a server or worker, and `letheon` commands; names the command that helps.",
    "output": "`letheon classify --output`.",
    "pull-failed": "`letheon model pull`, `letheon data pull`.",
    "receipt-invalid": "`letheon receipt verify`; the console's page for it shows the words.",
    "stale-active-set": "Inside a worker, which then checks its prompt again.",
}
"""Kinds that are no answer of the API, and where they are met instead: a test follows the calls of the handlers."""


def document() -> dict[str, Any]:
    """The document of a server with the default settings, whatever is set here."""
    found: dict[str, Any] = create_app(Settings.model_construct()).openapi()
    return found


def operations(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def anchor(title: str) -> str:
    """Of a heading, as GitHub and the site have it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# --- operations and schemas ------------------------------------------------------------------------------------------


def api_page() -> str:
    found = document()
    page = [
        MADE,
        "# HTTP API\n\n",
        "A running server shows the same under `/docs`, to be tried out, and as an OpenAPI document under "
        "`/openapi.json`. Send `Authorization: Bearer lth_…` and JSON; one of the scopes that are named is enough, and "
        "[who may do what](access.md) says more. Limits are those of the default [settings](settings.md). An error is "
        "a [problem](problems.md): each operation names the kinds that it may end in.\n\n",
        table(
            ("operation", "what it does"),
            (
                (f"[{code(f'{method} {path}')}](#{anchor(f'{method} {path}')})", _first(operation))
                for method, path, operation in operations(found)
            ),
        ),
    ]
    for tag, title in TAGS.items():
        page.append(f"## {title}\n\n")
        page += [
            _operation(method, path, operation)
            for method, path, operation in operations(found)
            if operation["tags"] == [tag]
        ]
    page.append(
        "## Figures of a request\n\nUnder `metrics` of its record, `checks` of its receipt; shares, but for "
        "`membership_auc`, an area (in the record: `membership`).\n\n"
    )
    page.append(table(("name", "what it is"), ((code(name), said[0]) for name, said in report.FIGURES.items())))
    page.append("## Schemas\n\nFields without *required* may be left out of a body, and null in an answer.\n\n")
    for name, schema in sorted(found["components"]["schemas"].items()):
        if name not in HIDDEN:
            page.append(f"### {name}\n\n{_schema(schema)}")
    return "".join(page)


def _first(operation: dict[str, Any]) -> str:
    first = operation.get("description", "").split("\n\n")[0]
    return sentence(re.split(r"\. (?=[A-Z])", first)[0])


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    said = operation.get("description", "").replace("``", "`")
    part = [f"### `{method} {path}`\n\n{said}\n\n"]
    if "Scope:" not in said:
        part.append("Scope: none, and no key.\n\n" if not operation.get("security") else "")
    rows = [
        (
            code(given["name"]),
            f"{given['in']}{', required' if given.get('required') and given['in'] != 'path' else ''}",
            _about(given),
        )
        for given in operation.get("parameters", [])
    ]
    if rows:
        part.append(table(("parameter", "in", "what it is"), rows))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        part.append(f"Body: {_kind(body)}.\n\n")
    part.append(table(("answer", ""), list(_answers(operation["responses"]))))
    return "".join(part)


def _about(given: dict[str, Any]) -> str:
    parts = [sentence(_kind(given["schema"])), _default(given["schema"]), given.get("description", "")]
    return " ".join(filter(None, parts))


def _answers(responses: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for status, response in sorted(responses.items()):
        content = response.get("content", {})
        problems = content.get(MEDIA_TYPE, {}).get("examples", {})
        if problems:
            yield status, ", ".join(f"[{code(name)}](problems.md#{anchor(name)})" for name in problems)
            continue
        said = response.get("description", "")
        said = "" if said in ("Successful Response", "Validation Error") else sentence(said)
        kinds = [
            _kind(how["schema"]) if name == "application/json" and how.get("schema") else code(name)
            for name, how in content.items()
        ]
        headers = ", ".join(code(name) for name in response.get("headers", {}))
        yield status, " ".join(filter(None, [said, sentence(either(kinds)) if kinds else "", _headers(headers)]))


def _headers(names: str) -> str:
    return f"Headers: {names}." if names else ""


def _schema(schema: dict[str, Any]) -> str:
    said = schema.get("description", "").replace("``", "`")
    part = f"{said}\n\n" if said else ""
    if "properties" not in schema:
        return f"{part}{_kind(schema)}\n\n"
    required = set(schema.get("required", ()))
    rows = [
        (
            code(name),
            _kind(field) + (", required" if name in required else ""),
            " ".join(filter(None, [field.get("description", ""), _default(field)])),
        )
        for name, field in schema["properties"].items()
    ]
    return part + table(("field", "type", "what it is"), rows)


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})" if name not in HIDDEN else f"[{name}](problems.md)"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = list(dict.fromkeys(_kind(part) for part in schema[several]))
            return either([kind for kind in kinds if kind != "null"] + (["null"] if "null" in kinds else []))
    if "enum" in schema or "const" in schema:
        return either([code(choice) for choice in schema.get("enum", [schema.get("const")])])
    kind = schema.get("type", "anything")
    if "prefixItems" in schema:
        return code(f"[{', '.join(_kind(part) for part in schema['prefixItems'])}]")
    if kind == "array":
        word = f"list of {_kind(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        word = f"object of {_kind(schema['additionalProperties'])}"
    else:
        word = {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(kind, kind)
    word = {"date-time": "time", "binary": "bytes"}.get(schema.get("format", ""), word)
    return ", ".join(filter(None, [word, *_bounds(schema)]))


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    for low, high, unit in (
        ("minimum", "maximum", ""),
        ("minItems", "maxItems", " entries"),
        ("minLength", "maxLength", " characters"),
    ):
        least, most = schema.get(low), schema.get(high)
        if least is not None and most is not None:
            yield f"{least:,} to {most:,}{unit}"
        elif least is not None:
            yield f"at least {least:,}{unit}"
        elif most is not None:
            yield f"at most {most:,}{unit}"
    for limit, words in (("exclusiveMinimum", "above"), ("exclusiveMaximum", "below")):
        if limit in schema:
            yield f"{words} {schema[limit]:,}"


def _default(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    return "" if default is None else f"Default: {code(str(default).lower() if default in (True, False) else default)}."


# --- problems --------------------------------------------------------------------------------------------------------


def kinds() -> dict[str, type[LetheonError]]:
    """Every kind of error of the service by its code, those of modules that are imported late included."""
    for module in pkgutil.walk_packages(app.__path__, "app."):
        importlib.import_module(module.name)
    found: dict[str, type[LetheonError]] = {}
    every: list[type[LetheonError]] = [LetheonError, *_below(LetheonError)]
    for kind in every:
        if not kind.__name__.startswith("_"):  # the framework's, which have a code each
            found.setdefault(kind.code, kind)
    return dict(sorted(found.items()))


def _below(base: type[LetheonError]) -> Iterator[type[LetheonError]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("app."):
            yield kind
            yield from _below(kind)


def problems_page() -> str:
    named = defaultdict(list)
    for method, path, operation in operations(document()):
        for response in operation["responses"].values():
            for name in response.get("content", {}).get(MEDIA_TYPE, {}).get("examples", {}):
                named[name].append(f"[{code(f'{method} {path}')}](api.md#{anchor(f'{method} {path}')})")
    found = kinds()
    answers = {name: kind for name, kind in found.items() if name not in INSIDE}
    page = [
        MADE,
        "# Problems\n\n",
        "Every error is an [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problem object, "
        f"`{MEDIA_TYPE}`: `type` is `{URN}` and the code, `title` and `status` as below, `detail` says what is wrong, "
        "`instance` is the path, `code` is the last part of `type`, and `errors` lists the fields that are wrong, each "
        "with `field`, `message` and, where one was passed, `limit`. Codes are stable; words are not. No problem "
        "repeats a value that was sent. 429 and 503 have `Retry-After`; a path or method that there is not is "
        "answered `not-found` or `method-not-allowed`.\n\n",
        table(
            ("code", "status", "title"),
            ((f"[{code(name)}](#{anchor(name)})", kind.status, kind.title) for name, kind in answers.items()),
        ),
    ]
    for name, kind in answers.items():
        page.append(f"## {name}\n\n{kind.status}. {sentence(kind.title)} {_about_kind(kind)}".rstrip() + "\n\n")
        where = named.get(name)
        page.append(f"Operations: {', '.join(where)}.\n\n" if where else f"{ANYWHERE[name]}\n\n")
    page.append(
        "## Not answers of the API\n\n"
        "These end a command or a start with one line, or stay inside the service. No client is answered with them.\n\n"
    )
    rows = ((code(name), f"{sentence(found[name].title)} {_about_kind(found[name])}", INSIDE[name]) for name in INSIDE)
    page.append(table(("code", "what it means", "where it is met"), rows))
    page.append(
        "## Why a request failed\n\n"
        "A request that ended as `failed` has a `failure`, with words in `detail` and one of these in `code`:\n\n"
    )
    page.append(table(("code", "what happened"), ((code(name), said) for name, said in sorted(FAILURES.items()))))
    return "".join(page)


def _about_kind(kind: type[LetheonError]) -> str:
    return docstring(kind) if kind.__doc__ and kind.__doc__ != LetheonError.__doc__ else ""
