"""A person's browser, as far as HTTP goes: a session by cookie, and forms that come from our own pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from typing import Any

import httpx2
from api_kit import Api
from fastapi.testclient import TestClient

OWN = {"Sec-Fetch-Site": "same-origin"}


@dataclass
class Person:
    """Somebody with a key."""

    client: TestClient
    headers: dict[str, str]  # as a program would send the same key

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=headers, follow_redirects=False)

    def post(self, path: str, data: Mapping[str, Any] | None = None, **more: Any) -> httpx2.Response:
        return self.client.post(path, data=data or {}, headers=OWN, follow_redirects=False, **more)

    @property
    def key_id(self) -> str:
        return "key_" + self.headers["Authorization"].split("_")[1]


def visitor(api: Api) -> TestClient:
    """A browser of its own, without a session."""
    return TestClient(api.app, raise_server_exceptions=False)


def log_in(api: Api, *scopes: str) -> Person:
    """A new key's owner, logged in; every scope when none is named."""
    person = Person(visitor(api), api.key(*scopes))
    answer = person.post("/console/login", {"key": person.headers["Authorization"].removeprefix("Bearer ")})
    assert answer.status_code == 303, answer.text
    return person


def words(response: httpx2.Response) -> str:
    """What a page says, without its tags."""
    text = re.sub(r"<(style|script|title).*?</\1>", " ", response.text, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


class Markup(HTMLParser):
    """What a page loads and links, what it has inline, and the fields of its forms."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.inline: list[str] = []
        self.ids: list[str] = []
        self.fields: list[tuple[str, str]] = []
        self._area: str | None = None
        self.feed(response.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in ("script", "link", "img"):
            self.loaded += [values[name] for name in ("src", "href") if name in values]
        elif "href" in values:
            self.links.append(values["href"])
        self.links += [values[name] for name in ("action", "hx-get", "hx-post", "sse-connect") if name in values]
        if (tag == "script" and "src" not in values) or tag == "style":
            self.inline.append(tag)
        self.inline += [
            name for name in values if name.startswith(("on", "hx-on", "hx-vals", "hx-vars")) or name == "style"
        ]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "input" and "name" in values and values.get("type") not in ("file", "checkbox", "submit"):
            self.fields.append((values["name"], values.get("value", "")))
        if tag == "textarea":
            self._area = values.get("name")
            self.fields.append((self._area or "", ""))

    def handle_data(self, data: str) -> None:
        if self._area is not None:
            name, before = self.fields[-1]
            self.fields[-1] = (name, before + data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea":
            self._area = None

    def form(self, **changes: Any) -> dict[str, Any]:
        """The fields as the browser would send them, several of one name as a list."""
        sent: dict[str, Any] = {}
        for name, value in self.fields:
            sent.setdefault(name, []).append(value)
        return {name: values[0] if len(values) == 1 else values for name, values in sent.items()} | changes
