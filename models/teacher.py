"""The teacher: the unprompted frozen model's last hidden states on the retain set, computed once and kept on disk.

Log-probabilities over a 50,000-word vocabulary would take gigabytes; the hidden state is d numbers, and the frozen head
gives the very same log-probabilities back. Rows are filled when a step first needs them and found by their text, so a
retain set that lost a row to a request keeps the rest, and the file loses that row.
"""

from __future__ import annotations

import hashlib
import logging
import os
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

_MAX_FILES = 4  # models
_KEY_BYTES = 16  # of the text's SHA-256


class Teacher:
    """Hidden states (N, d) of ``retain``, by index. ``directory`` None keeps them in memory only."""

    def __init__(self, llm: FrozenLLM, retain: Sequence[Example], directory: Path | None = None) -> None:
        self.llm = llm
        self.retain = retain
        self._classifier = Classifier(llm)
        self._hidden = np.zeros((len(retain), llm.hidden_size), np.float32)
        self._known = np.zeros(len(retain), bool)
        self._keys = np.stack([_key(example) for example in retain])
        self._file: Path | None = None
        self._dirty = False
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            dtype = str(llm.dtype).removeprefix("torch.")  # a training copy has states of its own
            self._file = directory / f"{llm.fingerprint[:32]}-{dtype}.npz"
            self._read(self._file)

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """(k, d) float32 on the model's device; computes what is missing."""
        missing = [i for i in dict.fromkeys(indices) if not self._known[i]]
        if missing:
            states = self._classifier.hidden([self.retain[i].text for i in missing])
            self._hidden[missing] = states.float().cpu().numpy()
            self._known[missing] = True
            self._dirty = True
        return torch.from_numpy(self._hidden[list(indices)]).to(self.llm.device)

    def logits(self, indices: Sequence[int]) -> Tensor:
        """Teacher logits (k, V)."""
        return self.llm.logits(self.hidden(indices).to(self.llm.dtype))

    def label_ids(self, indices: Sequence[int]) -> Tensor:
        """Label token ids (k,): the data's label, or the base model's own answer where there is none."""
        verbalizer = self.llm.verbalizer
        ids = torch.tensor(verbalizer.label_ids, device=self.llm.device)
        own = ids[self.llm.logits(self.hidden(indices).to(self.llm.dtype), verbalizer.label_ids).argmax(-1)]
        for k, i in enumerate(indices):
            label = self.retain[i].label
            if label is not None:
                own[k] = verbalizer.id_of(label)
        return own

    def save(self) -> None:
        """Keep what is known for the next request. Two workers may both write: the last one wins, both are right."""
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
        files = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(file.parent) if entry.is_file()]
        for _, old in sorted(files, reverse=True)[_MAX_FILES:]:
            Path(old).unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        """Take what the file knows of these rows. Rows it alone knows are gone from it with the next ``save``."""
        if not file.exists():
            return
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                keys, hidden = stored["keys"], stored["hidden"]
            if keys.shape != (len(hidden), _KEY_BYTES) or hidden.shape[1:] != self._hidden.shape[1:]:
                raise ValueError("shapes")
        except (OSError, ValueError, KeyError, BadZipFile):
            log.warning("%s is damaged and is made anew", file.name)
            return
        at = {key.tobytes(): k for k, key in enumerate(keys)}
        found = [(i, at[key.tobytes()]) for i, key in enumerate(self._keys) if key.tobytes() in at]
        for i, k in found:
            self._hidden[i], self._known[i] = hidden[k], True
        self._dirty = len({k for _, k in found}) < len(keys)


def _key(example: Example) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(example.text.encode()).digest()[:_KEY_BYTES], np.uint8)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
