"""Reports: the same bytes from every process, every figure of the receipt in sight, and nothing that was typed."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, Api, assert_problem, listening, new_key, running
from click.testing import Result
from databases import fresh_database, migrated_database, postgres_admin_url
from floor import activate, must_take, submit, terms
from pypdf import PdfReader
from sqlalchemy import insert, select
from sqlalchemy.orm import Session, sessionmaker
from training_kit import train
from typer.testing import CliRunner
from worker_kit import forget_texts

from app import active_set, cli, db, job_queue, lifecycle, report, report_page, report_pdf
from app.charts import percent
from app.receipt_format import ReceiptInvalid, extract, verify
from app.report_view import view
from app.settings import Mode, get_settings
from app.signing import canonical
from app.tables import Base, RequestEvent
from app.vault import Vault

Sessions = sessionmaker[Session]
FORMATS = {"json": "application/json", "html": "text/html; charset=utf-8", "pdf": "application/pdf"}


class Page(HTMLParser):
    """What a reader sees, and what a browser would run or fetch."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.seen, self.styles, self.policies = "", [""], [""]
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside: list[str] = []
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._inside:
            self.styles[-1] += data
        elif "pre" not in self._inside and "svg" not in self._inside:
            self.seen += data + " "


def pdf_text(data: bytes) -> str:
    reader = PdfReader(io.BytesIO(data))
    return re.sub(r"\s+", " ", " ".join(page.extract_text() for page in reader.pages))


def everything_in(data: bytes) -> bytes:
    """The file, and what is compressed in it."""
    if not data.startswith(b"%PDF"):
        return data
    reader = PdfReader(io.BytesIO(data))
    parts = [page.get_contents() for page in reader.pages]
    return data + pdf_text(data).encode() + b"".join(part.get_data() for part in parts if part is not None)


# --- of a real training, over HTTP -----------------------------------------------------------------------------------


@dataclass
class Filed:
    """A request that was trained, its receipt and its reports by format."""

    url: str
    receipt: bytes
    reports: dict[str, bytes]
    request_id: str


@pytest.fixture(scope="module")
def filed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filed]:
    folder = tmp_path_factory.mktemp("reports")
    url = migrated_database(folder / "letheon.db")
    with running(url, folder / "a", mode=Mode.ROUTED) as api, running(url, folder / "b") as other:
        request_id = train(api, folder / "a", Mode.ROUTED, [item.text for item in forget_texts(5)])
        path, headers = f"/unlearn-requests/{request_id}", api.key("auditor")
        reports = {}
        for name, media_type in FORMATS.items():
            answers = [s.client.get(f"{path}/report?format={name}", headers=headers) for s in (api, other, api)]
            assert {(a.status_code, a.headers["content-type"]) for a in answers} == {(200, media_type)}
            assert len({a.content for a in answers}) == 1, name
            file_name = f'filename="letheon-report-{request_id}.{name}"'
            assert answers[0].headers["content-disposition"] == f"inline; {file_name}"
            policy = answers[0].headers["content-security-policy"]
            assert policy == (report_page.POLICY if name == "html" else "default-src 'none'; frame-ancestors 'none'")
            reports[name] = answers[0].content
        assert api.client.get(f"{path}/report", headers=headers).content == reports["json"]
        check_refusals(api, path)
        yield Filed(url, api.client.get(f"{path}/receipt", headers=headers).content, reports, request_id)


def check_refusals(api: Api, path: str) -> None:
    headers = api.key("requests")
    pending = api.submit(headers)["id"]
    assert_problem(api.client.get(f"/unlearn-requests/{pending}/report", headers=headers), 409, "conflict")
    assert_problem(api.client.get(f"{path}/report", headers=headers), 404, "not-found")  # another key's
    assert_problem(api.client.get(f"{path}/report"), 401, "unauthenticated")
    assert_problem(api.client.get(f"{path}/report", headers=api.key("classify")), 403, "forbidden")
    refused = api.client.get(f"{path}/report?format=docx", headers=api.key())
    assert_problem(refused, 422, "invalid-input", field="query.format")


def test_another_process_gives_the_same_bytes(filed: Filed) -> None:
    code = """
import json, sys
from app import report_page, report_pdf
document = json.load(sys.stdin)
sys.stdout.buffer.write(report_page.render(document) + report_pdf.render(document))
"""
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code]
    made = subprocess.run(command, input=filed.reports["json"], env=environment, capture_output=True, check=True)
    assert made.stdout == filed.reports["html"] + filed.reports["pdf"]


@pytest.mark.skipif(postgres_admin_url() is None, reason="no PostgreSQL")
def test_another_database_gives_the_same_bytes(filed: Filed, tmp_path: Path) -> None:
    source = db.make_engine(filed.url)
    with fresh_database("postgresql", tmp_path) as url:
        copied = db.make_engine(url)
        with source.connect() as read, copied.begin() as write:
            for table in Base.metadata.sorted_tables:
                rows = [dict(row) for row in read.execute(select(table)).mappings()]
                write.execute(table.delete())
                if rows:
                    write.execute(insert(table), rows)
        source.dispose()
        copied.dispose()
        with running(url, tmp_path) as api:
            headers = api.key("auditor")
            for name, data in filed.reports.items():
                path = f"/unlearn-requests/{filed.request_id}/report?format={name}"
                assert api.client.get(path, headers=headers).content == data


@pytest.mark.parametrize("name", FORMATS)
def test_the_receipt_is_in_it_whole(filed: Filed, name: str) -> None:
    assert extract(filed.reports[name]) == filed.receipt
    found, _ = verify(extract(filed.reports[name]))
    assert found["request"]["id"] == filed.request_id


def test_the_receipt_can_be_saved_without_letheon(filed: Filed) -> None:
    [link] = [attrs for tag, attrs in Page(filed.reports["html"]).tags if tag == "a"]
    head, _, data = (link["href"] or "").partition(",")
    assert head == "data:application/json;base64" and base64.b64decode(data) == filed.receipt
    attached = PdfReader(io.BytesIO(filed.reports["pdf"])).attachments
    assert attached == {f"receipt-{filed.request_id}.json": [filed.receipt]} and link["download"] in attached
    body = json.loads(filed.reports["json"])
    assert canonical(body["receipt"]) == filed.receipt and canonical(body) == filed.reports["json"]


def test_every_figure_of_the_receipt_is_shown(filed: Filed) -> None:
    receipt = json.loads(filed.receipt)["receipt"]
    page, pdf = Page(filed.reports["html"]).seen, pdf_text(filed.reports["pdf"]).replace("\N{NO-BREAK SPACE}", " ")
    checks = receipt["checks"]
    areas = [rate for rate in checks["rates"] if rate["name"].removesuffix("_before") in report.AREAS]
    shares = [rate for rate in checks["rates"] if rate not in areas]
    expected = [percent(rate[name]) for rate in shares for name in ("rate", "low", "high") if rate["low"] is not None]
    expected += [f"{area['rate']:.3f} ({area['low']:.3f} to {area['high']:.3f})" for area in areas]
    expected += [str(rate["rows"]) for rate in checks["rates"] if rate["rows"] is not None]
    expected += [json.dumps(value) for values in (checks["counts"], checks["limits"]) for value in values.values()]
    expected += [receipt["prompt"]["digest"], receipt["prompt"]["gate_digest"], receipt["request"]["set_digest"]]
    expected += [receipt["key"]["public_key"], receipt["request"]["asked_by"], receipt["model"]["fingerprint"]]
    expected += [str(entry["seq"]) for entry in receipt["audit"]] + [entry["hash"] for entry in receipt["audit"]]
    assert len(expected) > 60 and len(areas) == 2
    for figure in expected:
        assert figure in page
        assert figure.replace(" ", "") in pdf.replace(" ", "")  # a long digest is broken into lines
    for sentence in receipt["meaning"]:
        for said in (page, pdf):  # without spaces, which follow the lines and the code
            assert re.sub("[` ]", "", sentence) in re.sub(r"\s", "", said)


def test_an_area_is_no_share(filed: Filed) -> None:
    """Of the membership attack: in words, never in percent, and in no bar."""
    body = json.loads(filed.reports["json"])
    [figure] = [one for one in body["figures"] if one["name"] == "membership_auc"]
    assert figure["words"].startswith("Area under the curve of a membership attack; 0.5 is guessing")
    shown = view(body)
    [row] = [row for row in shown.figures if row.name == "membership_auc"]
    for cell, area in ((row.before, figure["before"]), (row.after, figure["after"])):
        assert cell == f"{area['rate']:.3f} ({area['low']:.3f} to {area['high']:.3f})"
    assert row.rows == "5 of the request, and others" and "%" not in " ".join((row.before, row.after))
    bars = next(picture for picture in shown.pictures if "Before and after" in picture)
    assert "right answers" in bars and "ttack" not in bars
    held_out = copy.deepcopy(body)
    held_out["receipt"]["receipt"]["checks"]["counts"]["held_out_rows"] = 64
    [row] = [row for row in view(held_out).figures if row.name == "membership_auc"]
    assert row.rows == "5 of the request, 64 held out"


def test_what_people_read_has_no_raw_names(filed: Filed) -> None:
    body = json.loads(filed.reports["json"])
    shown, state = view(body), body["state"]
    assert (
        state == "active"
        and "· In force (active) ·" in shown.subtitle
        and ("State", "In force (active)") in shown.asked
    )
    names = [name for name, _ in shown.asked]
    assert "In force since" in names and not [name for name in names if name.startswith("Ended")], "said once"
    for figure in body["figures"]:
        assert figure["words"] != figure["name"] and figure["short"] != figure["name"]
    assert not [name for name, _ in shown.counts if "_" in name.partition(":")[0]]
    page, pdf = Page(filed.reports["html"]).seen, pdf_text(filed.reports["pdf"])
    for said in (page, pdf):
        assert said.index("Case or reference") < said.index("Reviewed by"), "to be filled in by hand"


def test_a_picture_has_the_losses_of_the_training(filed: Filed) -> None:
    body = json.loads(filed.reports["json"])
    assert [point["step"] for point in body["curve"]][-1] == 4 and set(body["curve"][0]) == {"step", *report.LOSSES}
    html = filed.reports["html"].decode()
    assert html.count("<svg ") == 2 and "Training of the prompt" in html


@pytest.mark.parametrize("name", FORMATS)
def test_no_text_of_the_request_is_in_it(filed: Filed, name: str) -> None:
    data = everything_in(filed.reports[name])
    for word in MARKER.split():
        assert word.encode() not in data


def test_the_page_keeps_its_policy(filed: Filed) -> None:
    """No script, no style but the one that the policy names by its hash, and nothing from elsewhere."""
    page = Page(filed.reports["html"])
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for _, attributes in page.tags:
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "data:application/json").startswith("data:application/json")
    [style] = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert "url(" not in style and "@import" not in style
    [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert f"{policy}; frame-ancestors 'none'; sandbox allow-downloads" == report_page.POLICY


# --- of every end that a request can have ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sessions, Vault]]:
    engine = db.make_engine(migrated_database(tmp_path_factory.mktemp("ends") / "letheon.db"))
    yield db.make_sessions(engine), Vault(bytes(range(32)))
    engine.dispose()


def make_report(sessions: Sessions, vault: Vault, request_id: str) -> dict[str, Any]:
    return report.build(sessions, vault, request_id)


def render_all(document: dict[str, Any]) -> str:
    """Both files can be made; what the page says."""
    assert report_pdf.render(document).startswith(b"%PDF")
    return re.sub(r"\s+", " ", Page(report_page.render(document)).seen)


def test_of_a_cancelled_and_of_a_failed_request(site: tuple[Sessions, Vault]) -> None:
    sessions, vault = site
    cancelled, failed = submit(sessions, vault), submit(sessions, vault, "a", "b", terms=terms())
    with sessions.begin() as session:
        lifecycle.request_cancel(session, cancelled, actor="key_1")
    claim = must_take(sessions, failed)
    with sessions.begin() as session:
        lifecycle.fail(session, claim, code="diverged", detail=f"not for reports: {MARKER}")
    found = make_report(sessions, vault, cancelled)
    said = render_all(found)
    assert "asked to forget 1 text." in said and "It was cancelled before it came into force." in said
    assert "Nothing was measured" in said and "The deadline" not in said and found["figures"] == []
    assert ("State", "Cancelled (cancelled)") in view(found).asked
    assert [value for name, value in view(found).asked if name == "Ended"] != []
    found = make_report(sessions, vault, failed)
    said = render_all(found)
    assert "the training did not converge (code: diverged). Nothing is suppressed by it." in said
    assert ("Failure", "the training did not converge (diverged)") in view(found).asked
    assert "The deadline was" in said and "Quillfeather" not in json.dumps(found)
    assert found["as_of"] == found["history"][-1]["at"] and found["history"][-1]["what"] == "It failed."


def test_it_says_since_when_the_deadline_runs(site: tuple[Sessions, Vault]) -> None:
    sessions, vault = site
    agreed = terms()
    earlier = replace(agreed, received_at=agreed.received_at - timedelta(days=3))
    dated, at_once = (submit(sessions, vault, terms=one) for one in (earlier, agreed))
    with sessions.begin() as session:
        for request_id in (dated, at_once):
            lifecycle.request_cancel(session, request_id, actor="key_1")
    said = render_all(make_report(sessions, vault, dated))
    when = report.moment(earlier.received_at.isoformat())
    assert f"The person's request was received on {when}; the deadline is counted from then." in said
    document = make_report(sessions, vault, dated)
    assert ("Received from the person", when) in view(document).asked
    assert when.replace(" ", "") in pdf_text(report_pdf.render(document)).replace(" ", "")
    assert "the deadline is counted" not in " ".join(make_report(sessions, vault, at_once)["summary"])


def test_of_an_active_a_suspended_and_a_revoked_request(site: tuple[Sessions, Vault]) -> None:
    sessions, vault = site
    request_id = submit(sessions, vault, terms=terms(minutes=60))
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=0)
    active = render_all(make_report(sessions, vault, request_id))
    assert "It has been in force since" in active and "It ends by itself on" in active
    assert "Measured when it came into force: 100 % of its texts were answered “unknown”" in active
    assert re.search(r"The deadline, [^,]+, [0-9:]+ UTC, was kept, with \d\d days to spare\.", active)
    with sessions.begin() as session:
        active_set.restore(session, 0, mode="concatenate", fingerprint="f" * 64, actor="key_2", reason=MARKER)
    assert "is not in force now" in render_all(make_report(sessions, vault, request_id))
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_3", reason=MARKER, code="withdrawn")
    found = make_report(sessions, vault, request_id)
    revoked = render_all(found)
    assert "(reason code: withdrawn). Since then it changes no answer." in revoked
    assert "Quillfeather" not in json.dumps(found)
    assert [entry["what"] for entry in found["history"] if entry["what"] == entry["action"]] == []


def test_the_curve_is_of_the_last_try(site: tuple[Sessions, Vault]) -> None:
    sessions, vault = site

    def step(number: int, loss: float) -> dict[str, Any]:
        return {"step": number, "loss": loss, "forget_loss": None, "phase": "training"}

    request_id = submit(sessions, vault)
    claim = must_take(sessions, request_id)
    with sessions.begin() as session:
        for number, loss in ((1, 9.0), (2, 8.0), (3, 7.0)):
            job_queue.record_progress(session, claim, step(number, loss))
        lifecycle.start_again(session, claim, {"num_virtual_tokens": 4})
        # Then a worker is lost behind its third step, and another goes on from a checkpoint at the first.
        for number, loss in ((1, 5.0), (2, 4.0), (3, 3.5), (2, 4.5), (3, 3.0), (4, float("inf"))):
            job_queue.record_progress(session, claim, step(number, loss))
        lifecycle.fail(session, claim, code="diverged", detail="")
    found = make_report(sessions, vault, request_id)
    assert found["curve"] == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.5}, {"step": 3, "loss": 3.0}]
    with sessions.begin() as session:
        many = [step(number, 1 / number) for number in range(5, 2000)]
        now = lifecycle.get_request(session, request_id).updated_at
        session.add_all(RequestEvent(request_id=request_id, at=now, type="progress", data=data) for data in many)
    curve = make_report(sessions, vault, request_id)["curve"]
    assert len(curve) == report.CURVE_POINTS and (curve[0]["step"], curve[-1]["step"]) == (1, 1999)


# --- words from outside --------------------------------------------------------------------------------------------


HOSTILE = "</style></script><img src=x onerror=alert(1)>\"'&{{7777*7777}}{% raw %}\x1b"


def test_words_from_outside_are_escaped(filed: Filed) -> None:
    body = json.loads(filed.reports["json"])
    signed = copy.deepcopy(body["receipt"])
    receipt = signed["receipt"]
    receipt["request"]["options"] = {HOSTILE: HOSTILE}
    receipt["model"]["identity"]["template"] = HOSTILE
    receipt["checks"]["violations"] = [HOSTILE]
    odd = {"rate": 0.5, "rows": 9, "low": 0.2, "high": 0.8, "approximate": False}
    names = [f"accuracy of class {HOSTILE}, {when}" for when in ("before", "after")]
    receipt["checks"]["rates"] += [{"name": name, **odd} for name in names]
    made = report.describe(signed, curve=body["curve"], warnings=[HOSTILE])
    data = report_page.render(made)
    page = Page(data)
    assert not {tag for tag, _ in page.tags} & {"script", "img"} and b"<img" not in data and b"60481729" not in data
    assert "onerror=alert(1)" in page.seen and "{{7777*7777}}" in page.seen
    assert [attrs for _, attrs in page.tags if "onerror" in attrs] == []
    assert report_pdf.render(made).startswith(b"%PDF")


def test_what_the_fonts_lack_is_spelt_out(filed: Filed) -> None:
    body = json.loads(filed.reports["json"])
    signed = copy.deepcopy(body["receipt"])
    signed["receipt"]["request"]["options"] = {"label": "Größe, Привет, 中"}
    text = pdf_text(report_pdf.render(report.describe(signed, curve=[], warnings=[])))
    assert "Größe, Привет, \\u4e2d" in text


def test_the_view_says_the_same_as_the_report(filed: Filed) -> None:
    body = json.loads(filed.reports["json"])
    shown = view(body)
    assert [row.name for row in shown.figures] == [figure["name"] for figure in body["figures"]]
    assert ("SHA-256 of the receipt", hashlib.sha256(filed.receipt).hexdigest()) in shown.signature
    assert body["signed"]["key"]["id"] in dict(shown.signature)["Signed by"]


# --- taking the receipt out ------------------------------------------------------------------------------------------


def test_a_file_without_one_receipt_is_refused(filed: Filed) -> None:
    for data in (b"", b"{}", b"%PDF-1.7", filed.reports["html"].replace(b"base64,", b"base64;")):
        with pytest.raises(ReceiptInvalid, match="holds no receipt"):
            extract(data)
    other = filed.receipt.replace(b'"num_texts":5', b'"num_texts":6')
    assert other != filed.receipt
    with pytest.raises(ReceiptInvalid, match="more than one"):
        extract(filed.reports["pdf"] + other)
    assert extract(filed.reports["json"] + filed.receipt) == filed.receipt  # the same one twice is one


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(migrated_database(tmp_path / "cli.db"), tmp_path / "home") as (url, app, _):
        service = app.state.service
        monkeypatch.setenv("LETHEON_URL", url)
        monkeypatch.setenv("LETHEON_API_KEY", new_key(service)["Authorization"].removeprefix("Bearer "))
        get_settings.cache_clear()
        request_id = submit(service.sessions, service.vault)
        early = run("requests", "report", request_id)
        assert early.exit_code == 1 and "has no receipt yet" in early.stderr
        with service.sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="key_1")
        receipt = run("receipt", "get", request_id).stdout_bytes
        for name in FORMATS:
            got = run("requests", "report", request_id, "--format", name, "--out", f"report.{name}")
            assert got.exit_code == 0 and f"letheon receipt extract report.{name}" in got.stderr, got.stderr
        assert run("requests", "report", request_id).stdout_bytes == Path("report.json").read_bytes()
    for name in FORMATS:  # the server is gone by now
        taken = run("receipt", "extract", f"report.{name}")
        assert taken.exit_code == 0 and taken.stdout_bytes == receipt
        Path("receipt.json").write_bytes(taken.stdout_bytes)
        good = run("receipt", "verify", "receipt.json")
        assert good.exit_code == 0 and f"{request_id}, cancelled, 1 texts" in good.stderr
    Path("receipt.json").write_bytes(b"nothing")
    assert run("receipt", "extract", "receipt.json").exit_code == 1
