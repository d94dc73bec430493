"""Two persons agree to a request: over HTTP, at once with a cancellation, and in the worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_kit import MARKER, Api, assert_problem, running, server_logs, tiny_llm
from databases import database_kinds, fresh_database
from floor import activate, await_approval, must_take, state, submit, terms
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from webhook_kit import receiving, sender
from worker_kit import forget_texts, write_retain

import worker.job
from app import approval, audit, audit_state, evidence, job_queue, lifecycle
from app.errors import Conflict, LetheonError
from app.lifecycle import ForgetText
from app.settings import Mode, Settings
from app.tables import AuditEntry, Checkpoint, Prompt, RequestEvent, RequestState, UnlearnRequest, WebhookDelivery
from app.vault import Vault
from models import finished
from models.errors import CheckpointError
from models.examples import Example, read_examples
from models.training import TrainingConfig, train_soft_prompt
from worker.context import Context
from worker.tasks import run_job

Sessions = sessionmaker[Session]


@pytest.fixture(scope="module", params=database_kinds())
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service for all tests; each has keys of its own."""
    folder = tmp_path_factory.mktemp("life")
    with fresh_database(request.param, folder) as url, running(url, folder, webhook_private=True) as api:
        yield api


def waiting(api: Api, headers: dict[str, str], **body: Any) -> str:
    """A request over HTTP whose prompt is trained and checked."""
    body = {"forget_texts": [f"{MARKER} is bad"], "require_approval": True, **body}
    created = api.client.post("/unlearn-requests", json=body, headers=headers).json()
    assert (created["state"], created["approval_required"]) == ("pending", True)
    await_approval(api.service.sessions, must_take(api.service.sessions, created["id"]))
    request_id: str = created["id"]
    return request_id


def decide(api: Api, headers: dict[str, str], request_id: str, what: str) -> Any:
    body = {"json": {"reason": "not the person's own"}} if what == "reject" else {}
    return api.client.post(f"/unlearn-requests/{request_id}/{what}", headers=headers, **body)


def test_another_key_approves(api: Api) -> None:
    asker, other = api.key("requests", "approve"), api.key("approve")
    request_id = waiting(api, asker)
    shown = api.client.get(f"/unlearn-requests/{request_id}", headers=asker).json()
    assert (shown["state"], shown["approved_by"], shown["metrics"]) == (
        "awaiting_approval",
        None,
        {"forget_abstain": 1},
    )
    for what in ("approve", "reject"):
        refused = assert_problem(decide(api, asker, request_id, what), 403, "same-key")
        assert "the key that asked" in refused["detail"]
        assert_problem(decide(api, api.key("requests", "admin"), request_id, what), 403, "forbidden")
        assert_problem(decide(api, other, "req_" + "0" * 28, what), 404, "not-found")
    before = len(list((api.service.settings.broker_dir / "messages").glob("*.msg")))
    approved = decide(api, other, request_id, "approve").json()
    assert (approved["state"], approved["attempt"]) == ("pending", 0)
    assert approved["approved_by"].startswith("key_") and approved["approved_at"]
    assert len(list((api.service.settings.broker_dir / "messages").glob("*.msg"))) == before + 1
    assert_problem(decide(api, other, request_id, "approve"), 409, "conflict")
    with api.service.sessions() as session:
        entries = [e for e in session.scalars(select(AuditEntry).order_by(AuditEntry.seq)) if e.subject == request_id]
        assert entries[-1].actor == approved["approved_by"] and entries[-1].detail["why"] == "approved"
        audit.verify(session)


def test_another_key_rejects(api: Api) -> None:
    request_id = waiting(api, api.key("requests"))
    other = api.key("approve")
    assert_problem(
        api.client.post(f"/unlearn-requests/{request_id}/reject", json={"reason": " "}, headers=other),
        422,
        "invalid-input",
        field="reason",
    )
    rejected = decide(api, other, request_id, "reject").json()
    assert rejected["state"] == "failed"
    assert rejected["failure"] == {"code": "rejected", "detail": "not the person's own"}
    with api.service.sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.wrapped_key is row.sealed_texts is None
        assert "own" not in repr([(e.action, e.detail) for e in session.scalars(select(AuditEntry))])
    assert_problem(decide(api, other, request_id, "approve"), 409, "conflict")


def test_the_reason_of_a_rejection_is_on_the_request_alone(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """Free text may be personal data: it goes to who may read the request, and nowhere that keeps or sends it on."""
    caplog.set_level(logging.DEBUG)
    asker, approver, auditor = api.key("requests"), api.key("approve"), api.key("auditor")
    with receiving() as receiver:
        for headers, everybody in ((asker, False), (approver, True)):
            made = webhooks_of(api, headers, receiver.url(), everybody)
            assert made.status_code == 201, made.text
        request_id = waiting(api, asker, forget_texts=[f"{MARKER} rejected"])
        body = {"reason": "Ondine Farthingale has not agreed"}
        rejected = api.client.post(f"/unlearn-requests/{request_id}/reject", json=body, headers=approver).json()
        assert rejected["failure"]["detail"] == body["reason"]
        sender(api.service.sessions, api.service.vault).work()
        told = [received.body.decode() for received in receiver.received]
    assert sum('"failure_code":"rejected"' in message for message in told) == 2
    address = f"/unlearn-requests/{request_id}"
    kept = [
        api.client.get("/admin/audit", params={"limit": 200}, headers=auditor).text,
        api.client.get("/admin/audit/export", headers=auditor).text,
        api.client.get(f"{address}/receipt", headers=asker).text,
        api.client.get(f"{address}/events", headers=asker).text,
    ]
    assert all(request_id in text for text in kept[:3]) and "failed" in kept[3]
    with api.service.sessions() as session:
        kept += [repr(vars(row)) for table in (RequestEvent, WebhookDelivery) for row in session.scalars(select(table))]
    for text in (*told, *kept, *(record.getMessage() for record in server_logs(caplog))):
        assert "Farthingale" not in text


def webhooks_of(api: Api, headers: dict[str, str], url: str, everybody: bool) -> Any:
    body = {"url": url, "states": ["failed"], "all_requests": everybody}
    return api.client.post("/webhooks", json=body, headers=headers)


def test_the_servers_setting_cannot_be_undone(database_url: str, tmp_path: Path) -> None:
    with running(database_url, tmp_path, require_approval=True) as api:
        body = {"forget_texts": [f"{MARKER} is bad"], "require_approval": False}
        created = api.client.post("/unlearn-requests", json=body, headers=api.key("requests")).json()
        assert created["approval_required"] is True


def test_only_what_waits_can_be_decided_on(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True))
    for before in set(RequestState) - {RequestState.AWAITING_APPROVAL}:
        with sessions() as session:
            lifecycle.lock_request(session, request_id).state = before
            session.flush()
            with pytest.raises(Conflict):
                approval.approve(session, request_id, actor="key_2")
            with pytest.raises(Conflict):
                approval.reject(session, request_id, actor="key_2", reason="no")
            session.rollback()


def test_nothing_comes_into_force_that_nobody_approved(sessions: Sessions, vault: Vault) -> None:
    """Whatever a worker believes, one of an older version for instance."""
    request_id = submit(sessions, vault, terms=terms(approval=True))
    claim = must_take(sessions, request_id)
    with pytest.raises(Conflict, match="approved"):
        activate(sessions, vault, claim, version=0)
    await_approval(sessions, claim)
    with sessions.begin() as session:
        approval.approve(session, request_id, actor="key_2")
    claim = must_take(sessions, request_id)
    with pytest.raises(Conflict, match="what was approved is another prompt"):
        activate(sessions, vault, claim, data=b"another", version=0)
    activate(sessions, vault, claim, version=0)
    assert state(sessions, request_id) == "active"


def test_texts_and_checkpoint_stay_sealed_while_it_waits(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True))
    claim = must_take(sessions, request_id)
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, claim, step=7, data=b"done")
    await_approval(sessions, claim)
    with sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.wrapped_key and row.sealed_texts and row.lease_owner is None and row.finished_at is None
        assert session.get_one(Checkpoint, request_id).step == 7
    with sessions.begin() as session:
        assert lifecycle.request_cancel(session, request_id, actor="key_1").state == "cancelled"
    with sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.wrapped_key is row.sealed_texts is session.get(Checkpoint, request_id) is None


def test_approved_and_cancelled_at_once(sessions: Sessions, vault: Vault) -> None:
    """Whoever is first, the request ends cancelled, and an approval that came too late is told."""
    for _ in range(6):
        request_id = submit(sessions, vault, terms=terms(approval=True))
        await_approval(sessions, must_take(sessions, request_id))
        barrier = threading.Barrier(2)
        refused: dict[str, LetheonError] = {}

        def work(name: str, request_id: str = request_id, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                with sessions.begin() as session:
                    if name == "approve":
                        approval.approve(session, request_id, actor="key_2")
                    else:
                        lifecycle.request_cancel(session, request_id, actor="key_1")
            except Conflict as error:
                refused[name] = error  # noqa: B023  # both threads end within this turn

        threads = [threading.Thread(target=work, args=(name,)) for name in ("approve", "cancel")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert state(sessions, request_id) == "cancelled" and "cancel" not in refused
        with sessions() as session:
            approved = lifecycle.get_request(session, request_id).approved_by
            assert (approved is None) == ("approve" in refused)
            audit.verify(session)


def test_of_two_decisions_at_once_one_holds(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, terms=terms(approval=True))
    await_approval(sessions, must_take(sessions, request_id))
    barrier = threading.Barrier(4)
    held: list[str] = []

    def work(actor: str) -> None:
        barrier.wait()
        try:
            with sessions.begin() as session:
                approval.approve(session, request_id, actor=actor)
        except Conflict:
            return
        held.append(actor)

    threads = [threading.Thread(target=work, args=(f"key_{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions() as session:
        assert [lifecycle.get_request(session, request_id).approved_by] == held


# --- in the worker ---------------------------------------------------------------------------------------------------


SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Where what is said does not depend on the database."""


@pytest.fixture(params=list(Mode))
def mode(request: pytest.FixtureRequest) -> Mode:
    found: Mode = request.param
    return found


@pytest.fixture
def context(sessions: Sessions, vault: Vault, tmp_path: Path, mode: Mode) -> Context:
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        mode=mode,
        num_virtual_tokens=4,
        max_steps=6,
        max_tries=1,
        check_retain_rows=16,
        min_forget_abstain=0,
        max_retain_drop=1,
        max_class_drop=1,
    )
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    return Context(settings=settings, sessions=sessions, vault=vault, llm=tiny_llm(), retain=retain)


def ask(context: Context, texts: list[ForgetText], *, approve: bool, **options: Any) -> str:
    with context.sessions.begin() as session:
        return lifecycle.create_request(
            session,
            context.vault,
            texts=texts,
            reason=None,
            options={"check_every": 1_000_000, **options},
            fingerprint=context.llm.fingerprint,
            api_key_id=None,
            terms=terms(approval=approve),
        ).id


def read_evidence(context: Context, request_id: str) -> dict[str, Any]:
    with context.sessions() as session:
        return evidence.read(session, context.vault, lifecycle.get_request(session, request_id))


def test_what_was_approved_is_what_comes_into_force(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not trained again, although the retain set has shrunk and the active set has moved meanwhile."""
    converges = {"check_every": 2, "target_abstain": 0, "target_retain_drop": 1}
    request_id = ask(context, forget_texts(), approve=True, **converges)
    run_job(context, request_id)
    assert state(context.sessions, request_id) == "awaiting_approval"
    waiting = read_evidence(context, request_id)
    # A text that is in the retain set, and that another request has out of it from now on.
    other = ask(context, [ForgetText(context.retain[0].text), *forget_texts(salt="o")], approve=False)
    run_job(context, other)
    assert state(context.sessions, other) == "active"
    with context.sessions.begin() as session:
        approval.approve(session, request_id, actor="key_2")
    monkeypatch.setattr(worker.job, "train_soft_prompt", None)  # whoever trains now breaks
    run_job(context, request_id)
    with context.sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.state == "active", row.failure
        events = lifecycle.list_events(session, request_id)
        [waited] = [e.data for e in events if e.data.get("state") == "awaiting_approval"]
        prompt = session.scalars(select(Prompt).where(Prompt.request_id == request_id)).one()
        assert prompt.digest == waited["prompt_digest"]
        assert row.metrics is not None
        assert (row.metrics["stopped"], row.metrics["steps"], row.metrics["attempt"]) == ("converged", 2, 1)
        assert row.wrapped_key is row.sealed_texts is session.get(Checkpoint, request_id) is None
        audit.verify(session)
    in_force = read_evidence(context, request_id)  # made again, and the request's key that sealed the first is gone
    assert in_force["prompt_digest"] == waiting["prompt_digest"] == prompt.digest
    assert in_force["created_at"] > waiting["created_at"]


@SQLITE
def test_a_worker_that_always_wants_an_approval_has_one_of_what_came_before(context: Context) -> None:
    """The setting was turned on while the request waited."""
    request_id = ask(context, forget_texts(), approve=False)
    strict = replace_settings(context, require_approval=True)
    run_job(strict, request_id)
    with context.sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert (row.state, row.approval_required) == ("awaiting_approval", True)
        assert audit_state.verify(session)
    with context.sessions.begin() as session:
        approval.approve(session, request_id, actor="key_2")
    run_job(strict, request_id)
    assert state(context.sessions, request_id) == "active"
    with context.sessions() as session:
        assert audit_state.verify(session)


@SQLITE
def test_another_prompt_than_the_approved_one_waits_for_its_own_approval(context: Context) -> None:
    request_id = ask(context, forget_texts(), approve=True)
    run_job(context, request_id)
    with context.sessions.begin() as session:
        first = approval.approve(session, request_id, actor="key_2")
        digest = approval.approved_digest(session, first)
    run_job(replace_settings(context, seed=7), request_id)  # a worker that was set up otherwise since trains anew
    assert state(context.sessions, request_id) == "awaiting_approval"
    with context.sessions.begin() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.approved_by is row.approved_at is approval.approved_digest(session, row) is None
        second = approval.approve(session, request_id, actor="key_2")
        assert digest is not None and approval.approved_digest(session, second) not in (None, digest)
    run_job(replace_settings(context, seed=7), request_id)
    assert state(context.sessions, request_id) == "active"


@SQLITE
def test_a_worker_that_broke_off_in_the_checks_does_not_train_again(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = ask(context, forget_texts(), approve=True)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(worker.job.Job, "check_and_activate", broken)
        run_job(context, request_id)
    with context.sessions.begin() as session:
        session.get_one(UnlearnRequest, request_id).lease_expires_at = lifecycle.utcnow()
    monkeypatch.setattr(worker.job, "train_soft_prompt", None)
    run_job(context, request_id)
    assert state(context.sessions, request_id) == "awaiting_approval"


@SQLITE
@pytest.mark.parametrize("mode", [Mode.ROUTED])
def test_a_prompt_that_fails_its_checks_asks_nobody(context: Context) -> None:
    strict = replace_settings(context, max_retain_drop=-2.0)  # a random model may pass any honest limit by luck
    request_id = ask(context, forget_texts(), approve=True)
    run_job(strict, request_id)
    with context.sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.state == "failed" and row.failure is not None and row.failure["code"] == "checks-failed"


@SQLITE
@pytest.mark.parametrize("mode", [Mode.CONCATENATE])  # a gate's failure is no prompt's to mend
def test_another_try_does_not_take_the_first_ones_end_for_its_own(context: Context) -> None:
    strict = replace_settings(context, max_retain_drop=-2.0, max_tries=2)
    request_id = ask(context, forget_texts(), approve=True)
    run_job(strict, request_id)
    with context.sessions() as session:
        row = lifecycle.get_request(session, request_id)
        assert row.metrics is not None and row.metrics["resumed_from"] == 0 and len(row.metrics["earlier_tries"]) == 1


def replace_settings(context: Context, **knobs: Any) -> Context:
    return Context(
        settings=context.settings.model_copy(update=knobs),
        sessions=context.sessions,
        vault=context.vault,
        llm=context.llm,
        retain=context.retain,
    )


def test_the_end_of_a_training_comes_back_bit_for_bit() -> None:
    forget = [Example(item.text, item.label) for item in forget_texts()]
    retain = [Example(f"the plot number {n} is good", "positive") for n in range(8)]
    config = TrainingConfig(
        num_virtual_tokens=4, max_steps=9, check_every=2, target_abstain=0, target_retain_drop=1, seed=3
    )
    checkpoints: list[bytes] = []
    result = train_soft_prompt(
        tiny_llm(),
        forget,
        retain,
        config,
        on_checkpoint=lambda _, data: checkpoints.append(data),
        checkpoint_seconds=0,
    )
    assert (result.stopped, result.steps) == ("converged", 2)
    data = finished.pack(result, seed=3)
    fingerprint = tiny_llm().fingerprint
    back = finished.unpack(data, fingerprint=fingerprint, seed=3)
    assert back is not None
    assert back.prompt.to_bytes() == result.prompt.to_bytes()
    assert replace(back, prompt=result.prompt, resumed_from=0) == result and back.resumed_from == 2
    for other in ({"seed": 4, "fingerprint": fingerprint}, {"seed": 3, "fingerprint": "0" * 64}):
        assert finished.unpack(data, **other) is None
    for wrong in (checkpoints[-1], data[:-1], data[:40], b"", result.prompt.to_bytes()):
        assert finished.unpack(wrong, fingerprint=fingerprint, seed=3) is None
    with pytest.raises(CheckpointError):  # nor is it taken for the middle of a run
        train_soft_prompt(tiny_llm(), forget, retain, config, resume=data)


def test_a_rejected_or_waiting_request_left_no_text_in_events(sessions: Sessions, vault: Vault) -> None:
    request_id = submit(sessions, vault, MARKER, terms=terms(approval=True))
    await_approval(sessions, must_take(sessions, request_id))
    with sessions.begin() as session:
        approval.reject(session, request_id, actor="key_2", reason="a reason that names nobody")
    with sessions() as session:
        told = repr([vars(row) for table in (RequestEvent, AuditEntry) for row in session.scalars(select(table))])
        assert MARKER not in told and "names nobody" not in told
