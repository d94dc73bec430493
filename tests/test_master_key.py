"""What a database holds sealed, one master key opens: under another one nothing starts, and so nothing is lost."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import MASTER_KEY, add_prompt, make_gate, make_settings, running, soft_prompt
from floor import activate, must_take, submit
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from worker_kit import write_retain

from app import active_set, db, lifecycle, reconcile
from app.errors import VaultError
from app.vault import Vault
from worker.main import prepare

Sessions = sessionmaker[Session]
OTHER_KEY = base64.b64encode(bytes(range(100, 132))).decode()
SAYS = "sealed under another LETHEON_MASTER_KEY"


def check(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session:
        reconcile.check_master_key(session, vault)


@pytest.fixture
def other() -> Vault:
    return Vault(bytes(range(100, 132)))


def test_an_empty_database_takes_any_key(sessions: Sessions, vault: Vault, other: Vault) -> None:
    check(sessions, vault)
    check(sessions, other)


def test_a_request_in_the_queue_binds_the_key_until_it_is_shredded(
    sessions: Sessions, vault: Vault, other: Vault
) -> None:
    requests = [submit(sessions, vault) for _ in range(2)]
    for request_id in requests:
        check(sessions, vault)
        with pytest.raises(VaultError, match=SAYS):
            check(sessions, other)
        with sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="key_1")
    check(sessions, other)  # nothing is left that it could fail to open


def test_a_prompt_binds_the_key_until_it_is_revoked(sessions: Sessions, vault: Vault, other: Vault) -> None:
    prompts = [
        activate(sessions, vault, must_take(sessions, submit(sessions, vault)), data=bytes([i]), version=i)
        for i in range(2)
    ]
    for prompt_id in reversed(prompts):  # the newest row may hold no key any more
        check(sessions, vault)
        with pytest.raises(VaultError, match=SAYS):
            check(sessions, other)
        with sessions.begin() as session:
            active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    check(sessions, other)


@pytest.mark.parametrize("holds", ["prompt", "request"])
def test_the_api_does_not_start_under_another_key(database_url: str, tmp_path: Path, holds: str) -> None:
    with running(database_url, tmp_path) as api:
        if holds == "prompt":
            add_prompt(api.service, soft_prompt(1), make_gate("one"))
        else:
            submit(api.service.sessions, api.service.vault)
    with (
        pytest.raises(VaultError, match=SAYS) as caught,
        running(database_url, tmp_path, master_key=OTHER_KEY) as api,
    ):
        pass
    assert OTHER_KEY not in str(caught.value)
    with running(database_url, tmp_path) as api:
        assert api.client.get("/readyz").status_code == 200


def test_a_first_start_takes_any_key_and_binds_the_database_to_it(database_url: str, tmp_path: Path) -> None:
    """By the digest keys, which are sealed under it: nothing else is."""
    with running(database_url, tmp_path, master_key=OTHER_KEY) as api:
        assert api.client.get("/readyz").status_code == 200
    with pytest.raises(VaultError, match=SAYS), running(database_url, tmp_path, master_key=MASTER_KEY) as api:
        pass
    with running(database_url, tmp_path, master_key=OTHER_KEY) as api:
        assert api.client.get("/readyz").status_code == 200


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes what a worker opens: one that does not start leaves that to the end of its process."""
    made: list[Engine] = []
    make = db.make_engine

    def keep(url: str) -> Engine:
        made.append(make(url))
        return made[-1]

    monkeypatch.setattr(db, "make_engine", keep)
    yield
    for engine in made:
        engine.dispose()


@pytest.mark.usefixtures("engines")
def test_the_worker_does_not_start_under_another_key(database_url: str, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {
        "model": str(make_tiny_model(tmp_path / "model")),
        "quantization": "none",
        "device": "cpu",
        "retain": str(write_retain(tmp_path / "retain.jsonl")),
    }
    ours = make_settings(database_url, tmp_path, **knobs)
    theirs = make_settings(database_url, tmp_path, **knobs, master_key=OTHER_KEY)
    context = prepare(ours)
    submit(context.sessions, context.vault)
    with pytest.raises(VaultError, match=SAYS):
        prepare(theirs)
    prepare(ours)
