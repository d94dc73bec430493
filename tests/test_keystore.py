"""Key shares: what opens with them, what does not without, and that a destroyed one is in no file."""

from __future__ import annotations

import base64
import secrets
import threading
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import make_url, select, update
from sqlalchemy.orm import Session, sessionmaker
from vault_kit import NEW, OLD, on_disk, sharing

from app import db
from app.deployment_secrets import load_or_create
from app.errors import KeyDestroyed, NotReady, ShareMissing, VaultError, WrongMasterKey
from app.keystore import _SHARES, KeyStore
from app.settings import Settings
from app.tables import Secret
from app.vault import Vault, share_id

Sessions = sessionmaker[Session]
SECRET = b"Zebulon Quist"


def test_a_share_is_needed_and_its_destruction_is_final(keystore: KeyStore) -> None:
    vault = sharing(keystore)
    wrapped, other = vault.new_key(), vault.new_key()
    sealed = vault.seal(wrapped, SECRET, aad="a")
    assert (wrapped[0], len(wrapped)) == (2, 1 + 16 + 12 + 48)
    assert vault.open(wrapped, sealed, aad="a") == SECRET
    assert keystore.counts() == (2, 0)
    found = share_id(wrapped)
    assert found is not None and keystore.destroy([found]) == keystore.destroy([found]) == {found}
    assert keystore.counts() == (1, 1)
    for action in (lambda: vault.open(wrapped, sealed, aad="a"), lambda: vault.seal(wrapped, b"", aad="a")):
        with pytest.raises(KeyDestroyed, match="destroyed"):
            action()
    assert vault.open(other, vault.seal(other, SECRET, aad="a"), aad="a") == SECRET


def test_a_key_without_a_share_still_opens(keystore: KeyStore, vault: Vault) -> None:
    wrapped = vault.new_key()
    sealed = vault.seal(wrapped, SECRET, aad="a")
    assert wrapped[0] == 1 and share_id(wrapped) is None is share_id(None)
    assert sharing(keystore).open(wrapped, sealed, aad="a") == SECRET
    assert keystore.counts() == (0, 0)


@pytest.mark.parametrize("case", ["store", "none", "master", "share", "id", "tag", "short", "version"])
def test_what_must_not_open(tmp_path: Path, case: str) -> None:
    vault = sharing(keystore := KeyStore(f"sqlite:///{tmp_path / 'keystore.db'}"))
    wrapped = vault.new_key()
    sealed = vault.seal(wrapped, SECRET, aad="a")
    expected: type[VaultError] = WrongMasterKey
    match case:
        case "store":
            vault, expected = sharing(KeyStore(f"sqlite:///{tmp_path / 'other.db'}")), ShareMissing
        case "none":
            vault, expected = sharing(None), ShareMissing
        case "master":
            vault = sharing(keystore, NEW)
        case "share":
            with keystore._engine().begin() as connection:
                connection.execute(update(_SHARES).values(share=bytes(32)))
        case "id":  # somebody else's share, which is there
            other = share_id(vault.new_key())
            assert other is not None
            wrapped = wrapped[:1] + other + wrapped[17:]
        case "tag":
            wrapped = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
        case "short":
            wrapped, expected = wrapped[:-1], VaultError
        case "version":
            wrapped, expected = b"\x01" + wrapped[1:], VaultError
    with pytest.raises(expected) as caught:
        vault.open(wrapped, sealed, aad="a")
    for hidden in (SECRET.decode(), OLD.hex(), wrapped.hex(), base64.b64encode(OLD).decode()):
        assert hidden not in repr(caught.value)


def test_a_destroyed_share_is_in_no_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keystore.db'}"
    keystore, elsewhere = KeyStore(url), db.make_engine(url)
    vault = sharing(keystore)
    gone, kept = [[share_id(vault.new_key()) for _ in range(100)] for _ in range(2)]
    with elsewhere.connect() as connection:  # another process keeps a connection, and with it the log
        shares = dict(connection.execute(select(_SHARES.c.id, _SHARES.c.share)).all())
        connection.rollback()
        assert all(shares[found][:16] in on_disk(keystore) for found in [*gone, *kept])
        assert keystore.destroy(found for found in gone if found) == set(gone)
        data = on_disk(keystore)
        assert not any(shares[found][at : at + 16] in data for found in gone for at in (0, 16))
        assert all(shares[found] in data for found in kept)
        assert all(found in data for found in gone if found), "tombstones stay"
    elsewhere.dispose()
    assert (tmp_path / "keystore.db").stat().st_mode & 0o777 == 0o600


def test_a_reader_in_the_way_leaves_it_to_the_next_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keystore.db'}"
    keystore, reader = KeyStore(url), db.make_engine(url)
    found = share_id(sharing(keystore).new_key())
    assert found is not None
    with reader.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.execute(select(_SHARES.c.id)).all()
        assert keystore.destroy([found]) == set(), "the log still has it"
        connection.rollback()
        assert keystore.destroy([found]) == {found}
    reader.dispose()


def test_processes_that_start_together_make_one_table(keystore: KeyStore) -> None:
    stores = [KeyStore(keystore._url) for _ in range(6)]
    errors: list[BaseException] = []
    together = threading.Barrier(len(stores))

    def work(store: KeyStore) -> None:
        try:
            together.wait()
            sharing(store).new_key()
        except BaseException as error:
            errors.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and keystore.counts() == (6, 0)


def test_a_key_store_that_is_away_is_told_from_a_wrong_one() -> None:
    with pytest.raises(NotReady, match="cannot be reached") as caught:
        KeyStore("postgresql://letheon:hunter2@127.0.0.1:9/letheon_keys?connect_timeout=1").check()
    assert "hunter2" not in str(caught.value)


def test_where_it_is(tmp_path: Path) -> None:
    embedded = Settings(_env_file=None, home=tmp_path)
    assert make_url(embedded.effective_keystore_url).database == str(tmp_path.resolve() / "keystore.db")
    url = "postgresql://letheon@db/letheon"
    assert Settings(_env_file=None, DATABASE_URL=url).effective_keystore_url == ""
    keys = {"DATABASE_URL": url, "keystore_url": url + "_keys"}
    assert Settings(_env_file=None, **keys).effective_keystore_url == url + "_keys"
    assert Vault.from_settings(embedded).new_key()[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"master.key", "keystore.db"}


POSTGRES, SQLITE = "postgresql://letheon:pass@db/letheon", "sqlite:////srv/letheon/main.db"


@pytest.mark.parametrize(
    ("database", "keystore", "same"),
    [
        (POSTGRES, POSTGRES, True),
        (POSTGRES, "postgres://other@DB:5432/letheon", True),
        (POSTGRES, "postgresql+psycopg://db/letheon?sslmode=require", True),
        (POSTGRES, "postgresql://letheon@/letheon?host=db&port=5432", True),
        (POSTGRES, "postgresql://letheon@db", True),  # of the user's name
        ("postgresql://localhost/letheon", "postgresql://127.0.0.1:5432/letheon", True),
        ("postgresql:///letheon", "postgresql:///letheon?host=/run/postgresql", True),
        (POSTGRES, POSTGRES + "_keys", False),
        (POSTGRES, "postgresql://letheon@db:5433/letheon", False),
        (POSTGRES, "postgresql://letheon@keys/letheon", False),
        (SQLITE, "sqlite+pysqlite:////srv/./letheon/../letheon/main.db", True),
        (SQLITE, "sqlite:////srv/letheon/keys.db", False),
        (POSTGRES, SQLITE, False),
        ("", "sqlite:///{home}/link.db", True),
        ("", "sqlite:///{home}/keystore.db", False),
    ],
)
def test_one_database_cannot_be_both_however_it_is_spelt(
    database: str, keystore: str, same: bool, tmp_path: Path
) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "letheon.db")
    values = {"DATABASE_URL": database, "keystore_url": keystore.format(home=tmp_path)}
    if not same:
        assert Settings(_env_file=None, home=tmp_path, **values).effective_keystore_url == values["keystore_url"]
        return
    with pytest.raises(ValidationError, match="keystore_url must not be database_url"):
        Settings(_env_file=None, home=tmp_path, **values)


def test_digests_outlive_the_master_key(sessions: Sessions, keystore: KeyStore) -> None:
    old, never = sharing(keystore), Vault(OLD)
    with sessions.begin() as session:
        old.adopt(session)
    texts = ["x", "y z"]
    assert [old.digest(t) for t in texts] == [never.digest(t) for t in texts], "those that are there stay valid"
    new = sharing(keystore, NEW, OLD)
    with sessions.begin() as session:
        new.adopt(session)
        assert len(session.scalars(select(Secret.name)).all()) == 2
    for function in ("digest", "gate_digest"):
        assert [getattr(new, function)(t) for t in texts] == [getattr(old, function)(t) for t in texts]
        assert getattr(new, function)("x") != getattr(Vault(NEW), function)("x")
    assert new.tag("idempotency", b"x") == old.tag("idempotency", b"x") != old.tag("set", b"x")
    with pytest.raises(VaultError, match="sealed under another LETHEON_MASTER_KEY"), sessions.begin() as session:
        sharing(keystore, NEW).adopt(session)


def test_processes_that_start_together_get_the_first_ones_secret(sessions: Sessions, vault: Vault) -> None:
    got: list[bytes] = []
    together = threading.Barrier(4)

    def start() -> None:
        together.wait()
        with sessions.begin() as session:
            got.append(load_or_create(session, vault, "x", lambda: secrets.token_bytes(32)))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and len(set(got)) == 1


def test_settings_hold_previous_keys_and_a_bad_one_is_named(tmp_path: Path) -> None:
    both = {"master_key": SecretStr(base64.b64encode(NEW).decode())}
    old = Vault(OLD)
    wrapped = old.new_key()
    sealed = old.seal(wrapped, SECRET, aad="a")
    good = Settings(_env_file=None, home=tmp_path, **both, previous_master_keys=[base64.b64encode(OLD).decode()])
    vault = Vault.from_settings(good.model_copy(update={"database_url": "sqlite:///x"}))
    assert vault.open(wrapped, sealed, aad="a") == SECRET and vault.keystore is None
    with pytest.raises(VaultError, match="LETHEON_PREVIOUS_MASTER_KEYS"):
        Vault.from_settings(Settings(_env_file=None, home=tmp_path, **both, previous_master_keys=["x"]))
