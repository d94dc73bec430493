"""An old backup, really restored: what was shredded since stays shredded, and the database says so before it serves."""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from api_kit import add_prompt, claim, make_gate, make_settings, running, soft_prompt, tiny_llm
from floor import activate, must_take, state, submit
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from vault_kit import NEW, OLD, away, backup, pending, prompt_opens, sharing, texts_open
from webhook_kit import add_key, add_webhook
from worker_kit import forget_texts, write_retain

from app import active_set, audit, audit_state, db, evidence, job_queue, keys, lifecycle, reconcile, shredding, webhooks
from app.errors import KeyStoreAway, ShareMissing, VaultError
from app.evidence import Found
from app.keystore import KeyStore
from app.settings import Mode, Settings
from app.tables import AuditEntry, Evidence, Prompt, UnlearnRequest, Webhook, utcnow
from app.vault import Vault
from models.examples import read_examples
from worker.chores import tell_ended
from worker.context import Context
from worker.main import prepare
from worker.tasks import run_job

Sessions = sessionmaker[Session]


@dataclass
class Restored:
    """A database as it was before the revokes and endings that the key store knows of."""

    url: str
    sessions: Sessions
    vault: Vault
    prompts: dict[str, str]
    requests: dict[str, str]


KEEP = timedelta(hours=2)


def put(sessions: Sessions, vault: Vault, data: bytes) -> str:
    request = must_take(sessions, submit(sessions, vault))
    with sessions() as session:
        version = active_set.read_active_set(session).version
    prompt_id = activate(sessions, vault, request, data=data, version=version)
    with sessions.begin() as session:
        key = active_set.get_prompt(session, prompt_id).wrapped_key
        assert key is not None
        evidence.save(session, request.request_id, evidence.seal(vault, request.request_id, key, Found({"seed": 0})))
    return prompt_id


@pytest.fixture
def restored(engine: Engine, sessions: Sessions, keystore: KeyStore, tmp_path: Path) -> Iterator[Restored]:
    vault = sharing(keystore)
    reconcile.make_ready(sessions, vault)
    prompts = {name: put(sessions, vault, name.encode()) for name in ("kept", "revoked", "suspended")}
    with sessions.begin() as session:
        active_set.restore(session, 2, mode="concatenate", fingerprint="f" * 64, actor="key_1", reason="test")
    with sessions.begin() as session:
        owner = keys.create_key(session, name="test", scopes=["requests"], actor="test")[0].id
    names = ("waits", "cancelled", "trains", "fails")
    requests = {name: submit(sessions, vault) for name in names}
    running_ones = {name: must_take(sessions, requests[name]) for name in ("trains", "fails")}
    with sessions.begin() as session:
        job_queue.save_checkpoint(session, vault, running_ones["fails"], step=5, data=b"state")
        key = vault.new_key()
        session.add(_webhook("whk_kept", owner, vault.new_key(), vault))
        session.add(_webhook("whk_gone", owner, key, vault))
    with backup(engine, tmp_path) as url:
        for name in ("revoked", "suspended"):
            with sessions.begin() as session:
                active_set.revoke_prompt(session, prompts[name], actor="key_1", reason=None)
        with sessions.begin() as session:
            lifecycle.request_cancel(session, requests["cancelled"], actor="key_1")
        with sessions.begin() as session:
            lifecycle.fail(session, running_ones["fails"], code="diverged", detail="the loss became infinite")
        with sessions.begin() as session:
            shredding.destroy_key(session, key)
        assert pending(sessions) == set()
        copy = db.make_engine(url)
        yield Restored(url, db.make_sessions(copy), vault, prompts, requests)
        copy.dispose()


def _webhook(row_id: str, owner: str, key: bytes, vault: Vault) -> Webhook:
    sealed = vault.seal(key, b"secret", aad=row_id)
    return Webhook(
        id=row_id,
        api_key_id=owner,
        url="https://x.example",
        states=[],
        wrapped_key=key,
        sealed_secret=sealed,
        created_at=utcnow(),
        disabled_at=None,
    )


def test_the_database_follows_the_key_store(restored: Restored, caplog: pytest.LogCaptureFixture) -> None:
    sessions, prompts, requests = restored.sessions, restored.prompts, restored.requests
    # What was shredded since stays shredded, with the right master key and before anything is reconciled.
    for name, opens in (("kept", True), ("revoked", False), ("suspended", False)):
        assert prompt_opens(sessions, restored.vault, prompts[name]) is opens, name
    for name, opens in (("waits", True), ("cancelled", False), ("trains", True), ("fails", False)):
        with sessions() as session:
            assert session.get_one(UnlearnRequest, requests[name]).sealed_texts is not None
        assert texts_open(sessions, restored.vault, requests[name]) is opens, name
    with sessions() as session:
        before = active_set.read_active_set(session)
    reconcile.make_ready(sessions, restored.vault)
    assert "2 prompts were revoked since, 2 requests lost their key" in caplog.text
    with sessions() as session:
        after, members = active_set.read_members(session)
        assert after.version == before.version + 1 and [member.id for member in members] == [prompts["kept"]]
        kept = session.get_one(UnlearnRequest, session.get_one(Prompt, prompts["kept"]).request_id)
        assert list(session.scalars(select(Evidence.request_id))) == [kept.id]
        assert evidence.read(session, restored.vault, kept)["seed"] == 0
        for name in ("revoked", "suspended"):
            row = session.get_one(Prompt, prompts[name])
            assert (row.state, row.revoked_by, row.revoke_code) == ("revoked", "system", "reconciled")
            assert row.wrapped_key is row.sealed is row.sealed_gate is row.sealed_canaries is None
            assert session.get_one(UnlearnRequest, row.request_id).state == "revoked"
        for name in ("cancelled", "fails"):
            request = session.get_one(UnlearnRequest, requests[name])
            assert request.state == "failed" and request.failure is not None
            assert request.failure["code"] == "key-destroyed"
            assert request.wrapped_key is request.sealed_texts is None
        hooks = {row.id: row.disabled_at for row in session.scalars(select(Webhook))}
        assert hooks["whk_kept"] is None and hooks["whk_gone"] is not None
        actions = session.scalars(select(AuditEntry.action).where(AuditEntry.actor == "system")).all()
        audit.verify(session)
    assert sorted(action for action in actions if not action.endswith("created")) == [
        "prompt.revoked",
        "prompt.revoked",
        "request.failed",
        "request.failed",
        "request.revoked",
        "request.revoked",
        "webhook.disabled",
    ]
    assert (state(sessions, requests["waits"]), state(sessions, requests["trains"])) == ("pending", "training")
    assert prompt_opens(sessions, restored.vault, prompts["kept"])
    caplog.clear()
    reconcile.make_ready(sessions, restored.vault)  # another replica, or the next start
    with sessions() as session:
        assert active_set.read_active_set(session) == after
        assert len(session.scalars(select(AuditEntry.action).where(AuditEntry.actor == "system")).all()) == len(actions)
    assert "older state" not in caplog.text and pending(sessions) == set()


def everything(sessions: Sessions) -> list[object]:
    with sessions() as session:
        rows = [session.execute(select(*table.__table__.c)).all() for table in (Prompt, UnlearnRequest, AuditEntry)]
        return [*rows, active_set.read_active_set(session)]


def test_what_stops_a_start_changes_nothing(restored: Restored, tmp_path: Path) -> None:
    """Another key store, none, another master key; and one share that is unknown, which is no revocation either."""
    before = everything(restored.sessions)
    keystore = restored.vault.keystore
    assert keystore is not None
    for wrong in (sharing(KeyStore(f"sqlite:///{tmp_path / 'other.db'}")), sharing(None)):
        with pytest.raises(ShareMissing, match="LETHEON_KEYSTORE_URL"):
            reconcile.make_ready(restored.sessions, wrong)
        with restored.sessions() as session, pytest.raises(ShareMissing, match="LETHEON_KEYSTORE_URL"):
            reconcile.reconcile(session, wrong)
    with pytest.raises(VaultError, match="sealed under another LETHEON_MASTER_KEY"):
        reconcile.make_ready(restored.sessions, sharing(keystore, NEW))
    with restored.sessions() as session:
        kept = session.get_one(Prompt, restored.prompts["kept"]).wrapped_key
    assert kept is not None
    with keystore._engine().begin() as connection:
        connection.exec_driver_sql("DELETE FROM shares WHERE id = " + _literal(connection.dialect.name, kept[1:17]))
    with restored.sessions() as session, pytest.raises(ShareMissing, match=r"1 of the \d+ keys.*nothing was changed"):
        reconcile.reconcile(session, restored.vault)
    assert everything(restored.sessions) == before


def _literal(dialect: str, value: bytes) -> str:
    return f"x'{value.hex()}'" if dialect == "sqlite" else f"'\\x{value.hex()}'::bytea"


def test_texts_that_were_kept_are_shredded(engine: Engine, keystore: KeyStore, tmp_path: Path) -> None:
    sessions, vault = db.make_sessions(engine, keep_texts=KEEP), sharing(keystore)
    reconcile.make_ready(sessions, vault)
    prompt_id = put(sessions, vault, b"tensor")
    with backup(engine, tmp_path) as url:
        with sessions.begin() as session:
            (row,) = job_queue.shred_due(session, now=utcnow() + 2 * KEEP)
        copy = db.make_engine(url)
        again = db.make_sessions(copy, keep_texts=KEEP)
        assert not texts_open(again, vault, row)
        reconcile.make_ready(again, vault)
        with again() as session:
            request = session.get_one(UnlearnRequest, row)
            assert (request.state, request.wrapped_key, request.shred_at) == ("active", None, None)
            actions = session.scalars(select(AuditEntry.action).where(AuditEntry.subject == row)).all()
        assert actions[-1] == "request.shredded" and prompt_opens(again, vault, prompt_id)
        copy.dispose()


def test_the_api_is_ready_only_with_what_is_in_force(
    database_url: str, engine: Engine, keystore: KeyStore, tmp_path: Path
) -> None:
    master = base64.b64encode(OLD).decode()
    with running(database_url, tmp_path, master_key=master, keystore_url=keystore._url) as api:
        kept = add_prompt(api.service, soft_prompt(1), make_gate("one"))
        revoked = add_prompt(api.service, soft_prompt(2), make_gate("two"))
        waiting = api.submit(api.key())["id"]
        headers = api.key()
    with backup(engine, tmp_path) as url:
        with running(database_url, tmp_path, master_key=master, keystore_url=keystore._url) as api:
            answer = api.client.post(f"/admin/prompts/{revoked}/revoke", json={"reason": "withdrawn"}, headers=headers)
            assert answer.status_code == 200, answer.text
            claimed = claim(api.service, waiting)
            with api.service.sessions.begin() as session:
                lifecycle.fail(session, claimed, code="diverged", detail="the loss became infinite")
        other = f"sqlite:///{tmp_path / 'other.db'}"
        with pytest.raises(ShareMissing), running(url, tmp_path, master_key=master, keystore_url=other):
            pass
        with running(url, tmp_path, master_key=master, keystore_url=keystore._url) as api:
            assert api.client.get("/readyz").status_code == 200
            shown = api.client.get("/admin/prompts?state=active", headers=headers).json()["items"]
            assert [item["id"] for item in shown] == [kept]
            request = api.client.get(f"/unlearn-requests/{waiting}", headers=headers).json()
            assert (request["state"], request["failure"]["code"]) == ("failed", "key-destroyed")
            assert api.classify(headers, "a plain film")["active_set_version"] == 3


def test_keys_and_webhooks_that_have_ended_stay_so(
    engine: Engine, sessions: Sessions, keystore: KeyStore, tmp_path: Path
) -> None:
    vault = sharing(keystore)
    reconcile.make_ready(sessions, vault)
    gone, kept, owner = (add_key(sessions) for _ in range(3))
    ended_hook, kept_hook = (add_webhook(sessions, vault, owner, "https://example.com/")[0] for _ in range(2))
    with backup(engine, tmp_path) as url:
        with sessions.begin() as session:
            keys.revoke_key(session, gone, actor="cli")
            webhooks.disable_webhook(session, ended_hook, of=None, actor="key_1")
        told: set[str] = set()
        for _ in range(2):
            tell_ended(sessions, vault, told)
        assert told == keystore.ended() == {gone, ended_hook}

        copy = db.make_engine(url)
        back = db.make_sessions(copy)
        for _ in range(2):  # and nothing is left to do the second time
            reconcile.make_ready(back, sharing(keystore))
        with back() as session:
            assert [key.id for key in keys.list_keys(session) if key.revoked_at] == [gone]
            assert session.scalars(select(Webhook.id).where(Webhook.disabled_at.is_not(None))).all() == [ended_hook]
            entries = [
                e
                for e in session.scalars(select(AuditEntry).order_by(AuditEntry.seq))
                if e.subject in (gone, ended_hook)
            ]
            assert [(e.action, e.actor) for e in entries[-2:]] == [
                ("key.revoked", "system"),
                ("webhook.disabled", "system"),
            ]
            audit.verify(session)
        copy.dispose()
    assert {kept, owner, kept_hook}.isdisjoint(keystore.ended())


def test_what_ended_during_an_outage_is_told_at_the_next_start(sessions: Sessions, keystore: KeyStore) -> None:
    vault, gone = sharing(keystore), add_key(sessions)
    reconcile.make_ready(sessions, vault)
    with away(keystore):
        with sessions.begin() as session:
            keys.revoke_key(session, gone, actor="cli")
        with pytest.raises(KeyStoreAway):
            tell_ended(sessions, vault, set())
    again = KeyStore(keystore._url)
    reconcile.make_ready(sessions, sharing(again))
    assert again.ended() == {gone}
    again.close()


def test_processes_that_start_together_after_a_restore_end_it_once(
    engine: Engine, sessions: Sessions, keystore: KeyStore
) -> None:
    revived = [add_key(sessions) for _ in range(3)]
    keystore.add_ended(revived)
    errors: list[BaseException] = []
    together = threading.Barrier(3)

    def start() -> None:
        store = KeyStore(keystore._url)
        try:
            together.wait()
            reconcile.make_ready(db.make_sessions(engine), sharing(store))
        except BaseException as error:
            errors.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with sessions() as session:
        again = select(AuditEntry.subject).where(AuditEntry.action == "key.revoked").order_by(AuditEntry.subject)
        assert session.scalars(again).all() == sorted(revived)


def test_a_start_without_a_key_store_says_so(
    sessions: Sessions, keystore: KeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reconcile.make_ready(sessions, sharing(None))
    assert [record.levelname for record in caplog.records if record.getMessage() == reconcile.NO_KEY_STORE] == [
        "WARNING"
    ]
    caplog.clear()
    reconcile.make_ready(sessions, sharing(keystore))
    assert "key store" not in caplog.text
    embedded = Vault.from_settings(Settings(_env_file=None, home=tmp_path))
    assert embedded.keystore is not None, "without DATABASE_URL there always is one"
    embedded.close()


def test_a_cancelled_request_whose_texts_are_kept_stays_so(engine: Engine, keystore: KeyStore, tmp_path: Path) -> None:
    """Its share lives on, so no tombstone says that it has ended."""
    sessions, vault = db.make_sessions(engine, keep_texts=KEEP), sharing(keystore)
    reconcile.make_ready(sessions, vault)
    waits, trains, kept = (submit(sessions, vault) for _ in range(3))
    running_one = must_take(sessions, trains)
    with backup(engine, tmp_path) as url:
        with sessions.begin() as session:
            lifecycle.request_cancel(session, waits, actor="key_1")
        with sessions.begin() as session:
            lifecycle.request_cancel(session, trains, actor="key_1")
        with sessions.begin() as session:
            lifecycle.finish_cancelled(session, running_one)
        tell_ended(sessions, vault, set())
        assert keystore.ended() == {waits, trains}
        copy = db.make_engine(url)
        again = db.make_sessions(copy, keep_texts=KEEP)
        for _ in range(2):  # and nothing is left to do the second time
            reconcile.make_ready(again, sharing(keystore))
            assert [state(again, one) for one in (waits, trains, kept)] == ["cancelled", "cancelled", "pending"]
        with again() as session:
            entries = session.scalars(select(AuditEntry).where(AuditEntry.action == "request.cancelled")).all()
            assert {(e.subject, e.actor, e.detail["code"]) for e in entries} == {
                (one, "system", "reconciled") for one in (waits, trains)
            }
            assert len(entries) == 2
            # Their time began at the first cancellation, so they are not kept for another such time.
            for one in (waits, trains):
                row = session.get_one(UnlearnRequest, one)
                assert (row.wrapped_key, row.sealed_texts, row.shred_at) == (None, None, None)
            assert session.get_one(UnlearnRequest, kept).wrapped_key is not None
            audit_state.verify(session)
        copy.dispose()


def test_the_worker_takes_no_work_before_it(tmp_path: Path) -> None:
    knobs = {
        "master_key": base64.b64encode(OLD).decode(),
        "keystore_url": f"sqlite:///{tmp_path / 'keystore.db'}",
        "model": str(make_tiny_model(tmp_path / "model")),
        "quantization": "none",
        "device": "cpu",
        "retain": str(write_retain(tmp_path / "retain.jsonl")),
    }
    first = prepare(make_settings(f"sqlite:///{tmp_path / 'letheon.db'}", tmp_path, **knobs))
    request_id = submit(first.sessions, first.vault)
    with backup(first.sessions.kw["bind"], tmp_path) as url:
        with first.sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor="key_1")
        second = prepare(make_settings(url, tmp_path, **knobs))
        assert state(second.sessions, request_id) == "failed"
        second.sessions.kw["bind"].dispose()
    first.sessions.kw["bind"].dispose()


def test_a_worker_with_another_key_store_fails_nothing(
    sessions: Sessions, keystore: KeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was started before the key store was set: it hands the request back, uncounted."""
    caplog.set_level(logging.INFO)
    settings = make_settings("", tmp_path, mode=Mode.CONCATENATE, num_virtual_tokens=4)
    retain = read_examples(str(write_retain(tmp_path / "retain.jsonl")), labels=settings.labels)
    right = sharing(keystore)
    request_id = submit_as_api(sessions, right)
    for wrong in (sharing(None), sharing(KeyStore(f"sqlite:///{tmp_path / 'other.db'}"))):
        context = Context(settings=settings, sessions=sessions, vault=wrong, llm=tiny_llm(), retain=retain)
        assert run_job(context, request_id) is False
        with sessions() as session:
            row = lifecycle.get_request(session, request_id)
        assert (row.state, row.attempt, row.lease_owner) == ("pending", 0, None)
        assert "released: " in caplog.text and "LETHEON_KEYSTORE_URL" in caplog.text
        caplog.clear()
    assert texts_open(sessions, right, request_id)


def submit_as_api(sessions: Sessions, vault: Vault) -> str:
    with sessions.begin() as session:
        return lifecycle.create_request(
            session,
            vault,
            texts=forget_texts(),
            reason=None,
            options={},
            fingerprint=tiny_llm().fingerprint,
            api_key_id=None,
        ).id
