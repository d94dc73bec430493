"""The console's door: sessions, forms of other sites, and every page by every scope."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, Api, add_prompt, running, server_logs, soft_prompt
from console_kit import OWN, Markup, Person, log_in, visitor, words
from fastapi.testclient import TestClient
from sqlalchemy import select
from test_access_matrix import HELD, ended_request, own_request, refused_key, routes

from app import active_set, keys
from app.auth import Caller
from app.console import session as cookie
from app.console.live import _Watch
from app.errors import Unauthenticated
from app.security_headers import CONSOLE_POLICY
from app.settings import Mode
from app.tables import ApiKey, EndedSession, utcnow
from app.vault import Vault

READS_ALL = {"admin", "auditor", "approve"}
EVERYBODY = set(keys.SCOPES)
ADDRESS = "/console/requests/{request_id}"

OPEN = {("GET", "/console/login"), ("POST", "/console/login"), ("GET", "/console/static/{name}")}

ALLOWED: dict[tuple[str, str], set[str]] = {
    ("GET", "/"): EVERYBODY,
    ("POST", "/console/logout"): EVERYBODY,
    ("GET", "/console/requests"): {"requests"} | READS_ALL,
    ("GET", "/console/requests/new"): {"requests"},
    ("POST", "/console/requests/new"): {"requests"},
    ("GET", ADDRESS): {"requests"} | READS_ALL,
    ("GET", ADDRESS + "/live"): {"requests"} | READS_ALL,
    ("GET", ADDRESS + "/pictures"): {"requests"} | READS_ALL,
    ("GET", ADDRESS + "/receipt"): {"requests"} | READS_ALL,
    ("GET", ADDRESS + "/report"): {"requests"} | READS_ALL,
    ("POST", ADDRESS + "/cancel"): {"requests", "admin"},
    ("POST", ADDRESS + "/approve"): {"approve"},
    ("POST", ADDRESS + "/reject"): {"approve"},
    ("POST", ADDRESS + "/revoke"): {"admin"},
    ("POST", ADDRESS + "/withdraw"): {"admin"},
    ("GET", "/console/prompts"): {"admin", "auditor"},
    ("POST", "/console/active-sets/{version}/restore"): {"admin"},
    ("GET", "/console/playground"): {"classify"},
    ("POST", "/console/playground"): {"classify"},
    ("GET", "/console/evidence"): {"admin", "auditor"},
    ("POST", "/console/evidence/receipt"): {"admin", "auditor"},
    ("GET", "/console/evidence/audit-log"): {"admin", "auditor"},
    ("GET", "/console/evidence/checkpoint"): {"admin", "auditor"},
}
"""One of these scopes is enough, as on the API's side."""

OTHERS: dict[tuple[str, str], set[str]] = {
    ("GET", ADDRESS): READS_ALL,
    ("GET", ADDRESS + "/live"): READS_ALL,
    ("GET", ADDRESS + "/pictures"): READS_ALL,
    ("GET", ADDRESS + "/receipt"): READS_ALL,
    ("GET", ADDRESS + "/report"): READS_ALL,
    ("POST", ADDRESS + "/cancel"): {"admin"},
    ("POST", ADDRESS + "/approve"): {"approve"},
    ("POST", ADDRESS + "/reject"): {"approve"},
}
"""With one of these, also another key's request; it is not there for anyone else."""

FORMS: dict[tuple[str, str], dict[str, str]] = {
    ("POST", "/console/requests/new"): {"do": "check", "pasted": "a good film"},
    ("POST", ADDRESS + "/reject"): {"reason": "asked"},
    ("POST", ADDRESS + "/revoke"): {"code": "other", "reason": "asked"},
    ("POST", "/console/active-sets/{version}/restore"): {"reason": "asked"},
    ("POST", "/console/playground"): {"texts": "a good film"},
    ("POST", "/console/evidence/receipt"): {"file": ""},
}
DONE = {200, 303, 404, 409}  # 404 where the request has no prompt, 409 where its state does not allow it


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("console")
    with running(f"sqlite:///{folder}/letheon.db", folder, mode=Mode.CONCATENATE) as api:
        add_prompt(api.service, soft_prompt(1))
        yield api


@pytest.fixture(scope="module")
def people(api: Api) -> dict[tuple[str, ...], Person]:
    return {held: log_in(api, *held) for held in HELD}


@pytest.fixture(scope="module")
def others_request(api: Api) -> str:
    return ended_request(api, api.key("requests"))


def ask(person: Person, route: tuple[str, str], request_id: str) -> Any:
    method, path = route
    path = path.replace("{request_id}", request_id).replace("{version}", "0").replace("{name}", "x")
    return person.get(path) if method == "GET" else person.post(path, FORMS.get(route))


def test_every_route_is_in_the_table(api: Api) -> None:
    found = {(m, p) for m, p in routes(api.app.routes) if p == "/" or p.startswith("/console")}
    assert found == set(ALLOWED) | OPEN
    assert not [path for path in api.app.openapi()["paths"] if path == "/" or "console" in path]


@pytest.mark.parametrize("route", sorted(ALLOWED), ids=" ".join)
def test_scopes(api: Api, people: dict[tuple[str, ...], Person], route: tuple[str, str], others_request: str) -> None:
    for held, person in people.items():
        if route[1] == "/console/logout":
            person = log_in(api, *held)
        answer = ask(person, route, others_request)
        assert MARKER not in answer.text
        if not ALLOWED[route].intersection(held):
            assert answer.status_code == 403, held
            assert "Log in with another key" in words(answer)
        elif route not in OTHERS:
            assert answer.status_code in DONE, (held, answer.text)
        elif OTHERS[route].intersection(held):
            assert answer.status_code in (200, 303, 409), (held, answer.text)
        else:
            assert answer.status_code == 404, held
            mine = own_request(api, person.headers)
            assert ask(person, route, mine).status_code in (200, 303, 409), held


@pytest.mark.parametrize("route", sorted(set(ALLOWED)), ids=" ".join)
def test_nothing_without_a_session(api: Api, route: tuple[str, str], others_request: str) -> None:
    person = Person(visitor(api), {})
    for token in ("", "letheon", f"key_{0:016x}.{0:032x}.1.99999999999.{'A' * 43}"):
        person.client.cookies.set("letheon", token)
        answer = ask(person, route, others_request)
        assert answer.status_code == 303
        assert answer.headers["location"].lstrip("./").startswith("console/login")
    in_header = visitor(api).get(
        route[1].replace("{request_id}", others_request), headers=api.key(), follow_redirects=False
    )
    assert in_header.status_code != 200, "a key in a header is the API's, not the console's"


def test_login_and_out(api: Api) -> None:
    person = Person(visitor(api), api.key())
    plaintext = person.headers["Authorization"].removeprefix("Bearer ")
    sent_off = person.get(f"/console/requests/req_{0:028x}")
    address = sent_off.headers["location"]
    assert (sent_off.status_code, address) == (303, f"../../console/login?next=console/requests/req_{0:028x}")
    page = person.client.get(f"/console/login?next=console/requests/req_{0:028x}")
    answer = person.post("/console/login", Markup(page).form(key=f" {plaintext} "))
    assert (answer.status_code, answer.headers["location"]) == (303, f"../console/requests/req_{0:028x}")
    [cookie_header] = answer.headers.get_list("set-cookie")
    attributes = {part.strip().split("=")[0].lower(): part.strip() for part in cookie_header.split(";")[1:]}
    assert {"httponly", "samesite", "path", "max-age"} <= set(attributes) and "secure" not in attributes
    assert (attributes["samesite"], attributes["path"], attributes["max-age"]) == (
        "SameSite=strict",
        "Path=/",
        "Max-Age=28800",
    )
    assert plaintext not in str(answer.headers) + answer.text and plaintext.split("_")[2] not in cookie_header
    home = person.get("/")
    assert home.status_code == 200 and plaintext not in home.text
    out = person.post("/console/logout")
    assert out.status_code == 303 and 'letheon=""' in out.headers["set-cookie"]
    assert person.get("/").status_code == 303


def test_a_logout_ends_the_session_for_every_copy_of_its_cookie(database_url: str, tmp_path: Path) -> None:
    """On another replica too, and in a page that is open; other sessions of the key go on."""
    with running(database_url, tmp_path) as first, running(database_url, tmp_path) as second:
        person = log_in(first)
        other = Person(visitor(first), person.headers)
        key = person.headers["Authorization"].removeprefix("Bearer ")
        assert other.post("/console/login", {"key": key}).status_code == 303
        token = person.client.cookies["letheon"]
        copy = Person(visitor(second), {})
        copy.client.cookies.set("letheon", token)
        assert copy.get("/").status_code == 200
        caller, session_of = Caller(person.key_id, frozenset(keys.SCOPES), {}), login(first, person)
        watch = _Watch(second.service, caller, session_of, first.submit(person.headers)["id"])
        watch.look()
        assert person.post("/console/logout").status_code == 303
        for path in ("/", "/console/requests"):
            assert copy.get(path).headers["location"].lstrip("/.").startswith("console/login")
        assert copy.post("/console/playground", {"texts": "a good film"}).status_code == 303
        part = copy.get("/", **{"HX-Request": "true"})
        assert (part.status_code, part.headers["hx-redirect"]) == (401, "./console/login")
        with pytest.raises(Unauthenticated):
            watch.look()
        assert copy.post("/console/logout").status_code == 303, "there is nothing left to end"
        assert other.get("/").status_code == 200
        cookie.log_out(second.service.sessions, session_of, now=utcnow())  # as two replicas may at the same moment
        with first.service.sessions() as session:
            assert session.scalars(select(EndedSession.id)).all() == [session_of.id]
        cookie.log_out(second.service.sessions, login(first, other), now=session_of.expires_at + timedelta(hours=1))
        with first.service.sessions() as session:  # what would have ended anyway, by any clock, is kept no longer
            assert session_of.id not in session.scalars(select(EndedSession.id)).all()


def test_the_cookie_is_for_this_host_and_tls_where_there_is_tls(api: Api) -> None:
    client = TestClient(api.app, base_url="https://testserver")
    key = api.key()["Authorization"].removeprefix("Bearer ")
    answer = client.post("/console/login", data={"key": key}, headers=OWN, follow_redirects=False)
    assert re.match(r"__Host-letheon=key_\w+.*; Path=/; SameSite=strict; Secure$", answer.headers["set-cookie"])
    assert client.get("/").status_code == 200
    token = client.cookies["__Host-letheon"]
    client.cookies.clear()
    client.cookies.set("letheon", token)  # as a neighbour could set it
    assert client.get("/", follow_redirects=False).status_code == 303


@pytest.mark.parametrize("why", ["wrong", "expired", "revoked", "none"])
def test_refused_keys(api: Api, why: str) -> None:
    presented = refused_key(api, why).get("Authorization", "Bearer ").removeprefix("Bearer ")
    answer = visitor(api).post("/console/login", data={"key": presented}, headers=OWN)
    assert answer.status_code == 401 and "set-cookie" not in answer.headers
    assert "The key is unknown, wrong, expired or revoked." in words(answer)
    assert not presented or presented not in answer.text


@pytest.mark.parametrize(
    "next_page",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "console/../../x",
        "console/%2f",
        "x",
        "console//evil",
    ],
)
def test_the_login_leads_nowhere_else(api: Api, next_page: str) -> None:
    key = api.key()["Authorization"].removeprefix("Bearer ")
    data = {"key": key, "next": next_page}
    answer = visitor(api).post("/console/login", data=data, headers=OWN, follow_redirects=False)
    assert re.fullmatch(r"\.\./(console//evil)?", answer.headers["location"])
    assert next_page not in visitor(api).get("/console/login", params={"next": next_page}).text or next_page in (
        "x",
        "console//evil",
    )


def login(api: Api, person: Person) -> cookie.Login:
    return cookie.read(api.service.vault, person.client.cookies["letheon"], now=utcnow())


def test_a_key_that_ends_ends_its_open_page(api: Api, others_request: str) -> None:
    person = log_in(api)
    with api.service.sessions() as session:
        caller = Caller(person.key_id, frozenset(keys.SCOPES), {})
        assert keys.in_force(session, person.key_id)
    watch = _Watch(api.service, caller, login(api, person), others_request)
    watch.look()
    with api.service.sessions.begin() as session:
        keys.revoke_key(session, person.key_id, actor="test")
    with pytest.raises(Unauthenticated):
        watch.look()


def test_the_digest_of_the_active_set_is_for_those_who_may_read_it(api: Api) -> None:
    with api.service.sessions() as session:
        digest = active_set.read_active_set(session).digest
    assert digest in log_in(api, "auditor").get("/").text
    assert digest not in log_in(api, "metrics").get("/").text


def test_a_key_that_ends_ends_its_sessions_at_once(api: Api) -> None:
    revoked, expired, narrowed = (log_in(api) for _ in range(3))
    with api.service.sessions.begin() as session:
        keys.revoke_key(session, revoked.key_id, actor="test")
        session.get_one(ApiKey, expired.key_id).expires_at = utcnow() - timedelta(seconds=1)
        session.get_one(ApiKey, narrowed.key_id).scopes = ["classify"]
    for person in (revoked, expired):
        assert person.get("/console/requests").status_code == 303
        assert person.post("/console/requests/new", {"do": "send", "pasted": "x"}).status_code == 303
    assert narrowed.get("/console/requests").status_code == 403
    assert narrowed.get("/console/playground").status_code == 200


def test_tokens() -> None:
    vault, now = Vault(bytes(range(32))), utcnow()
    key_id = "key_0123456789abcdef"
    token = cookie.issue(vault, key_id, now=now, hours=1)
    said = cookie.read(vault, token, now=now)
    assert said == cookie.read(vault, token, now=now + timedelta(minutes=59)) and said.key_id == key_id
    assert timedelta(minutes=59) < said.expires_at - now <= timedelta(hours=1)
    assert cookie.read(vault, cookie.issue(vault, key_id, now=now, hours=1), now=now).id != said.id
    stated, _, signature = token.rpartition(".")
    later = stated.rpartition(".")[0] + ".99999999999." + signature
    other = token.replace("key_01", "key_02")
    for bad in ("", ".", "....", token[:-1], token + "A", later, other, "é" * 50, stated, token.replace(".", "_")):
        with pytest.raises(Unauthenticated):
            cookie.read(vault, bad, now=now)
    with pytest.raises(Unauthenticated):
        cookie.read(vault, token, now=now + timedelta(hours=1))
    with pytest.raises(Unauthenticated):
        cookie.read(vault, token, now=now - timedelta(hours=1))
    with pytest.raises(Unauthenticated):
        cookie.read(Vault(bytes(32)), token, now=now)


FOREIGN = [
    {},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"},
    {"Origin": "null"},
    {"Origin": "http://evil.example"},
    {"Origin": "http://testserver.evil.example"},
    {"Origin": ""},
]


@pytest.mark.parametrize("route", sorted(r for r in set(ALLOWED) | OPEN if r[0] == "POST"), ids=" ".join)
def test_forms_of_other_sites_do_nothing(
    api: Api, route: tuple[str, str], people: dict[tuple[str, ...], Person]
) -> None:
    person = log_in(api)
    waiting = api.submit(person.headers)["id"]
    path = route[1].replace("{request_id}", waiting).replace("{version}", "0")
    key = person.headers["Authorization"].removeprefix("Bearer ")
    for headers in FOREIGN:
        data = FORMS.get(route, {}) | ({"key": key} if "login" in path else {})
        answer = person.client.post(path, data=data, headers=headers, follow_redirects=False)
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False), headers
        assert "This did not come from a page of this console" in words(answer)
    state = api.client.get(f"/unlearn-requests/{waiting}", headers=person.headers).json()["state"]
    assert state == "pending" and person.get("/").status_code == 200


def test_an_origin_of_our_own_is_enough_where_a_browser_says_no_more(api: Api) -> None:
    person = log_in(api)
    answer = person.client.post("/console/logout", headers={"Origin": "http://testserver"}, follow_redirects=False)
    assert answer.status_code == 303


def test_a_login_has_no_room_for_more_than_a_key(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    answer = visitor(api).post("/console/login", data={"key": "x" * 2000}, headers=OWN)
    assert answer.status_code == 413 and "1024 bytes" in words(answer)
    fits = visitor(api).post("/console/login", data={"key": "x" * 900}, headers=OWN)
    assert fits.status_code == 401
    without = visitor(api).post(
        "/console/requests/new", data={"pasted": "x" * 900}, headers=OWN, follow_redirects=False
    )
    assert without.status_code == 303, "nobody without a session has a body read"
    assert "xxx" not in " ".join(record.getMessage() for record in server_logs(caplog))


def test_links_in_messages_find_the_session(api: Api) -> None:
    """The browser keeps a strict cookie to itself there, so the page asks once more, of its own accord."""
    person = Person(visitor(api), {})
    again = person.get("/console/requests", **{"Sec-Fetch-Site": "cross-site"})
    assert again.status_code == 200 and '<meta http-equiv="refresh" content="0">' in again.text
    assert person.get("/console/requests", **{"Sec-Fetch-Site": "same-origin"}).status_code == 303
    part = person.get("/", **{"HX-Request": "true"})
    assert (part.status_code, part.headers["hx-redirect"]) == (401, "./console/login")


def test_calls_count_as_the_apis(tmp_path: Any) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, rate_per_minute=4) as api:
        person = log_in(api)
        assert [person.get("/").status_code for _ in range(2)] == [200, 200]
        assert api.client.get("/unlearn-requests", headers=person.headers).status_code == 200
        refused = person.get("/console/requests")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "Too many requests" in words(refused)
        assert api.client.get("/unlearn-requests", headers=person.headers).status_code == 429


def test_every_page_keeps_to_its_policy(api: Api, people: dict[tuple[str, ...], Person]) -> None:
    person = log_in(api)
    request_id = api.submit(person.headers)["id"]
    paths = ["/console/login", "/", "/console/requests", "/console/requests/new", f"/console/requests/{request_id}"]
    paths += ["/console/prompts", "/console/playground", "/console/evidence?verify=true", "/console/nothing"]
    for path in paths:
        page = person.get(path)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers.get_list("content-security-policy") == [CONSOLE_POLICY]
        assert page.headers["cache-control"] == "no-store" and page.headers["referrer-policy"] == "same-origin"
        found = Markup(page)
        assert found.inline == [], path
        assert len(found.ids) == len(set(found.ids)), path
        assert not [link for link in found.links + found.loaded if re.match(r"(\w+:)?//|/", link)], path
        assert '"allowEval":false' in page.text and '"includeIndicatorStyles":false' in page.text
    assert "'unsafe" not in CONSOLE_POLICY and "default-src 'none'" in CONSOLE_POLICY


def test_the_first_page_is_small_and_what_it_loads_is_kept(api: Api) -> None:
    person = log_in(api)
    page = person.get("/")
    total = len(page.content)
    for part in Markup(page).loaded:
        answer = visitor(api).get(f"/{part}")
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert re.search(r"\.[0-9a-f]{12}\.(js|css|svg)$", part)
        total += len(answer.content)
    assert total < 200_000
    assert visitor(api).get("/console/static/console.css").status_code == 404
    assert visitor(api).get("/console/static/..%2fpages.py").status_code == 404
