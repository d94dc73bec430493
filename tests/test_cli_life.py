"""The commands of a request's life: terms, decisions, and a revoke that takes two."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from api_kit import MARKER, add_prompt, listening, new_key, soft_prompt
from floor import await_approval, must_take
from test_cli import Live, document, error_line, live, own_home, run

from app.settings import Mode
from app.tables import utcnow

__all__ = ["live", "own_home"]  # fixtures


def test_terms_are_sent_and_decided_on(live: Live) -> None:
    times = ("--received", received := utcnow().isoformat(), "--expires", "2099-01-01T00:00:00Z")
    asked = ("requests", "submit", "--text", MARKER, *times, "--require-approval", "--idempotency-key", "7", "--json")
    request = document(run(*asked))
    assert datetime.fromisoformat(request["received_at"]) == datetime.fromisoformat(received)
    assert (request["expires_at"], request["approval_required"]) == ("2099-01-01T00:00:00Z", True)
    assert document(run(*asked))["id"] == request["id"]
    assert "needed once it is trained" in run("requests", "show", request["id"]).stdout
    sessions = live.app.state.service.sessions
    await_approval(sessions, must_take(sessions, request["id"]))
    assert f"letheon requests approve {request['id']}" in run("requests", "show", request["id"]).stdout
    assert "same-key (403)" in error_line(run("requests", "approve", request["id"]))
    live.use("approve")
    assert document(run("requests", "approve", request["id"], "--json"))["state"] == "pending"
    assert "conflict (409)" in error_line(run("requests", "reject", request["id"], "--reason", "late"))
    live.use("requests")
    rejected = document(run("requests", "submit", "--text", MARKER, "--require-approval", "--json"))["id"]
    await_approval(sessions, must_take(sessions, rejected))
    live.use("approve")
    assert "rejected: not theirs" in run("requests", "reject", rejected, "--reason", "not theirs").stdout


def test_a_second_admin_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'two.db'}"
    with listening(url, tmp_path / "two", mode=Mode.CONCATENATE, revoke_needs_two=True) as (url, app, _):
        monkeypatch.setenv("LETHEON_URL", url)
        admins = [new_key(app.state.service)["Authorization"].removeprefix("Bearer ") for _ in range(2)]
        monkeypatch.setenv("LETHEON_API_KEY", admins[0])
        prompt_id = add_prompt(app.state.service, soft_prompt(1))
        revoke = ("prompts", "revoke", prompt_id, "--code", "harm", "--reason", "wrong person", "--yes")
        asked = run(*revoke)
        assert asked.exit_code == 0 and "active" in asked.stdout
        assert "another admin has to run this command" in asked.stderr
        assert "conflict (409)" in error_line(run(*revoke))
        assert document(run("prompts", "withdraw-revoke", prompt_id, "--json"))["revoke_asked_by"] is None
        run(*revoke)
        monkeypatch.setenv("LETHEON_API_KEY", admins[1])
        revoked = run(*revoke, "--json")
        assert (document(revoked)["state"], document(revoked)["revoke_code"]) == ("revoked", "harm")
        assert "another admin" not in revoked.stderr
