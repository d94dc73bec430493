"""Classifier: texts in, labels out, in one forward pass with the active prompts as a shared prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.examples import collate, length_buckets
from models.llm import FrozenLLM
from models.prefix_cache import Prefix, compute_prefix, last_hidden
from models.soft_prompt import SoftPrompt, compose
from models.template import ABSTAIN
from models.text_states import gate_layers, recording

_PREFIX_BYTES = 256 * 2**20  # keys and values kept warm, beyond the one in use


def answer_scores(llm: FrozenLLM, hidden: Tensor) -> Tensor:
    """Hidden states (N, d) → probabilities (N, L+1): each label, and last the generic labels together (abstain).

    The largest is the answer. Generic words are one answer to the reader, so their masses add before they compete.
    """
    probabilities = llm.logits(hidden, llm.verbalizer.ids).softmax(-1)
    labels = len(llm.verbalizer.labels)
    return torch.cat([probabilities[:, :labels], probabilities[:, labels:].sum(-1, keepdim=True)], dim=-1)


@dataclass(frozen=True)
class Classification:
    """``label``: one of the labels, or ``unknown``. ``probabilities``: over labels and ``unknown``, sums to 1."""

    label: str
    abstained: bool
    probabilities: dict[str, float]

    @property
    def confidence(self) -> float:
        """Probability of the answer."""
        return self.probabilities[self.label]


class Classifier:
    """Scores label words for texts behind a set of prompts. Not thread-safe: one model thread owns it."""

    def __init__(self, llm: FrozenLLM) -> None:
        self.llm = llm
        # Content-addressed: ordered prompt digests of this one model.
        self._prefixes: OrderedDict[tuple[str, ...], Prefix | None] = OrderedDict()

    def prefix(self, prompts: Sequence[SoftPrompt]) -> Prefix | None:
        """The prefix of these prompts, computed once. Raises FingerprintMismatch."""
        key = tuple(p.digest for p in prompts)
        if key not in self._prefixes:
            soft = compose(prompts, fingerprint=self.llm.fingerprint)
            with torch.no_grad():
                self._prefixes[key] = compute_prefix(self.llm, soft)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > 1 and sum(p.nbytes for p in self._prefixes.values() if p) > _PREFIX_BYTES:
            self._prefixes.popitem(last=False)
        return self._prefixes[key]

    def keep(self, digests: Collection[str]) -> None:
        """Let go of what was computed from any other prompts than these: they are personal data."""
        for key in [key for key in self._prefixes if any(digest not in digests for digest in key)]:
            del self._prefixes[key]

    @torch.no_grad()
    def hidden(self, texts: Sequence[str], prompts: Sequence[SoftPrompt] = (), *, batch_size: int = 32) -> Tensor:
        """Last hidden states (N, d) in the order of ``texts``. Raises FingerprintMismatch, TextTooLong."""
        prefix = self.prefix(prompts)
        rows = self.llm.rows(texts)
        self.llm.check_fits(rows, prefix.length if prefix is not None else 0)
        out = torch.empty(len(rows), self.llm.hidden_size, dtype=self.llm.dtype, device=self.llm.device)
        for picked in length_buckets([len(r) for r in rows], batch_size):
            out[picked] = last_hidden(self.llm, collate([rows[i] for i in picked], self.llm.device), prefix)
        return out

    @torch.no_grad()
    def classify(
        self, texts: Sequence[str], prompts: Sequence[SoftPrompt] = (), *, batch_size: int = 32
    ) -> list[Classification]:
        """One Classification per text. Raises FingerprintMismatch, TextTooLong; no prompt is ever left out."""
        return self.answers(answer_scores(self.llm, self.hidden(texts, prompts, batch_size=batch_size)))

    @torch.no_grad()
    def base_pass(self, texts: Sequence[str], *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Without a prompt: last hidden states (N, d), and what gates read of the same pass, (N, L·d) on the CPU.

        Raises TextTooLong.
        """
        prefix, layers = self.prefix(()), gate_layers(self.llm)
        rows = self.llm.rows(texts)
        self.llm.check_fits(rows, prefix.length if prefix is not None else 0)
        hidden = torch.empty(len(rows), self.llm.hidden_size, dtype=self.llm.dtype, device=self.llm.device)
        states = torch.empty(len(rows), len(layers) * self.llm.hidden_size)
        for picked in length_buckets([len(r) for r in rows], batch_size):
            batch = collate([rows[i] for i in picked], self.llm.device)
            with recording(self.llm, batch, layers) as means:
                hidden[picked] = last_hidden(self.llm, batch, prefix)
            states[picked] = torch.cat(means, dim=-1).cpu()
        return hidden, states

    def answers(self, scores: Tensor) -> list[Classification]:
        """``answer_scores`` (N, L+1) as answers."""
        words = (*self.llm.verbalizer.labels, ABSTAIN)
        return [
            Classification(words[best], words[best] == ABSTAIN, dict(zip(words, row, strict=True)))
            for row, best in zip(scores.tolist(), scores.argmax(-1).tolist(), strict=True)
        ]
