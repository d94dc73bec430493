from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from api_kit import soft_prompt, tiny_llm
from floor import activate, must_take, state, submit
from sqlalchemy import Engine, MetaData, inspect, select, text
from sqlalchemy.orm import Session, sessionmaker

from app import active_set, audit, db, lifecycle, set_history
from app.errors import NotReady
from app.settings import Mode
from app.stack import StackReader
from app.tables import Base, PendingShred, Prompt, utcnow
from app.vault import Vault

TABLES = set(Base.metadata.tables)


def test_migrated_schema_is_the_models_schema(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    assert set(inspect(engine).get_table_names()) == TABLES | {"alembic_version"}


def test_up_down_up_with_data(empty_database_url: str, vault: Vault) -> None:
    db.upgrade(empty_database_url)
    engine = db.make_engine(empty_database_url)
    sessions = db.make_sessions(engine)
    first, second = submit(sessions, vault), submit(sessions, vault)
    activate(sessions, vault, must_take(sessions, first), version=0)
    must_take(sessions, second)
    engine.dispose()

    db.upgrade(empty_database_url)  # nothing to do, and nothing is lost
    assert state(sessions, first) == "active"
    engine.dispose()

    db.downgrade(empty_database_url, "base")
    assert not set(inspect(engine).get_table_names()) & TABLES
    with pytest.raises(NotReady, match="nothing"):
        db.check_schema(engine)
    engine.dispose()

    db.upgrade(empty_database_url)
    db.check_schema(engine)
    with sessions() as session:
        assert active_set.read_active_set(session) == active_set.ActiveSetView(0, active_set.set_digest([]))
        assert lifecycle.list_requests(session, limit=10) == ([], None)
        assert audit.verify(session) == 0
    engine.dispose()


def test_no_way_back_while_key_shares_are_to_be_destroyed(empty_database_url: str) -> None:
    """The older version has no place for their ids: an old backup would open what was shredded."""
    db.upgrade(empty_database_url)
    engine = db.make_engine(empty_database_url)
    sessions = db.make_sessions(engine)
    with sessions.begin() as session:
        session.add(PendingShred(share_id=bytes(16), at=utcnow()))
    engine.dispose()
    with pytest.raises(RuntimeError, match="1 key shares are still to be destroyed"):
        db.downgrade(empty_database_url, "0003")
    db.check_schema(engine)
    with sessions.begin() as session:
        session.delete(session.get_one(PendingShred, bytes(16)))
    engine.dispose()
    db.downgrade(empty_database_url, "0003")
    assert "pending_shreds" not in inspect(engine).get_table_names()
    engine.dispose()


def fill_first_schema(engine: Engine, vault: Vault, prompts: dict[str, bytes]) -> dict[str, bytes]:
    """A database as the first version left it: one prompt for each state. Their sealed bytes."""
    tables = MetaData()
    tables.reflect(engine, only=["unlearn_requests", "prompts", "active_set"])
    now = datetime.now(UTC)
    sealed = {}
    with engine.begin() as connection:
        for position, (prompt_state, data) in enumerate(prompts.items(), start=1):
            request_id, prompt_id, digest = f"req_{position:028x}", f"prm_{position:028x}", sha256(data).hexdigest()
            request = {
                "id": request_id,
                "state": prompt_state,
                "created_at": now,
                "updated_at": now,
                "num_texts": 1,
                "options": {},
                "fingerprint": tiny_llm().fingerprint,
                "attempt": 1,
                "cancel_requested": False,
            }
            connection.execute(tables.tables["unlearn_requests"].insert(), request)
            key = vault.new_key()
            sealed[prompt_state] = vault.seal(key, data, aad=active_set.prompt_aad(prompt_id, digest))
            prompt = {
                "id": prompt_id,
                "request_id": request_id,
                "state": prompt_state,
                "position": position,
                "fingerprint": tiny_llm().fingerprint,
                "num_virtual_tokens": 4,
                "hidden_size": 32,
                "digest": digest,
                "wrapped_key": key,
                "sealed": sealed[prompt_state],
                "metrics": {"forget_abstain": 1.0},
                "seconds_to_active": 1.0,
                "activated_at": now,
            }
            connection.execute(tables.tables["prompts"].insert(), prompt)
        in_force = {"version": 3, "digest": active_set.set_digest([sha256(prompts["active"]).hexdigest()])}
        connection.execute(tables.tables["active_set"].update().values(**in_force))
    return sealed


def test_from_the_first_schema_to_gates_and_back(empty_database_url: str, vault: Vault) -> None:
    """What was in force stays servable, in the mode it was trained for; what was revoked is shredded now."""
    db.upgrade(empty_database_url, "0001")
    engine = db.make_engine(empty_database_url)
    kept, gone = soft_prompt(1), soft_prompt(2)
    sealed = fill_first_schema(engine, vault, {"revoked": gone.to_bytes(), "active": kept.to_bytes()})
    engine.dispose()

    def served() -> list[str]:
        reader = StackReader(vault, fingerprint=tiny_llm().fingerprint, mode=Mode.CONCATENATE)
        with sessions() as session:
            return [prompt.digest for prompt in reader.read(session).prompts]

    db.upgrade(empty_database_url)
    sessions = db.make_sessions(engine)
    assert served() == [kept.digest]
    with sessions() as session:
        revoked, active = session.scalars(select(Prompt).order_by(Prompt.position))
        assert revoked.wrapped_key is revoked.sealed is None and revoked.digest == gone.digest
        assert (active.mode, active.gate_digest, active.sealed_gate) == ("concatenate", None, None)
        (version,), _ = set_history.list_versions(session, limit=9)
        assert (version.version, version.size) == (3, 1)
        assert version.digest == active_set.read_active_set(session).digest
        assert [prompt.id for prompt in set_history.members_of(session, 3)] == [active.id]
    engine.dispose()
    if empty_database_url.startswith("sqlite"):  # not even in what the file no longer uses
        content = Path(empty_database_url.removeprefix("sqlite:///")).read_bytes()
        assert (sealed["active"] in content, sealed["revoked"] in content) == (True, False)

    db.downgrade(empty_database_url, "0001")
    columns = {column["name"] for column in inspect(engine).get_columns("prompts")}
    assert {"wrapped_key", "sealed"} <= columns and not {"mode", "gate_digest", "gate_space", "sealed_gate"} & columns
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT state, sealed FROM prompts")).all()
        assert [(row.state, bytes(row.sealed)) for row in rows] == [("active", sealed["active"])]
    engine.dispose()

    db.upgrade(empty_database_url)
    assert served() == [kept.digest]
    with sessions.begin() as session:  # and it can go like any other
        active_set.revoke_prompt(session, active.id, actor="key_1", reason=None)
    assert served() == []
    engine.dispose()


def test_two_processes_may_migrate_at_once(empty_database_url: str) -> None:
    errors: list[BaseException] = []

    def up() -> None:
        try:
            db.upgrade(empty_database_url)
        except BaseException as error:
            errors.append(error)

    # alembic's context is per process, so real processes: one of them is this one
    code = "import sys; from app import db; db.upgrade(sys.argv[1])"
    root = Path(db.__file__).parent.parent
    others = [
        subprocess.Popen([sys.executable, "-c", code, empty_database_url], env={**os.environ, "PYTHONPATH": str(root)})
        for _ in range(2)
    ]
    thread = threading.Thread(target=up)
    thread.start()
    thread.join()
    assert [other.wait(60) for other in others] == [0, 0]
    assert errors == []
    engine = db.make_engine(empty_database_url)
    db.check_schema(engine)
    engine.dispose()


def test_failed_migration_leaves_nothing_behind(empty_database_url: str) -> None:
    with pytest.raises(RuntimeError, match="half-way"), db.migrating(empty_database_url) as connection:
        connection.execute(text("CREATE TABLE half (id INTEGER)"))
        raise RuntimeError("half-way")
    engine = db.make_engine(empty_database_url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_command_line_reads_the_settings_from_any_folder(empty_database_url: str, tmp_path: Path) -> None:
    root = Path(db.__file__).parent.parent
    command = [sys.executable, "-m", "alembic", "-c", str(root / "alembic.ini"), "upgrade", "head"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "DATABASE_URL": empty_database_url}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    engine = db.make_engine(empty_database_url)
    db.check_schema(engine)
    engine.dispose()


def test_check_schema_says_when_the_database_is_away() -> None:
    engine = db.make_engine("postgresql://nobody:hunter2@127.0.0.1:1/none")
    with pytest.raises(NotReady) as caught:
        db.check_schema(engine)
    assert "hunter2" not in str(caught.value)
    engine.dispose()


def test_unsupported_database() -> None:
    with pytest.raises(ValueError, match="mysql"):
        db.make_engine("mysql://localhost/x")


def test_sqlite_is_set_up_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "letheon.db"
    engine = db.make_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        for pragma, value in (("journal_mode", "wal"), ("foreign_keys", 1), ("secure_delete", 1)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    engine.dispose()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_reader_neither_blocks_nor_is_blocked_by_a_writer(sessions: sessionmaker[Session], vault: Vault) -> None:
    with sessions() as reader:
        assert active_set.read_active_set(reader).version == 0
        request_id = submit(sessions, vault)  # would wait 30 s if the open reader held a lock
        assert lifecycle.get_request(reader, request_id).state == "pending"
        with sessions.begin() as writer:
            active_set.bump(writer, active_set.lock_active_set(writer), actor="test", now=utcnow())
            with sessions() as second_reader:
                assert active_set.read_active_set(second_reader).version == 0
        assert active_set.read_active_set(reader).version == 1


def test_read_then_write_in_many_threads_never_fails_locked(sessions: sessionmaker[Session]) -> None:
    """The upgrade from a read to a write is what SQLite refuses at once in a plain deferred transaction."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                with sessions.begin() as session:
                    active_set.read_active_set(session)
                    active_set.bump(session, active_set.lock_active_set(session), actor="test", now=utcnow())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with sessions() as session:
        assert active_set.read_active_set(session).version == 40  # none was lost
