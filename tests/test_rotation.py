"""Another master key: every wrapped key moves to it, what they sealed stays as it is, and any crash is made good."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from floor import activate, must_take, submit
from sqlalchemy import Engine, event, select
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner
from vault_kit import NEW, OLD, pending, prompt_opens, share_of, sharing, texts_open
from worker_kit import ROOT

from app import active_set, audit, cli, cli_doctor, db, key_file, keys, lifecycle, reconcile, rotation
from app.errors import Conflict, VaultError, WrongMasterKey
from app.keystore import KeyStore
from app.settings import get_settings
from app.tables import AuditEntry, Prompt, Secret, UnlearnRequest, Webhook, utcnow
from app.vault import Vault, share_id

Sessions = sessionmaker[Session]
SEALED = {
    Prompt: ("sealed", "sealed_gate", "sealed_canaries"),
    UnlearnRequest: ("sealed_texts",),
    Webhook: ("sealed_secret",),
}


def fill(sessions: Sessions, vault: Vault) -> tuple[str, str]:
    """A prompt in force, a request that waits, a webhook, digest keys; the ids of the first two."""
    reconcile.make_ready(sessions, vault)
    prompt_id = activate(sessions, vault, must_take(sessions, submit(sessions, vault)), version=0)
    with sessions.begin() as session:
        owner = keys.create_key(session, name="test", scopes=["requests"], actor="test")[0].id
        key = vault.new_key()
        sealed = vault.seal(key, b"secret", aad="whk")
        session.add(
            Webhook(
                id="whk_1",
                api_key_id=owner,
                url="https://x.example",
                states=[],
                wrapped_key=key,
                sealed_secret=sealed,
                created_at=utcnow(),
            )
        )
    return prompt_id, submit(sessions, vault)


def payloads(sessions: Sessions, vault: Vault) -> list[bytes]:
    """Every sealed value there is, without the wrapped keys."""
    with sessions() as session:
        found = [
            getattr(row, name)
            for table, names in SEALED.items()
            for row in session.scalars(select(table).order_by(table.id))
            for name in names
        ]
        found += [vault.split(wrapped)[1] for wrapped in session.scalars(select(Secret.wrapped).order_by(Secret.name))]
    return found


def rotate(sessions: Sessions, vault: Vault) -> int:
    moved = 0
    for where in rotation.COLUMNS:
        after: str | None = ""
        while after is not None:
            with sessions.begin() as session:
                step = rotation.rotate_some(session, vault, where, after, actor="test")
            after, moved = step.last, moved + step.moved
    return moved


@pytest.mark.parametrize("shares", [True, False])
def test_every_key_moves_and_nothing_else(sessions: Sessions, keystore: KeyStore, shares: bool) -> None:
    store = keystore if shares else None
    old, both, new = sharing(store, OLD), sharing(store, NEW, OLD), sharing(store, NEW)
    prompt_id, request_id = fill(sessions, old)
    before, digest = payloads(sessions, old), old.digest("x")
    counts = keystore.counts()
    with sessions() as session:
        assert rotation.tally(session, both) == {old.key_id: 5}
    assert rotate(sessions, both) == 5 and rotate(sessions, both) == 0
    assert payloads(sessions, both) == before and keystore.counts() == counts
    with sessions() as session:
        assert rotation.tally(session, both) == {new.key_id: 5}
        said = session.scalars(select(AuditEntry).where(AuditEntry.action == "vault.rotated")).all()
        assert sum(entry.detail["keys"] for entry in said) == 5
        assert all(set(entry.detail) == {"table", "keys"} for entry in said)
        audit.verify(session)
    reconcile.make_ready(sessions, new)
    assert new.digest("x") == digest
    assert prompt_opens(sessions, new, prompt_id) and texts_open(sessions, new, request_id)
    with pytest.raises(VaultError, match="sealed under another LETHEON_MASTER_KEY"):
        reconcile.make_ready(sessions, old)
    with sessions.begin() as session:  # a share still dies with its row
        active_set.revoke_prompt(session, prompt_id, actor="key_1", reason=None)
    assert pending(sessions) == set()


def test_a_key_without_a_share_gets_one(sessions: Sessions, keystore: KeyStore, vault: Vault) -> None:
    prompt_id, request_id = fill(sessions, vault)
    before, sealing = payloads(sessions, vault), sharing(keystore)
    assert rotate(sessions, sealing) == 5 and rotate(sessions, sealing) == 0
    assert payloads(sessions, sealing) == before and keystore.counts() == (5, 0)
    assert share_of(sessions, prompt_id) != share_of(sessions, request_id)
    assert prompt_opens(sessions, sealing, prompt_id) and texts_open(sessions, sealing, request_id)
    with sessions() as session:
        assert rotation.unreferenced(session, sealing) == 0
        sealing.new_key()
        assert rotation.unreferenced(session, sealing) == 1


def test_both_keys_serve_while_it_goes_on(
    sessions: Sessions, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "CHUNK", 2)
    old, both = sharing(keystore, OLD, NEW), sharing(keystore, NEW, OLD)  # both know both: one is not restarted yet
    reconcile.make_ready(sessions, sharing(keystore, OLD))
    requests = [submit(sessions, old) for _ in range(5)]
    with sessions.begin() as session:
        step = rotation.rotate_some(session, both, "requests", "", actor="test")
    assert (step.read, step.moved, step.last) == (2, 2, requests[1])
    with sessions() as session:
        assert rotation.tally(session, both)[both.key_id] == 2
    for vault in (old, both):
        assert all(texts_open(sessions, vault, request_id) for request_id in requests)
    late = submit(sessions, old)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, requests[2], actor="key_1")
    rotate(sessions, both)
    with sessions() as session:
        assert set(rotation.tally(session, both)) == {both.key_id}
    assert texts_open(sessions, sharing(keystore, NEW), late)


def test_a_rotation_that_is_cut_off_is_taken_up(
    sessions: Sessions, keystore: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "CHUNK", 1)
    both = sharing(keystore, NEW, OLD)
    prompt_id, request_id = fill(sessions, sharing(keystore, OLD))

    def cut(_: Session) -> None:
        raise KeyboardInterrupt

    with sessions.begin() as session:
        assert rotation.rotate_some(session, both, "prompts", "", actor="test").moved == 1
    event.listen(sessions, "before_commit", cut)
    with pytest.raises(KeyboardInterrupt):
        rotate(sessions, both)
    event.remove(sessions, "before_commit", cut)
    assert prompt_opens(sessions, both, prompt_id) and texts_open(sessions, both, request_id)
    assert rotate(sessions, both) == 4


def test_a_key_that_does_not_open_stops_it(sessions: Sessions, keystore: KeyStore) -> None:
    fill(sessions, sharing(keystore, OLD))
    with pytest.raises(WrongMasterKey):
        rotate(sessions, sharing(keystore, NEW))
    with sessions() as session:
        assert rotation.tally(session, sharing(keystore, NEW)) == {rotation.UNKNOWN: 5}


def test_digests_that_hang_on_the_former_key_stop_it(sessions: Sessions, vault: Vault) -> None:
    submit(sessions, vault)  # by a version before this one
    both = Vault(NEW, previous=[OLD])
    with sessions() as session, pytest.raises(Conflict, match="digest keys are not in the database"):
        rotation.check_adopted(session)
    with pytest.raises(VaultError, match="former master key alone"):
        reconcile.make_ready(sessions, both)
    reconcile.make_ready(sessions, vault)
    reconcile.make_ready(sessions, both)
    assert both.digest("x") == vault.digest("x")


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    get_settings.cache_clear()
    return CliRunner().invoke(cli.app, list(arguments))


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The embedded default: database, key store and key file in one folder."""
    for name in ("DATABASE_URL", "LETHEON_DATABASE_URL", "LETHEON_KEYSTORE_URL", "LETHEON_MASTER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LETHEON_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield tmp_path / "home"
    get_settings.cache_clear()


@pytest.fixture
def embedded(home: Path) -> Iterator[Engine]:
    url = get_settings().effective_database_url
    db.upgrade(url)
    engine = db.make_engine(url)
    yield engine
    engine.dispose()


def test_the_key_file_is_swapped(home: Path, embedded: Engine) -> None:
    sessions = db.make_sessions(embedded)
    vault = Vault.from_settings(get_settings())
    prompt_id, request_id = fill(sessions, vault)
    before, digest = payloads(sessions, vault), vault.digest("x")
    first = (home / "master.key").read_text()
    assert "stop `letheon serve`" in run("vault", "rotate", "--new-key-file").stderr
    assert (home / "master.key").read_text() == first and not (home / "master.key.previous").exists()
    vault.close()
    shown = document(run("vault", "status", "--json"))
    assert shown["keys"] == {shown["current"]: 5} and shown["others"] == {}
    assert shown["shares"] == {"live": 5, "tombstones": 1, "unreferenced": 0, "pending_shreds": 0}
    done = document(run("vault", "rotate", "--new-key-file", "--json"))
    assert done["under_it"] == 5 == sum(done["moved"].values())
    after = Vault.from_settings(get_settings())
    assert after.key_id == done["master_key"] != shown["current"] and after.key_ids == [after.key_id]
    reconcile.make_ready(sessions, after)
    assert after.digest("x") == digest and payloads(sessions, after) == before
    assert prompt_opens(sessions, after, prompt_id) and texts_open(sessions, after, request_id)
    assert {path.name for path in home.iterdir() if "master" in path.name} == {"master.key"}
    assert (home / "master.key").stat().st_mode & 0o777 == 0o600
    again = run("vault", "rotate")  # beside a running service, and with nothing to do
    assert again.exit_code == 0 and "0 keys moved" in again.stderr
    after.close()
    printed = run("vault", "status")
    assert done["master_key"] in printed.stdout and "keystore.db" in printed.stderr.replace("\n", "")


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from app import cli_vault, key_file, rotation
STEPS = (
    (key_file, "_put"), (key_file, "_temporary"), (os, "link"), (os, "replace"), (key_file, "_sync"),
    (rotation, "rotate_some"), (Path, "unlink"),
)
def rotate(point):
    left = [point]
    def before(real):
        def counted(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        return counted
    for module, name in STEPS:
        setattr(module, name, before(getattr(module, name)))
    cli_vault.rotate(new_key_file=not Path("master.key.previous").exists(), as_json=False)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        rotate(int(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_kill_9_between_any_two_steps_of_a_swap(home: Path, embedded: Engine) -> None:
    """Each run dies one step later, and the next goes on from what it left; at last one comes through."""
    sessions = db.make_sessions(embedded)
    vault = Vault.from_settings(get_settings())
    prompt_id, request_id = fill(sessions, vault)
    before, digest, first = payloads(sessions, vault), vault.digest("x"), vault.key_id
    vault.close()
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT))]
    with subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None and forks.stdout is not None
        for point in range(1, 30):
            forks.stdin.write(f"{point}\n")
            forks.stdin.flush()
            status = int(forks.stdout.readline())
            vault = Vault.from_settings(get_settings())  # whatever was left, a service starts on it
            reconcile.make_ready(sessions, vault)
            assert prompt_opens(sessions, vault, prompt_id) and texts_open(sessions, vault, request_id), point
            assert vault.digest("x") == digest and payloads(sessions, vault) == before
            vault.close()
            if status == 0:
                break
            assert status == -signal.SIGKILL
        else:
            raise AssertionError("it never came through")
        forks.stdin.close()
    assert point > 8, "there are more steps than that"
    vault = Vault.from_settings(get_settings())
    assert vault.key_id != first and len(vault.key_ids) == 1 and not (home / key_file.FORMER).exists()
    with sessions() as session:
        assert rotation.tally(session, vault) == {vault.key_id: 5}
    vault.close()


def test_keys_from_the_environment(home: Path, embedded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (base64.b64encode(key).decode() for key in (OLD, NEW))
    printed = run("vault", "new-key").stdout
    assert len(base64.b64decode(printed.strip())) == 32 and not home.joinpath("master.key").exists()
    monkeypatch.setenv("LETHEON_MASTER_KEY", old)
    assert "digest keys are not in the database" in run("vault", "rotate").stderr
    sessions = db.make_sessions(embedded)
    keystore = KeyStore(get_settings().effective_keystore_url)
    fill(sessions, sharing(keystore, OLD))
    monkeypatch.setenv("LETHEON_MASTER_KEY", new)
    refused = run("vault", "rotate")
    assert refused.exit_code == 1 and old not in refused.stderr and new not in refused.stderr
    monkeypatch.setenv("LETHEON_PREVIOUS_MASTER_KEYS", json.dumps([old]))
    assert "LETHEON_MASTER_KEY is set" in run("vault", "rotate", "--new-key-file").stderr
    shown = document(run("vault", "status", "--json"))
    assert shown["current"] == Vault(NEW).key_id and shown["keys"] == {Vault(NEW).key_id: 0, Vault(OLD).key_id: 5}
    done = run("vault", "rotate")
    assert done.exit_code == 0 and "LETHEON_PREVIOUS_MASTER_KEYS may be removed" in done.stderr
    monkeypatch.delenv("LETHEON_PREVIOUS_MASTER_KEYS")
    assert document(run("vault", "status", "--json"))["keys"] == {Vault(NEW).key_id: 5}


def test_a_service_that_still_wraps_under_the_former_key_is_told_of(
    home: Path, embedded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (base64.b64encode(key).decode() for key in (OLD, NEW))
    sessions = db.make_sessions(embedded)
    late = sharing(KeyStore(get_settings().effective_keystore_url), OLD)
    fill(sessions, late)
    monkeypatch.setenv("LETHEON_MASTER_KEY", new)
    monkeypatch.setenv("LETHEON_PREVIOUS_MASTER_KEYS", json.dumps([old]))
    tally = rotation.tally

    def meanwhile(session: Session, vault: Vault) -> Any:
        submit(sessions, late)
        return tally(session, vault)

    monkeypatch.setattr(rotation, "tally", meanwhile)
    refused = run("vault", "rotate")
    assert refused.exit_code == 1 and f"(1 {Vault(OLD).key_id})" in refused.stderr
    assert "keep the previous key until then" in refused.stderr
    monkeypatch.setattr(rotation, "tally", tally)
    assert run("vault", "rotate").exit_code == 0


def test_doctor_says_which_of_the_two_is_the_case(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key_store() -> cli_doctor.Check:
        get_settings.cache_clear()
        return cli_doctor._guarded("key store", cli_doctor._key_store, get_settings())

    assert key_store().status == "ok" and "not there yet" in key_store().detail
    assert not home.exists()
    Vault.from_settings(get_settings()).new_key()
    assert key_store().status == "ok" and "leave it out of the database's backups" in key_store().detail
    monkeypatch.setenv("DATABASE_URL", "sqlite:///elsewhere.db")
    assert key_store().status == "warn"
    assert "an old backup of the database and the master key together open" in key_store().detail
    monkeypatch.setenv("LETHEON_KEYSTORE_URL", "postgresql://u:hunter2@127.0.0.1:9/x?connect_timeout=1")
    assert key_store().status == "fail" and "hunter2" not in key_store().detail
    (home / key_file.FORMER).write_text(key_file.new_key())
    assert "letheon vault rotate" in cli_doctor._master_key(get_settings())[1]


def test_shares_are_named_by_the_wrapped_key_alone(keystore: KeyStore) -> None:
    vault = sharing(keystore, OLD)
    wrapped = vault.new_key()
    moved = sharing(keystore, NEW, OLD).rewrap(wrapped)
    assert moved is not None and share_id(moved) == share_id(wrapped), "a backup's copy dies with the same share"
