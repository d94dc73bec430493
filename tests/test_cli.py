"""The command line in process: against a real server on loopback, against the local database, and its error lines."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, add_prompt, listening, new_key, soft_prompt
from click.testing import Result
from fastapi import FastAPI
from typer.testing import CliRunner

from app import cli, db, keys
from app.cli_remote import parse_options, read_texts
from app.errors import InvalidInput
from app.settings import Mode, get_settings
from letheon_client import Letheon, Unauthenticated


def run(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=given)


def document(result: Result) -> Any:
    """The JSON document that must be all of stdout."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_line(result: Result) -> str:
    """The one line of a failed command, behind the bars that it may have shown; stdout must be empty."""
    assert result.exit_code == 1, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "━" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].lstrip().startswith("error: ")
    return lines[0]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every command works in a folder of its own, whatever this shell or a .env here has set."""
    for name in ("DATABASE_URL", "BROKER_URL", "LETHEON_URL", "LETHEON_API_KEY", "LETHEON_MODEL", "LETHEON_RETAIN"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("LETHEON_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield home
    get_settings.cache_clear()


@dataclass
class Live:
    """A running server, and the shell set up to talk to it."""

    url: str
    app: FastAPI
    use: Callable[..., None]  # take a new key with these scopes


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    url = f"sqlite:///{tmp_path / 'server.db'}"
    with listening(url, tmp_path / "server", mode=Mode.CONCATENATE) as (url, app, _):

        def use(*scopes: str) -> None:
            header = new_key(app.state.service, *scopes)["Authorization"]
            monkeypatch.setenv("LETHEON_API_KEY", header.removeprefix("Bearer "))

        monkeypatch.setenv("LETHEON_URL", url)
        use()
        yield Live(url, app, use)


# --- requests, classify, prompts -------------------------------------------------------------------------------------


def test_submit_list_show_and_cancel(live: Live) -> None:
    submitted = document(run("requests", "submit", "--file", "-", "--json", given=f"{MARKER} one\n\n{MARKER} two\n"))
    assert (submitted["state"], submitted["num_texts"]) == ("pending", 2)
    request_id = submitted["id"]
    assert [r["id"] for r in document(run("requests", "list", "--json"))["items"]] == [request_id]
    assert document(run("requests", "list", "--state", "active", "--json"))["items"] == []
    assert (
        document(run("requests", "list", "--id", request_id, "--due-before", "2001-01-01T00:00:00Z", "--json"))["items"]
        == []
    )
    found = run("requests", "list", "--id", request_id[:12], "--received-from", "2001-01-01T00:00:00Z", "--json")
    assert [r["id"] for r in document(found)["items"]] == [request_id]
    assert document(run("requests", "show", request_id, "--json"))["id"] == request_id
    table = run("requests", "list")
    assert request_id in table.stdout
    assert MARKER not in table.stdout + run("requests", "show", request_id).stdout
    assert document(run("requests", "cancel", request_id, "--json"))["state"] == "cancelled"
    assert "conflict (409)" in error_line(run("requests", "cancel", request_id))


def test_submit_sends_labels_options_and_reason(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"id": "7", "text": f"{MARKER} is bad", "label": "negative"}) + "\n" + '"plain"\n')
    result = run("requests", "submit", "-f", str(path), "-o", "max_steps=3", "--reason", "case 12", "--json")
    request = document(result)
    assert (request["num_texts"], request["options"], request["reason"]) == (2, {"max_steps": 3}, "case 12")


def test_waiting_ends_with_the_request_and_its_state_is_the_exit_status(live: Live) -> None:
    request_id = document(run("requests", "submit", "--text", MARKER, "--json"))["id"]

    def cancel() -> None:  # not by the command line, whose runner replaces the output of this whole process
        with Letheon(live.url, os.environ["LETHEON_API_KEY"]) as client:
            client.cancel(request_id)

    canceller = threading.Timer(1.0, cancel)
    canceller.start()
    with Letheon(live.url) as anonymous, pytest.raises(Unauthenticated):
        anonymous.wait(request_id)
    shown = document(run("requests", "show", request_id, "--wait", "--json"))
    canceller.join()
    assert shown["state"] == "cancelled"


def test_a_refused_text_is_named_by_its_place_only(live: Live) -> None:
    line = error_line(run("requests", "submit", "--text", "fine", "--text", f"{MARKER} " * 200))
    assert "forget_texts[1].text" in line
    assert MARKER not in line


def test_classify(live: Live, tmp_path: Path) -> None:
    answer = document(run("classify", "a good film", "a bad film", "--json"))
    assert len(answer["results"]) == 2
    assert set(answer["results"][0]) == {"label", "abstained"}
    assert len(answer["active_set_versions"]) == 1
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a good film"}\n{"text": "a bad film"}\n')
    scored = document(run("classify", "--file", str(path), "--scores", "--json"))
    assert [r["label"] for r in scored["results"]] == [r["label"] for r in answer["results"]]
    assert 0 < scored["results"][0]["confidence"] <= 1
    assert "a good film" in run("classify", "a good film", "--scores").stdout


def test_classify_splits_many_texts_into_calls_the_server_takes(live: Live) -> None:
    texts = [f"film number {i}" for i in range(11)]  # this server takes 4 at a time
    done: list[int] = []
    with Letheon(live.url, os.environ["LETHEON_API_KEY"]) as client:
        answer = client.classify_many(texts, batch=4, on_done=done.append)
        one_by_one = [client.classify(text)["results"][0] for text in texts]
    assert done == [4, 8, 11]
    assert [r["label"] for r in answer["results"]] == [r["label"] for r in one_by_one]


def test_prompts_are_listed_and_revoked(live: Live) -> None:
    prompt_id = add_prompt(live.app.state.service, soft_prompt(1))
    assert [p["id"] for p in document(run("prompts", "list", "--json"))["items"]] == [prompt_id]
    assert prompt_id in run("prompts", "list").stdout
    asked = run("prompts", "revoke", prompt_id, "--reason", "withdrawn", given="n\n")
    assert asked.exit_code == 1
    assert document(run("prompts", "list", "--state", "active", "--json"))["items"]
    revoked = document(run("prompts", "revoke", prompt_id, "--reason", "withdrawn", "--yes", "--json"))
    assert (revoked["state"], revoked["revoke_reason"]) == ("revoked", "withdrawn")
    assert "conflict (409)" in error_line(run("prompts", "revoke", prompt_id, "--reason", "again", "--yes"))


# --- error lines -----------------------------------------------------------------------------------------------------


def test_active_sets_are_listed_and_restored(live: Live) -> None:
    for seed in (1, 2):
        add_prompt(live.app.state.service, soft_prompt(seed))
    listed = document(run("active-sets", "list", "--json"))["items"]
    assert [found["version"] for found in listed] == [2, 1, 0]
    assert listed[1]["digest"][:12] in run("active-sets", "list").stdout
    assert "--before 1" in run("active-sets", "list", "--limit", "2").stderr
    refused = run("active-sets", "restore", "1", "--reason", "too much", given="n\n")
    assert refused.exit_code != 0 and document(run("active-sets", "list", "--json"))["items"][0]["version"] == 2
    restored = document(run("active-sets", "restore", "1", "--reason", "too much", "--yes", "--json"))
    assert (restored["version"], restored["digest"]) == (3, listed[1]["digest"])
    assert "conflict (409)" in error_line(run("active-sets", "restore", "1", "--reason", "again", "--yes"))
    assert listed[2]["digest"][:12] in run("active-sets", "restore", "0", "--reason", "all", "--yes").stdout


def test_a_missing_or_weak_key_is_told(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.use("classify")
    assert "'admin'" in error_line(run("prompts", "list"))
    monkeypatch.delenv("LETHEON_API_KEY")
    assert "LETHEON_API_KEY" in error_line(run("requests", "list"))


def test_no_server_is_told_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHEON_URL", "http://127.0.0.1:9")  # discard: nobody listens
    assert "letheon serve" in error_line(run("classify", "x"))


@pytest.mark.parametrize("url", ["127.0.0.1:8600", "ftp://host", "http://user:pw@host", "http://host/?key=lth_x"])
def test_addresses_that_cannot_be_or_must_not_be(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("LETHEON_URL", url)
    line = error_line(run("classify", "x"))
    assert "LETHEON_URL" in line
    assert "pw" not in line.replace("password", "")
    assert "lth_x" not in line


def test_a_wrong_setting_is_told_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHEON_PORT", "secret-by-mistake")
    line = error_line(run("classify", "x"))
    assert "port" in line
    assert "secret-by-mistake" not in line


def test_missing_files_are_told(tmp_path: Path) -> None:
    assert "nowhere.txt" in error_line(run("requests", "submit", "--file", str(tmp_path / "nowhere.txt")))
    assert "letheon model pull" in error_line(run("serve"))
    assert "letheon model pull" in error_line(run("worker"))
    assert "checksum mismatch" in error_line(run("model", "pull", "--archive", __file__))
    assert "nothing to forget" in error_line(run("requests", "submit"))


def test_an_id_cannot_be_a_path(live: Live) -> None:
    assert "an id has" in error_line(run("requests", "show", "../admin/prompts"))


# --- reading texts and options ---------------------------------------------------------------------------------------


def test_read_texts(tmp_path: Path) -> None:
    plain = tmp_path / "texts.txt"
    plain.write_bytes(b"\xef\xbb\xbfone \r\n\r\n  two\r\n")
    assert read_texts(plain) == ["one", "two"]
    rows = tmp_path / "rows.txt"
    rows.write_text('{"text": "a", "label": null}\n{"text": "b", "label": "positive"}\n')
    assert read_texts(rows) == [{"text": "a"}, {"text": "b", "label": "positive"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x"}\n{' + MARKER.encode(), "line 2: not JSON"),
        (b'{"txt": "' + MARKER.encode() + b'"}', "line 1: needs"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe" + MARKER.encode(), "is not UTF-8"),
    ],
)
def test_unreadable_texts_are_named_by_line_only(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as error:
        read_texts(path)
    assert MARKER not in error.value.detail


def test_a_first_line_that_is_json_makes_it_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "texts"  # no suffix to go by, as on standard input
    path.write_text('"a \\"b\\""\n{"text": "c"}\n')
    assert read_texts(path) == ['a "b"', {"text": "c"}]
    path.write_text('"Brilliant", she said.\n"second"\n')
    assert read_texts(path) == ['"Brilliant", she said.', '"second"']
    for broken in ('["a", "b"]\n', '{"text": ' + "[" * 100_000):
        path.write_text(broken)
        with pytest.raises(InvalidInput, match="line 1"):
            read_texts(path)


def test_options() -> None:
    assert parse_options(["max_steps=3", "alpha=0.5"]) == {"max_steps": 3, "alpha": 0.5}
    for wrong in ("max_steps", "=3", "max_steps=three", "max_steps=NaN", "alpha=Infinity", "alpha=1e999"):
        with pytest.raises(InvalidInput):
            parse_options([wrong])


# --- webhooks --------------------------------------------------------------------------------------------------------


def test_webhooks_are_made_listed_tried_and_disabled(live: Live) -> None:
    live.use("requests")
    plain = run("webhooks", "create", "https://example.com/hook", "--state", "active")
    assert plain.exit_code == 0 and plain.stdout.startswith("whsec_") and len(plain.stdout.split()) == 1
    made = document(run("webhooks", "create", "https://example.com/hook", "--json"))
    listed = run("webhooks", "list", "--json")
    assert made["secret"] not in listed.stdout
    assert [hook["states"] for hook in document(listed)["items"]] == [[], ["active"]]
    assert "https://example.com/hook" in run("webhooks", "list").stdout
    sent = document(run("webhooks", "test", made["id"], "--json"))
    assert [d["id"] for d in document(run("webhooks", "deliveries", made["id"], "--json"))["items"]] == [sent["id"]]
    assert sent["id"] in run("webhooks", "deliveries", made["id"], "--state", "pending").stdout
    assert document(run("webhooks", "redeliver", made["id"], sent["id"], "--json"))["state"] == "pending"
    assert document(run("webhooks", "disable", made["id"], "--json"))["disabled_at"]
    assert "disabled" in error_line(run("webhooks", "test", made["id"]))
    assert "scope" in error_line(run("webhooks", "create", "https://example.com", "--all-requests"))
    assert "https://" in error_line(run("webhooks", "create", "http://example.com"))


# --- keys and doctor: the local database -----------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked(own_home: Path) -> None:
    made = document(run("keys", "create", "ci", "--scope", "classify", "--scope", "admin", "--json"))
    assert made["scopes"] == ["classify", "admin"]
    engine = db.make_engine(get_settings().effective_database_url)
    with db.make_sessions(engine)() as session:
        assert keys.authenticate(session, made["key"]).id == made["id"]
    engine.dispose()
    listed = run("keys", "list", "--json")
    assert made["key"] not in listed.stdout
    assert [k["id"] for k in document(listed)["items"]] == [made["id"]]
    assert document(run("keys", "revoke", made["id"], "--json"))["revoked_at"]
    assert "already revoked" in error_line(run("keys", "revoke", made["id"]))
    assert "scopes must be" in error_line(run("keys", "create", "x", "--scope", "everything"))
    assert own_home.joinpath("letheon.db").is_file()


def test_a_key_printed_for_people_is_alone_on_stdout() -> None:
    result = run("keys", "create", "ci")
    assert result.exit_code == 0
    assert result.stdout.startswith("lth_")
    assert len(result.stdout.split()) == 1


def test_doctor_changes_nothing_and_fails_without_a_model(own_home: Path) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert report["healthy"] is False
    assert found["model"]["status"] == "fail"
    assert "letheon model pull" in found["model"]["detail"]
    assert {found[name]["status"] for name in ("python", "torch", "device", "bitsandbytes", "broker")} == {"ok"}
    assert not own_home.exists()


def test_doctor_on_a_healthy_home(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retain = tmp_path / "retain.jsonl"
    retain.write_text('{"text": "a good film", "label": "positive"}\n')
    monkeypatch.setenv("LETHEON_MODEL", str(tmp_path))
    monkeypatch.setenv("LETHEON_RETAIN", str(retain))
    assert run("keys", "create", "ci").exit_code == 0
    (own_home / "master.key").write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
    (own_home / "master.key").chmod(0o600)
    get_settings.cache_clear()
    report = document(run("doctor", "--json"))
    found = {check["name"]: check for check in report["checks"]}
    assert {check["status"] for name, check in found.items() if name != "server"} == {"ok"}
    assert "1 entries" in found["audit chain"]["detail"]

    (own_home / "master.key").chmod(0o644)
    found = {check["name"]: check for check in json.loads(run("doctor", "--json").stdout)["checks"]}
    assert found["master key"]["status"] == "fail"


def test_doctor_finds_an_altered_audit_log_and_a_dead_broker(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("keys", "create", "ci").exit_code == 0
    engine = db.make_engine(get_settings().effective_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE audit_log SET actor = 'nobody'")
    engine.dispose()
    monkeypatch.setenv("BROKER_URL", "redis://:hunter2@127.0.0.1:9/0")
    get_settings.cache_clear()
    result = run("doctor", "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["audit chain"]["status"] == "fail"
    assert found["broker"]["status"] == "fail"
    assert "hunter2" not in result.stdout + result.stderr
    assert own_home.is_dir()
