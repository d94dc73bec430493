"""The deployment's key: made once, sealed, and good for one purpose at a time."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from app import deployment_secrets
from app.deployment_secrets import find, load_or_create
from app.errors import InvalidInput, VaultError
from app.signing import PublicKey, Signer, canonical, new_private_key
from app.signing_key import find_public_key, load_signer
from app.tables import AuditEntry, Secret
from app.vault import Vault

Sessions = sessionmaker[Session]


def test_the_key_is_made_once_and_the_log_names_it(sessions: Sessions, vault: Vault) -> None:
    with sessions() as session:
        assert find_public_key(session, vault) is None
    keys = set()
    for _ in range(2):
        with sessions.begin() as session:
            keys.add(load_signer(session, vault).public)
    with sessions() as session:
        assert {find_public_key(session, vault)} == keys
        [entry] = session.scalars(select(AuditEntry).where(AuditEntry.action == "signing_key.created"))
        assert {PublicKey.from_hex(entry.detail["public_key"])} == keys


def test_two_processes_that_start_at_once_have_one_key(sessions: Sessions, vault: Vault) -> None:
    found: list[PublicKey] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        with sessions.begin() as session:
            found.append(load_signer(session, vault).public)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    with sessions() as session:
        assert len(list(session.scalars(select(AuditEntry)))) == 1


def test_what_is_stored_is_sealed_and_is_never_replaced(sessions: Sessions, vault: Vault) -> None:
    secret = b"thirty-two bytes that are secret"
    with sessions.begin() as session:
        assert load_or_create(session, vault, "other", lambda: secret) == secret
        assert load_or_create(session, vault, "other", lambda: b"another") == secret
        assert not deployment_secrets.add(session, vault, "other", b"another")
        packed = session.scalars(select(Secret.wrapped)).one()
    assert secret not in packed
    with sessions() as session, pytest.raises(VaultError):
        load_or_create(session, Vault(bytes(32)), "other", lambda: secret)
    with sessions.begin() as session:
        session.execute(update(Secret).values(name="signing"))  # one secret must not pass for another
        with pytest.raises(VaultError):
            find(session, vault, "signing")
    for altered in (b"", packed[:1], packed[:40], packed[:-1], packed[:-1] + b"\0\0"):
        with sessions.begin() as session:
            session.execute(update(Secret).values(name="other", wrapped=altered))
        with sessions() as session, pytest.raises(VaultError):
            load_or_create(session, vault, "other", lambda: secret)


def test_a_signature_is_of_one_statement_and_one_purpose() -> None:
    raw = new_private_key()
    signer = Signer(raw)
    signature = signer.sign("a", {"seq": 1})
    assert signature == Signer(raw).sign("a", {"seq": 1})
    assert signer.public.verifies("a", {"seq": 1}, signature)
    assert not signer.public.verifies("b", {"seq": 1}, signature)
    assert not signer.public.verifies("a", {"seq": 2}, signature)
    assert not Signer(new_private_key()).public.verifies("a", {"seq": 1}, signature)
    for spelt in (signature.upper(), signature + " ", signature[:-1], "", "0x" + signature[2:]):
        assert not signer.public.verifies("a", {"seq": 1}, spelt)


def test_keys_are_spelt_one_way_and_the_private_one_is_not_shown() -> None:
    raw = new_private_key()
    signer = Signer(raw)
    text = signer.public.hex()
    assert PublicKey.from_hex(text) == signer.public and len(signer.public.key_id) == 32
    for wrong in (text.upper() if text.upper() != text else "", text[:-1], text + "0", f" {text}", "", "é" * 64):
        with pytest.raises(InvalidInput):
            PublicKey.from_hex(wrong)
    shown = repr(signer) + str(signer) + repr(signer.public) + str(vars(signer))
    assert raw.hex() not in shown and repr(raw) not in shown


def test_canonical_json_has_one_spelling() -> None:
    assert canonical({"b": [1.5, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1.5,null]}'
    with pytest.raises(ValueError, match="float"):
        canonical({"a": float("nan")})
