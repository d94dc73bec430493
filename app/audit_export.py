"""An exported audit log, one JSON object a line, and its verification without a database or a server.

Entries, oldest first; then every signed checkpoint, the last one of the last entry; then the head, a signed line that
covers the bytes of all lines before it. What this shows of one file is that nothing in it was altered since it was
signed. That the log itself was not rewritten before that shows against an older export or checkpoint, kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain as concatenated
from itertools import islice
from typing import Any

from app.audit_chain import AuditBroken, Chain, check_checkpoint
from app.errors import InvalidInput
from app.signing import PublicKey, Signer, canonical

HEAD = "letheon audit export v1"  # the signature's purpose
VERSION = 1
Line = str | bytes

_ENTRY: dict[str, type] = {
    **dict.fromkeys(("kind", "at", "actor", "action", "subject", "prev_hash", "hash"), str),
    "seq": int,
    "detail": dict,
}
_CHECKPOINT: dict[str, type] = {
    **dict.fromkeys(("kind", "at", "hash", "key_id", "public_key", "signature"), str),
    "seq": int,
}
_HEAD: dict[str, type] = {**_CHECKPOINT, "digest": str, "checkpoints": int, "version": int}
_LONGEST_CHECKPOINT = 50  # lines of one that was printed prettily


@dataclass(frozen=True)
class Verified:
    """What holds: ``entries`` of an unbroken chain that ends in ``hash``, said at ``at`` by the holder of the key."""

    entries: int
    checkpoints: int
    hash: str
    at: str
    public_key: PublicKey


def to_lines(documents: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(canonical(document) + b"\n" for document in documents)


def head_line(signer: Signer, *, seq: int, hash: str, at: str, checkpoints: int, digest: str) -> bytes:
    """The last line; ``digest``: SHA-256 of all bytes before it."""
    statement = {
        "at": at,
        "checkpoints": checkpoints,
        "digest": digest,
        "hash": hash,
        "key_id": signer.public.key_id,
        "kind": "head",
        "public_key": signer.public.hex(),
        "seq": seq,
        "version": VERSION,
    }
    return to_lines([{**statement, "signature": signer.sign(HEAD, statement)}])


def verify_lines(
    lines: Iterable[Line], public_key: PublicKey | None = None, against: Iterable[Line] | None = None
) -> Verified:
    """Chain, checkpoints and signatures of an export; then that what ``against`` knows is still its beginning.

    ``against``: the lines of an older export, or one checkpoint. Without ``public_key`` the key is the file's own,
    which proves nothing by itself: whoever rewrites a log can sign it with a key of their own. Raises AuditBroken.
    """
    found, hashes = _read(lines, public_key)
    if against is not None:
        _check_begins_with(found, hashes, against)
    return found


def _read(lines: Iterable[Line], public_key: PublicKey | None) -> tuple[Verified, bytearray]:
    """Also the hashes of all entries, 32 bytes each: all that is kept of the file."""
    chain, hashes, digest = Chain(), bytearray(), hashlib.sha256()
    checkpoints = last = 0
    head: dict[str, Any] | None = None
    for line in lines:
        if head is not None:
            raise AuditBroken("something follows the last line of the export", seq=chain.seq + 1)
        raw, document = _parse(line, after=chain.seq)
        if document["kind"] == "entry" and not checkpoints:
            chain.add(document)
            hashes += bytes.fromhex(chain.head)
        elif document["kind"] == "checkpoint":
            public_key = _signer_of(document, public_key)
            _check_on_chain(document, public_key, hashes, after=last)
            checkpoints, last = checkpoints + 1, document["seq"]
        elif document["kind"] == "head":
            public_key, head = _signer_of(document, public_key), document
            continue
        else:
            raise AuditBroken(f"an entry is out of order behind entry {chain.seq}", seq=chain.seq + 1)
        digest.update(raw + b"\n")
    if head is None or public_key is None:
        seq = chain.seq + 1
        raise AuditBroken(f"the export ends behind entry {chain.seq} without its last line: it was cut", seq=seq)
    statement = {name: value for name, value in head.items() if name != "signature"}
    if not public_key.verifies(HEAD, statement, head["signature"]):
        raise AuditBroken("the last line of the export was altered: its signature does not hold", seq=chain.seq + 1)
    if head["version"] != VERSION:
        raise AuditBroken(f"the export is of version {head['version']}, and this verifies {VERSION}", seq=chain.seq + 1)
    if (head["seq"], head["hash"], last) != (chain.seq, chain.head, chain.seq):
        seq = min(chain.seq, head["seq"]) + 1
        raise AuditBroken(f"the export was signed with {head['seq']} entries and has {chain.seq}", seq=seq)
    if (head["checkpoints"], head["digest"]) != (checkpoints, digest.hexdigest()):
        raise AuditBroken("checkpoints of the export were altered or removed", seq=chain.seq)
    return Verified(chain.seq, checkpoints, chain.head, head["at"], public_key), hashes


def _check_begins_with(found: Verified, hashes: bytearray, against: Iterable[Line]) -> None:
    """Raises AuditBroken, which names the first entry that is another one or missing, as far as ``against`` tells."""
    lines = iter(against)
    first = next(lines, "")
    checkpoint = _one_checkpoint(first, lines)
    if checkpoint is not None:
        _check_on_chain(checkpoint, _signer_of(checkpoint, found.public_key), hashes, after=0)
        return
    try:
        older, known = _read(concatenated([first], lines), found.public_key)
    except AuditBroken as error:
        raise AuditBroken(f"the older export: {error.detail}", **error.extra) from None
    if not hashes.startswith(known):
        entries = range(min(found.entries, older.entries))
        differs = (i for i in entries if hashes[32 * i : 32 * i + 32] != known[32 * i : 32 * i + 32])
        seq = next(differs, found.entries) + 1
        what = "is missing" if seq > found.entries else "was rewritten"
        raise AuditBroken(f"audit entry {seq} {what}: the older export has it", seq=seq)


def _one_checkpoint(first: Line, lines: Iterable[Line]) -> dict[str, Any] | None:
    """The checkpoint that ``against`` is; None, with ``lines`` untouched, where it begins as an export does."""
    with suppress(AuditBroken):  # the first line of one that was printed prettily
        if _parse(first, after=0)[1]["kind"] == "entry":
            return None
    found: Any = None
    text = b"".join(_bytes(line) for line in concatenated([first], islice(lines, _LONGEST_CHECKPOINT)))
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if not isinstance(found, dict) or found.get("kind") != "checkpoint" or not _fits(found, _CHECKPOINT):
        raise InvalidInput("what is compared with is neither an export of the audit log nor a checkpoint")
    return found


def _check_on_chain(checkpoint: Mapping[str, Any], public_key: PublicKey, hashes: bytearray, *, after: int) -> None:
    seq, entries = checkpoint["seq"], len(hashes) // 32
    if seq <= after:
        raise AuditBroken(f"the checkpoint of entry {seq} is out of order", seq=max(1, seq))
    if seq > entries:
        raise AuditBroken(f"audit entry {entries + 1} is missing: a checkpoint has {seq} entries", seq=entries + 1)
    check_checkpoint(checkpoint, public_key, hashes[32 * (seq - 1) : 32 * seq].hex())


def _signer_of(document: Mapping[str, Any], public_key: PublicKey | None) -> PublicKey:
    """The key that is expected, or else the document's own. Raises AuditBroken."""
    try:
        own = PublicKey.from_hex(document["public_key"])
    except InvalidInput:
        own = None
    if own is None or own.key_id != document["key_id"] or public_key not in (None, own):
        raise AuditBroken(f"line of entry {document['seq']}: signed by another key", seq=max(1, document["seq"]))
    return own


def _parse(line: Line, *, after: int) -> tuple[bytes, dict[str, Any]]:
    """A line without its end, and what it says. Raises AuditBroken unless it is spelt as an export spells it."""
    raw = _bytes(line).removesuffix(b"\n")
    try:
        document = json.loads(raw)
        shape = {"entry": _ENTRY, "checkpoint": _CHECKPOINT, "head": _HEAD}.get(document["kind"])
        good = shape is not None and _fits(document, shape) and canonical(document) == raw
    except (ValueError, TypeError, LookupError, RecursionError):
        good = False
    if not good:
        raise AuditBroken(f"the line behind entry {after} is not one of an audit export", seq=after + 1)
    return raw, document


def _fits(document: Mapping[str, Any], shape: Mapping[str, type]) -> bool:
    return set(document) == set(shape) and all(type(document[name]) is kind for name, kind in shape.items())


def _bytes(line: Line) -> bytes:
    return line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
