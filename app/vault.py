"""Envelope encryption: every secret is sealed under a data key of its own, and the master key wraps the data keys.

Destroying a wrapped data key destroys what it sealed, in every copy and backup that does not hold that key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import unicodedata
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from app.errors import VaultError
from app.settings import Settings

KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"  # first byte of everything sealed, so that the scheme can change
_WRAP_AAD = b"letheon data key"


class Vault:
    """Seals and opens bytes, and computes keyed digests. Holds the master key; its repr does not show it."""

    def __init__(self, master_key: bytes) -> None:
        """Raises VaultError unless the key has 32 bytes."""
        if len(master_key) != KEY_BYTES:
            raise VaultError(f"the master key must have {KEY_BYTES} bytes")
        # One derived key per purpose: a weakness in one use must not reach the other.
        self._wrapping = AESGCM(_derive(master_key, b"letheon wrap v1"))
        self._digest_key = _derive(master_key, b"letheon digest v1")
        self._gate_key = _derive(master_key, b"letheon gate digest v1")
        self._tag_key = _derive(master_key, b"letheon tag v1")

    @classmethod
    def from_settings(cls, settings: Settings) -> Vault:
        """The configured master key, or the key file under ``home``, made on first use. Raises VaultError."""
        if settings.master_key is not None:
            return cls(_decode(settings.master_key.get_secret_value(), "LETHEON_MASTER_KEY"))
        path = settings.home / "master.key"
        if not path.exists():
            _create_key_file(path)
        return cls(_decode(path.read_text(encoding="ascii", errors="replace"), "the key file master.key"))

    def new_key(self) -> bytes:
        """A fresh data key, wrapped."""
        return _encrypt(self._wrapping, AESGCM.generate_key(bit_length=256), _WRAP_AAD)

    def seal(self, wrapped: bytes, plaintext: bytes, *, aad: str) -> bytes:
        """Encrypt under a wrapped key; ``aad`` says what it is and has to be the same to open it. Raises VaultError."""
        return _encrypt(self._unwrap(wrapped), plaintext, aad.encode())

    def open(self, wrapped: bytes | None, sealed: bytes, *, aad: str) -> bytes:
        """Raises VaultError: key destroyed, another master key, another ``aad``, or altered bytes."""
        if wrapped is None:
            raise VaultError("the key of this value was destroyed")
        return _decrypt(self._unwrap(wrapped), sealed, aad.encode())

    def digest(self, text: str) -> bytes:
        """HMAC-SHA256 of the normalised text: equal texts match, but nobody without the master key can test one."""
        return hmac.digest(self._digest_key, normalise(text).encode("utf-8", "surrogatepass"), sha256)

    def gate_digest(self, text: str) -> bytes:
        """The same of what ``letters`` keeps: repeats that differ in punctuation and spacing match too."""
        return hmac.digest(self._gate_key, letters(text).encode("utf-8", "surrogatepass"), sha256)

    def tag(self, purpose: str, data: bytes) -> bytes:
        """HMAC-SHA256 of bytes that are the same or not, such as a whole body; those of two purposes never match."""
        return hmac.digest(self._tag_key, purpose.encode() + b"\0" + data, sha256)

    def _unwrap(self, wrapped: bytes) -> AESGCM:
        return AESGCM(_decrypt(self._wrapping, wrapped, _WRAP_AAD))


def normalise(text: str) -> str:
    """What counts as the same text: NFKC, case and whitespace folded (Unicode's NFKC_Casefold, plus whitespace)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(unicodedata.normalize("NFKC", folded.casefold()).split())


def letters(text: str) -> str:
    """The normalised text without punctuation and spaces; the normalised text itself where nothing else is in it.

    Marks stay, which in many scripts are the vowels, and so do symbols: an emoji can be all that tells two texts apart.
    """
    folded = normalise(text)
    kept = "".join(c for c in folded if unicodedata.category(c)[0] in "LMNS" and unicodedata.category(c) != "Sk")
    return normalise(kept) or folded  # once more, for what only composes now that nothing stands between


def _derive(master_key: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(master_key)


def _encrypt(key: AESGCM, plaintext: bytes, aad: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)  # random nonces are safe: a data key seals few values
    return _VERSION + nonce + key.encrypt(nonce, plaintext, aad)


def _decrypt(key: AESGCM, sealed: bytes, aad: bytes) -> bytes:
    body = len(_VERSION)
    if len(sealed) < body + _NONCE_BYTES + 16 or sealed[:body] != _VERSION:
        raise VaultError("not a sealed value of this version")
    nonce, ciphertext = sealed[body : body + _NONCE_BYTES], sealed[body + _NONCE_BYTES :]
    try:
        return key.decrypt(nonce, ciphertext, aad)
    except InvalidTag:
        raise VaultError("the sealed value does not open: wrong master key, or altered data") from None


def _decode(value: str, where: str) -> bytes:
    try:
        key = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise VaultError(f"{where} is not base64 of {KEY_BYTES} bytes")
    return key


def _create_key_file(path: Path) -> None:
    """Write a key to a private temporary file, then link it into place: complete or absent, and never replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # another process was first; its key is the key
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # losing the key in a power cut would lose everything sealed under it
        finally:
            os.close(directory)
    finally:
        temporary.unlink()
