"""Ed25519 signatures over canonical JSON. Each kind of statement has a purpose: none can pass for another."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.errors import InvalidInput

KEY_ID_DIGITS = 32
_KEY = re.compile("[0-9a-f]{64}")
_SIGNATURE = re.compile("[0-9a-f]{128}")


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted names, no spaces, ASCII. Raises ValueError for what is no JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


class PublicKey:
    """What everybody may know, and what a signature is checked with."""

    def __init__(self, raw: bytes) -> None:
        """Raises InvalidInput unless these are 32 bytes."""
        if len(raw) != 32:
            raise InvalidInput("a public key has 32 bytes, written as 64 hex digits", field="public_key")
        self.raw = raw
        self.key_id = hashlib.sha256(raw).hexdigest()[:KEY_ID_DIGITS]
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    @classmethod
    def from_hex(cls, text: str) -> PublicKey:
        """Raises InvalidInput."""
        # Strict: bytes.fromhex takes spaces and capitals too, and then two spellings would be the same key.
        return cls(bytes.fromhex(text) if _KEY.fullmatch(text) else b"")

    def hex(self) -> str:
        return self.raw.hex()

    def verifies(self, purpose: str, statement: Any, signature: str) -> bool:
        """Whether ``signature`` (hex) is one of this statement, made for this purpose."""
        if not _SIGNATURE.fullmatch(signature):
            return False
        try:
            self._key.verify(bytes.fromhex(signature), _message(purpose, statement))
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.key_id})"


class Signer:
    """The deployment's private key. Its repr names the public one only."""

    def __init__(self, raw: bytes) -> None:
        """``raw``: of ``new_private_key``."""
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        self.public = PublicKey(self._key.public_key().public_bytes_raw())

    def sign(self, purpose: str, statement: Any) -> str:
        """The signature in hex; the same statement always gets the same one."""
        return self._key.sign(_message(purpose, statement)).hex()

    def __repr__(self) -> str:
        return f"Signer({self.public.key_id})"


def new_private_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes_raw()


def _message(purpose: str, statement: Any) -> bytes:
    return purpose.encode() + b"\0" + canonical(statement)
