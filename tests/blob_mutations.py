"""Seeded damage to safetensors bytes: what a hostile or broken database might hand out as a prompt or a gate."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

DTYPES = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F4", "F6_E2M3", "F8_E4M3", "F8_E8M0", "", "f32", None, 7]
SHAPES: list[Any] = [
    [2**62, 4],
    [2**40, 2**40],
    [2**63, 2],
    [2**32, 0],
    [0, 2**62],
    [0, 0],
    [0],
    [],
    [-1, 4],
    [1.5, 2],
    [True, 1],
    [[2], 2],
    "2,2",
    None,
    [1] * 70,
    [1] * 5000,
    [10**30, 1],
]
OFFSETS: list[Any] = [[0, 0], [8, 0], [-4, 4], [0, 2**62], [2**62, 2**62 + 4], [0], None, [0.5, 4], "0", [1, 5]]
METADATA: list[Any] = [None, {}, [], "x", {"fingerprint": None}, {"fingerprint": 7}, {"fingerprint": ["a"]}, {"a": {}}]
NUMBERS = [float("nan"), float("inf"), float("-inf")]


class Bomb:
    """Unpickled, it makes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (Path.mkdir, (self.folder,))


def mutations(good: bytes, count: int, *, seed: int, marker: Path) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged versions of ``good`` and the name of what was done; none of them equals it.

    ``marker`` is a folder that is there afterwards if one of them was unpickled.
    """
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, bytes], bytes]] = [
        _flip, _flip, _flip_header, _truncate, _append, _splice, _noise, _size, _not_finite, _raw_header,
        _dtype, _shape, _offsets, _metadata, _extra, _rename, _drop, _duplicate, _other_format,
    ]  # fmt: skip
    foreign = _foreign(marker)
    made = 0
    while made < count:
        kind = kinds[made % len(kinds)]
        bad = rng.choice(foreign) if kind is _other_format else kind(rng, good)
        if bad != good:
            made += 1
            yield kind.__name__.strip("_"), bad


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def whole(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _flip(rng: random.Random, good: bytes) -> bytes:
    bad = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 8))):
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def _flip_header(rng: random.Random, good: bytes) -> bytes:
    bad = bytearray(good)
    bad[rng.randrange(8 + int.from_bytes(good[:8], "little"))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def _truncate(rng: random.Random, good: bytes) -> bytes:
    return good[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(good)), len(good) - 1))]


def _append(rng: random.Random, good: bytes) -> bytes:
    return good + rng.randbytes(rng.choice((1, 4, 1000)))


def _splice(rng: random.Random, good: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(good)) for _ in range(2))
    return good[:start] + rng.choice((b"", rng.randbytes(end - start), good[:end])) + good[end:]


def _noise(rng: random.Random, good: bytes) -> bytes:
    return rng.randbytes(rng.randrange(2 * len(good)))


def _size(rng: random.Random, good: bytes) -> bytes:
    size = rng.choice((0, 1, 2**63, 2**64 - 1, 100_000_001, len(good), len(good) - 8, rng.randrange(2**20)))
    return size.to_bytes(8, "little") + good[8:]


def _not_finite(rng: random.Random, good: bytes) -> bytes:
    header, body = parts(good)
    entry = rng.choice([e for n, e in header.items() if n != "__metadata__" and e["dtype"] in ("F32", "F64")])
    width = 4 if entry["dtype"] == "F32" else 8
    start, end = entry["data_offsets"]
    at = start + width * rng.randrange((end - start) // width)
    value = struct.pack("<f" if width == 4 else "<d", rng.choice(NUMBERS))
    return whole(header, body[:at] + value + body[at + width :])


def _raw_header(rng: random.Random, good: bytes) -> bytes:
    body = parts(good)[1]
    text = rng.choice(
        (b"", b"null", b"[]", b"7", b"{", b"{}", b'"x"', b"\xff\xfe", b"[" * 3000, b'{"a":' * 3000, b"{}" * 9, b"NaN")
    )
    return whole(text, body)


def _edit(rng: random.Random, good: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    header, body = parts(good)
    change(header[rng.choice([name for name in header if name != "__metadata__"])])
    return whole(header, body)


def _dtype(rng: random.Random, good: bytes) -> bytes:
    return _edit(rng, good, lambda entry: entry.update(dtype=rng.choice(DTYPES)))


def _shape(rng: random.Random, good: bytes) -> bytes:
    return _edit(rng, good, lambda entry: entry.update(shape=rng.choice(SHAPES)))


def _offsets(rng: random.Random, good: bytes) -> bytes:
    return _edit(rng, good, lambda entry: entry.update(data_offsets=rng.choice(OFFSETS)))


def _metadata(rng: random.Random, good: bytes) -> bytes:
    header, body = parts(good)
    header["__metadata__"] = rng.choice([*METADATA, {"fingerprint": "0" * 64}, {"fingerprint": "x" * 100_000}])
    return whole(header, body)


def _extra(rng: random.Random, good: bytes) -> bytes:
    header, body = parts(good)
    name = rng.choice(("more", "", "embeddings ", "directions.", "\0", "é" * 500))
    shape, size = rng.choice((([1], 4), ([0], 0), ([2**40, 0], 0), ([], 4)))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + size]}
    return whole(header, body + bytes(size))


def _rename(rng: random.Random, good: bytes) -> bytes:
    header, body = parts(good)
    name = rng.choice([name for name in header if name != "__metadata__"])
    header[rng.choice(("other", name.upper(), ""))] = header.pop(name)
    return whole(header, body)


def _drop(rng: random.Random, good: bytes) -> bytes:
    header, body = parts(good)
    del header[rng.choice([name for name in header if name != "__metadata__"])]
    return whole(header, body)


def _duplicate(rng: random.Random, good: bytes) -> bytes:
    header, body = parts(good)
    name = rng.choice([name for name in header if name != "__metadata__"])
    again = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": rng.choice(([0, 4], [0, 0]))}})
    return whole((again[:-1] + "," + json.dumps(header)[1:]).encode(), body)


def _other_format(rng: random.Random, good: bytes) -> bytes:
    raise AssertionError("made by _foreign")


def _foreign(marker: Path) -> list[bytes]:
    """What is no safetensors at all, and runs code or fills the memory when it is taken for what it says it is."""
    buffer = io.BytesIO()
    torch.save({"embeddings": torch.zeros(4, 4)}, buffer)
    return [
        *(pickle.dumps(Bomb(marker), protocol) for protocol in (0, 2, 5)),
        buffer.getvalue(),
        gzip.compress(bytes(2**22)),
        b"PK\x03\x04" + bytes(64),
        b"GGUF" + bytes(64),
        b"\x89HDF\r\n\x1a\n" + bytes(64),
    ]
