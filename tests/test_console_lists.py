"""What the console's lists find, what its evidence shows, and what its playground says of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from api_kit import MARKER, Api, add_prompt, claim, make_gate, running, soft_prompt, tiny_llm
from console_kit import OWN, Markup, Person, log_in, words
from sqlalchemy import select
from test_evidence import DOCUMENT

from app import approval, evidence, lifecycle
from app.auth import Caller
from app.console import session as cookie
from app.console.live import _Watch
from app.console.playground import NO_OTHERS
from app.errors import DeadlineExceeded
from app.evidence import Found
from app.evidence_pictures import DASHED, NO_PROOF, SOLID
from app.keys import SCOPES
from app.tables import ApiKey, AuditEntry, Prompt, RequestState, utcnow

LIST = "/console/requests"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("lists")
    with running(f"sqlite:///{folder}/letheon.db", folder) as api:
        yield api


@pytest.fixture(scope="module")
def admin(api: Api) -> Person:
    return log_in(api)


def found(person: Person, query: str) -> list[str]:
    page = person.get(f"{LIST}?{query}")
    assert page.status_code == 200, words(page)
    return list(dict.fromkeys(re.findall(r'href="console/requests/(req_\w+)"', page.text)))


# --- the list --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(api: Api, admin: Person) -> dict[str, str]:
    """Requests by name: two of one key, one of another, of different days."""
    desk, other = log_in(api, "requests"), log_in(api, "requests")
    with api.service.sessions.begin() as session:
        session.get_one(ApiKey, desk.key_id).name = "support <desk>"
    ids = {name: api.submit(who.headers)["id"] for name, who in (("old", desk), ("new", desk), ("others", other))}
    days = {"old": 40, "new": 25, "others": 2}
    with api.service.sessions.begin() as session:
        for name, request_id in ids.items():
            row = lifecycle.get_request(session, request_id)
            row.received_at = utcnow() - timedelta(days=days[name])
            row.due_at = row.received_at + timedelta(days=30)
            if name == "others":
                row.state = RequestState.FAILED
    return {**ids, "desk": desk.key_id}


def test_requests_are_found_by_what_one_knows_of_them(admin: Person, asked: dict[str, str]) -> None:
    old, new, others = asked["old"], asked["new"], asked["others"]
    assert set(found(admin, "")) == {old, new, others}
    for known in (old, old.removeprefix("req_"), f"  {old.upper()} "):
        assert found(admin, f"id={quote(known)}") == [old]
    assert set(found(admin, f"id={old[:12]}")) >= {old, new, others}
    for name in (asked["desk"], "support <desk>"):
        assert set(found(admin, f"key={quote(name)}")) == {old, new}
    assert found(admin, "key=nobody") == [] == found(admin, "key=%00")
    day = f"{utcnow() - timedelta(days=25):%Y-%m-%d}"
    assert found(admin, f"from={day}&to={day}") == [new], "both days are in"
    assert set(found(admin, f"from={day}")) == {new, others}
    assert found(admin, f"to={utcnow() - timedelta(days=30):%Y-%m-%d}") == [old]
    assert found(admin, "due=0") == [old] and set(found(admin, "due=7")) == {old, new}
    assert found(admin, "show=failed&due=30") == [], "nobody waits for it any more"
    assert found(admin, "show=failed&id=&key=&from=&to=&due=") == [others], "as the form sends it"
    page = admin.get(f"{LIST}?key={quote('support <desk>')}&due=7&show=open")
    assert "support &lt;desk&gt;" in page.text and "<desk>" not in page.text
    shown = Markup(page)
    assert dict(shown.fields)["key"] == "support <desk>" and dict(shown.fields)["show"] == "open"
    assert '<option value="7" selected>' in page.text
    others_of_state = [link for link in shown.links if "show=revoked" in link]
    assert others_of_state == [f"console/requests?show=revoked&key={quote_plus('support <desk>')}&due=7"]
    assert "console/requests?show=open" in shown.links, "what takes the rest away"


def test_what_cannot_be_looked_for_is_said(api: Api, admin: Person, asked: dict[str, str]) -> None:
    for query, said in (
        ("id=req_xyz", "An id begins with req_"),
        ("id=%25", "An id begins with req_"),
        ("from=2026-02-30", "There is no such day"),
        ("to=9999-12-31", "There is no such day"),
    ):
        page = admin.get(f"{LIST}?{query}")
        assert page.status_code == 422 and said in words(page) and "Nothing was looked for" in words(page), query
        assert not re.findall(r'href="console/requests/req_', page.text)
    for query in ("from=yesterday", "due=5", "show=x", "key=" + "x" * 101):
        assert admin.get(f"{LIST}?{query}").status_code == 422
    mine = log_in(api, "requests")
    assert mine.get(f"{LIST}?key={asked['desk']}").status_code == 422
    assert found(mine, f"id={asked['old']}") == [] and "Asked by" not in words(mine.get(LIST))
    page = mine.get(f"{LIST}?id={asked['old']}")
    assert "No request matches" in words(page)


def test_pages_keep_what_was_asked_for(api: Api, admin: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.console.requests.PAGE", 2)
    desk = log_in(api, "requests")
    ids = [api.submit(desk.headers)["id"] for _ in range(5)][::-1]
    api.submit(admin.headers)
    yesterday = f"{utcnow() - timedelta(days=1):%Y-%m-%d}"
    address, seen = f"{LIST}?key={desk.key_id}&show=open&from={yesterday}&id=", list[str]()
    for pages in range(1, 9):
        page = admin.get(address)
        seen += re.findall(r'href="console/requests/(req_\w+)"', page.text)
        older = re.search(r'href="(console/requests\?[^"]+)" rel="next"', page.text)
        if pages > 1:
            assert f'href="console/requests?show=open&amp;key={desk.key_id}&amp;from={yesterday}">Newest' in page.text
        if older is None:
            break
        address = "/" + older[1].replace("&amp;", "&")
    assert (seen, pages) == (ids, 3)


# --- a request's page ------------------------------------------------------------------------------------------------


def test_all_four_sets_have_a_bar_or_the_page_says_why_not(api: Api, admin: Person) -> None:
    asked = api.submit(admin.headers)["id"]
    waiting = admin.get(f"{LIST}/{asked}")
    for label in ("texts to forget: unknown", "nearest other texts: right", "all other texts: right", "held-out texts"):
        assert label in waiting.text
    assert waiting.text.count("not measured") >= 4 and "Held-out texts, where there are any" in words(waiting)
    measured = {
        "forget_abstain": 1.0,
        "forget_abstain_before": 0.0,
        "retain_accuracy": 0.9,
        "retain_accuracy_before": 0.91,
        "retain_rows": 200,
        "neighbour_accuracy": 0.8,
        "neighbour_accuracy_before": 0.9,
        "neighbour_rows": 20,
    }
    for more, said in (
        ({}, "No held-out texts were measured"),
        (
            {"held_out_rows": 64, "held_out_accuracy": 0.75, "held_out_accuracy_before": 0.875},
            "Held-out: 64 texts that the model was never trained on",
        ),
    ):
        with api.service.sessions.begin() as session:
            lifecycle.get_request(session, asked).metrics = {**measured, **more}
        page = admin.get(f"{LIST}/{asked}")
        assert said in words(page) and ("87.5 % → 75 %" in page.text) is bool(more)
        assert ("not comparable with a plain sample" in words(page)) is bool(more)
        assert "by the prompt alone, while training" in words(page) and "of what is served" in words(page)


def login(api: Api, person: Person) -> cookie.Login:
    return cookie.read(api.service.vault, person.client.cookies["letheon"], now=utcnow())


def test_evidence_comes_into_the_open_page_where_its_place_was_kept(api: Api, admin: Person) -> None:
    body = {"forget_texts": [f"{MARKER} waits for evidence"], "require_approval": True}
    asked = api.client.post("/unlearn-requests", json=body, headers=admin.headers).json()["id"]
    claimed = claim(api.service, asked)
    page = admin.get(f"{LIST}/{asked}")
    assert page.text.count('figure embedding waiting"') == 1 == page.text.count('figure membership waiting"')
    assert words(page).count("evidence comes with its checks") == 2, "no box is empty"
    watch = _Watch(api.service, Caller(admin.key_id, frozenset(SCOPES), {}), login(api, admin), asked)
    watch.look()
    with api.service.sessions.begin() as session:
        lifecycle.start_evaluating(session, claimed)
    _, kind, parts = watch.look()
    assert kind == "state" and 'figure embedding waiting"' in parts
    with api.service.sessions.begin() as session:
        wrapped = lifecycle.get_request(session, asked).wrapped_key
        assert wrapped is not None
        evidence.save(session, asked, evidence.seal(api.service.vault, asked, wrapped, Found(DOCUMENT)))
        approval.await_approval(
            session, claimed, metrics={"forget_abstain": 1.0}, prompt_digest="0" * 64, gate_digest=None
        )
    _, kind, parts = watch.look()
    assert kind == "state" and '<div id="evidence" hx-swap-oob="innerHTML">' in parts
    assert 'waiting"' not in parts and 'figure embedding">' in parts and 'figure membership">' in parts
    assert "Membership attack" in parts and NO_PROOF in parts
    said = words_of(parts)
    assert "far below 0.5 is not “safe” : these texts stand out because they are answered “unknown”" in said
    assert "Solid is before" in said and "Dashed is after" in said and "only that their label can no longer be" in said
    assert "Membership attack" in admin.get(f"{LIST}/{asked}").text
    with api.service.sessions.begin() as session:
        lifecycle.request_cancel(session, asked, actor="test")
    goes_on, _, parts = watch.look()
    assert not goes_on and 'figure embedding waiting"' in parts, "nothing moves in the open page"
    page = admin.get(f"{LIST}/{asked}")
    assert 'waiting"' not in page.text and "ended as cancelled: it has no evidence" in words(page)


# --- evidence --------------------------------------------------------------------------------------------------------


def sealed(api: Api, seed: int, text: str) -> str:
    """A request in force with evidence; its id."""
    prompt_id = add_prompt(api.service, soft_prompt(seed), make_gate(text), text=text)
    with api.service.sessions.begin() as session:
        prompt = session.get_one(Prompt, prompt_id)
        assert prompt.wrapped_key is not None
        found = evidence.seal(api.service.vault, prompt.request_id, prompt.wrapped_key, Found(DOCUMENT))
        evidence.save(session, prompt.request_id, found)
        row = lifecycle.get_request(session, prompt.request_id)
        row.metrics = {**(row.metrics or {}), **Found(DOCUMENT).figures}
        return prompt.request_id


def test_evidence_is_shown_small_and_late(api: Api, admin: Person) -> None:
    assert "No request has evidence" in words(admin.get("/console/evidence"))
    ids = [sealed(api, seed, f"the story {seed} is awful") for seed in range(7)]
    page = admin.get("/console/evidence")
    shown = re.findall(r'hx-get="console/requests/(req_\w+)/pictures" hx-trigger="revealed"', page.text)
    assert shown == ids[:0:-1], "the newest six"
    assert '<path class="c-s1"' not in page.text and len(page.content) < 60_000
    assert NO_PROOF in words(page) and "AUC 0.750 → 0.250" in words(page)
    assert f"{SOLID}; {DASHED}" in words(page) and "Far below 0.5 is not “safe”" in words(page)
    assert "they stand out as" not in words(page), "the interval of these holds 0.5"
    with api.service.sessions.begin() as session:
        row = lifecycle.get_request(session, ids[-1])
        found = {**(row.metrics or {})["membership"], "after": {"auc": 0.01, "low": 0.0, "high": 0.08}}
        row.metrics = {**(row.metrics or {}), "membership": found}
    assert "AUC 0.750 → 0.010: they stand out as “unknown”" in words(admin.get("/console/evidence"))
    part = admin.get(f"{LIST}/{ids[-1]}/pictures")
    assert part.text.count("<svg") == 2 and "<text" not in part.text and "Membership attack" in part.text
    assert "<html" not in part.text and Markup(part).inline == [] and len(part.content) < 30_000
    assert "content-security-policy" in part.headers
    without = api.submit(admin.headers)["id"]
    assert "evidence comes with its checks" in words(admin.get(f"{LIST}/{without}/pictures"))
    with api.service.sessions() as session:
        prompt_id = session.scalars(select(Prompt.id).where(Prompt.request_id == ids[-1])).one()
    revoke = {"reason": "asked"}
    assert api.client.post(f"/admin/prompts/{prompt_id}/revoke", json=revoke, headers=admin.headers).status_code == 200
    assert ids[-1] not in re.findall(r'hx-get="console/requests/(req_\w+)/pic', admin.get("/console/evidence").text)
    assert "shredded with the prompt" in words(admin.get(f"{LIST}/{ids[-1]}/pictures"))


def verify(person: Person, data: bytes) -> str:
    answer = person.client.post(
        "/console/evidence/receipt", files={"file": ("r.json", data, "application/json")}, headers=OWN
    )
    assert answer.status_code == 200
    return words(answer)


def test_a_kept_receipt_is_held_against_signature_and_log(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        auditor = log_in(api, "requests", "auditor", "admin")
        assert "Nothing was ever signed here" in verify(auditor, b"{}")
        prompt_id = add_prompt(api.service, soft_prompt(1), make_gate("the story is awful"))
        with api.service.sessions() as session:
            request_id = session.get_one(Prompt, prompt_id).request_id
        kept = auditor.get(f"{LIST}/{request_id}/receipt").content
        said = verify(auditor, kept + b"\n")
        assert "It is. It bears this deployment's signature" in said and "in force when it was made" in said
        assert "Since then" not in said
        body = {"reason": "asked"}
        assert api.client.post(f"/admin/prompts/{prompt_id}/revoke", json=body, headers=auditor.headers).is_success
        assert "Since then the request has gone on: revoked." in verify(auditor, kept)
        altered = kept.replace(b'"num_texts":1', b'"num_texts":2')
        assert altered != kept
        for data, why in (
            (altered, "was altered"),
            (json.dumps(json.loads(kept), indent=1).encode(), "altered or reformatted"),
            (b"PK not JSON", "not a receipt"),
            (b"[" * 10_000, "not a receipt"),
            (b"", "not a receipt"),
        ):
            said = verify(auditor, data)
            assert "It is not, as far as can be told here" in said and why in said, why
        empty = auditor.post("/console/evidence/receipt", {"file": ""})
        assert "No file was chosen" in words(empty)
        with api.service.sessions.begin() as session:
            entry = session.scalars(
                select(AuditEntry).where(AuditEntry.subject == request_id).order_by(AuditEntry.seq)
            ).first()
            assert entry is not None
            seq, entry.hash = entry.seq, "0" * 64
        assert f"the log no longer has entry {seq}" in verify(auditor, kept)


# --- the playground --------------------------------------------------------------------------------------------------


def test_next_tokens_of_both_or_why_there_are_none(tmp_path: Path) -> None:
    asked, known, other, certain = "the plot is awful", "a great film", "quite bad acting", "the story is very good"
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        person = log_in(api)
        add_prompt(api.service, soft_prompt(3), make_gate(asked))
        digest = api.service.vault.gate_digest(known)
        add_prompt(api.service, soft_prompt(5), make_gate(known, digests=[digest]))
        gate = make_gate(certain)
        add_prompt(api.service, soft_prompt(4), replace(gate, threshold=0.99, certain=0.99))
        page = person.post("/console/playground", {"texts": "\n".join((asked, known, other, certain)), "do": "show"})
        first, second, third, fourth = page.text.split("<article")[1:]
        assert "The gate of a request was certain" in words_of(fourth) and "A gate decided alone" in words_of(fourth)
        assert first.count('<ol class="token-list">') == 2 and "Behind the prompt of" in words_of(first)
        assert second.count('<ol class="token-list">') == 1 and "A keyed digest decided alone" in words_of(second)
        assert third.count('<ol class="token-list">') == 1 and "No request concerns this text" in words_of(third)
        for article, why in ((second, "guarded"), (third, "base"), (fourth, "certain")):
            assert "Behind a prompt" in words_of(article) and NO_OTHERS[why] in words_of(article)
            assert NO_OTHERS[why].startswith("No prompt was asked.")
        assert not re.findall(r">0\.0\d+ %", page.text), "one format in both tables"
        for article in (first, second, third):
            widths = [float(width) for width in re.findall(r'<rect class="c-before" width="([\d.]+)"', article)]
            assert len(widths) == 10 and widths == sorted(widths, reverse=True) and 0 < sum(widths) <= 100.01
        assert ('<details class="tokens" open>' in first, '<details class="tokens" open>' in second) == (True, False)
        assert Markup(page).inline == []
        scored = log_in(api, "classify", "scores")
        page = scored.post("/console/playground", {"texts": asked, "do": "show"})
        assert "Behind the prompt" in words(page) and "req_" not in page.text.split("<article")[1]
        plain = log_in(api, "classify").post("/console/playground", {"texts": asked, "do": "show"})
        assert "token-list" not in plain.text
        assert "takes a key with the scope scores" in words(plain)


def words_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_tokens_cannot_break_a_page(api: Api, admin: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llm().tokenizer, "decode", lambda ids, **_: "<script>\u202e\x00" if len(ids) == 1 else "")
    page = admin.post("/console/playground", {"texts": "quite bad acting", "do": "show"})
    assert page.status_code == 200 and "&lt;script&gt;\\u202e\\u0000" in page.text
    assert "<script>" not in page.text and "\u202e" not in page.text


def test_without_time_for_tokens_the_answers_come_alone_and_say_so(
    api: Api, admin: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, asked = api.service.serving.work, []

    def late(run: Any, *, deadline: float) -> Any:
        asked.append(run)
        if len(asked) == 2:  # the answers are there, and the next tokens are not
            raise DeadlineExceeded("no answer in the time allowed; the server is busy")
        return work(run, deadline=deadline)

    monkeypatch.setattr(api.service.serving, "work", late)
    page = admin.post("/console/playground", {"texts": "quite bad acting", "do": "show"})
    assert page.status_code == 200 and len(asked) == 2
    assert "Bare model" in words(page) and "had no time left to say its most likely next tokens" in words(page)
    assert "Next tokens are over the whole vocabulary" not in words(page)
