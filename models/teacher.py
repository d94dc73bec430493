"""The teacher: the unprompted frozen model's last hidden states on the retain set, computed once and kept on disk.

Log-probabilities over a 50,000-word vocabulary would take gigabytes; the hidden state is d numbers, and the frozen head
gives the very same log-probabilities back. Rows are filled when a step first needs them and found by their text, so a
retain set that lost a row to a request keeps the rest, and the file loses that row.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from models.examples import Example
from models.inference import Classifier
from models.llm import FrozenLLM

log = logging.getLogger("letheon.models")

_STALE_SECONDS = 3600.0
_KEY_BYTES = 16  # of the text's SHA-256


class Teacher:
    """Hidden states (N, d) of ``retain``, by index. ``directory`` None keeps them in memory only."""

    def __init__(self, llm: FrozenLLM, retain: Sequence[Example], directory: Path | None = None) -> None:
        self.llm = llm
        self.retain = retain
        self._classifier = Classifier(llm)
        # Rows of equal text share the place of the first.
        places: dict[bytes, int] = {}
        self._place = np.array([places.setdefault(_key(example), len(places)) for example in retain])
        self._keys = np.frombuffer(b"".join(places), np.uint8).reshape(-1, _KEY_BYTES)
        self._hidden = np.zeros((len(places), llm.hidden_size), np.float32)
        self._known = np.zeros(len(places), bool)
        self._file: Path | None = None
        self._dirty = False
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # a cache: without its folder it is kept in memory
                log.warning("the teacher's states are not kept (%s)", type(error).__name__)
                return
            dtype = str(llm.dtype).removeprefix("torch.")  # a training copy has states of its own
            self._file = directory / f"{llm.fingerprint[:32]}-{dtype}.npz"
            self._read(self._file)

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """(k, d) float32 on the model's device; computes what is missing."""
        missing = {int(self._place[i]): self.retain[i].text for i in indices if not self._known[self._place[i]]}
        if missing:
            places = list(missing)
            self._hidden[places] = self._classifier.hidden(list(missing.values())).float().cpu().numpy()
            self._known[places] = True
            self._dirty = True
        return torch.from_numpy(self._hidden[self._place[list(indices)]]).to(self.llm.device)

    def logits(self, indices: Sequence[int]) -> Tensor:
        """Teacher logits (k, V)."""
        return self.llm.logits(self.hidden(indices).to(self.llm.dtype))

    def label_ids(self, indices: Sequence[int]) -> Tensor:
        """Token ids (k,): the data's label, or the word that the base model itself says where there is none."""
        verbalizer = self.llm.verbalizer
        ids = torch.tensor(verbalizer.ids, device=self.llm.device)
        own = ids[self.llm.logits(self.hidden(indices).to(self.llm.dtype), verbalizer.ids).argmax(-1)]
        for k, i in enumerate(indices):
            label = self.retain[i].label
            if label is not None:
                own[k] = verbalizer.id_of(label)
        return own

    def save(self) -> None:
        """Keep what is known for the next request. Of two workers that both write, the last one's file stays."""
        if self._file is None or not self._dirty:
            return
        self._dirty = False
        # A cache: a full disk costs the next request some time, not this one its outcome.
        try:
            self._write(self._file)
        except OSError as error:
            log.warning("the teacher's states are not kept (%s)", type(error).__name__)

    def _write(self, file: Path) -> None:
        partial = file.with_name(f"{file.stem}.{np.random.default_rng().integers(1 << 62):x}.partial")
        with open(partial, "xb", opener=_private) as handle:
            np.savez(handle, keys=self._keys[self._known], hidden=self._hidden[self._known])
        partial.replace(file)
        # Files of other models would keep rows that were to be forgotten since; partial ones are of writers that died.
        for other in file.parent.glob("*.npz"):
            if other != file:
                other.unlink(missing_ok=True)
        for stale in file.parent.glob("*.partial"):
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        """Take what the file knows of these rows. Rows it alone knows are gone from it with the next ``save``."""
        if not file.exists():
            return
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                keys, hidden = stored["keys"], stored["hidden"]
            if keys.shape != (len(hidden), _KEY_BYTES) or hidden.shape[1:] != self._hidden.shape[1:]:
                raise ValueError("shapes")
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            log.warning("%s is damaged and is made anew", file.name)
            return
        places = {key.tobytes(): place for place, key in enumerate(self._keys)}
        found = [(places[key.tobytes()], k) for k, key in enumerate(keys) if key.tobytes() in places]
        for place, k in found:
            self._hidden[place], self._known[place] = hidden[k], True
        self._dirty = len(found) < len(keys)


def _key(example: Example) -> bytes:
    return hashlib.sha256(example.text.encode()).digest()[:_KEY_BYTES]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
