"""Exports of the audit log are proven offline: whatever is done to one, or to the log before the next, is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from api_kit import assert_problem, running
from audit_kit import (
    cut_database,
    entries_of,
    export_lines,
    fill,
    forge_export,
    make_checkpoint,
    rewrite_database,
    the_signer,
    with_head,
)
from click.testing import Result
from databases import migrated_database
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner

from app import audit, cli, db
from app.audit_chain import AuditBroken
from app.audit_export import verify_lines
from app.errors import InvalidInput
from app.settings import get_settings
from app.signing import PublicKey, Signer, canonical, new_private_key
from app.signing_key import find_public_key, verify_audit
from app.tables import ApiKey, AuditCheckpoint
from app.vault import Vault

Sessions = sessionmaker[Session]
TRIALS = settings(max_examples=100, deadline=None)


@dataclass(frozen=True)
class Log:
    """One log exported twice: with 8 entries, then with 14."""

    older: list[bytes]
    lines: list[bytes]
    signer: Signer

    @property
    def key(self) -> PublicKey:
        return self.signer.public


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    engine = db.make_engine(migrated_database(tmp_path_factory.mktemp("log") / "log.db"))
    sessions, vault = db.make_sessions(engine), Vault(bytes(range(32)))
    fill(sessions, 4)
    make_checkpoint(sessions, vault)
    fill(sessions, 3)
    older = export_lines(sessions, vault)
    fill(sessions, 3)
    make_checkpoint(sessions, vault)
    fill(sessions, 3)
    yield Log(older, export_lines(sessions, vault), the_signer(sessions, vault))
    engine.dispose()


def assert_broken(lines: list[bytes], key: PublicKey | None, against: list[bytes] | None = None) -> int:
    with pytest.raises(AuditBroken) as caught:
        verify_lines(lines, key, against)
    seq: int = caught.value.extra["seq"]
    assert 1 <= seq <= len(lines) + 1
    return seq


def test_an_export_round_trips_on_every_database(sessions: Sessions, vault: Vault) -> None:
    fill(sessions, 4)
    first = make_checkpoint(sessions, vault)
    fill(sessions, 2)
    lines = export_lines(sessions, vault)
    assert [json.loads(line)["kind"] for line in lines] == ["entry"] * 7 + ["checkpoint"] * 2 + ["head"]
    key = the_signer(sessions, vault).public
    found = verify_lines(lines, key)
    assert (found.entries, found.checkpoints, found.public_key) == (7, 2, key)
    assert verify_lines([line.decode() for line in lines]) == found
    point = canonical(audit.checkpoint_document(first, key))
    assert verify_lines(lines, key, [point]).entries == 7
    with sessions() as session:
        assert verify_audit(session, vault) == 7


def test_more_entries_than_a_page(sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_PAGE", 3)
    fill(sessions, 8)
    make_checkpoint(sessions, vault)
    assert verify_lines(export_lines(sessions, vault)).entries == 9


def test_the_untouched_exports_hold(log: Log) -> None:
    assert verify_lines(log.lines, log.key).entries == 14
    assert verify_lines(log.lines, log.key, log.older).entries == 14
    assert verify_lines(log.older, log.key, log.older).entries == 8
    assert assert_broken(log.older, log.key, log.lines) == 9  # the other way round the log was cut


def _other(value: Any) -> Any:
    """The same type, another value."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return {**value, "number": -1} if isinstance(value, dict) else value + 1


@TRIALS
@given(data=st.data())
def test_an_edited_field_is_found(log: Log, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(log.lines) - 1))
    document = json.loads(log.lines[at])
    name = data.draw(st.sampled_from(sorted(document)))
    action = data.draw(st.sampled_from(["edit", "remove", "null", "add"]))
    if action == "edit":
        document[name] = _other(document[name])
    elif action == "null":
        document[name] = None
    elif action == "remove":
        del document[name]
    else:
        document[name + "2"] = document[name]
    lines = [*log.lines[:at], canonical(document) + b"\n", *log.lines[at + 1 :]]
    seq = assert_broken(lines, log.key)
    if at < 14 and name in ("actor", "action", "subject", "detail", "at") and action == "edit":
        assert seq == at + 1  # the very entry is named


@TRIALS
@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(log: Log, at: int, bit: int) -> None:
    whole = bytearray(b"".join(log.lines))
    whole[at % len(whole)] ^= 1 << bit
    assert_broken(bytes(whole).splitlines(keepends=True), log.key)


@TRIALS
@given(data=st.data())
def test_lines_deleted_doubled_swapped_or_cut_are_found(log: Log, data: st.DataObject) -> None:
    lines = list(log.lines)
    at, other = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True))
    action = data.draw(st.sampled_from(["delete", "double", "swap", "cut", "insert"]))
    if action == "delete":
        del lines[at]
    elif action == "double":
        lines.insert(at, lines[at])
    elif action == "insert":
        lines.insert(at, lines[other])
    elif action == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        del lines[at:]
    assert_broken(lines, log.key)


@TRIALS
@given(start=st.integers(1, 8), drop=st.integers(0, 6), theirs=st.booleans())
def test_a_log_made_anew_is_found_against_an_older_export(log: Log, start: int, drop: int, theirs: bool) -> None:
    """Right in itself, hashes and all; even when the deployment's own key has signed it."""
    entries = deepcopy(entries_of(log.lines))
    entries[start - 1]["actor"] = "somebody else"
    lines = forge_export(entries[: 14 - drop], log.signer if theirs else Signer(new_private_key()))
    verify_lines(lines)  # alone, and under the key that it names, nothing is wrong with it
    if theirs:
        assert assert_broken(lines, None, log.older) == start
    else:
        assert_broken(lines, log.key)
        assert_broken(lines, None, log.older)


@TRIALS
@given(last=st.integers(1, 7), again=st.integers(0, 9))
def test_a_cut_log_is_found_against_an_older_export(log: Log, last: int, again: int) -> None:
    """Also when it has grown since, beyond the length that it had."""
    kept = entries_of(log.lines)[:last]
    made = [{**kept[0], "subject": "made up"}] * again
    lines = forge_export([*kept, *made], log.signer)
    verify_lines(lines, log.key)
    assert assert_broken(lines, log.key, log.older) == last + 1
    checkpoint = [line for line in log.older if b'"kind":"checkpoint"' in line][-1:]
    assert_broken(lines, log.key, checkpoint)
    pretty = json.dumps(json.loads(checkpoint[0]), indent=2).splitlines(keepends=True)
    assert_broken(lines, log.key, [line.encode() for line in pretty])
    assert verify_lines(log.lines, log.key, [line.encode() for line in pretty]).entries == 14


def test_what_nobody_had_a_copy_of_is_not_proven(log: Log) -> None:
    """The limit that the documentation states: the deployment itself may rewrite what came after the last copy."""
    entries = deepcopy(entries_of(log.lines))
    entries[10]["actor"] = "somebody else"
    assert verify_lines(forge_export(entries, log.signer), log.key, log.older).entries == 14


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'{"action":', b'{"action":"a","action":'), (b'"seq":2', b'"seq": 2'), (b'"actor"', b'"\\u0061ctor"')],
)
def test_a_line_has_one_spelling_whoever_signs_it(log: Log, old: bytes, new: bytes) -> None:
    """A name given twice, for one, is read differently by different parsers."""
    lines = forge_export(entries_of(log.lines), log.signer)[:-1]
    assert verify_lines(with_head(lines, log.signer), log.key).entries == 14
    lines[1] = lines[1].replace(old, new)
    assert json.loads(lines[1])["seq"] == 2
    assert assert_broken(with_head(lines, log.signer), log.key) == 2


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"{}",
        b'{"kind":[]}',
        b'{"kind":"entry"}',
        b"\xff",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"kind":"checkpoint","seq":NaN}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_export_is_refused(log: Log, line: bytes) -> None:
    assert assert_broken([line], log.key) == 1
    assert assert_broken([*log.lines[:3], line, *log.lines[3:]], log.key) == 4
    assert_broken([*log.lines, line], log.key)
    assert assert_broken([], log.key) == 1
    with pytest.raises(InvalidInput):
        verify_lines(log.lines, log.key, [line])
    with pytest.raises(InvalidInput):
        verify_lines(log.lines, log.key, [])


def test_an_older_export_that_was_altered_itself_proves_nothing(log: Log) -> None:
    with pytest.raises(AuditBroken, match="the older export"):
        verify_lines(log.lines, log.key, [*log.older[:3], *log.older[4:]])
    foreign = forge_export(entries_of(log.older), Signer(new_private_key()))
    with pytest.raises(AuditBroken, match="another key"):
        verify_lines(log.lines, log.key, foreign)


# --- the command line and the routes ---------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("DATABASE_URL", "BROKER_URL", "LETHEON_MASTER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LETHEON_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


def test_from_the_command_line(own_home: Path) -> None:
    assert run("keys", "create", "ci").exit_code == 0
    key = run("audit", "public-key").stdout.strip()
    assert PublicKey.from_hex(json.loads(run("audit", "public-key", "--json").stdout)["public_key"]).hex() == key
    first = run("audit", "export")
    assert first.exit_code == 0, first.stderr
    (own_home / "first.jsonl").write_bytes(first.stdout_bytes)
    assert run("keys", "create", "cd").exit_code == 0
    (own_home / "second.jsonl").write_bytes(run("audit", "export").stdout_bytes)

    assert json.loads(run("audit", "verify", "--json").stdout) == {"entries": 3}
    found = run("audit", "verify", "second.jsonl", "--public-key", key, "--against", "first.jsonl", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["entries"] == 3
    alone = run("audit", "verify", "second.jsonl")
    assert alone.exit_code == 0 and "the file's own" in alone.stderr and "3 entries" in alone.stderr

    lines = (own_home / "second.jsonl").read_bytes().splitlines(keepends=True)
    (own_home / "bad.jsonl").write_bytes(b"".join([lines[0], lines[1].replace(b'"system"', b'"nobody"'), *lines[2:]]))
    for arguments, said in (
        (["bad.jsonl"], "audit entry 2 is missing or was altered"),
        (["first.jsonl", "--against", "second.jsonl"], "audit entry 3 is missing"),
        (["second.jsonl", "--public-key", "0" * 64], "another key"),
        (["second.jsonl", "--public-key", "x"], "64 hex digits"),
        (["--public-key", key], "are about a file"),
        (["none.jsonl"], "No such file"),
    ):
        failed = run("audit", "verify", *arguments)
        assert failed.exit_code == 1 and failed.stdout == "" and said in failed.stderr, failed.stderr

    engine = db.make_engine(get_settings().effective_database_url)
    sessions = db.make_sessions(engine)
    rewrite_database(sessions, 1)
    failed = run("audit", "verify")
    assert failed.exit_code == 1 and "rewritten at entry 2 or before" in failed.stderr
    assert run("audit", "export").exit_code == 1
    with sessions.begin() as session:  # whoever can do that can do this too: only the copies elsewhere show it
        session.execute(delete(AuditCheckpoint))
        session.execute(delete(ApiKey).where(ApiKey.name == "cd"))  # the log that is left does not have it
    cut_database(sessions, 2)
    assert run("audit", "verify").exit_code == 0
    (own_home / "third.jsonl").write_bytes(run("audit", "export").stdout_bytes)
    failed = run("audit", "verify", "third.jsonl", "--against", "first.jsonl")
    assert failed.exit_code == 1 and "audit entry 1 was rewritten" in failed.stderr
    engine.dispose()


def test_over_http(database_url: str, tmp_path: Path) -> None:
    with running(database_url, tmp_path) as api:
        headers = api.key("auditor")
        api.submit(api.key("requests"))
        key = api.client.get("/admin/audit/public-key", headers=headers).json()
        public = PublicKey.from_hex(key["public_key"])
        assert (key["key_id"], key["algorithm"]) == (public.key_id, "Ed25519")
        point = api.client.get("/admin/audit/checkpoint", headers=headers)
        assert point.json() == api.client.get("/admin/audit/checkpoint", headers=headers).json()
        api.key("admin")
        response = api.client.get("/admin/audit/export", headers=headers)
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = response.content.splitlines(keepends=True)
        found = verify_lines(lines, public, [point.content])
        assert found.entries == point.json()["seq"] + 1

        page = api.client.get("/admin/audit?limit=2", headers=api.key("admin")).json()
        assert [item["seq"] for item in page["items"]] == [found.entries + 1, found.entries]
        rest = api.client.get(f"/admin/audit?before={page['next_before']}", headers=headers).json()
        assert len(rest["items"]) == found.entries - 1 and rest["next_before"] is None
        request_id = api.client.get("/unlearn-requests", headers=api.key()).json()["items"][0]["id"]
        about = api.client.get("/admin/audit", params={"subject": request_id}, headers=headers).json()
        assert [item["action"] for item in about["items"]] == ["request.created"]
        assert_problem(api.client.get("/admin/audit?subject=%00", headers=headers), 422, "invalid-input")

        for path in ("", "/export", "/checkpoint", "/public-key"):
            assert_problem(api.client.get(f"/admin/audit{path}"), 401, "unauthenticated")
            others = api.key("requests", "classify", "scores", "approve", "metrics")
            problem = assert_problem(api.client.get(f"/admin/audit{path}", headers=others), 403, "forbidden")
            assert "'auditor', 'admin'" in problem["detail"]

        rewrite_database(api.service.sessions, 1)
        for path in ("/export", "/checkpoint"):
            assert_problem(api.client.get(f"/admin/audit{path}", headers=headers), 500, "audit-broken")


def test_the_command_line_makes_no_key_under_another_master_key(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service's signatures would be impossible from then on: a signing key is never replaced."""
    url = get_settings().effective_database_url
    db.upgrade(url)
    engine = db.make_engine(url)
    sessions = db.make_sessions(engine)
    vault = Vault(bytes(32))
    with sessions.begin() as session:
        vault.adopt(session)  # as the service does when it starts
    for command in ("public-key", "export"):
        failed = run("audit", command)
        assert failed.exit_code == 1 and "another LETHEON_MASTER_KEY" in failed.stderr
    with sessions() as session:
        assert find_public_key(session, vault) is None
    engine.dispose()
