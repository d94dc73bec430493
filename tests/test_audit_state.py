"""The state held against the log: what raw SQL does to rows is found, what requests do is not taken for it."""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from api_kit import assert_problem, running
from databases import database_kinds, fresh_database
from floor import FINGERPRINT, activate, await_approval, must_take, submit, take, terms
from sqlalchemy import Engine, text, update
from sqlalchemy.orm import Session, sessionmaker

from app import (
    active_set,
    approval,
    audit,
    audit_state,
    cli_doctor,
    db,
    entry_facts,
    expiry,
    job_queue,
    keys,
    lifecycle,
    receipts,
    report,
    revoking,
)
from app.audit import AuditBroken
from app.errors import NotFound
from app.settings import Settings
from app.signing_key import find_public_key, verify_audit
from app.tables import ActiveSet, ActiveSetVersion, AuditEntry, Prompt, UnlearnRequest, utcnow
from app.vault import Vault
from bench.fault_state import ALTERATIONS, Grower, fit_active_set

Sessions = sessionmaker[Session]
METRICS = {
    "z": 0.1,
    "a": 1e-05,
    "large": 1e22,
    "whole": 5.0,
    "negative": -0.0,
    "count": 12,
    "none": None,
    "yes": True,
    "nested": {"b": [1, 2.5, {"y": 1, "x": 2}], "a": {}},
    "labels": {"naïve ✓": {"rows": 3}},
}
SPELT = (
    '{"a":1e-05,"count":12,"labels":{"na\\u00efve \\u2713":{"rows":3}},"large":1e+22,"negative":-0.0,'
    '"nested":{"a":{},"b":[1,2.5,{"x":2,"y":1}]},"none":null,"whole":5.0,"yes":true,"z":0.1}'
)


@pytest.fixture(scope="module", params=database_kinds())
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    """Requests in every state. Tests take back what they do to it."""
    folder = tmp_path_factory.mktemp("grown")
    with fresh_database(request.param, folder) as url:
        engine = db.make_engine(url)
        sessions = db.make_sessions(engine)
        with sessions.begin() as session:
            key, _ = keys.create_key(session, name="a", scopes=keys.SCOPES, actor="test")
        Grower(sessions, Vault(bytes(range(32))), fingerprint=FINGERPRINT, api_key_id=key.id).grow()
        yield sessions
        engine.dispose()


def holds(sessions: Sessions) -> int:
    with sessions() as session:
        return audit_state.verify(session)


def broken(sessions: Sessions) -> AuditBroken:
    with sessions() as session, pytest.raises(AuditBroken) as caught:
        audit_state.verify(session)
    return caught.value


def alter(sessions: Sessions, table: Any, where: Any, **values: Any) -> None:
    with sessions.begin() as session:
        session.execute(update(table).where(where).values(**values), execution_options={"synchronize_session": False})


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_row_that_was_altered_is_found(grown: Sessions, name: str) -> None:
    for seed in range(3):
        with grown() as session:
            ALTERATIONS[name](session, random.Random(seed))
            audit.verify(session)  # the log itself is whole
            with pytest.raises(AuditBroken) as caught:
                audit_state.hold(session)
            session.rollback()
        assert any(named in caught.value.detail for named in ("request req_", "active set", "API key key_"))
        assert set(caught.value.extra) <= {"request_id", "version", "api_key_id"}
    with grown() as session:
        assert audit_state.verify(session) == audit.verify(session)


def test_a_prompt_taken_out_by_sql_is_found_everywhere(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every replica follows without a word: the prompt suspended, version and digest of the set made to fit."""
    with running(database_url, tmp_path) as api:
        sessions, vault = api.service.sessions, api.service.vault
        prompt_id = activate(sessions, vault, must_take(sessions, submit(sessions, vault)), version=0)
        with sessions() as session:
            request_id = active_set.get_prompt(session, prompt_id).request_id
            assert verify_audit(session, vault)
        with sessions.begin() as session:
            session.execute(update(Prompt).where(Prompt.id == prompt_id).values(state="suspended"))
            fit_active_set(session)
        with sessions() as session:
            assert active_set.read_members(session)[1] == []  # it is served so
            with pytest.raises(AuditBroken, match=f"request {request_id}: its prompt's state is not what the log says"):
                verify_audit(session, vault)
        settings = Settings(home=tmp_path / "none", database_url=database_url)
        found = cli_doctor._guarded("audit chain", cli_doctor._audit, settings)
        assert found.status == "fail" and request_id in found.detail


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"approval_required": False}, "approval_required is"),
        ({"expires_at": utcnow() - timedelta(hours=1)}, "expires_at is"),
        ({"due_at": utcnow() + timedelta(days=300)}, "due_at is"),
        ({"received_at": None, "due_at": None}, "received_at, due_at are"),
        ({"options": {"alpha": 1}}, "options_digest is"),
        ({"cancel_requested": True}, "cancel_requested is"),
    ],
)
def test_the_terms_of_a_request(sessions: Sessions, vault: Vault, values: dict[str, Any], named: str) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True, minutes=60))
    submit(sessions, vault)
    assert holds(sessions) == 2
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, **values)
    error = broken(sessions)
    assert error.detail == f"request {request_id}: {named} not what the log says"
    assert error.extra == {"request_id": request_id}


def test_what_was_done_with_altered_rows_is_found_when_they_are_put_back(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log tells of what could not have happened on rows as they should have been."""
    unapproved, expired, swapped = (submit(sessions, vault, terms=terms(approval=True, minutes=60)) for _ in range(3))
    one = UnlearnRequest.id == unapproved
    alter(sessions, UnlearnRequest, one, approval_required=False)
    activate(sessions, vault, must_take(sessions, unapproved), version=0)
    alter(sessions, UnlearnRequest, one, approval_required=True)
    assert broken(sessions).detail == f"request {unapproved}: it came into force, and nobody had approved it"
    with sessions() as session:
        audit_state.hold_request(session, expired)
        ends = lifecycle.get_request(session, expired).expires_at
    alter(sessions, UnlearnRequest, UnlearnRequest.id == expired, expires_at=utcnow() - timedelta(seconds=1))
    with sessions.begin() as session:
        assert expiry.expire(session, expired)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == expired, expires_at=ends)
    with sessions() as session, pytest.raises(AuditBroken, match=f"{expired}: it was ended as expired before its time"):
        audit_state.hold_request(session, expired)
    claim = must_take(sessions, swapped)
    await_approval(sessions, claim, data=b"another")
    with sessions.begin() as session:
        approval.approve(session, swapped, actor="key_2")
    claim = must_take(sessions, swapped)
    with monkeypatch.context() as patch:  # a worker that does not look
        patch.setattr(approval, "approved_digest", lambda session, request: None)
        activate(sessions, vault, claim, version=1)
    with sessions() as session, pytest.raises(AuditBroken, match=f"{swapped}: another prompt came into force than was"):
        audit_state.hold_request(session, swapped)


def test_an_ask_an_approval_and_a_cancellation_that_sql_made_up_or_hid(sessions: Sessions, vault: Vault) -> None:
    """Put back as they were, so that only the entries contradict each other."""
    with sessions.begin() as session:
        one, two = (keys.create_key(session, name="a", scopes=keys.SCOPES, actor="test")[0].id for _ in range(2))
    approvals = (False, True, False)
    cancelled, own, forged = (submit(sessions, vault, api_key_id=one, terms=terms(approval=a)) for a in approvals)
    claim = must_take(sessions, cancelled)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, cancelled, actor=one)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == cancelled, cancel_requested=False)
    activate(sessions, vault, claim, version=0)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == cancelled, cancel_requested=True)

    await_approval(sessions, must_take(sessions, own))
    alter(sessions, UnlearnRequest, UnlearnRequest.id == own, api_key_id=two)
    with sessions.begin() as session:
        approval.approve(session, own, actor=one)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == own, api_key_id=one)

    prompt_id = activate(sessions, vault, must_take(sessions, forged), version=1)
    alter(sessions, Prompt, Prompt.id == prompt_id, revoke_asked_by=two, revoke_asked_at=utcnow())
    with sessions.begin() as session:
        assert revoking.revoke(session, prompt_id, actor=one, code="withdrawn", reason="r", needs_two=True)[1]
    for request_id, what in (
        (cancelled, "it came into force after it was cancelled"),
        (own, "it was approved by who asked for it"),
        (forged, "its prompt was revoked on an ask that nobody made"),
    ):
        with sessions() as session, pytest.raises(AuditBroken, match=f"request {request_id}: {what}"):
            audit_state.hold_request(session, request_id)


def test_asks_that_were_made_and_taken_back_hold(sessions: Sessions, vault: Vault) -> None:
    prompt_id = activate(sessions, vault, must_take(sessions, submit(sessions, vault)), version=0)
    asks: list[Callable[[Session], object]] = [
        lambda s: revoking.revoke(s, prompt_id, actor="key_1", code="withdrawn", reason="r", needs_two=True),
        lambda s: revoking.withdraw(s, prompt_id, actor="key_3"),
        lambda s: revoking.revoke(s, prompt_id, actor="key_2", code="withdrawn", reason="r", needs_two=True),
        lambda s: revoking.revoke(s, prompt_id, actor="key_1", code="withdrawn", reason="r", needs_two=True),
    ]
    for ask in asks:
        with sessions.begin() as session:
            ask(session)
        assert holds(sessions)


def test_texts_that_are_kept_without_an_end(engine: Engine, vault: Vault) -> None:
    sessions = db.make_sessions(engine, keep_texts=timedelta(hours=1))
    request_id = submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, request_id), version=0)
    assert holds(sessions)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, shred_at=None)
    assert broken(sessions).detail == f"request {request_id}: shred_at is not what the log says"


def test_texts_that_an_older_process_kept_without_an_end(
    engine: Engine, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = db.make_sessions(engine, keep_texts=timedelta(hours=1))
    request_id = submit(sessions, vault)
    with monkeypatch.context() as patch:
        older(patch)
        activate(sessions, vault, must_take(sessions, request_id), version=0)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, shred_at=utcnow() + timedelta(hours=1))
    assert holds(sessions)  # its entry does not say until when
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, shred_at=None)
    assert broken(sessions).detail == f"request {request_id}: it is over, and its texts are kept without an end"


FAR = timedelta(days=36500)


@pytest.mark.parametrize("end", ["active", "failed", "cancelled"])
def test_texts_are_kept_until_the_time_that_was_set(engine: Engine, vault: Vault, end: str) -> None:
    """Whatever the setting is by then."""
    sessions, later = (db.make_sessions(engine, keep_texts=timedelta(hours=hours)) for hours in (1, 100))
    request_id = submit(sessions, vault, terms=terms())
    claim = must_take(sessions, request_id)
    if end == "active":
        prompt_id = activate(sessions, vault, claim, version=0)
        with later.begin() as session:
            active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    with sessions.begin() as session:
        if end == "failed":
            lifecycle.fail(session, claim, code="diverged", detail="")
        elif end == "cancelled":
            lifecycle.finish_cancelled(session, claim)
    assert holds(later)
    with sessions() as session:
        row = lifecycle.get_request(session, request_id)
    assert row.shred_at is not None and row.wrapped_key is not None
    for moved in (FAR, timedelta(microseconds=-1)):
        alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, shred_at=row.shred_at + moved)
        assert broken(sessions).detail == f"request {request_id}: shred_at is not what the log says"
        with pytest.raises(AuditBroken, match="shred_at"):
            receipts.build(sessions, vault, request_id)
    # Gone before their time, they are kept from nobody.
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, wrapped_key=None, sealed_texts=None, shred_at=None)
    assert holds(sessions)


@pytest.mark.parametrize("keep_hours", [0, 1])
@pytest.mark.parametrize("of_before", [False, True])
def test_texts_that_were_put_back_from_a_copy(
    engine: Engine, vault: Vault, monkeypatch: pytest.MonkeyPatch, keep_hours: int, of_before: bool
) -> None:
    """After ``request.shredded``, and after an end that kept nothing, which an older process did not state."""
    sessions = db.make_sessions(engine, keep_texts=timedelta(hours=keep_hours))
    request_id = submit(sessions, vault)
    with sessions() as session:
        row = lifecycle.get_request(session, request_id)
    with monkeypatch.context() as patch:
        if of_before:
            older(patch)
        activate(sessions, vault, must_take(sessions, request_id), version=0)
        with sessions.begin() as session:
            due = job_queue.shred_due(session, now=utcnow() + timedelta(hours=2))
        assert due == ([request_id] if keep_hours else [])
    assert holds(sessions)
    copy = {"wrapped_key": row.wrapped_key, "sealed_texts": row.sealed_texts}
    for values in (copy, {"wrapped_key": None}):  # either is one too many
        alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, **values)
        if of_before and not keep_hours:  # no entry says that they are gone: only that they have no end
            what = "it is over, and its texts are kept without an end"
        else:
            what = "its texts were destroyed, and are there"
        assert broken(sessions).detail == f"request {request_id}: {what}"
        alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, shred_at=utcnow() + FAR)
        if of_before and not keep_hours:
            assert holds(sessions)
        else:
            assert broken(sessions).detail == f"request {request_id}: shred_at is not what the log says"
        alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, shred_at=None)


def test_a_verification_and_a_receipt_take_one_connection(database_url: str, vault: Vault) -> None:
    engine = db.make_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=1)
    sessions = db.make_sessions(engine)
    with sessions() as session:
        assert verify_audit(session, vault) == 0
    request_id = submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, request_id), version=0)
    assert report.build(sessions, vault, request_id)["receipt"] == receipts.build(sessions, vault, request_id)
    engine.dispose()


def test_what_cannot_be_read_is_named(sessions: Sessions, vault: Vault) -> None:
    ids = [submit(sessions, vault) for _ in range(3)]
    with sessions.begin() as session:
        if session.get_bind().dialect.name == "sqlite":
            done = "UPDATE unlearn_requests SET created_at = 'x', options = '{' WHERE id = :id"
        else:
            done = "UPDATE unlearn_requests SET created_at = 'infinity', failure = '[1]' WHERE id = :id"
        session.execute(text(done), {"id": ids[1]})
    assert broken(sessions).detail == f"request {ids[1]}: it cannot be read"


UNREADABLE = ["detail = '[1]'", "detail = 'null'"], ["at = 'x'", "detail = '{'"], ["at = 'infinity'"]


def test_an_entry_that_cannot_be_read_gets_no_receipt(
    sessions: Sessions, vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor an error that nobody knows. It is named, and where it was met is in the log."""
    request_id = submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, request_id), version=0)
    receipts.build(sessions, vault, request_id)
    shapes, of_sqlite, of_postgres = UNREADABLE
    on_sqlite = sessions.kw["bind"].dialect.name == "sqlite"
    for values in (*shapes, *(of_sqlite if on_sqlite else of_postgres)):
        with sessions() as session:
            session.execute(text(f"UPDATE audit_log SET {values} WHERE seq = 2"))
            caplog.clear()
            with pytest.raises(AuditBroken) as caught:
                audit_state.hold_request(session, request_id)
            if values in shapes:
                assert caught.value.detail == "audit entry 2 was altered"
            else:
                assert caught.value.detail == f"request {request_id}: it cannot be read"
                assert re.search(r"cannot be read \((Value|JSONDecode|Data)Error < \w+\.pyx?:", caplog.text)
                assert "infinity" not in caplog.text  # a message may quote what is in the row
            session.rollback()


def test_of_what_cannot_be_read_the_right_one_is_named(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a page is read ahead of what is held; and what was held already is not held again."""
    monkeypatch.setattr(audit_state, "_PAGE", 2)
    ids = [submit(sessions, vault) for _ in range(6)]
    held = list[str]()
    hold_one = audit_state._hold_one

    def hold(found: Any) -> Any:
        held.append(found.row.id)
        return hold_one(found)

    monkeypatch.setattr(audit_state, "_hold_one", hold)
    with sessions() as session:
        value = "x" if session.get_bind().dialect.name == "sqlite" else "infinity"
        session.execute(text("UPDATE audit_log SET at = :value WHERE seq = 5"), {"value": value})
        with pytest.raises(AuditBroken, match=f"request {ids[4]}: it cannot be read"):
            audit_state.hold(session)
        assert held == ids[:4]
        session.rollback()


def test_a_row_that_cannot_be_read_gets_no_receipt(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, request_id, actor="test")
    with sessions.begin() as session:
        value = "x" if session.get_bind().dialect.name == "sqlite" else "infinity"
        session.execute(text("UPDATE unlearn_requests SET due_at = :value"), {"value": value})
    with pytest.raises(AuditBroken, match="it cannot be read"):
        receipts.build(sessions, vault, request_id)


@pytest.mark.parametrize("error", [TypeError, KeyError, ValueError])
def test_an_error_of_ours_is_no_alteration(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    request_id = submit(sessions, vault)

    def wrong(*args: object) -> None:
        raise error("a mistake in the comparison")

    monkeypatch.setattr(audit_state, "_same", wrong)
    with sessions() as session:
        for hold in (audit_state.hold, lambda s: audit_state.hold_request(s, request_id)):
            with pytest.raises(error):
                hold(session)


def test_a_request_that_the_log_has_and_the_table_has_not(sessions: Sessions, vault: Vault) -> None:
    ids = [submit(sessions, vault) for _ in range(2)]
    with sessions.begin() as session:
        session.execute(text("DELETE FROM unlearn_requests WHERE id = :id"), {"id": ids[0]})
    assert broken(sessions).detail == f"request {ids[0]}: its row is missing"


def test_the_version_of_the_set_alone(sessions: Sessions, vault: Vault) -> None:
    assert holds(sessions) == 0
    alter(sessions, ActiveSet, ActiveSet.id == 1, version=1)
    assert broken(sessions).detail == "the version of the active set is not what the log says"


def test_the_digest_of_the_set_is_that_of_the_newest_activation(sessions: Sessions, vault: Vault) -> None:
    """Two prompts change places under the same version: in mode ``concatenate`` that is another context."""
    for version, data in enumerate((b"1", b"2")):
        activate(sessions, vault, must_take(sessions, submit(sessions, vault)), data=data, version=version)
    assert holds(sessions)
    with sessions.begin() as session:
        session.execute(update(Prompt).values(position=3 - Prompt.position))
        fit_active_set(session)
        session.execute(update(ActiveSet).values(version=2))
        assert active_set.read_members(session)[0].version == 2  # it is served so
    assert broken(sessions).detail == "the digest of the active set is not what the log says"


# --- what is not taken for an alteration -----------------------------------------------------------------------------


def test_a_snapshot_is_of_one_moment_and_keeps_nobody_from_writing(sessions: Sessions, vault: Vault) -> None:
    submit(sessions, vault)
    with sessions() as session, db.snapshot(session) as still:
        assert audit.verify(still) == 1
        submit(sessions, vault)
        assert audit.verify(still) == 1 and len(still.query(UnlearnRequest).all()) == 1
        assert audit.verify(session) == 2
    with sessions() as session:  # the connection is as it was
        assert audit.verify(session) == 2
        submit(sessions, vault)
        assert audit.verify(session) == 3


def test_it_holds_while_requests_move(sessions: Sessions, vault: Vault) -> None:
    done, errors = threading.Event(), list[BaseException]()

    def version() -> int:
        with sessions() as session:
            return active_set.read_active_set(session).version

    def live(worker: int) -> None:
        draw = random.Random(worker)
        try:
            for number in range(8):
                asked = submit(sessions, vault, f"{worker} {number}", terms=terms(approval=number % 2 == 1, minutes=90))
                claim = must_take(sessions, asked)
                if number % 4 == 1:
                    await_approval(sessions, claim, data=b"tensor")
                    with sessions.begin() as session:
                        approval.approve(session, asked, actor="key_2")
                    claim = must_take(sessions, asked)
                if number % 4 == 3:
                    with sessions.begin() as session:
                        lifecycle.fail(session, claim, code="checks-failed", detail="", metrics={"passed": False})
                    continue
                prompt_id = put(claim)
                if draw.random() < 0.5:
                    with sessions.begin() as session:
                        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
        except BaseException as error:
            errors.append(error)

    def put(claim: lifecycle.Claim) -> str:
        while True:
            try:
                return activate(sessions, vault, claim, version=version())
            except active_set.StaleActiveSet:
                continue

    def watch() -> None:
        try:
            while not done.is_set() or len(seen) < 4:
                holds(sessions)
                seen.append(1)
        except BaseException as error:
            errors.append(error)

    seen: list[int] = []
    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=live, args=(number,)) for number in range(3)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()
    assert errors == []
    assert holds(sessions) > 100


def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of before the entries stated what they state now."""
    record = lifecycle.record_state
    monkeypatch.setattr(lifecycle, "record_state", lambda *args, facts=None, **named: record(*args, **named))
    append = audit.append

    def less(session: Session, *, detail: dict[str, Any], **named: Any) -> AuditEntry:
        unknown = ("revoked_at", "record_digest")
        return append(session, detail={k: v for k, v in detail.items() if k not in unknown}, **named)

    monkeypatch.setattr(audit, "append", less)


def test_what_older_entries_do_not_state_is_not_compared(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        older(patch)
        with sessions.begin() as session:
            key, _ = keys.create_key(session, name="a", scopes=keys.SCOPES, actor="test")
        ids = Grower(sessions, vault, fingerprint=FINGERPRINT, api_key_id=key.id).grow()
        with sessions() as session:
            of_requests = session.query(AuditEntry).where(AuditEntry.action.not_like("key.%"))
            stated = {name for entry in of_requests for name in entry.detail}
        assert not stated & {
            *entry_facts.CREATED,
            "metrics_digest",
            "finished_at",
            "shred_at",
            "approved_at",
            "revoked_at",
        }
    assert holds(sessions) > 60
    alter(sessions, UnlearnRequest, UnlearnRequest.id == ids["active"], metrics={"passed": True}, due_at=utcnow())
    assert holds(sessions)
    assert receipts.build(sessions, vault, ids["active"])  # and none of it is in the way of a receipt
    alter(sessions, UnlearnRequest, UnlearnRequest.id == ids["approved"], approved_by=None)
    assert broken(sessions).detail == f"request {ids['approved']}: approved_by is not what the log says"
    alter(sessions, UnlearnRequest, UnlearnRequest.id == ids["approved"], approved_by="second")
    with sessions.begin() as session:
        session.execute(update(Prompt).where(Prompt.request_id == ids["active"]).values(state="suspended"))
        fit_active_set(session)
    assert broken(sessions).detail == f"request {ids['active']}: its prompt's state is not what the log says"


@pytest.mark.parametrize("end", ["active", "failed", "cancelled"])
def test_an_older_worker_ends_what_a_newer_api_took(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    request_id = submit(sessions, vault, terms=terms())
    with monkeypatch.context() as patch:
        older(patch)
        claim = must_take(sessions, request_id)
        if end == "active":
            activate(sessions, vault, claim, version=0)
        elif end == "failed":
            with sessions.begin() as session:
                lifecycle.fail(session, claim, code="checks-failed", detail="", metrics={"passed": False})
        else:
            with sessions.begin() as session:
                lifecycle.finish_cancelled(session, claim)
    assert holds(sessions)
    assert receipts.build(sessions, vault, request_id)


def test_what_is_removed_in_due_time_is_not_missed(sessions: Sessions, vault: Vault) -> None:
    kept = db.make_sessions(sessions.kw["bind"], keep_texts=timedelta(hours=1))
    request_id = submit(kept, vault)
    prompt_id = activate(kept, vault, must_take(kept, request_id), version=0)
    assert holds(sessions)
    with kept.begin() as session:
        assert job_queue.shred_due(session, now=utcnow() + timedelta(hours=2)) == [request_id]
    assert holds(sessions)
    with kept.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    assert holds(sessions)


# --- digests of JSON -------------------------------------------------------------------------------------------------


def test_figures_have_one_digest_in_every_database(sessions: Sessions, vault: Vault) -> None:
    """Floats, order of names and letters beyond ASCII come back from either database as they were hashed."""
    digest = entry_facts.json_digest(METRICS)
    assert digest == hashlib.sha256(SPELT.encode()).hexdigest()
    assert entry_facts.json_digest(dict(reversed(METRICS.items()))) == digest
    assert entry_facts.json_digest({**METRICS, "z": 0.1 + 2**-56}) != digest
    assert entry_facts.json_digest({"a": (1, 2), 3: None}) == entry_facts.json_digest({"3": None, "a": [1, 2]})
    assert entry_facts.json_digest(None) is None
    request_id = submit(sessions, vault, options={"learning_rate": 1e-05, "alpha": 0.30000000000000004, "seed": 2**53})
    activate(sessions, vault, must_take(sessions, request_id), version=0, metrics=METRICS)
    assert holds(sessions)
    with sessions.begin() as session:
        session.expire_all()
        row = lifecycle.get_request(session, request_id)
        assert entry_facts.json_digest(row.metrics) == digest
        last = audit.entries_about(session, request_id)[-1]
        assert last.detail["metrics_digest"] == digest
    # The same figures, in another order: what was signed is the same.
    receipt = receipts.build(sessions, vault, request_id)
    with sessions.begin() as session:
        lifecycle.get_request(session, request_id).metrics = dict(reversed(METRICS.items()))
    assert holds(sessions)
    assert receipts.build(sessions, vault, request_id) == receipt


# --- receipts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=database_kinds())
def in_force(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("receipts")
    with fresh_database(request.param, folder) as url, running(url, folder) as api:
        sessions, vault = api.service.sessions, api.service.vault
        request_id = submit(sessions, vault, terms=terms(approval=True, minutes=60), options={"alpha": 0.3})
        await_approval(sessions, must_take(sessions, request_id))
        with sessions.begin() as session:
            approval.approve(session, request_id, actor="key_2")
        metrics = {"passed": True, "retain_accuracy": 0.75, "retain_rows": 16}
        activate(sessions, vault, must_take(sessions, request_id), version=0, metrics=metrics)
        yield api, request_id


FORGED: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (UnlearnRequest, "metrics", lambda found: {**found, "retain_accuracy": 0.99}),
    (UnlearnRequest, "metrics", lambda found: {**found, "passed": False}),
    (UnlearnRequest, "metrics", lambda found: {"per_class": {"positive": 1}}),  # of which no receipt could be made
    (UnlearnRequest, "received_at", lambda found: found - timedelta(days=3)),
    (UnlearnRequest, "due_at", lambda found: found + timedelta(days=3)),
    (UnlearnRequest, "options", lambda found: {"alpha": 0.5}),
    (UnlearnRequest, "num_texts", lambda found: 12),
    (UnlearnRequest, "approved_by", lambda found: "key_3"),
    (UnlearnRequest, "finished_at", lambda found: found - timedelta(days=3)),
    (UnlearnRequest, "state", lambda found: "suspended"),
    (Prompt, "digest", lambda found: "0" * 64),
    (Prompt, "gate_digest", lambda found: "0" * 64),
    (Prompt, "activated_at", lambda found: found - timedelta(days=3)),
    (ActiveSetVersion, "digest", lambda found: "f" * 64),
]


@pytest.mark.parametrize(("table", "name", "forge"), FORGED)
def test_an_altered_row_gets_no_receipt(in_force: Any, table: Any, name: str, forge: Callable[[Any], Any]) -> None:
    api, request_id = in_force
    sessions, headers = api.service.sessions, api.key("requests", "admin")
    paths = [f"/unlearn-requests/{request_id}/{what}" for what in ("receipt", "report", "report?format=html")]
    good = [api.client.get(path, headers=headers) for path in paths]
    assert [answer.status_code for answer in good] == [200, 200, 200]
    where = {
        UnlearnRequest: UnlearnRequest.id == request_id,
        Prompt: Prompt.request_id == request_id,
        ActiveSetVersion: ActiveSetVersion.version == 1,
    }[table]
    with sessions() as session:
        was = getattr(session.query(table).where(where).one(), name)
    alter(sessions, table, where, **{name: forge(was)})
    try:
        for path in paths:
            found = assert_problem(api.client.get(path, headers=headers), 500, "audit-broken")
            assert found["request_id"] == request_id and "not what the log says" in found["detail"]
    finally:
        alter(sessions, table, where, **{name: was})
    assert [api.client.get(path, headers=headers).content for path in paths] == [answer.content for answer in good]


@pytest.mark.parametrize("rehashed", [False, True])
def test_an_entry_altered_to_fit_is_found(sessions: Sessions, vault: Vault, rehashed: bool) -> None:
    """A hash takes no key: whoever alters an entry can make its own fit, and the next one does not hang on it then."""
    request_id = submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, request_id), version=0)
    receipts.build(sessions, vault, request_id)  # and the making of the key is the next entry
    metrics = {"forget_abstain": 0.5}
    with sessions.begin() as session:
        lifecycle.get_request(session, request_id).metrics = metrics
        session.query(Prompt).one().metrics = metrics
        entry = audit.entries_about(session, request_id)[-1]
        entry.detail = {**entry.detail, "metrics_digest": entry_facts.json_digest(metrics)}
        if rehashed:
            names = ("seq", "at", "actor", "action", "subject", "detail")
            entry.hash = audit.entry_hash(entry.prev_hash, **{name: getattr(entry, name) for name in names})
    what = "entry 5 does not follow from the one before it" if rehashed else "entry 4 was altered"
    with pytest.raises(AuditBroken, match=what):
        receipts.build(sessions, vault, request_id)


@pytest.mark.parametrize(
    ("done", "what"),
    [
        ("UPDATE audit_log SET prev_hash = hash WHERE seq = 2", "entry 2 was altered"),
        ("UPDATE audit_log SET hash = prev_hash WHERE seq = 1", "entry 2 does not follow"),
        ("UPDATE audit_log SET prev_hash = hash WHERE seq = 6", "entry 6 does not follow"),
        ("DELETE FROM audit_log WHERE seq = 1", "entry 2 does not follow"),
        ("DELETE FROM audit_log WHERE seq = 6", "entry 6 does not follow"),
    ],
)
def test_the_entries_about_a_request_hang_between_their_neighbours(
    sessions: Sessions, vault: Vault, done: str, what: str
) -> None:
    """Of a request that has the entries 2 to 5, while those of others are the first, the next and the last."""
    submit(sessions, vault)
    request_id = submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, request_id), version=0)
    with sessions() as session:
        audit_state.hold_request(session, request_id)  # none comes after it yet
    for _ in range(2):
        submit(sessions, vault)
    with sessions() as session:
        assert [entry.seq for entry in audit.entries_about(session, request_id)] == [2, 3, 4, 5]
        audit_state.hold_request(session, request_id)
        session.execute(text(done))
        with pytest.raises(AuditBroken, match=what):
            audit_state.hold_request(session, request_id)


def rate_of(signed: dict[str, Any]) -> float:
    [rate] = [rate["rate"] for rate in signed["receipt"]["checks"]["rates"] if rate["name"] == "forget_abstain"]
    return float(rate)


@pytest.mark.parametrize("make", [receipts.build, lambda *args: report.build(*args)["receipt"]])
def test_what_is_signed_is_what_was_held(
    sessions: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch, make: Callable[..., dict[str, Any]]
) -> None:
    """Somebody alters the row just after it was held against the log, and revokes the prompt: it is of before both."""
    request_id = submit(sessions, vault)
    good, false = ({"forget_abstain": rate, "passed": True} for rate in (0.25, 1.0))
    prompt_id = activate(sessions, vault, must_take(sessions, request_id), version=0, metrics=good)
    before = make(sessions, vault, request_id)
    assert rate_of(before) == 0.25
    hold, held = audit_state.hold_request, list[str]()

    def and_then(session: Session, which: str) -> None:
        hold(session, which)
        held.append(which)
        alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, metrics=false)
        with sessions.begin() as other:
            active_set.revoke_prompt(other, prompt_id, actor="key_1", reason=None)

    with monkeypatch.context() as patch:
        patch.setattr(audit_state, "hold_request", and_then)
        assert make(sessions, vault, request_id) == before and held == [request_id]
    with pytest.raises(AuditBroken, match="metrics_digest is not what the log says"):
        make(sessions, vault, request_id)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, metrics=good)
    assert make(sessions, vault, request_id)["receipt"]["request"]["state"] == "revoked"


def test_a_receipt_of_what_is_not_there_makes_no_key(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault)
    for owner, which in ((None, "req_0"), ("key_1", request_id)):
        with pytest.raises(NotFound):
            receipts.build(sessions, vault, which, owner=owner)
    with sessions() as session:
        assert find_public_key(session, vault) is None


@pytest.mark.parametrize("end", ["failed", "cancelled", "rejected"])
def test_an_end_without_figures_does_not_vouch_for_those_of_the_row(sessions: Sessions, vault: Vault, end: str) -> None:
    """An end states only what it brings: figures that were put into the row before it are not made good by it."""
    request_id = submit(sessions, vault, terms=terms(approval=True))
    claim = must_take(sessions, request_id)
    if end == "rejected":
        await_approval(sessions, claim)
    alter(sessions, UnlearnRequest, UnlearnRequest.id == request_id, metrics={"passed": True})
    with sessions.begin() as session:
        if end == "failed":
            lifecycle.fail(session, claim, code="diverged", detail="")
        elif end == "cancelled":
            lifecycle.finish_cancelled(session, claim)
        else:
            approval.reject(session, request_id, actor="key_2", reason="no")
    assert broken(sessions).detail == f"request {request_id}: metrics_digest is not what the log says"
    with pytest.raises(AuditBroken, match="metrics_digest"):
        receipts.build(sessions, vault, request_id)


def test_both_gates_are_on_record(sessions: Sessions, vault: Vault) -> None:
    with sessions.begin() as session:
        key, _ = keys.create_key(session, name="a", scopes=keys.SCOPES, actor="test")
    ids = Grower(sessions, vault, fingerprint=FINGERPRINT, api_key_id=key.id).grow()
    with sessions() as session:
        entries = {entry.action: entry.detail for entry in audit.entries_about(session, ids["agreed"])}
        prompt = session.query(Prompt).where(Prompt.request_id == ids["agreed"]).one()
    assert prompt.gate_digest is not None
    for action in ("request.awaiting_approval", "request.active"):
        assert entries[action]["gate_digest"] == prompt.gate_digest, action
    assert take(sessions, ids["agreed"]) is None
