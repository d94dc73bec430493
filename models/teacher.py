"""The teacher: the unprompted frozen model's last hidden states on the retain set, computed once and kept on disk.

Log-probabilities over a 50,000-word vocabulary would take gigabytes; the hidden state is d numbers, and the frozen head
gives the very same log-probabilities back. Rows are filled when a step first needs them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from models.examples import Example, digest_examples
from models.inference import Classifier
from models.llm import FrozenLLM

log = logging.getLogger("letheon.models")

_MAX_FILES = 4


class Teacher:
    """Hidden states (N, d) of ``retain``, by index. ``directory`` None keeps them in memory only."""

    def __init__(self, llm: FrozenLLM, retain: Sequence[Example], directory: Path | None = None) -> None:
        self.llm = llm
        self.retain = retain
        self._classifier = Classifier(llm)
        shape = (len(retain), llm.hidden_size)
        self._file: Path | None = None
        self._dirty = False
        if directory is None:
            self._hidden, self._known = np.zeros(shape, np.float32), np.zeros(len(retain), bool)
            return
        dtype = str(llm.dtype).removeprefix("torch.")  # a training copy has states of its own
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / f"{llm.fingerprint[:24]}-{dtype}-{digest_examples(retain)[:24]}.npz"
        self._hidden, self._known = self._read(shape)

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
            np.savez(handle, hidden=self._hidden, known=self._known)
        partial.replace(file)
        # A request whose texts are rows of the retain set makes a retain set, hence a file, of its own.
        files = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(file.parent) if entry.is_file()]
        for _, old in sorted(files, reverse=True)[_MAX_FILES:]:
            Path(old).unlink(missing_ok=True)

    def _read(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        if self._file is not None and self._file.exists():
            try:
                with self._file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                    if stored["hidden"].shape == shape and stored["known"].shape == shape[:1]:
                        return stored["hidden"], stored["known"]
            except (OSError, ValueError, KeyError, BadZipFile):
                log.warning("%s is damaged and is made anew", self._file.name)
        return np.zeros(shape, np.float32), np.zeros(shape[0], bool)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
