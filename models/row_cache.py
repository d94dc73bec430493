"""Vectors of texts, computed once and kept on disk: found by their text, so a set that lost a row keeps the rest.

A row that the reader no longer has is gone from the file with the next ``save``: what was asked to be forgotten must
not outlive the request in a cache. Texts are named by keyed digests: whoever has the file, and not the key, cannot try
a text that they can guess.
"""

from __future__ import annotations

import hmac
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("letheon.models")

_STALE_SECONDS = 3600.0
_NAME_BYTES = 16  # of the text's HMAC-SHA256


@dataclass(frozen=True, repr=False)
class CacheFolder:
    """Where caches are kept, and the secret that the texts in them are named under."""

    path: Path
    key: bytes

    def name(self, text: str) -> bytes:
        return hmac.digest(self.key, text.encode(), sha256)[:_NAME_BYTES]


class RowCache:
    """float32 vectors (N, ``width``) of ``texts``, by index. Rows of equal text share the place of the first.

    Without a ``folder`` they are kept in memory only. ``name``: of the file in it, ``<kind>-<model>``. Of two processes
    that write, the last one's stays.
    """

    def __init__(self, texts: Sequence[str], width: int, folder: CacheFolder | None, name: str) -> None:
        self._texts = texts
        places: dict[str, int] = {}
        self._place = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.int64)
        self._names = np.zeros((0, _NAME_BYTES), np.uint8)
        self._vectors = np.zeros((len(places), width), np.float32)
        self._known = np.zeros(len(places), bool)
        self._file: Path | None = None
        self._dirty = False
        if folder is not None:
            names = b"".join(folder.name(text) for text in places)
            self._names = np.frombuffer(names, np.uint8).reshape(-1, _NAME_BYTES)
            file = folder.path / f"{name}.npz"
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
            np.savez(handle, names=self._names[self._known], vectors=self._vectors[self._known])
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
                names, vectors = stored["names"], stored["vectors"]
            if names.shape != (len(vectors), _NAME_BYTES) or vectors.shape[1:] != self._vectors.shape[1:]:
                raise ValueError("shapes")
        except Exception:  # zipfile and numpy have many ways to say that a file is damaged
            log.warning("%s is damaged and is made anew", file.name)
            return
        places = {name.tobytes(): place for place, name in enumerate(self._names)}
        found = [(places[name.tobytes()], k) for k, name in enumerate(names) if name.tobytes() in places]
        for place, k in found:
            self._vectors[place], self._known[place] = vectors[k], True
        self._dirty = len(found) < len(names)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
