"""``letheon requests submit --dry-run`` and ``letheon active-sets rollback``, against a real server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_kit import MARKER, add_prompt, listening, new_key, soft_prompt
from click.testing import Result
from fastapi import FastAPI
from typer.testing import CliRunner

from app import cli
from app.settings import Mode, get_settings

RETAIN = [f"the {noun} number {i} is a {noun}" for noun in ("film", "movie", "story", "plot") for i in range(20)]


def run(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=given)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FastAPI]:
    """In the mode that the test asks for, and the shell set up to talk to it."""
    for name in ("DATABASE_URL", "BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LETHEON_HOME", str(tmp_path / "shell"))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    retain = tmp_path / "retain.jsonl"
    retain.write_text("".join(json.dumps({"text": text}) + "\n" for text in RETAIN), encoding="utf-8")
    knobs = {"mode": request.param, "retain": str(retain), "gate_rows": 64, "max_total_claim_rate": 1.0}
    with listening(f"sqlite:///{tmp_path}/server.db", tmp_path / "server", **knobs) as (url, app, _):
        key = new_key(app.state.service)["Authorization"].removeprefix("Bearer ")
        monkeypatch.setenv("LETHEON_URL", url)
        monkeypatch.setenv("LETHEON_API_KEY", key)
        yield app
    get_settings.cache_clear()


@pytest.mark.parametrize("server", [Mode.ROUTED], indirect=True)
def test_a_dry_run_as_document_and_as_table(server: FastAPI) -> None:
    given = f"{MARKER} is bad\n{MARKER} IS bad\n{RETAIN[0]}\n"
    asked = run("requests", "submit", "--dry-run", "--file", "-", "-o", "max_steps=7", "--json", given=given)
    report = json.loads(asked.stdout)
    assert report["forget"]["exact_duplicates"] == [1] and report["retain"]["texts"] == [2]
    assert report["cost"]["planned_steps"] == 7
    assert asked.exit_code == (1 if report["obstacles"] else 0)
    table = run("requests", "submit", "--dry-run", "--file", "-", given=given)
    assert "1 (no. 2)" in table.stdout and "blast radius" in table.stdout and "1 (no. 3)" in table.stdout
    assert MARKER not in table.stdout + table.stderr and RETAIN[0] not in table.stdout + table.stderr
    assert json.loads(run("requests", "list", "--json").stdout)["items"] == []


@pytest.mark.parametrize("server", [Mode.ROUTED], indirect=True)
def test_a_request_that_would_fail_is_exit_status_1(server: FastAPI, tmp_path: Path) -> None:
    (tmp_path / "retain.jsonl").write_text(json.dumps({"text": RETAIN[0]}) + "\n", encoding="utf-8")
    table = run("requests", "submit", "--dry-run", "--text", f"{MARKER} is bad")
    assert table.exit_code == 1 and "it would fail: too-few-retain-rows" in table.stderr


@pytest.mark.parametrize("server", [Mode.CONCATENATE], indirect=True)
def test_a_rollback_goes_back_to_the_newest_version_that_differs(server: FastAPI) -> None:
    nothing = run("active-sets", "rollback", "--reason", "too much", "--yes")
    assert nothing.exit_code == 1 and "no earlier version" in nothing.stderr
    for seed in (1, 2):
        add_prompt(server.state.service, soft_prompt(seed))
    versions = {s["version"]: s["digest"] for s in json.loads(run("active-sets", "list", "--json").stdout)["items"]}
    assert run("active-sets", "rollback", "--reason", "too much", given="n\n").exit_code == 1
    back = json.loads(run("active-sets", "rollback", "--reason", "too much", "--yes", "--json").stdout)
    assert (back["version"], back["digest"], back["reason"]) == (3, versions[1], "too much")
    again = json.loads(run("active-sets", "rollback", "--reason", "after all", "--yes", "--json").stdout)
    assert (again["version"], again["digest"]) == (4, versions[2]), "done twice, it is undone"
