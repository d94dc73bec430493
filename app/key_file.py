"""The embedded default's master key: a file under ``home``, made once, and swapped for another without a gap.

Whoever has read the file holds it (a shared lock) while it runs. A swap needs it alone, so no process can go on
wrapping keys under a master key that is about to go. During a rotation ``master.key.previous`` holds the former key.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import os
import secrets
from pathlib import Path

from app.errors import Conflict, VaultError

KEY_BYTES = 32
NAME = "master.key"
FORMER = "master.key.previous"


def new_key() -> str:
    """A fresh master key, as settings and the file have it."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def decode(value: str, where: str) -> bytes:
    """Raises VaultError, which names ``where`` and shows nothing of the value."""
    try:
        key = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise VaultError(f"{where} is not base64 of {KEY_BYTES} bytes")
    return key


def hold(home: Path) -> tuple[bytes, list[bytes], int]:
    """The key, made when there is none; former ones; and the descriptor that holds the file. Raises VaultError."""
    path = home / NAME
    if not path.exists():
        _put(path, new_key().encode() + b"\n")
    descriptor = _lock(path, fcntl.LOCK_SH)
    try:
        key = decode(_text(path), f"the key file {NAME}")
        former = home / FORMER
        previous = [decode(_text(former), f"the key file {FORMER}")] if former.exists() else []
    except BaseException:
        os.close(descriptor)
        raise
    return key, [other for other in previous if other != key], descriptor


def swap(home: Path) -> bool:
    """Put a new key in the file's place; the former stays beside it until ``forget``. False: that was done before.

    Whatever moment it is cut off at, the next call goes on from there. Raises Conflict while a process holds the key.
    """
    path, former = home / NAME, home / FORMER
    if not path.exists():
        raise Conflict(f"there is no key file {NAME} yet: nothing to rotate")
    try:
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"a running process uses {NAME}: stop `letheon serve` and its worker first") from None
    try:
        decode(_text(path), f"the key file {NAME}")
        if former.exists() and former.read_bytes() != path.read_bytes():
            return False
        _put(former, path.read_bytes())
        os.replace(_temporary(path, new_key().encode() + b"\n"), path)
        _sync(home)
    finally:
        os.close(descriptor)
    return True


def forget(home: Path) -> bool:
    """Remove the former key; whether there was one."""
    former = home / FORMER
    if not former.exists():
        return False
    former.unlink()
    _sync(home)
    return True


def _lock(path: Path, how: int) -> int:
    """A descriptor of the file that has this name once it is locked. Raises BlockingIOError."""
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, how)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # swapped meanwhile


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace")


def _temporary(path: Path, content: bytes) -> Path:
    """A private file beside ``path`` with this content, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _put(path: Path, content: bytes) -> None:
    """Link a complete file into place: complete or absent, and never replaced."""
    temporary = _temporary(path, content)
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # another process was first; its key is the key
        _sync(path.parent)
    finally:
        temporary.unlink()


def _sync(folder: Path) -> None:
    """Losing the key in a power cut would lose everything sealed under it."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
