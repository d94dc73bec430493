from __future__ import annotations

import hashlib
import threading

import pytest
from floor import FINGERPRINT, activate, must_take, state, submit
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, audit, job_queue, lifecycle
from app.active_set import ActiveSetView, set_digest
from app.errors import Conflict, InvalidInput, NotFound, NotReady, StaleActiveSet, VaultError
from app.lifecycle import CancelRequested
from app.sealing import seal_prompt
from app.tables import ActiveSet, AuditEntry, Checkpoint, Prompt
from app.vault import Vault

Sessions = sessionmaker[Session]


def put(sessions: Sessions, vault: Vault, data: bytes, version: int) -> str:
    return activate(sessions, vault, must_take(sessions, submit(sessions, vault)), data=data, version=version)


def test_activate(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, claim, step=5, data=b"state")
    prompt_id = activate(sessions, vault, claim, data=b"tensor", version=0)
    with sessions() as session:
        prompt = active_set.get_prompt(session, prompt_id)
        request = lifecycle.get_request(session, claim.request_id)
        assert (prompt.state, prompt.request_id, prompt.position) == ("active", request.id, 1)
        assert prompt.seconds_to_active >= 0
        assert prompt.sealed is not None and b"tensor" not in prompt.sealed
        assert active_set.open_prompt(vault, prompt) == b"tensor"
        assert request.state == "active"
        assert request.metrics == {"forget_abstain": 1.0}
        assert request.finished_at is not None
        # shredded
        assert request.wrapped_key is request.sealed_texts is None
        assert request.lease_owner is None
        assert session.scalars(select(Checkpoint)).all() == []
        assert active_set.read_active_set(session) == ActiveSetView(1, set_digest([prompt.digest]))
        assert active_set.forgotten_digests(session) == {vault.digest("  zebulon QUIST was dreadful in this film")}
        assert audit.verify(session) == 4
        last = session.scalars(select(AuditEntry).order_by(AuditEntry.seq.desc())).first()
        assert last is not None
        assert (last.action, last.detail["prompt_id"]) == ("request.active", prompt_id)


def test_a_stack_keeps_its_order_and_a_revoke_its_version(sessions: Sessions, vault: Vault) -> None:
    first, second, third = (put(sessions, vault, data, version) for version, data in enumerate((b"1", b"2", b"3")))
    with sessions() as session:
        view, members = active_set.read_members(session)
        assert view.version == 3
        assert [member.id for member in members] == [first, second, third]
        assert [prompt.id for prompt in active_set.active_prompts(session)] == [first, second, third]
    with sessions.begin() as session:
        revoked = active_set.revoke_prompt(session, second, actor="key_1", reason="by mistake")
        assert (revoked.state, revoked.revoked_by, revoked.revoke_reason) == ("revoked", "key_1", "by mistake")
    fourth = put(sessions, vault, b"4", 4)
    with sessions() as session:
        view, members = active_set.read_members(session)
        assert [member.id for member in members] == [first, third, fourth]
        assert view == ActiveSetView(5, set_digest(member.digest for member in members))
        assert state(sessions, revoked.request_id) == "revoked"
        assert "by mistake" not in repr([row.detail for row in session.scalars(select(AuditEntry))])
        audit.verify(session)


def test_revoking_the_only_prompt_restores_the_digest_of_the_empty_set(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session:
        before = active_set.read_active_set(session)
        assert active_set.read_members(session) == (before, [])
    prompt_id = put(sessions, vault, b"1", 0)
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    with sessions() as session:
        after = active_set.read_active_set(session)
        assert (after.version, after.digest) == (2, before.digest)
        # Nobody asked for these texts to be taught again.
        assert len(active_set.forgotten_digests(session)) == 1


def test_revoking_twice_or_nothing(sessions: Sessions, vault: Vault) -> None:
    prompt_id = put(sessions, vault, b"1", 0)
    with sessions.begin() as session:
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    with sessions() as session, pytest.raises(Conflict):
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    with sessions() as session, pytest.raises(NotFound):
        active_set.revoke_prompt(session, "prm_0", actor="key_1", reason=None)
    with sessions() as session:
        assert active_set.read_active_set(session).version == 2


def test_a_stale_set_is_refused_and_nothing_stays(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    put(sessions, vault, b"other", 0)
    with pytest.raises(StaleActiveSet):
        activate(sessions, vault, claim, data=b"mine", version=0)
    assert state(sessions, claim.request_id) == "evaluating"
    activate(sessions, vault, claim, data=b"mine", version=1)
    with sessions() as session:
        assert active_set.read_active_set(session).version == 2


def test_of_activations_at_once_on_one_version_one_wins(sessions: Sessions, vault: Vault) -> None:
    claims = [must_take(sessions, submit(sessions, vault)) for _ in range(4)]
    outcomes: list[str] = []

    def work(number: int) -> None:
        try:
            activate(sessions, vault, claims[number], data=bytes([number]), version=0)
            outcomes.append("active")
        except BaseException as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["StaleActiveSet"] * 3 + ["active"]
    with sessions() as session:
        assert active_set.read_active_set(session).version == 1


def test_activate_and_revoke_at_once_do_not_deadlock(sessions: Sessions, vault: Vault) -> None:
    errors: list[BaseException] = []
    prompts = [put(sessions, vault, bytes([number]), number) for number in range(5)]

    def revoke() -> None:
        try:
            for prompt_id in prompts:
                with sessions.begin() as session:
                    active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
        except BaseException as error:
            errors.append(error)

    def add() -> None:
        try:
            done = 0
            claim = must_take(sessions, submit(sessions, vault))
            while done < 5:
                with sessions() as session:
                    version = active_set.read_active_set(session).version
                try:
                    activate(sessions, vault, claim, data=b"n%d" % done, version=version)
                except StaleActiveSet:
                    continue
                done += 1
                claim = must_take(sessions, submit(sessions, vault))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target) for target in (revoke, add)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with sessions() as session:
        view, members = active_set.read_members(session)
        assert (view.version, len(members)) == (15, 5)
        audit.verify(session)


def test_a_cancellation_before_activation_wins(sessions: Sessions, vault: Vault) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    with sessions.begin() as session:
        lifecycle.request_cancel(session, claim.request_id, actor="key_1")
    with pytest.raises(CancelRequested):
        activate(sessions, vault, claim, version=0)
    with sessions.begin() as session:
        lifecycle.finish_cancelled(session, claim)
    with sessions() as session:
        assert active_set.read_active_set(session).version == 0


@pytest.mark.parametrize(("field", "value"), [("digest", "0" * 64), ("fingerprint", "0" * 64)])
def test_another_prompt_than_said_is_refused(sessions: Sessions, vault: Vault, field: str, value: str) -> None:
    claim = must_take(sessions, submit(sessions, vault))
    digest = value if field == "digest" else hashlib.sha256().hexdigest()
    with sessions() as session, pytest.raises((ValueError, Conflict)):
        active_set.activate(
            session,
            claim,
            seal_prompt(vault, vault.new_key(), prompt=b"", digest=digest),
            fingerprint=value if field == "fingerprint" else FINGERPRINT,
            num_virtual_tokens=1,
            hidden_size=1,
            metrics={},
            expected_version=0,
        )


def test_fail_closed_when_rows_do_not_agree(sessions: Sessions, vault: Vault) -> None:
    prompt_id = put(sessions, vault, b"1", 0)
    put(sessions, vault, b"2", 1)
    with sessions.begin() as session:
        session.execute(update(Prompt).where(Prompt.id == prompt_id).values(state="revoked"))
    with sessions() as session, pytest.raises(NotReady):
        active_set.read_members(session)
    with sessions.begin() as session:
        session.delete(session.get_one(ActiveSet, 1))
    for read in (active_set.read_members, active_set.read_active_set, active_set.lock_active_set):
        with sessions() as session, pytest.raises(NotReady):
            read(session)


def test_swapped_prompt_bytes_do_not_open(sessions: Sessions, vault: Vault) -> None:
    first, second = put(sessions, vault, b"1", 0), put(sessions, vault, b"2", 1)
    with sessions() as session:
        one, two = active_set.get_prompt(session, first), active_set.get_prompt(session, second)
        one.sealed, one.wrapped_key = two.sealed, two.wrapped_key
        with pytest.raises(VaultError):
            active_set.open_prompt(vault, one)
        session.rollback()


def test_list_prompts(sessions: Sessions, vault: Vault) -> None:
    ids = sorted((put(sessions, vault, bytes([number]), number) for number in range(3)), reverse=True)
    with sessions.begin() as session:
        active_set.revoke_prompt(session, ids[0], actor="key_1", reason=None)
    with sessions() as session:
        page, cursor = active_set.list_prompts(session, limit=2)
        rest, end = active_set.list_prompts(session, limit=2, cursor=cursor)
        assert [prompt.id for prompt in page + rest] == ids
        assert end is None
        assert [prompt.id for prompt in active_set.list_prompts(session, limit=9, state="revoked")[0]] == ids[:1]
        with pytest.raises(InvalidInput):
            active_set.list_prompts(session, limit=9, state="x")
        with pytest.raises(InvalidInput):
            active_set.list_prompts(session, limit=9, cursor="x")
        with pytest.raises(NotFound):
            active_set.get_prompt(session, "prm_0")
