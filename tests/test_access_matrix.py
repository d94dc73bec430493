"""Every route × every scope. A route that is missing in the table fails: who adds one says here who may use it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api_kit import MARKER, Api, add_prompt, assert_problem, running, soft_prompt
from starlette.routing import BaseRoute

from app import keys, lifecycle
from app.lifecycle import ForgetText
from app.settings import Mode
from app.tables import ApiKey, utcnow

ROOT = Path(__file__).resolve().parent.parent
READS_ALL = {"admin", "auditor", "approve"}

OPEN = {
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/docs/{name}"),
}
"""What needs no key, and takes no notice of one."""

ALLOWED: dict[tuple[str, str], set[str]] = {
    ("POST", "/unlearn-requests"): {"requests"},
    ("GET", "/unlearn-requests"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/events"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/receipt"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/report"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/evidence"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/evidence/embedding.svg"): {"requests"} | READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/evidence/membership.svg"): {"requests"} | READS_ALL,
    ("POST", "/unlearn-requests/{request_id}/cancel"): {"requests", "admin"},
    ("POST", "/unlearn-requests/{request_id}/approve"): {"approve"},
    ("POST", "/unlearn-requests/{request_id}/reject"): {"approve"},
    ("POST", "/webhooks"): {"requests"} | READS_ALL,
    ("GET", "/webhooks"): {"requests"} | READS_ALL,
    ("GET", "/webhooks/{webhook_id}"): {"requests"} | READS_ALL,
    ("DELETE", "/webhooks/{webhook_id}"): {"requests"} | READS_ALL,
    ("GET", "/webhooks/{webhook_id}/deliveries"): {"requests"} | READS_ALL,
    ("POST", "/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"): {"requests"} | READS_ALL,
    ("POST", "/webhooks/{webhook_id}/test"): {"requests"} | READS_ALL,
    ("POST", "/classify"): {"classify"},
    ("GET", "/admin/prompts"): {"admin", "auditor"},
    ("GET", "/admin/prompts/{prompt_id}"): {"admin", "auditor"},
    ("GET", "/admin/prompts/{prompt_id}/export"): {"admin"},
    ("POST", "/admin/prompts/{prompt_id}/revoke"): {"admin"},
    ("POST", "/admin/prompts/{prompt_id}/revoke/withdraw"): {"admin"},
    ("GET", "/admin/active-sets"): {"admin", "auditor"},
    ("GET", "/admin/active-sets/{version}"): {"admin", "auditor"},
    ("POST", "/admin/active-sets/{version}/restore"): {"admin"},
    ("GET", "/admin/audit"): {"admin", "auditor"},
    ("GET", "/admin/audit/export"): {"admin", "auditor"},
    ("GET", "/admin/audit/checkpoint"): {"admin", "auditor"},
    ("GET", "/admin/audit/public-key"): {"admin", "auditor"},
    ("GET", "/metrics"): {"metrics"},
}
"""One of these scopes is enough."""

OTHERS: dict[tuple[str, str], set[str]] = {
    ("GET", "/unlearn-requests/{request_id}"): READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/events"): READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/receipt"): READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/report"): READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/evidence"): READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/evidence/embedding.svg"): READS_ALL,
    ("GET", "/unlearn-requests/{request_id}/evidence/membership.svg"): READS_ALL,
    ("POST", "/unlearn-requests/{request_id}/cancel"): {"admin"},
    ("POST", "/unlearn-requests/{request_id}/approve"): {"approve"},
    ("POST", "/unlearn-requests/{request_id}/reject"): {"approve"},
}
"""Where a request is named: with one of these scopes, also another key's; it is not there for anyone else."""

SECOND_PERSON = {
    ("POST", "/unlearn-requests/{request_id}/approve"),
    ("POST", "/unlearn-requests/{request_id}/reject"),
}
"""Not for the key that asked."""

BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/unlearn-requests"): {"forget_texts": ["a good film"]},
    ("POST", "/unlearn-requests/{request_id}/reject"): {"reason": "asked"},
    ("POST", "/webhooks"): {"url": "https://hooks.example/", "all_requests": True},
    ("POST", "/classify"): {"text": "a good film"},
    ("POST", "/admin/prompts/{prompt_id}/revoke"): {"reason": "asked"},
    ("POST", "/admin/active-sets/{version}/restore"): {"reason": "asked"},
}

MIXED = [("requests", "auditor"), ("classify", "metrics", "scores")]
HELD = [*((scope,) for scope in keys.SCOPES), *MIXED]
REFUSED = ["none", "wrong", "expired", "revoked"]


def routes(found: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in found:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes(inner.routes)
            continue
        methods = getattr(route, "methods", None) or {"(any)"}
        for method in methods - {"HEAD"}:
            yield method, str(getattr(route, "path", None))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("matrix")
    with running(f"sqlite:///{folder}/letheon.db", folder, mode=Mode.CONCATENATE, export_prompts=True) as api:
        yield api


@pytest.fixture(scope="module")
def credentials(api: Api) -> dict[Any, dict[str, str]]:
    """Headers by what is held or what is wrong; good ones have every scope."""
    made: dict[Any, dict[str, str]] = {held: api.key(*held) for held in HELD}
    return made | {why: refused_key(api, why) for why in REFUSED} | {"good": api.key()}


@pytest.fixture(scope="module")
def prompt_id(api: Api) -> str:
    return add_prompt(api.service, soft_prompt(1))


@pytest.fixture(scope="module")
def others_request(api: Api) -> str:
    """Another key's, and ended: its event stream ends too."""
    return ended_request(api, api.key("requests"))


def ended_request(api: Api, headers: dict[str, str]) -> str:
    request_id: str = api.submit(headers)["id"]
    assert api.client.post(f"/unlearn-requests/{request_id}/cancel", headers=headers).status_code == 200
    return request_id


def webhook(api: Api, headers: dict[str, str], *, everybody: bool = False) -> dict[str, str]:
    """What addresses a new webhook of this key, which has the scope, and a message of it."""
    body = {"url": "https://hooks.example/", "all_requests": everybody}
    made = api.client.post("/webhooks", json=body, headers=headers).json()
    ping = api.client.post(f"/webhooks/{made['id']}/test", headers=headers).json()
    return {"{webhook_id}": made["id"], "{delivery_id}": ping["id"]}


def own_request(api: Api, headers: dict[str, str]) -> str:
    """An ended one of this key's, whatever the key may do."""
    key_id = "key_" + headers["Authorization"].split("_")[1]
    with api.service.sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            api.service.vault,
            texts=[ForgetText(f"{MARKER} is a bad film")],
            reason=None,
            options={},
            fingerprint=api.service.serving.llm.fingerprint,
            api_key_id=key_id,
        ).id
    with api.service.sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor=key_id)
    return request_id


def call(
    api: Api,
    route: tuple[str, str],
    headers: dict[str, str],
    request_id: str,
    prompt_id: str,
    others: dict[str, str] | None = None,
) -> httpx2.Response:
    method, path = route
    values = {"{request_id}": request_id, "{prompt_id}": prompt_id, "{version}": "0", "{name}": "start.js"}
    values |= {"{webhook_id}": f"whk_{0:028x}", "{delivery_id}": f"whd_{0:028x}"} | (others or {})
    for name, value in values.items():
        path = path.replace(name, value)
    assert "{" not in path, "a value for each parameter"
    return api.client.request(method, path, json=BODIES.get(route), headers=headers)


def is_console(path: str) -> bool:
    """Pages have a table of their own (test_console_access)."""
    return path == "/" or path.startswith("/console/")


def test_every_route_is_in_the_table(api: Api) -> None:
    assert {route for route in routes(api.app.routes) if not is_console(route[1])} == set(ALLOWED) | OPEN
    assert set(OTHERS) == {route for route in ALLOWED if "{request_id}" in route[1]}
    assert set(keys.SCOPES) >= set().union(*ALLOWED.values())
    documented = {(m.upper(), p) for p, item in api.app.openapi()["paths"].items() for m in item}
    assert documented >= set(ALLOWED), "nothing that needs a key is hidden"


def test_the_page_names_every_route_and_who_may_use_it(api: Api) -> None:
    told: dict[tuple[str, str], set[str]] = {}
    for line in (ROOT / "docs" / "access.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        for route in re.findall(r"`([A-Z]+) (/[^`]*)`", cells[0] if line.startswith("|") else ""):
            assert route not in told, "no route is told of twice"
            told[route] = set(re.findall(r"`(\w+)`", cells[-1])) & set(keys.SCOPES)
    told[("POST", "/classify")].remove("scores")  # no way in by itself
    assert told == ALLOWED | {route: set() for route in OPEN}
    document = {(method.upper(), path) for path, item in api.app.openapi()["paths"].items() for method in item}
    assert document <= set(told)


def test_a_route_that_is_added_is_noticed(api: Api) -> None:
    before = set(routes(api.app.routes))
    api.app.add_api_route("/new", lambda: None)
    try:
        assert set(routes(api.app.routes)) - before == {("GET", "/new")}
    finally:
        del api.app.router.routes[-1]


@pytest.mark.parametrize("route", sorted(ALLOWED), ids=" ".join)
@pytest.mark.parametrize("held", HELD, ids="+".join)
def test_scopes(api: Api, route: tuple[str, str], held: tuple[str, ...], prompt_id: str, others_request: str) -> None:
    headers = api.key(*held)
    response = call(api, route, headers, others_request, prompt_id)
    if not ALLOWED[route].intersection(held):
        problem = assert_problem(response, 403, "forbidden")
        assert set(problem["scopes"]) == ALLOWED[route]
        return
    if "{webhook_id}" in route[1]:
        there, mine = webhook(api, api.key("requests")), webhook(api, headers, everybody="requests" not in held)
        others = call(api, route, headers, "", "", there)
        if "admin" in held:
            assert others.status_code in (200, 202, 409), others.text
        else:
            assert_problem(others, 404, "not-found")
        assert call(api, route, headers, "", "", mine).status_code in (200, 202, 409)
        return
    if route == ("POST", "/webhooks") and READS_ALL.isdisjoint(held):
        assert_problem(response, 403, "forbidden")  # of one's own requests it may be
        response = api.client.post("/webhooks", json={"url": "https://hooks.example/"}, headers=headers)
    if route not in OTHERS:
        assert response.status_code in (200, 201, 202, 409), response.text
        return
    if OTHERS[route].intersection(held):
        assert response.status_code in (200, 409), response.text
    else:
        assert_problem(response, 404, "not-found")
    mine = own_request(api, headers)
    if route in SECOND_PERSON:
        assert_problem(call(api, route, headers, mine, prompt_id), 403, "same-key")
        return
    assert call(api, route, headers, mine, prompt_id).status_code in (200, 409)


@pytest.mark.parametrize("route", sorted(ALLOWED), ids=" ".join)
@pytest.mark.parametrize("why", REFUSED)
def test_keys_that_are_not_in_force(
    api: Api,
    credentials: dict[Any, dict[str, str]],
    route: tuple[str, str],
    why: str,
    prompt_id: str,
    others_request: str,
) -> None:
    headers = credentials[why]
    problem = assert_problem(call(api, route, headers, others_request, prompt_id), 401, "unauthenticated")
    if why != "none":
        assert problem["detail"] == "the API key is unknown, wrong, expired or revoked"


@pytest.mark.parametrize("route", sorted(OPEN), ids=" ".join)
@pytest.mark.parametrize("why", [*REFUSED, "good"])
def test_what_needs_no_key(api: Api, credentials: dict[Any, dict[str, str]], route: tuple[str, str], why: str) -> None:
    assert call(api, route, credentials[why], "", "").status_code == 200


def refused_key(api: Api, why: str) -> dict[str, str]:
    """A key with every scope, were it in force."""
    if why == "none":
        return {}
    headers = api.key()
    key_id = "key_" + headers["Authorization"].split("_")[1]
    if why == "wrong":
        token = headers["Authorization"]
        return {"Authorization": token[:-2] + ("AA" if token[-2:] != "AA" else "BB")}
    with api.service.sessions.begin() as session:
        if why == "revoked":
            keys.revoke_key(session, key_id, actor="test")
        else:
            session.get_one(ApiKey, key_id).expires_at = utcnow() - timedelta(seconds=1)
    return headers


def test_the_document_names_the_scopes_and_429(api: Api) -> None:
    document = api.app.openapi()
    for (method, path), scopes in ALLOWED.items():
        operation = document["paths"][path][method.lower()]
        assert "429" in operation["responses"], path
        if path == "/metrics":
            assert "scope `metrics`" in operation["description"]
            continue
        assert {one for way in operation["security"] for [one] in way.values()} == scopes
        for scope in scopes:
            assert f"`{scope}`" in operation["description"].rpartition("Scope: ")[2]
