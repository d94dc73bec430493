"""Envelope encryption: every secret is sealed under a data key of its own, and the master key wraps the data keys.

With a key store (``app.keystore``) a data key is wrapped under the master key and a random share together. Destroying
the share destroys what the key sealed, in every copy and backup of the database. Without one, destroying a wrapped key
reaches the copies only that do not hold it.

Wrapped, version 1: 01 ‖ nonce ‖ ciphertext. Version 2: 02 ‖ share id ‖ nonce ‖ ciphertext.
"""

from __future__ import annotations

import hmac
import os
import secrets
import unicodedata
import weakref
from collections.abc import Callable, Sequence
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import deployment_secrets, key_file
from app.errors import KeyDestroyed, ShareMissing, VaultError, WrongMasterKey
from app.key_file import KEY_BYTES
from app.keystore import ID_BYTES, SHARE_BYTES, KeyStore
from app.settings import Settings
from app.tables import ForgetDigest

__all__ = ["KEY_BYTES", "Vault", "letters", "normalise", "share_id"]

ANOTHER_KEY = "the database was sealed under another LETHEON_MASTER_KEY than this one"
DIGEST_SECRETS = ("digest", "gate-digest")
_NONCE_BYTES = 12
_VERSION = b"\x01"  # first byte of everything sealed, so that the scheme can change
_SHARED = b"\x02"
_WRAP_AAD = b"letheon data key"
_CIPHERTEXT_BYTES = KEY_BYTES + 16


class Vault:
    """Seals and opens bytes, and computes keyed digests. Holds the master keys; its repr does not show them."""

    def __init__(self, master_key: bytes, *, previous: Sequence[bytes] = (), keystore: KeyStore | None = None) -> None:
        """``previous`` keys open what they sealed; nothing new is wrapped under them.

        Raises VaultError unless every key has 32 bytes.
        """
        self._masters = list(dict.fromkeys([master_key, *previous]))
        if any(len(key) != KEY_BYTES for key in self._masters):
            raise VaultError(f"a master key must have {KEY_BYTES} bytes")
        self.keystore = keystore
        # One derived key per purpose: a weakness in one use must not reach the other.
        self._digest_key = _derive(master_key, b"letheon digest v1")
        self._gate_key = _derive(master_key, b"letheon gate digest v1")
        self._release: Callable[[], object] = lambda: None

    @classmethod
    def from_settings(cls, settings: Settings) -> Vault:
        """The configured master keys, or the key file under ``home``, made on first use. Raises VaultError."""
        previous = [
            key_file.decode(key.get_secret_value(), "LETHEON_PREVIOUS_MASTER_KEYS")
            for key in settings.previous_master_keys
        ]
        keystore = KeyStore(settings.effective_keystore_url) if settings.effective_keystore_url else None
        if settings.master_key is not None:
            key = key_file.decode(settings.master_key.get_secret_value(), "LETHEON_MASTER_KEY")
            return cls(key, previous=previous, keystore=keystore)
        key, former, descriptor = key_file.hold(settings.home)
        vault = cls(key, previous=[*former, *previous], keystore=keystore)
        vault._release = weakref.finalize(vault, os.close, descriptor)
        return vault

    def adopt(self, session: Session) -> None:
        """Take the digest keys from the database, so that digests outlive the master key; make them when it is new.

        Raises VaultError, also where digests are there that no adopted key made and it cannot be told which one did.
        """
        unclear = len(self._masters) > 1 and bool(deployment_secrets.missing(session, DIGEST_SECRETS))
        if unclear and session.scalar(select(ForgetDigest.digest).limit(1)) is not None:
            raise VaultError(
                "the digest keys are not in the database yet: start this version once with the former master key alone "
                "(no LETHEON_PREVIOUS_MASTER_KEYS), then rotate"
            )
        try:
            digest, gate = DIGEST_SECRETS
            self._digest_key, self._gate_key = (
                deployment_secrets.load_or_create(session, self, digest, lambda: self._digest_key),
                deployment_secrets.load_or_create(session, self, gate, lambda: self._gate_key),
            )
        except WrongMasterKey:
            raise VaultError(ANOTHER_KEY) from None

    def close(self) -> None:
        """Let go of the key store's connections and of the key file."""
        if self.keystore is not None:
            self.keystore.close()
        self._release()

    def new_key(self, name: bytes | None = None) -> bytes:
        """A fresh data key, wrapped. Its share is stored first: one that nothing uses in the end opens nothing.

        ``name``: the id of that share, where it is to be known before (``app.shredding.prepare_key``).
        """
        return self._wrap(AESGCM.generate_key(bit_length=256), *self._new_share(name))

    def seal(self, wrapped: bytes, plaintext: bytes, *, aad: str) -> bytes:
        """Encrypt under a wrapped key; ``aad`` says what it is and has to be the same to open it. Raises VaultError."""
        return _encrypt(AESGCM(self._unwrap(wrapped)[0]), plaintext, aad.encode())

    def open(self, wrapped: bytes | None, sealed: bytes, *, aad: str) -> bytes:
        """Raises VaultError: key or share destroyed, another master key or key store, ``aad``, or altered bytes."""
        if wrapped is None:
            raise KeyDestroyed("the key of this value was destroyed")
        return _decrypt(AESGCM(self._unwrap(wrapped)[0]), sealed, aad.encode())

    def rewrap(self, wrapped: bytes) -> bytes | None:
        """The same data key under the current master key, with the same share; None where it is so already.

        One without a share gets one where there is a key store. Raises VaultError.
        """
        key, master = self._unwrap(wrapped)
        if master == self._masters[0] and (self.keystore is None or share_id(wrapped) is not None):
            return None
        found = share_id(wrapped)
        return self._wrap(key, *(self._new_share() if found is None else (found, self._share(found))))

    def wrapped_under(self, wrapped: bytes) -> str:
        """The id of the master key that opens this wrapped key. Raises VaultError."""
        return _key_id(self._unwrap(wrapped)[1])

    @property
    def key_id(self) -> str:
        """Names the current master key and says nothing else of it."""
        return _key_id(self._masters[0])

    @property
    def key_ids(self) -> list[str]:
        """The same of all keys, the current one first."""
        return [_key_id(key) for key in self._masters]

    def split(self, stored: bytes) -> tuple[bytes, bytes]:
        """A wrapped key and what stands behind it, where both are kept as one value."""
        head = 1 + (ID_BYTES if stored[:1] == _SHARED else 0) + _NONCE_BYTES + _CIPHERTEXT_BYTES
        return stored[:head], stored[head:]

    def digest(self, text: str) -> bytes:
        """HMAC-SHA256 of the normalised text: equal texts match, but nobody without the key can test one."""
        return hmac.digest(self._digest_key, normalise(text).encode("utf-8", "surrogatepass"), sha256)

    def gate_digest(self, text: str) -> bytes:
        """The same of what ``letters`` keeps: repeats that differ in punctuation and spacing match too."""
        return hmac.digest(self._gate_key, letters(text).encode("utf-8", "surrogatepass"), sha256)

    def tag(self, purpose: str, data: bytes) -> bytes:
        """HMAC-SHA256 of ``data`` under a key of this purpose alone; outlives the master key as digests do."""
        return hmac.digest(self.key_for(purpose), data, sha256)

    def key_for(self, purpose: str) -> bytes:
        """The key of ``tag``, for whoever tags many values and must not know the vault."""
        return _derive(self._digest_key, b"letheon tag v1 " + purpose.encode())

    def _new_share(self, name: bytes | None = None) -> tuple[bytes | None, bytes | None]:
        """The id of a share, and the share, which is stored; neither without a key store."""
        if self.keystore is None:
            return None, None
        name, share = name or secrets.token_bytes(ID_BYTES), secrets.token_bytes(SHARE_BYTES)
        self.keystore.add(name, share)
        return name, share

    def _wrap(self, key: bytes, name: bytes | None, share: bytes | None) -> bytes:
        """Under the current master key, and the share of this id."""
        prefix = _VERSION if name is None else _SHARED + name
        return _encrypt(_wrapping_key(self._masters[0], share), key, _wrap_aad(prefix), prefix)

    def _unwrap(self, wrapped: bytes) -> tuple[bytes, bytes]:
        """The data key, and the master key that it was wrapped under."""
        found = share_id(wrapped)
        prefix = _VERSION if found is None else _SHARED + found
        if wrapped[: len(prefix)] != prefix or len(wrapped) != len(prefix) + _NONCE_BYTES + _CIPHERTEXT_BYTES:
            raise VaultError("not a wrapped key of this version")
        share = None if found is None else self._share(found)
        for master in self._masters:
            try:
                return _decrypt(_wrapping_key(master, share), wrapped, _wrap_aad(prefix), prefix), master
            except VaultError:
                continue
        raise WrongMasterKey("the sealed value does not open: wrong master key, altered key share or altered data")

    def _share(self, share_id: bytes) -> bytes:
        if self.keystore is None:
            raise ShareMissing(
                "this was sealed with a key share, and no key store is configured: set LETHEON_KEYSTORE_URL"
            )
        known, share = self.keystore.read(share_id)
        if not known:
            raise ShareMissing(
                "the key store does not know the share of this key: LETHEON_KEYSTORE_URL names another key store than "
                "the database was used with, or that was lost (docs/keys-and-backups.md)"
            )
        if share is None:
            raise KeyDestroyed("the key share of this value was destroyed")
        return share


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


def share_id(wrapped: bytes | None) -> bytes | None:
    """The id of the key share that this wrapped key needs; None where it needs none."""
    if wrapped is None or wrapped[:1] != _SHARED:
        return None
    return wrapped[1 : 1 + ID_BYTES]


def _derive(master_key: bytes, info: bytes, salt: bytes | None = None) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(master_key)


def _wrapping_key(master_key: bytes, share: bytes | None) -> AESGCM:
    if share is None:
        return AESGCM(_derive(master_key, b"letheon wrap v1"))
    return AESGCM(_derive(master_key, b"letheon wrap v2", share))


def _encrypt(key: AESGCM, plaintext: bytes, aad: bytes, prefix: bytes = _VERSION) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)  # random nonces are safe: a data key seals few values
    return prefix + nonce + key.encrypt(nonce, plaintext, aad)


def _decrypt(key: AESGCM, sealed: bytes, aad: bytes, prefix: bytes = _VERSION) -> bytes:
    body = len(prefix)
    if len(sealed) < body + _NONCE_BYTES + 16 or sealed[:body] != prefix:
        raise VaultError("not a sealed value of this version")
    nonce, ciphertext = sealed[body : body + _NONCE_BYTES], sealed[body + _NONCE_BYTES :]
    try:
        return key.decrypt(nonce, ciphertext, aad)
    except InvalidTag:
        raise VaultError("the sealed value does not open: altered data, or not what it is said to be") from None


def _wrap_aad(prefix: bytes) -> bytes:
    return _WRAP_AAD if prefix == _VERSION else _WRAP_AAD + prefix


def _key_id(master_key: bytes) -> str:
    return _derive(master_key, b"letheon key id v1")[:4].hex()
