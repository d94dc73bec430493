"""Where the failpoints stand: what another process sees of a change on either side of each, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from api_kit import Api, add_prompt, claim, running, soft_prompt, tiny_llm
from databases import fresh_database
from floor import Sessions, activate, await_approval, must_take, state, submit, terms
from sqlalchemy import select
from vault_kit import NEW, OLD, pending, share_of, sharing
from webhook_kit import add_key, add_webhook, deliveries, receiving, sender
from worker_kit import forget_texts, write_retain

from app import active_set, approval, cli_vault, failpoints, lifecycle, reconcile, rotation
from app.keystore import KeyStore
from app.settings import Mode, Settings
from app.tables import Checkpoint, Prompt, UnlearnRequest, utcnow
from models.examples import read_examples
from worker.chores import end_expired
from worker.context import Context
from worker.tasks import run_job

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""An order in the code does not depend on the database."""


class Spy:
    """Armed at every point at once: notes each that is passed, and what is to be seen at that moment."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.passed: list[tuple[str, Any]] = []
        self._look = look

    @property
    def name(self) -> Spy:
        return self

    def __eq__(self, point: object) -> bool:
        self.passed.append((str(point), self._look()))
        return False  # so nothing happens there

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def passing(look: Callable[[], Any]) -> Iterator[list[tuple[str, Any]]]:
    """The points that the block passes, each with what ``look`` saw then, on a connection of its own."""
    spy = Spy(look)
    failpoints._armed = spy  # type: ignore[assignment]
    try:
        yield spy.passed
    finally:
        failpoints._armed = None


def around(name: str, before: Any, after: Any) -> list[tuple[str, Any]]:
    return [(f"{name}.before_commit", before), (f"{name}.after_commit", after)]


# --- the API's -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("order")
    store = f"sqlite:///{folder / 'keystore.db'}"
    with (
        fresh_database("sqlite", folder) as url,
        running(url, folder, mode=Mode.CONCATENATE, revoke_needs_two=True, keystore_url=store) as api,
    ):
        yield api


def waiting(api: Api, headers: dict[str, str]) -> str:
    body = {"forget_texts": ["a text"], "require_approval": True}
    request_id: str = api.client.post("/unlearn-requests", json=body, headers=headers).json()["id"]
    await_approval(api.service.sessions, claim(api.service, request_id))
    return request_id


def call(api: Api, path: str, headers: dict[str, str], **body: Any) -> int:
    return api.client.post(path, json=body or None, headers=headers).status_code


def test_an_approval(api: Api) -> None:
    request_id, other = waiting(api, api.key("requests")), api.key("approve")
    with passing(lambda: state(api.service.sessions, request_id)) as passed:
        assert call(api, f"/unlearn-requests/{request_id}/approve", other) == 200
    assert passed == around("approve", "awaiting_approval", "pending")
    with api.service.sessions.begin() as session:  # another test is to find room for its own
        lifecycle.request_cancel(session, request_id, actor="test")


@pytest.mark.parametrize(
    ("what", "point", "end"), [("reject", "reject", "failed"), ("cancel", "request_cancel", "cancelled")]
)
def test_the_end_of_what_waits_takes_its_key_share_along(api: Api, what: str, point: str, end: str) -> None:
    asker = api.key("requests")
    request_id = waiting(api, asker)
    sessions, store = api.service.sessions, api.service.vault.keystore
    assert store is not None
    share = share_of(sessions, request_id)

    def look() -> tuple[str, bool, bool]:
        return state(sessions, request_id), share in pending(sessions), store.destroyed([share])[share] is not None

    headers, body = (api.key("approve"), {"reason": "no"}) if what == "reject" else (asker, {})
    with passing(look) as passed:
        assert call(api, f"/unlearn-requests/{request_id}/{what}", headers, **body) == 200
    assert passed == [
        (f"{point}.before_commit", ("awaiting_approval", False, False)),
        ("shares.pending", (end, True, False)),
        ("shares.destroyed", (end, True, True)),
        (f"{point}.after_commit", (end, False, True)),
    ]


def test_a_restored_set_and_a_revoke_by_two(api: Api) -> None:
    sessions, one, two = api.service.sessions, api.key("admin"), api.key("admin")

    def version() -> int:
        with sessions() as session:
            return active_set.read_active_set(session).version

    first = add_prompt(api.service, soft_prompt(1))
    at = version()
    with sessions.begin() as session:  # so that the empty set before it lacks nothing that is in force
        view = active_set.restore(
            session, at - 1, mode=Mode.CONCATENATE, fingerprint=tiny_llm().fingerprint, actor="test", reason="test"
        )
    with passing(version) as passed:
        assert call(api, f"/admin/active-sets/{at}/restore", one, reason="test") == 200
    assert passed == around("restore", view.version, view.version + 1)

    def look() -> tuple[str, bool]:
        with sessions() as session:
            prompt = active_set.get_prompt(session, first)
            return prompt.state, prompt.revoke_asked_by is not None

    with passing(look) as passed:
        assert call(api, f"/admin/prompts/{first}/revoke", one, reason="test") == 202
    assert passed == around("revoke", ("active", False), ("active", True))
    with passing(look) as passed:
        assert call(api, f"/admin/prompts/{first}/revoke", two, reason="test") == 200
    shares = [("shares.pending", ("revoked", True)), ("shares.destroyed", ("revoked", True))]
    before, after = around("revoke", ("active", True), ("revoked", True))
    assert passed == [before, *shares, after]


# --- the worker's ----------------------------------------------------------------------------------------------------


@SQLITE
def test_a_training_that_waits_for_an_approval(sessions: Sessions, keystore: KeyStore, tmp_path: Path) -> None:
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        num_virtual_tokens=4,
        max_steps=2,
        max_tries=1,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
        checkpoint_seconds=600,
    )
    vault, llm = sharing(keystore), tiny_llm()
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    context = Context(settings=settings, sessions=sessions, vault=vault, llm=llm, retain=retain)
    with sessions.begin() as session:
        request_id = lifecycle.create_request(
            session,
            vault,
            texts=forget_texts(),
            reason=None,
            options={},
            fingerprint=llm.fingerprint,
            api_key_id=None,
            terms=terms(approval=True),
        ).id

    def look() -> tuple[str, bool]:
        """Its state, and whether the end of the training is kept."""
        with sessions() as session:
            return state(sessions, request_id), session.get(Checkpoint, request_id) is not None

    with passing(look) as passed:
        run_job(context, request_id)
    assert passed == [
        *around("claim", ("pending", False), ("training", False)),
        ("texts.read", ("training", False)),
        *[("train.step", ("training", False))] * 2,
        ("train.done", ("training", False)),
        *around("keep", ("training", False), ("training", True)),
        *around("evaluating", ("training", True), ("evaluating", True)),
        *around("await_approval", ("evaluating", True), ("awaiting_approval", True)),
    ]
    with sessions.begin() as session:
        approval.approve(session, request_id, actor="key_2")
    with passing(look) as passed:
        run_job(context, request_id)
    assert [name for name, _ in passed if "step" in name or "keep" in name] == []  # it was trained, and is kept
    assert passed[-3:] == [
        ("prompt.sealed", ("evaluating", True)),
        *around("activate", ("evaluating", True), ("active", False)),
    ]


@SQLITE
@pytest.mark.parametrize("reached", ["pending", "active"])
def test_an_end_by_the_clock(sessions: Sessions, keystore: KeyStore, reached: str) -> None:
    vault = sharing(keystore)
    request_id = submit(sessions, vault, terms=terms(minutes=9))
    if reached == "active":
        activate(sessions, vault, must_take(sessions, request_id), version=0)
    with sessions.begin() as session:
        lifecycle.get_request(session, request_id).expires_at = utcnow() - timedelta(seconds=1)
    with passing(lambda: state(sessions, request_id)) as passed:
        end_expired(sessions)
        end_expired(sessions)
    assert passed == around("expire", reached, "revoked" if reached == "active" else "failed")


@SQLITE
def test_a_message(sessions: Sessions, keystore: KeyStore) -> None:
    vault = sharing(keystore)
    with receiving() as receiver:
        key = add_key(sessions)
        add_webhook(sessions, vault, key, receiver.url())
        submit(sessions, vault, api_key_id=key)
        with passing(lambda: (deliveries(sessions)[0].state, len(receiver.received))) as passed:
            sender(sessions, vault).work()
    assert passed == [
        *around("webhook_claim", ("pending", 0), ("sending", 0)),
        *around("webhook_record", ("sending", 1), ("delivered", 1)),
    ]


# --- the vault's -----------------------------------------------------------------------------------------------------


@SQLITE
def test_a_rotation(sessions: Sessions, keystore: KeyStore) -> None:
    submit(sessions, sharing(keystore))
    both = sharing(keystore, NEW, OLD)

    def moved() -> int:
        with sessions() as session:
            return rotation.tally(session, both)[both.key_id]

    with passing(moved) as passed:
        assert cli_vault._rotate(sessions, both).total() == 1
    assert passed[:2] == around("rotate", 0, 1)
    assert passed[2:] == around("rotate", 1, 1) * (len(passed) // 2 - 1)


@SQLITE
def test_a_start_on_an_old_backup(sessions: Sessions, keystore: KeyStore) -> None:
    vault = sharing(keystore)
    reconcile.make_ready(sessions, vault)
    request_id = submit(sessions, vault)
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=0)
    keystore.destroy([share_of(sessions, prompt_id)])

    def look() -> str:
        with sessions() as session:
            found = session.scalars(select(Prompt.state).where(Prompt.id == prompt_id)).one()
            return f"{found}, {session.get_one(UnlearnRequest, request_id).state}"

    with passing(look) as passed:
        reconcile.make_ready(sessions, vault)
    before, after = around("reconcile", "active, active", "revoked, revoked")
    shares = [("shares.pending", "revoked, revoked"), ("shares.destroyed", "revoked, revoked")]
    assert passed == [before, *shares, after]
    with passing(look) as passed:
        reconcile.make_ready(sessions, vault)
    assert passed == []
