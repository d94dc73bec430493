"""What the console's pages do: requests, uploads, decisions, prompts, playground, evidence."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import pytest
from api_kit import MARKER, Api, add_prompt, claim, gate_space, make_gate, running, server_logs, soft_prompt
from console_kit import Markup, Person, log_in, words
from sqlalchemy import event, func, insert, select

from app import approval, job_queue, lifecycle
from app.console import evidence as evidence_page
from app.console.figures import checks, progress_of
from app.console.live import _Watch
from app.console.playground import Shown, as_csv
from app.console.uploads import MAX_ROWS, MENDABLE, Unreadable, mended, read_file, read_kept, read_pasted
from app.settings import Settings
from app.tables import ActiveSet, AuditEntry, Prompt, RequestEvent, UnlearnRequest, new_id, utcnow

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
NEW = "/console/requests/new"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("pages")
    with running(f"sqlite:///{folder}/letheon.db", folder, max_body_bytes=3_000_000, max_forget_texts=6) as api:
        yield api


@pytest.fixture(scope="module")
def admin(api: Api) -> Person:
    return log_in(api)


def stored(api: Api) -> int:
    with api.service.sessions() as session:
        return session.scalar(select(func.count()).select_from(UnlearnRequest)) or 0


# --- asking ----------------------------------------------------------------------------------------------------------


def test_a_file_with_bad_rows_is_mended_and_sent_once(
    api: Api, admin: Person, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        f"text,label\n{MARKER} is a good film,positive\n",
        '"a text, of\ntwo lines",negative\n',
        "a bad film,neither\n",
    ]
    form = Markup(admin.get(NEW)).form(do="send", reason=f"{MARKER} 1", received="2026-11-01")
    before = stored(api)
    file = ("rows.csv", "".join(rows) + "  ,positive\n" + "good " * 300 + ",\n", "text/csv")
    answer = admin.post(NEW, form, files={"file": file})
    said = words(answer)
    assert answer.status_code == 200 and stored(api) == before
    assert "3 rows need correcting. The other 2 are kept." in said
    assert "line 5 label : must be one of negative, positive" in said
    assert "line 6 text : the text must not be blank" in said
    assert re.search(r"line 7 text : has \d+ tokens, the limit is 64", said)
    page = Markup(answer)
    assert [row[0] for row in json.loads(page.form()["kept"])] == ["line 2", "line 3"]
    # Mend one, leave one out, leave the third as it is.
    texts = page.form()["mend_text"]
    again = page.form(do="send", mend_label=["negative", "", ""], mend_text=[texts[0], "", texts[2]], mend_drop="1")
    answer = admin.post(NEW, again)
    assert answer.status_code == 200 and "1 row needs correcting. The other 3 are kept." in words(answer)
    last = Markup(answer).form(do="send", mend_label="", mend_text="a short one")
    assert last["reason"] == f"{MARKER} 1" and last["received"] == "2026-11-01"
    # A double click: both arrive, one request is made.
    answers: list[Any] = []
    clicks = [threading.Thread(target=lambda: answers.append(admin.post(NEW, last))) for _ in range(2)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert [a.status_code for a in answers] == [303, 303] and stored(api) == before + 1
    places = {a.headers["location"].partition("?done=") for a in answers}
    assert {done for _, _, done in places} == {"sent", "again"} and len({place for place, _, _ in places}) == 1
    request_id = places.pop()[0].rpartition("/")[2]
    with api.service.sessions() as session:
        row = lifecycle.get_request(session, request_id)
    assert (row.num_texts, row.reason) == (4, f"{MARKER} 1")
    assert row.received_at is not None and row.received_at.isoformat() == "2026-11-01T00:00:00+00:00"
    opened = json.loads(
        api.service.vault.open(row.wrapped_key, row.sealed_texts or b"", aad=lifecycle.texts_aad(row.id))
    )
    assert ["a text, of\ntwo lines", "negative"] in opened and ["a bad film", "negative"] in opened
    assert "4 texts to forget" in words(admin.get(f"/console/requests/{request_id}?done=sent"))
    changed = admin.post(NEW, {**last, "reason": "another"})
    assert changed.status_code == 422 and "sent before with other texts" in words(changed) and stored(api) == before + 1
    key = Markup(changed).form()["idempotency_key"]
    assert key != last["idempotency_key"]
    duplicate = admin.post(NEW, Markup(changed).form(do="send"))
    assert duplicate.headers["location"].endswith(f"{request_id}?done=duplicate") and stored(api) == before + 1
    logged = " ".join(f"{record.getMessage()} {record.exc_info}" for record in server_logs(caplog))
    assert "Quillfeather" not in logged and "two lines" not in logged and key not in logged


def test_a_dry_run_stores_nothing_and_says_what_it_can(api: Api, admin: Person) -> None:
    before = stored(api)
    form = Markup(admin.get(NEW)).form(do="rehearse", pasted="a good film\na bad film\n")
    answer = admin.post(NEW, form)
    said = words(answer)
    assert answer.status_code == 200 and stored(api) == before
    assert "Dry run: what this request would do" in said and "2 different" in said
    assert [text for _, text, _ in json.loads(Markup(answer).form()["kept"])] == ["a good film", "a bad film"]
    assert admin.post(NEW, Markup(answer).form(do="send")).status_code == 303 and stored(api) == before + 1


def test_what_cannot_be_sent_comes_back_with_why(api: Api, admin: Person) -> None:
    before = stored(api)
    form = Markup(admin.get(NEW)).form(do="send", pasted="a good film")
    for changes, said in (
        ({"pasted": " \n \n"}, "There is no text yet: paste some"),
        ({"received": "2999-01-01"}, "Received_at is in the future"),
        ({"expires": "2001-01-01"}, "Expires_at is not in the future"),
        ({"received": "soon"}, "must be a time with its zone"),
        ({"num_virtual_tokens": "many"}, "valid integer"),
        ({"max_steps": "1000000"}, "less than or equal to 100000"),
        ({"reason": "x" * 501}, "at most 500 characters"),
        ({"pasted": "\n".join(f"film {i}" for i in range(7))}, "has 7 items, the limit is 6"),
        ({"kept": "not JSON"}, "the rows that this form held are damaged"),
        ({"kept": '[["line 1"]]'}, "the rows that this form held are damaged"),
    ):
        answer = admin.post(NEW, {**form, **changes})
        assert answer.status_code == (200 if "no text" in said or "damaged" in said else 422), changes
        assert said in words(answer)
        assert Markup(answer).form()["idempotency_key"] == form["idempotency_key"]
    for name, content, said in (
        ("rows.xlsx", b"PK", "its name must end in .csv, .tsv or .jsonl"),
        ("rows.csv", b"", "it is empty"),
        ("rows.csv", b"a,b\n1,2\n", "the header has no column text or sentence"),
        ("rows.csv", b'text\n"never closed\n', "a quote is opened and never closed"),
    ):
        answer = admin.post(NEW, form, files={"file": (name, content)})
        assert answer.status_code == 200 and said in words(answer), name
        assert [text for _, text, _ in json.loads(Markup(answer).form()["kept"])] == ["a good film"], "kept"
    not_utf8 = admin.post(NEW, form, files={"file": ("rows.csv", b"text\ncaf\xe9\n")})
    assert not_utf8.status_code == 400 and "not valid UTF-8" in words(not_utf8)
    broken = admin.client.post(
        NEW, content=b"x", headers={"Sec-Fetch-Site": "same-origin", "Content-Type": "multipart/form-data"}
    )
    assert broken.status_code == 400 and "cannot be read" in words(broken)
    for charset in ("punycode", "unicode_escape", "undefined", "no-such"):
        multipart = f'--x\r\nContent-Disposition: form-data; name="pasted"\r\n\r\n{"a" * 9}-9a\r\n--x--\r\n'.encode()
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        refused = admin.client.post(
            NEW, content=multipart, headers={"Sec-Fetch-Site": "same-origin", "Content-Type": kind}
        )
        assert refused.status_code == 400 and "not in UTF-8" in words(refused)
    lines = "".join(f"{number}\n" for number in range(MENDABLE + 1))
    answer = admin.post(NEW, form, files={"file": ("rows.jsonl", lines)})
    assert "501 rows need correcting, more than 500" in words(answer)
    assert [text for _, text, _ in json.loads(Markup(answer).form()["kept"])] == []
    assert stored(api) == before


def test_no_text_touches_a_disk(admin: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    def rolled(self: Any) -> None:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(SpooledTemporaryFile, "rollover", rolled)
    lines = "".join(json.dumps({"text": "good " * 2000}) + "\n" for _ in range(200))
    answer = admin.post(NEW, Markup(admin.get(NEW)).form(do="check"), files={"file": ("rows.jsonl", lines)})
    assert len(lines) > 2_000_000 and answer.status_code == 200 and "200 rows need correcting" in words(answer)


def test_rows_of_files_and_pastes() -> None:
    labels = ("negative", "positive")

    def rows(name: str, data: str) -> list[tuple[str, str, str | None, str | None]]:
        return [(e.place, e.text, e.label, e.fault) for e in read_file(name, data.encode(), labels)]

    assert rows("a.csv", "\ufefftext;label\nfine;1\nbad;\n") == [
        ("line 2", "fine", "positive", None),
        ("line 3", "bad", None, None),
    ]
    assert rows("A.TSV", "label\ttext\nnegative\tnot, good\n") == [("line 2", "not, good", "negative", None)]
    assert rows("a.jsonl", '"one"\n\n{"text": "two", "label": 0}\n{"review": "three"}\n{"text": 4}\n{nonsense\n') == [
        ("line 1", "one", None, None),
        ("line 3", "two", "negative", None),
        ("line 4", "three", None, None),
        ("line 5", "4", None, "the text must be a string"),
        ("line 6", "", None, "not JSON"),
    ]
    assert rows("a.jsonl", '{"text": "x", "label": {"a": 1}}\n')[0][3] == "the label must be a string"
    pasted = [(e.place, e.text, e.label) for e in read_pasted("a\n\nb c\tpositive\n \n")]
    assert pasted == [("pasted, line 1", "a", None), ("pasted, line 3", "b c", "positive")]
    assert [(e.text, e.fault) for e in mended(["1", "2", "3"], [" a ", " ", "c"], ["", "", "x"], ["2"])] == [
        ("a", None),
        ("", "the text must not be blank"),
    ]
    # Places repeat, since two files have a line 3 each: only the one that was ticked is left out.
    assert [e.text for e in mended(["line 3", "line 3"], ["kept", "dropped"], ["", ""], ["1"])] == ["kept"]
    # What int() does not take, though isdigit() says so; and what no page could show.
    assert rows("a.csv", "text,label\nfine,²\n")[0][:3] == ("line 2", "fine", "²")
    assert rows("a.csv", f"text,label\nfine,{'9' * 5000}\n")[0][1] == "fine"
    half = "must not contain half a surrogate pair"
    assert rows("a.jsonl", '{"text": "a \\ud800 b"}\n')[0][1].isascii()
    assert rows("a.jsonl", '{"text": "a", "label": "\\udfff"}\n') == [("line 1", "a", "?", half)]
    assert read_kept('[["x", "\\ud800", null]]')[0].text == "?"
    for too_many in (lambda: rows("a.jsonl", '"a"\n' * (MAX_ROWS + 1)), lambda: read_pasted("a\n" * (MAX_ROWS + 1))):
        with pytest.raises(Unreadable, match="more than 16384 rows"):
            too_many()
    for bad in ("[1]", "{}", '[["a"]]', "[", "[" * 100_000):
        if bad == "{}":
            assert read_kept(bad) == []
            continue
        with pytest.raises(Unreadable):
            read_kept(bad)


# --- a request's page ------------------------------------------------------------------------------------------------


def test_nothing_that_people_typed_becomes_markup(api: Api, admin: Person) -> None:
    asked = api.client.post(
        "/unlearn-requests", json={"forget_texts": ["good", "bad"], "reason": HOSTILE}, headers=admin.headers
    ).json()["id"]
    pages = [admin.get(f"/console/requests/{asked}"), admin.get("/console/requests")]
    pages += [admin.post(f"/console/requests/{asked}/cancel")]
    pages += [admin.post("/console/playground", {"texts": HOSTILE, "do": "show"})]
    pages += [admin.post(NEW, Markup(admin.get(NEW)).form(do="check", pasted=f"{HOSTILE}\t{HOSTILE}", reason=HOSTILE))]
    pages += [admin.get("/console/login?next=" + HOSTILE)]
    for page in pages:
        assert HOSTILE not in page.text and "<script>" not in page.text and "<img" not in page.text
        assert Markup(page).inline == []
    assert HOSTILE in Markup(pages[4]).form()["reason"]


def test_cancel_and_its_trail(api: Api, admin: Person) -> None:
    asked = api.submit(admin.headers)["id"]
    page = words(admin.get(f"/console/requests/{asked}"))
    assert "Waiting" in page and "sealed under a key of their own" in page and "Request made" in page
    done = admin.post(f"/console/requests/{asked}/cancel")
    assert done.headers["location"] == f"../../../console/requests/{asked}?done=cancelled"
    page = words(admin.get(f"/console/requests/{asked}?done=cancelled"))
    assert "The request is cancelled." in page and "destroyed, key and all" in page and "Signed receipt" in page
    again = admin.post(f"/console/requests/{asked}/cancel")
    assert again.status_code == 409 and "already ended as cancelled" in words(again)
    receipt = admin.get(f"/console/requests/{asked}/receipt")
    assert receipt.headers["content-disposition"] == f'attachment; filename="{asked}.receipt.json"'
    assert receipt.content == api.client.get(f"/unlearn-requests/{asked}/receipt", headers=admin.headers).content
    assert admin.get(f"/console/requests/{asked}?done=<script>").status_code == 422


def test_the_second_person_decides(api: Api) -> None:
    asker, other = log_in(api, "requests", "approve"), log_in(api, "approve")
    body = {"forget_texts": [f"{MARKER} waits"], "require_approval": True}
    asked = api.client.post("/unlearn-requests", json=body, headers=asker.headers).json()["id"]
    claimed = claim(api.service, asked)
    with api.service.sessions.begin() as session:
        lifecycle.start_evaluating(session, claimed)
        approval.await_approval(
            session, claimed, metrics={"forget_abstain": 1.0}, prompt_digest="0" * 64, gate_digest=None
        )
    address = f"/console/requests/{asked}"
    assert "another person's key has to approve it" in words(asker.get(address))
    assert asker.post(f"{address}/approve").status_code == 403
    assert "Approve" in words(other.get(address))
    blank = other.post(f"{address}/reject", {"reason": "  "})
    assert blank.status_code == 422 and "must not be blank" in words(blank)
    assert other.post(f"{address}/reject", {"reason": HOSTILE}).status_code == 303
    assert "Failed" in words(other.get(address)) and HOSTILE not in other.get(address).text


def test_revoking_takes_a_reason_and_two_where_two_are_needed(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, revoke_needs_two=True) as api:
        add_prompt(api.service, soft_prompt(1), make_gate(f"{MARKER} is awful"))
        with api.service.sessions() as session:
            asked = session.scalars(select(UnlearnRequest.id)).one()
        first, second = log_in(api), log_in(api)
        address = f"/console/requests/{asked}"
        for form in ({"code": "nonsense", "reason": "x"}, {"code": "harm", "reason": ""}, {"code": "harm"}):
            assert first.post(f"{address}/revoke", form).status_code == 422
        assert (
            first.post(f"{address}/revoke", {"code": "harm", "reason": "x"}).headers["location"].endswith("?done=asked")
        )
        page = words(first.get(address))
        assert "You have asked to revoke this: it does harm to other answers. x" in page and "In force" in page
        assert first.post(f"{address}/revoke", {"code": "harm", "reason": "x"}).status_code == 409
        assert first.post(f"{address}/withdraw").headers["location"].endswith("?done=withdrawn")
        first.post(f"{address}/revoke", {"code": "harm", "reason": "x"})
        assert "Agree to revoke" in words(second.get(address))
        done = second.post(f"{address}/revoke", {"code": "withdrawn", "reason": "y"})
        assert done.headers["location"].endswith("?done=revoked")
        page = words(second.get(address))
        assert "All of this is undone" in page or "Revoked" in page
        assert "The person withdrew the request. y" in page and "Prompt destroyed" in page


def test_progress_is_drawn_as_it_comes(api: Api, admin: Person) -> None:
    asked = api.submit(admin.headers)["id"]
    before = admin.get(f"/console/requests/{asked}")
    after = re.search(rf'sse-connect="console/requests/{asked}/live\?after=(\d+)"', before.text)
    assert after is not None and 'sse-swap="progress,state"' in before.text
    claimed = claim(api.service, asked)
    losses = {"loss": 1.0, "forget_loss": 0.5, "retain_loss": 0.25, "kl_loss": 0.1, "elapsed_seconds": 3.0}
    row = {"step": 7, "total_steps": 60, "phase": "training", "forget_abstain": 0.5, "retain_accuracy": None, **losses}
    with api.service.sessions.begin() as session:
        job_queue.record_progress(session, claimed, row)
    with api.service.sessions.begin() as session:
        lifecycle.fail(session, claimed, code="diverged", detail="the loss became infinite")
    stream = admin.get(f"/console/requests/{asked}/live?after={after[1]}")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n")[0] for block in stream.text.split("\n\n") if block.startswith("event:")]
    assert events == ["event: state", "event: done"]
    assert "Step 7 of at most 60" in stream.text and "the loss became infinite" in words(stream)
    for part in ("state", "results", "evidence", "facts", "actions", "remarks", "trail"):
        assert f'<div id="{part}" hx-swap-oob="innerHTML">' in stream.text
    assert '<p id="standing" role="status" hx-swap-oob="innerHTML">' in stream.text
    assert Markup(stream).inline == []
    done = admin.get(f"/console/requests/{asked}/live?after=999999")
    assert "event: state" not in done.text and "event: done" in done.text
    assert "sse-connect" not in admin.get(f"/console/requests/{asked}").text


def test_a_page_without_a_place_for_its_stream_asks_again(
    api: Api, admin: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, streams = api.submit(admin.headers)["id"], api.service.streams
    address = f"/console/requests/{asked}/live?after=0"
    with ExitStack() as stack:
        for _ in range(api.service.settings.max_event_streams):
            stack.enter_context(streams.one(admin.key_id))
        told = admin.get(address)
    assert told.status_code == 200 and "event: state" in told.text and "event: done" not in told.text
    assert told.text.endswith("retry: 10000\n\n")
    # A browser asks again with the id of the last event that it got: what it has does not come again.
    (told_id,) = re.findall(r"^id: (\d+)$", told.text, re.MULTILINE)
    with ExitStack() as stack:
        for _ in range(api.service.settings.max_event_streams):
            stack.enter_context(streams.one(admin.key_id))
        assert admin.get(address, **{"Last-Event-ID": told_id}).text == "retry: 10000\n\n"
        losses = {"loss": 1.0, "forget_loss": 0.5, "retain_loss": 0.25, "kl_loss": 0.1, "elapsed_seconds": 3.0}
        progress = {"total_steps": 60, "phase": "training", "forget_abstain": 0.5, "retain_accuracy": None, **losses}
        claimed = claim(api.service, asked)
        with api.service.sessions.begin() as session:
            job_queue.record_progress(session, claimed, {"step": 7, **progress})
        more = admin.get(address, **{"Last-Event-ID": told_id})
        (more_id,) = re.findall(r"^id: (\d+)$", more.text, re.MULTILINE)
        with api.service.sessions.begin() as session:
            job_queue.record_progress(session, claimed, {"step": 8, **progress})
        news = admin.get(address, **{"Last-Event-ID": more_id})
    assert "Step 7 of at most 60" in more.text and int(more_id) > int(told_id)
    assert "event: progress" in news.text and "Step 8 of at most 60" in news.text
    assert 'id="actions"' not in news.text, "nobody's typing is painted over"
    curves = [
        answer.text.replace("\ndata: ", "\n").partition('<div class="figure lines">')[2].partition("</div>")[0].split()
        for answer in (news, admin.get(f"/console/requests/{asked}"))
    ]
    assert curves[0] == curves[1] != [], "drawn from all events, not from the new ones alone"
    seen: list[int] = []

    def look(watch: _Watch) -> tuple[bool, str | None, str]:
        seen.append(streams._open[admin.key_id])
        return False, None, ""

    monkeypatch.setattr(_Watch, "look", look)
    assert "event: done" in admin.get(address).text
    assert seen == [1] and not streams._open, "with a place it takes it, for as long as it is open"


def test_curves_follow_the_newest_training() -> None:
    def step(number: int, **more: Any) -> RequestEvent:
        data = {"step": number, "total_steps": 60, "phase": "training", "elapsed_seconds": 1.0, "forget_abstain": None}
        losses = {"forget_loss": 1 / number, "retain_loss": 0.5, "kl_loss": 0.1, "retain_accuracy": 0.9}
        return RequestEvent(id=1, request_id="req", at=utcnow(), type="progress", data=data | losses | more)

    def tried() -> RequestEvent:
        return RequestEvent(id=1, request_id="req", at=utcnow(), type="state", data={"state": "training", "tried": {}})

    assert progress_of([]) is None
    first = progress_of([step(1), step(30), step(60)])
    assert first is not None and (first.step, first.total, first.tried) == (60, 60, 1)
    assert "forget: 3 points, from 1 at 1 to 0.0166667 at 60" in first.curve
    again = progress_of([step(1), step(60), tried(), step(1), step(2)])
    assert again is not None and (again.step, again.tried) == (2, 2) and "forget: 2 points" not in first.curve
    long = progress_of([step(n) for n in range(1, 3001)])
    assert long is not None and len(long.curve) < 25_000 and "at 3000" in long.curve


def test_checks_say_what_was_kept() -> None:
    limits = {"min_forget_abstain": 0.9, "max_retain_drop": 0.03, "max_class_drop": 0.06, "max_prompt_norm": 64.0}
    assert {check.kept for check in checks({}, limits)} == {None}
    found: dict[str, Any] = {"forget_abstain": 0.5, "retain_accuracy_before": 0.95, "retain_accuracy": 0.94}
    found |= {"per_class": {"a": {"before": 0.9, "after": 0.8, "rows": 10}}, "prompt_norm": 3.5, "passed": False}
    rows = {check.what: (check.found, check.kept) for check in checks(found, limits)}
    assert rows["Texts to forget answered “unknown”"] == ("50 %", False)
    assert rows["Right answers lost on all other texts"] == ("1 %", True)
    assert rows["… in the class that lost most"] == ("10 %", False)
    assert rows["Largest vector of the prompt, relative to a word's"] == ("3.5", True)


# --- lists -----------------------------------------------------------------------------------------------------------


def test_ten_thousand_requests_cost_as_many_queries_as_one(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        person = log_in(api)
        made = utcnow()
        rows = [
            {
                "id": new_id("req"),
                "state": ("active", "pending", "revoked", "failed")[i % 4],
                "created_at": made,
                "updated_at": made,
                "num_texts": 1,
                "options": {},
                "fingerprint": "0" * 64,
                "due_at": made,
                "api_key_id": person.key_id,
            }
            for i in range(10_000)
        ]
        with api.service.sessions.begin() as session:
            session.execute(insert(UnlearnRequest), rows)
        statements: list[str] = []
        event.listen(api.service.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        first = person.get("/console/requests?show=active")
        counted = [s for s in statements if "unlearn_requests" in s]
        assert len(counted) == 1 and "LIMIT" in counted[0] and "count(" not in counted[0]
        plan: list[Any] = []
        with api.service.engine.connect() as connection:
            query = (
                "EXPLAIN QUERY PLAN SELECT * FROM unlearn_requests WHERE state IN ('active') ORDER BY id DESC LIMIT 51"
            )
            plan = [row[3] for row in connection.exec_driver_sql(query)]
        assert any("ix_unlearn_requests_state_id" in line for line in plan), plan
        seen: list[str] = []
        page = first
        for _ in range(3):
            seen += re.findall(r'href="console/requests/(req_\w+)"', page.text)
            older = re.search(r'href="(console/requests\?[^"]+)" rel="next"', page.text)
            assert older is not None
            page = person.get("/" + older[1].replace("&amp;", "&"))
        active = sorted((str(row["id"]) for row in rows if row["state"] == "active"), reverse=True)
        assert seen == active[:150]
        assert len(first.content) < 100_000
        statements.clear()
        home = words(person.get("/"))
        assert len([s for s in statements if "unlearn_requests" in s]) == 2 and "2500 requests not in force yet" in home
        assert person.get("/console/requests?show=nonsense").status_code == 422
        assert person.get("/console/requests?cursor=req_x").status_code == 422


def test_one_sees_ones_own(api: Api) -> None:
    one, other = log_in(api, "requests"), log_in(api, "requests")
    mine = api.submit(one.headers)["id"]
    assert mine in one.get("/console/requests").text and mine not in other.get("/console/requests").text
    assert (
        other.get(f"/console/requests/{mine}").status_code
        == other.get(f"/console/requests/{mine}/live").status_code
        == 404
    )
    assert mine[-8:] in words(one.get("/")) and mine[-8:] not in words(other.get("/"))
    assert "0 requests not in force yet" in words(other.get("/"))
    metrics = log_in(api, "metrics")
    assert "Texts per second" in words(metrics.get("/")) and "Due next" not in words(metrics.get("/"))
    assert "Texts per second" not in words(one.get("/"))


# --- prompts, playground, evidence -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suppressed(api: Api) -> str:
    """A text that a request in force answers `unknown`; the guard knows it."""
    text = f"{MARKER} is awful"
    gate_space()
    add_prompt(api.service, soft_prompt(2), make_gate(text, digests=[api.service.vault.gate_digest(text)]), text=text)
    return text


def test_the_bare_models_answer_is_for_the_scope_scores(api: Api, admin: Person, suppressed: str) -> None:
    full = admin.post("/console/playground", {"texts": f"{suppressed}\na good movie", "do": "show"})
    said = words(full)
    assert "2 answers" in said and "1 “unknown”" in said and "Bare model" in said
    assert "It is one of the texts of a request" in said
    with api.service.sessions() as session:
        request_id = session.scalars(select(Prompt.request_id).order_by(Prompt.id.desc())).first()
    assert f'href="console/requests/{request_id}"' in full.text
    plain = log_in(api, "classify").post("/console/playground", {"texts": suppressed, "do": "show"})
    said = words(plain)
    assert "1 answer" in said and "unknown" in said
    assert (
        "Probabilities" not in said
        and str(request_id) not in plain.text
        and "one of the texts of a request" not in said
    )
    assert "keys with the scope scores only" in said
    scored = log_in(api, "classify", "scores").post("/console/playground", {"texts": suppressed, "do": "show"})
    assert "Probabilities" in words(scored) and str(request_id) not in scored.text
    answer = api.classify(admin.headers, suppressed)["results"][0]
    assert (answer["label"], answer["abstained"]) == ("unknown", True)


def test_answers_as_a_file(api: Api, admin: Person, suppressed: str) -> None:
    texts = ["=HYPERLINK(1)", "a good movie", "@x", suppressed]
    answer = admin.post("/console/playground", {"texts": "\n".join(texts), "do": "csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="answers.csv"'
    rows = list(csv.reader(io.StringIO(answer.text)))
    assert rows[0] == ["text", "answer", "base_answer", "decided_by", "active_set_version"]
    assert [row[0] for row in rows[1:]] == ["'=HYPERLINK(1)", "a good movie", "'@x", suppressed]
    assert rows[4][1] == "unknown" and rows[4][2] in ("positive", "negative")
    bare = log_in(api, "classify").post("/console/playground", {"texts": "\n".join(texts), "do": "csv"})
    assert next(iter(csv.reader(io.StringIO(bare.text)))) == ["text", "answer", "active_set_version"]
    for start in "=+-@\t\r＝＋－＠":
        shown = [Shown(f"{start}1", "positive", False, None, [], None, [])]
        cell = list(csv.reader(io.StringIO(as_csv(shown, ("positive",), 1, with_base=False), newline="")))[1][0]
        assert cell.startswith("'")
    for texts_sent, said in (
        ("", "at least 1"),
        ("\n".join(["good"] * 5), "has 5 items, the limit is 4"),
        ("good " * 100, "tokens"),
    ):
        refused = admin.post("/console/playground", {"texts": texts_sent, "do": "show"})
        assert refused.status_code == 422 and said in words(refused)


def test_an_earlier_set_comes_back_with_a_reason(api: Api, admin: Person, suppressed: str) -> None:
    with api.service.sessions() as session:
        newest = session.scalars(select(Prompt).order_by(Prompt.id.desc())).first()
    assert newest is not None
    page = admin.get("/console/prompts")
    assert newest.request_id in page.text and "Restore version 0" in page.text
    blank = admin.post("/console/active-sets/0/restore", {"reason": " "})
    assert blank.status_code == 422 and "must not be blank" in words(blank)
    assert admin.post("/console/active-sets/999/restore", {"reason": "x"}).status_code == 404
    done = admin.post("/console/active-sets/0/restore", {"reason": "hides too much"})
    assert done.headers["location"].endswith("console/prompts?done=restored")
    page = words(admin.get("/console/prompts?done=restored"))
    assert "as a new version" in page and "Suspended" in page and "hides too much" in page
    assert api.classify(admin.headers, suppressed)["results"][0]["abstained"] is False
    again = admin.post("/console/active-sets/0/restore", {"reason": "x"})
    assert again.status_code == 409 and "in force already" in words(again)
    assert admin.post("/console/active-sets/1/restore", {"reason": "back"}).status_code == 303
    auditor = log_in(api, "auditor")
    assert "Restore" not in words(auditor.get("/console/prompts"))


def test_the_log_is_verified_on_the_page(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path) as api:
        auditor = log_in(api, "auditor")
        assert "Not looked at yet" in words(auditor.get("/console/evidence"))
        checkpoint = auditor.get("/console/evidence/checkpoint")
        assert checkpoint.headers["content-disposition"] == 'attachment; filename="audit-checkpoint.json"'
        assert checkpoint.json()["kind"] == "checkpoint"
        page = words(auditor.get("/console/evidence?verify=true"))
        assert "It holds. All 3 entries follow" in page and "signature" in page
        with evidence_page._verifying:  # somebody else's
            refused = auditor.get("/console/evidence?verify=true")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "10"
        assert "verified already" in words(refused)
        with api.service.sessions.begin() as session:  # the log is whole, and what is served is not what it says
            session.get_one(ActiveSet, 1).version += 1
        broken = words(auditor.get("/console/evidence?verify=true"))
        assert "It does not." in broken and "The version of the active set is not what the log says." in broken
        with api.service.sessions.begin() as session:
            session.get_one(ActiveSet, 1).version -= 1
        log = auditor.get("/console/evidence/audit-log")
        assert len(log.text.splitlines()) == 5 and log.headers["content-type"].startswith("application/x-ndjson")
        with api.service.sessions.begin() as session:
            session.get_one(AuditEntry, 1).actor = "somebody else"
        broken = words(auditor.get("/console/evidence?verify=true"))
        assert "It does not." in broken and "entry 1" in broken
        failed = auditor.get("/console/evidence/audit-log")
        assert failed.status_code in (200, 409, 500)


def test_settings_of_the_session(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="console_session_hours"):
        Settings(_env_file=None, console_session_hours=0)
