"""Copies of databases, as backups are, and what can be opened with them."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from databases import postgres_admin_url
from floor import Sessions
from psycopg import sql
from sqlalchemy import Engine, make_url, select

from app import active_set
from app.errors import VaultError
from app.keystore import KeyStore
from app.lifecycle import texts_aad
from app.tables import PendingShred, Prompt, UnlearnRequest
from app.vault import Vault, share_id

OLD, NEW = bytes(range(32)), bytes(range(100, 132))


@contextmanager
def backup(engine: Engine, folder: Path) -> Iterator[str]:
    """A real copy of the database as it is now: of the file, or by PostgreSQL from a template. Yields its URL."""
    url = engine.url.render_as_string(hide_password=False)
    engine.dispose()
    name = f"letheon_copy_{secrets.token_hex(8)}"
    if engine.dialect.name == "sqlite":
        shutil.copy(str(engine.url.database), folder / f"{name}.db")
        yield f"sqlite:///{folder / name}.db"
        return
    admin_url = postgres_admin_url()
    assert admin_url is not None
    with psycopg.connect(admin_url, autocommit=True) as admin:
        names = sql.Identifier(name), sql.Identifier(str(engine.url.database))
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))
        try:
            yield make_url(url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def sharing(keystore: KeyStore | None, *masters: bytes) -> Vault:
    """A vault with these master keys, the first of them current."""
    first, *previous = masters or (OLD,)
    return Vault(first, previous=previous, keystore=keystore)


def texts_open(sessions: Sessions, vault: Vault, request_id: str) -> bool:
    with sessions() as session:
        row = session.get_one(UnlearnRequest, request_id)
    if row.sealed_texts is None:
        return False
    try:
        vault.open(row.wrapped_key, row.sealed_texts, aad=texts_aad(row.id))
    except VaultError:
        return False
    return True


def prompt_opens(sessions: Sessions, vault: Vault, prompt_id: str) -> bool:
    with sessions() as session:
        row = active_set.get_prompt(session, prompt_id)
    try:
        active_set.open_prompt(vault, row)
    except VaultError:
        return False
    return True


def pending(sessions: Sessions) -> set[bytes]:
    with sessions() as session:
        return set(session.scalars(select(PendingShred.share_id)))


def share_of(sessions: Sessions, row_id: str) -> bytes:
    """The id of the share that a request's or a prompt's key needs."""
    table = Prompt if row_id.startswith("prm_") else UnlearnRequest
    with sessions() as session:
        found = share_id(session.get_one(table, row_id).wrapped_key)
    assert found is not None
    return found


def on_disk(keystore: KeyStore) -> bytes:
    """The file of a key store and its log, read by a child: closing them here would drop SQLite's locks."""
    path = Path(str(make_url(keystore._url).database))
    files = [file for file in (path, path.with_name(f"{path.name}-wal")) if file.exists()]
    return subprocess.run(["cat", *files], capture_output=True, check=True).stdout


@contextmanager
def _closed(keystore: KeyStore) -> Iterator[None]:
    """For the length of the block no thread opens it: one that did between two renames would hold a file that is no
    longer there, or make a new one, and be answered by that for good."""
    with keystore._lock:
        if keystore._opened is not None:
            keystore._opened.dispose()
            keystore._opened = None
        yield


@contextmanager
def away(keystore: KeyStore) -> Iterator[None]:
    """For the length of the block the database of this key store refuses every connection, those of the store too.

    A file must not be opened by anybody else meanwhile.
    """
    url = make_url(keystore._url)
    if url.get_backend_name() == "sqlite":
        files = [Path(f"{url.database}{suffix}") for suffix in ("", "-wal", "-shm")]
        with _closed(keystore):
            moved = [(file, file.with_name(f"moved-{file.name}")) for file in files if file.exists()]
            for file, elsewhere in moved:
                file.rename(elsewhere)
            while not files[0].is_dir():
                files[0].unlink(missing_ok=True)  # of a thread that was about to connect
                with suppress(FileExistsError):
                    files[0].mkdir()
        yield
        with _closed(keystore):
            files[0].rmdir()
            for file, elsewhere in moved:
                elsewhere.rename(file)
        return
    # Its connections are ended below. To close the store here would leave one open that its watch is just using.
    admin_url = postgres_admin_url()
    assert admin_url is not None
    with psycopg.connect(admin_url, autocommit=True) as admin:
        may = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        name = sql.Identifier(str(url.database))
        admin.execute(may.format(name, sql.SQL("false")))
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [url.database])
        yield
        admin.execute(may.format(name, sql.SQL("true")))
