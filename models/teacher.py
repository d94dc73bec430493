"""The teacher: the unprompted frozen model's last hidden states on the retain set, computed once and kept on disk.

Log-probabilities over a 50,000-word vocabulary would take gigabytes; the hidden state is d numbers, and the frozen head
gives the very same log-probabilities back. Rows are filled when a step first needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.examples import Example
from models.inference import Classifier
from models.llm import FrozenLLM
from models.row_cache import CacheFolder, RowCache


class Teacher:
    """Hidden states (N, d) of ``retain``, by index. Without a ``folder`` they are kept in memory only."""

    def __init__(self, llm: FrozenLLM, retain: Sequence[Example], folder: CacheFolder | None = None) -> None:
        self.llm = llm
        self.retain = retain
        self._classifier = Classifier(llm)
        dtype = str(llm.dtype).removeprefix("torch.")  # a training copy has states of its own
        texts, name = [example.text for example in retain], f"teacher-{llm.fingerprint[:32]}-{dtype}"
        self._cache = RowCache(texts, llm.hidden_size, folder, name)

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """(k, d) float32 on the model's device; computes what is missing."""
        return self._cache.rows(indices, self._classifier.hidden).to(self.llm.device)

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
        """Keep what is known for the next request."""
        self._cache.save()
