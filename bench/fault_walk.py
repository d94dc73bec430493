"""What a deployment answers, asked whole: every GET of its API and of its console's pages, and all that it refuses."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx2
from pypdf import PdfReader
from starlette.routing import BaseRoute

from app import console
from app.console.assets import asset
from bench.fault_site import Api

_MORE = {"/console/evidence": [{}, {"verify": "true"}]}
"""Queries of the console's pages that show more than the page without one."""


class Asked:
    """Calls the API and keeps every response whole, with what is compressed in it."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.said: list[bytes] = []
        self.routes: dict[str, Sequence[Mapping[str, str]]] = {}  # GET routes, as they are written, by a walk
        self.answered: set[str] = set()  # those that have answered 200

    def __call__(self, method: str, path: str, **body: Any) -> httpx2.Response:
        # No connection is kept: between two calls of one there may be just the time after which the server closes it.
        headers = {**body.pop("headers", {}), "Connection": "close"}
        answer = self.api.client.request(method, path, headers=headers, **body)
        self.keep(answer)
        return answer

    def keep(self, answer: httpx2.Response) -> None:
        headers = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        said = f"{answer.status_code}\n{headers}\n".encode() + answer.content
        self.said.append(b"\n".join([said, *unpacked(answer.content)]))

    @property
    def missed(self) -> list[str]:
        """GET routes that no walk has had an answer of: what these say was not searched."""
        return sorted(set(self.routes) - self.answered)


def unpacked(content: bytes) -> Iterator[bytes]:
    """What cannot be read off the bytes of a zip file or a PDF: the files in it, and what its pages say."""
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from map(archive.read, archive.namelist())
    elif content.startswith(b"%PDF"):
        reader = PdfReader(io.BytesIO(content))
        for page in reader.pages:
            yield "".join(page.extract_text().split()).encode()  # a long word is broken into lines
        for files in reader.attachments.values():
            yield from files
        yield json.dumps({name: str(value) for name, value in (reader.metadata or {}).items()}).encode()


# --- what is answered ------------------------------------------------------------------------------------------------


def log_in(asked: Asked, key: str) -> None:
    """For the console's pages."""
    asked("POST", "/console/login", data={"key": key}, headers={"Sec-Fetch-Site": "same-origin"})


def get_routes(document: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, str]]]:
    """Every GET route of an OpenAPI document and of the console, which is in none, and the queries to ask it with."""
    found: dict[str, Sequence[Mapping[str, str]]] = {
        path: _formats(document, item["get"]) for path, item in document["paths"].items() if "get" in item
    }
    return found | {path: _MORE.get(path, [{}]) for path in _pages(console.router.routes)}


def walk(
    asked: Asked, shared: Mapping[str, str], each: Iterable[Mapping[str, str]], *, without: Collection[str] = ()
) -> None:
    """GET every route of a server that is logged in to: once, or for ``each`` where its address names one of them.

    ``without``: formats that are left out.
    """
    everybody = [{**shared, "name": asset("console.css").rpartition("/")[2], **one} for one in each]
    asked.routes = get_routes(asked("GET", "/openapi.json").json())
    for route, queries in asked.routes.items():
        for path in sorted({_filled(route, known) for known in everybody} - {""}):
            for query in (query for query in queries if query.get("format") not in without):
                if asked("GET", path, params=query).status_code == 200:
                    asked.answered.add(route)


def _pages(found: Iterable[BaseRoute]) -> Iterator[str]:
    for route in found:
        inner = getattr(route, "original_router", None)  # of an included router
        if inner is not None:
            yield from _pages(inner.routes)
        elif "GET" in (getattr(route, "methods", None) or ()):
            yield str(getattr(route, "path", None))


def _formats(document: Mapping[str, Any], operation: Mapping[str, Any]) -> list[dict[str, str]]:
    for parameter in operation.get("parameters", []):
        if parameter["name"] == "format":
            schema = parameter["schema"]
            named = schema.get("$ref", "").rpartition("/")[2]
            return [{"format": kind} for kind in document["components"]["schemas"].get(named, schema)["enum"]]
    return [{}]


def _filled(route: str, known: Mapping[str, str]) -> str:
    """Its address; empty where a part of it is not known."""
    if not set(re.findall(r"\{(\w+)\}", route)) <= set(known):
        return ""
    return re.sub(r"\{(\w+)\}", lambda part: known[part[1]], route)


# --- what is refused -------------------------------------------------------------------------------------------------


def ask_badly(asked: Asked, canaries: tuple[str, str]) -> None:
    """Everything that is refused, with the canary in the place that is wrong."""
    text = " ".join(canaries)
    long = f"{text} very " * 400
    for body in (
        {"forget_texts": [{"text": text, "label": text}]},
        {"forget_texts": [{"text": text, text: text}]},
        {"forget_texts": [{"text": long}]},
        {"forget_texts": [{"text": [text]}]},
        {"forget_texts": text},
        {"forget_texts": [text], "options": {text: text}},
        {"forget_texts": [text], "options": {"learning_rate": text}},
    ):
        asked("POST", "/unlearn-requests", json=body)
    for path in ("/unlearn-requests", "/classify"):
        asked("POST", path, content=f'{{"forget_texts": ["{text}", "text": "{text}'.encode())
        asked("POST", path, content=json.dumps({"text": text}), headers={"Content-Type": "text/plain"})
    asked("POST", "/classify", json={"texts": [text, long]})
    asked("POST", "/classify", json={"text": {text: text}})
