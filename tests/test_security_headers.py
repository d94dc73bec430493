"""Headers on every kind of answer, and a reference page that loads nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import pytest
from api_kit import Api, listening, running
from fastapi.testclient import TestClient

from app.security_headers import API_POLICY

ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("headers")
    with running(f"sqlite:///{folder}/letheon.db", folder) as api:
        yield api


def test_every_answer_has_them(api: Api) -> None:
    @api.app.get("/boom")
    def boom() -> None:
        raise RuntimeError

    headers = api.key()
    made = api.client.post("/unlearn-requests", json={"forget_texts": ["good"]}, headers=headers)
    request_id = made.json()["id"]
    answers = [
        made,
        api.client.post(f"/unlearn-requests/{request_id}/cancel", headers=headers),
        api.client.get(f"/unlearn-requests/{request_id}/events", headers=headers),  # a stream
        api.client.post("/classify", json={"text": "good"}, headers=headers),
        api.client.get("/admin/prompts", headers=headers),
        api.client.get("/admin/prompts"),
        api.client.get("/nothing/here"),
        api.client.put("/classify"),
        api.client.post("/classify", content=b"x" * 30_000, headers=headers),
        api.client.post("/classify", content=b"{", headers={"Content-Type": "application/json"} | headers),
        api.client.get("/boom"),
        api.client.get("/livez"),
        api.client.get("/metrics", headers=headers),
        api.client.get("/openapi.json"),
        api.client.get("/docs/start.js"),
        api.client.get("/docs/nothing.js"),
    ]
    assert [a.status_code for a in answers] == [
        202,
        200,
        200,
        200,
        200,
        401,
        404,
        405,
        413,
        400,
        500,
        200,
        200,
        200,
        200,
        404,
    ]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in ALWAYS} == ALWAYS, answer.request.url
        assert answer.headers.get_list("content-security-policy") == [API_POLICY]
        assert "strict-transport-security" not in answer.headers


def test_strict_transport_behind_tls_only(api: Api) -> None:
    with_tls = TestClient(api.app, base_url="https://testserver")
    assert with_tls.get("/livez").headers["strict-transport-security"] == "max-age=31536000"


@pytest.mark.parametrize(("trusted", "expected"), [("127.0.0.1", True), ("192.0.2.1", False)])
def test_a_proxys_word_counts_where_it_is_trusted(
    trusted: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)  # uvicorn's own
    with listening(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as (url, _, _):
        answer = httpx2.get(f"{url}/livez", headers={"X-Forwarded-Proto": "https"}, trust_env=False)
    assert ("strict-transport-security" in answer.headers) is expected


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [value for name in ("src", "href") if (value := values.get(name))]
        self.inline += tag == "script" and "src" not in values
        self.inline += tag == "style" or any(name.startswith("on") or name == "style" for name in values)


def test_the_reference_page_is_whole_and_loads_nothing_from_elsewhere(api: Api) -> None:
    page = api.client.get("/docs")
    policy = {part.split()[0]: part.split()[1:] for part in page.headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'none'"] and policy["script-src"] == policy["connect-src"] == ["'self'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert {name: page.headers.get(name) for name in ALWAYS} == ALWAYS
    links = Links()
    links.feed(page.text)
    assert links.inline == 0, "the policy would keep it from running"
    sizes = {}
    for link in links.found:
        if link == "data:,":
            continue
        assert not re.match(r"(\w+:)?//", link)
        part = api.client.get(urljoin("/docs", link))
        assert part.status_code == 200
        sizes[link] = (part.headers["content-type"].split(";")[0], len(part.content))
    assert {link: kind for link, (kind, _) in sizes.items()} == {
        "docs/swagger-ui.css": "text/css",
        "docs/swagger-ui-bundle.js": "text/javascript",
        "docs/start.js": "text/javascript",
    }
    assert sizes["docs/swagger-ui-bundle.js"][1] > 1_000_000
    assert "SwaggerUIBundle=" in api.client.get("/docs/swagger-ui-bundle.js").text[:1000]
    start = api.client.get("/docs/start.js").text
    assert "persistAuthorization: false" in start and "validatorUrl: null" in start and '"openapi.json"' in start
    assert api.client.get("/redoc").status_code == 404
    assert api.client.get("/docs/..%2fcore.py").status_code == 404
