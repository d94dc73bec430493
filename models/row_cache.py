"""Vectors of texts, computed once and kept on disk: found by their text, so a set that lost a row keeps the rest.

A row that the reader no longer has is gone from the file with the next ``save``: what was asked to be forgotten must
not outlive the request in a cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("letheon.models")

_STALE_SECONDS = 3600.0
_KEY_BYTES = 16  # of the text's SHA-256


class RowCache:
    """float32 vectors (N, ``width``) of ``texts``, by index. Rows of equal text share the place of the first.

    ``file``: ``<kind>-<model>.npz``, None keeps them in memory only. Of two processes that write, the last one's stays.
    """

    def __init__(self, texts: Sequence[str], width: int, file: Path | None) -> None:
        self._texts = texts
        places: dict[bytes, int] = {}
        self._place = np.array([places.setdefault(text_key(text), len(places)) for text in texts], dtype=np.int64)
        self._keys = np.frombuffer(b"".join(places), np.uint8).reshape(-1, _KEY_BYTES)
        self._vectors = np.zeros((len(places), width), np.float32)
        self._known = np.zeros(len(places), bool)
        self._file: Path | None = None
        self._dirty = False
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # a cache: without its folder it is kept in memory
                log.warning("%s is not kept (%s)", file.name, type(error).__name__)
                return
            self._file = file
            self._read(file)

    def rows(self, indices: Sequence[int], compute: Callable[[list[str]], Tensor]) -> Tensor:
        """(k, width) float32 on the CPU. ``compute`` is given the texts that are missing, each once."""
        missing = {int(self._place[i]): self._texts[i] for i in indices if not self._known[self._place[i]]}
        if missing:
            places = list(missing)
            self._vectors[places] = compute(list(missing.values())).float().cpu().numpy()
            self._known[places] = True
            self._dirty = True
        return torch.from_numpy(self._vectors[self._place[list(indices)]])

    def save(self) -> None:
        """Keep what is known for the next request."""
        if self._file is None or not self._dirty:
            return
        self._dirty = False
        # A full disk costs the next request some time, not this one its outcome.
        try:
            self._write(self._file)
        except OSError as error:
            log.warning("%s is not kept (%s)", self._file.name, type(error).__name__)

    def _write(self, file: Path) -> None:
        partial = file.with_name(f"{file.stem}.{np.random.default_rng().integers(1 << 62):x}.partial")
        with open(partial, "xb", opener=_private) as handle:
            np.savez(handle, keys=self._keys[self._known], vectors=self._vectors[self._known])
        partial.replace(file)
        # Files of other models would keep rows that were to be forgotten since; partial ones are of writers that died.
        for other in file.parent.glob(f"{file.stem.partition('-')[0]}-*.npz"):
            if other != file:
                other.unlink(missing_ok=True)
        for stale in file.parent.glob("*.partial"):
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        """Take what the file knows of these rows."""
        if not file.exists():
            return
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                keys, vectors = stored["keys"], stored["vectors"]
            if keys.shape != (len(vectors), _KEY_BYTES) or vectors.shape[1:] != self._vectors.shape[1:]:
                raise ValueError("shapes")
        except Exception:  # zipfile and numpy have many ways to say that a file is damaged
            log.warning("%s is damaged and is made anew", file.name)
            return
        places = {key.tobytes(): place for place, key in enumerate(self._keys)}
        found = [(places[key.tobytes()], k) for k, key in enumerate(keys) if key.tobytes() in places]
        for place, k in found:
            self._vectors[place], self._known[place] = vectors[k], True
        self._dirty = len(found) < len(keys)


def text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_KEY_BYTES]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
