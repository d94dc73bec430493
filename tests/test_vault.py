from __future__ import annotations

import base64
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.errors import VaultError
from app.settings import Settings
from app.vault import Vault, letters, normalise

SECRET = b"Zebulon Quist"


def test_seal_and_open(vault: Vault) -> None:
    wrapped = vault.new_key()
    sealed = vault.seal(wrapped, SECRET, aad="a")
    assert SECRET not in sealed
    assert vault.open(wrapped, sealed, aad="a") == SECRET
    assert vault.seal(wrapped, SECRET, aad="a") != sealed
    assert vault.open(wrapped, vault.seal(wrapped, b"", aad=""), aad="") == b""


def test_every_altered_byte_is_noticed(vault: Vault) -> None:
    wrapped = vault.new_key()
    sealed = vault.seal(wrapped, b"x", aad="a")
    for index in range(len(sealed)):
        altered = bytearray(sealed)
        altered[index] ^= 1
        with pytest.raises(VaultError):
            vault.open(wrapped, bytes(altered), aad="a")


@pytest.mark.parametrize("case", ["aad", "key", "wrapped", "destroyed", "master", "short"])
def test_what_must_not_open(vault: Vault, case: str) -> None:
    wrapped = vault.new_key()
    sealed = vault.seal(wrapped, SECRET, aad="a")
    with pytest.raises(VaultError) as caught:
        match case:
            case "aad":
                vault.open(wrapped, sealed, aad="b")
            case "key":
                vault.open(vault.new_key(), sealed, aad="a")
            case "wrapped":
                vault.open(wrapped[:-1] + bytes([wrapped[-1] ^ 1]), sealed, aad="a")
            case "destroyed":
                vault.open(None, sealed, aad="a")
            case "master":
                Vault(bytes(32)).open(wrapped, sealed, aad="a")
            case "short":
                vault.open(wrapped, b"", aad="a")
    assert "Zebulon" not in repr(caught.value)


def test_digest_is_keyed_and_normalised(vault: Vault) -> None:
    assert vault.digest("Zebulon  Quist\n") == vault.digest(" zebulon quist")
    assert vault.digest("Zebulon Quist") != vault.digest("Zebulon Quist.")
    assert vault.digest("Zebulon Quist") != Vault(bytes(32)).digest("Zebulon Quist")
    assert len(vault.digest("")) == 32
    assert vault.digest("\ud800")  # a lone surrogate, as JSON can carry one, is no crash


def test_normalise() -> None:
    assert normalise("  Straße\u00a0\t\uff26ilm\n") == "strasse film"


@given(st.text())
def test_normalise_is_idempotent_and_ignores_case_and_space(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f"  {text}\n") == once


def test_gate_digest_ignores_punctuation_and_spaces(vault: Vault) -> None:
    known = vault.gate_digest("Zebulon Quist's 2nd film")
    for variant in ("zebulon quists 2nd film!", "  ZEBULON-QUIST’S ‘2nd’\tfilm…", "ｚｅｂｕｌｏｎ quists 2ⁿᵈ film"):
        assert vault.gate_digest(variant) == known, variant
    for other in ("Zebulon Quist's 3rd film", "Zebulon Quist's 2nd films", ""):
        assert vault.gate_digest(other) != known
    assert known not in (vault.digest("Zebulon Quist's 2nd film"), vault.digest("zebulonquists2ndfilm"))
    assert known != Vault(bytes(32)).gate_digest("Zebulon Quist's 2nd film")
    assert vault.gate_digest("?!") != vault.gate_digest("!?")  # else every text without a letter would be the same one
    assert vault.gate_digest("\ud800")
    for a, b in (("good 👍", "good 👎"), ("यह कि", "यह का"), ("in C++", "in C#")):
        assert vault.gate_digest(a) != vault.gate_digest(b), "symbols and vowel signs tell texts apart"
    assert vault.gate_digest("`` good '' -- really ^^") == vault.gate_digest('"good" really')


@given(st.text())
def test_letters_is_idempotent_and_never_empties_a_text(text: str) -> None:
    once = letters(text)
    assert letters(once) == once == letters(f" {text.casefold()}\n")
    assert bool(once) == bool(normalise(text))


def test_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    first = Vault.from_settings(settings)
    path = settings.home / "master.key"
    content = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in settings.home.iterdir()] == ["master.key"]
    wrapped = first.new_key()
    sealed = first.seal(wrapped, SECRET, aad="a")
    assert Vault.from_settings(settings).open(wrapped, sealed, aad="a") == SECRET
    assert path.read_bytes() == content


def _digest_of_new_vault(home: Path) -> bytes:
    return Vault.from_settings(Settings(home=home)).digest("x")


def test_processes_that_start_together_share_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        digests = pool.map(_digest_of_new_vault, [tmp_path / "home"] * 6)
        pool.close()
        pool.join()
    assert len(set(digests)) == 1


def test_configured_master_key(tmp_path: Path) -> None:
    key = base64.b64encode(bytes(range(32))).decode()
    settings = Settings(home=tmp_path, master_key=SecretStr(key))
    assert Vault.from_settings(settings).digest("x") == Vault(bytes(range(32))).digest("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "no base64!", base64.b64encode(b"short").decode(), "é"])
def test_bad_keys_are_refused_without_being_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(VaultError) as caught:
        Vault.from_settings(Settings(home=tmp_path, master_key=SecretStr(key)))
    assert "LETHEON_MASTER_KEY" in caught.value.detail
    assert not key or key not in caught.value.detail
    (tmp_path / "master.key").write_text(key)
    with pytest.raises(VaultError, match=r"master\.key"):
        Vault.from_settings(Settings(home=tmp_path))
