"""Classifier: texts in, labels out, in one forward pass with the active prompts as a shared prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import NotFinite
from models.llm import FrozenLLM
from models.packing import fits
from models.passes import by_length, run_rows
from models.prefix_cache import Prefix, compute_prefix
from models.soft_prompt import SoftPrompt, compose
from models.template import ABSTAIN
from models.text_states import gate_layers

BATCH = 64
"""Rows of a pass: on CPU more gain a few percent (docs/LOG.md), and the first answer waits for the last row."""
PREFIX_BYTES = 256 * 2**20
"""Keys and values that are kept, beyond those in use."""


def rows_of_a_pass(llm: FrozenLLM, most: int) -> int:
    """Rows of a pass of a server that takes batches of ``most`` texts: a GPU takes many in the time of a few."""
    return min(most, BATCH) if llm.device.type == "cpu" else most


def answer_scores(llm: FrozenLLM, hidden: Tensor) -> Tensor:
    """Hidden states (N, d) → probabilities (N, L+1): each label, and last the generic labels together (abstain).

    The largest is the answer. Generic words are one answer to the reader, so their masses add before they compete.
    Raises NotFinite: the largest of such numbers would be some label, and an answer that is to be suppressed get out.
    """
    probabilities = llm.logits(hidden, llm.verbalizer.ids).softmax(-1)
    if not bool(probabilities.isfinite().all()):
        raise NotFinite("the model's scores are not finite")
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


@dataclass(frozen=True, repr=False)  # no repr: a text must not reach a traceback or a log by accident
class Encoded:
    """A text as the model reads it: its ``row`` (``FrozenLLM.rows``), and its keyed ``digest`` for the guard of gates.

    Made outside the model's thread, which has better things to do.
    """

    row: Sequence[int]
    digest: bytes | None


class Classifier:
    """Scores label words for texts behind a set of prompts. Not thread-safe: one model thread owns it.

    ``before_pass`` is called before each pass of texts; what it raises ends the call. ``prefix_bytes``: of keys and
    values that are kept for the next call, beyond those in use.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        *,
        before_pass: Callable[[], None] = lambda: None,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self.llm = llm
        self._prefix_bytes = prefix_bytes
        self._before_pass = before_pass
        # Content-addressed: ordered prompt digests of this one model.
        self._prefixes: OrderedDict[tuple[str, ...], Prefix | None] = OrderedDict()
        self._tokens = self._padding = 0

    def prefix(self, prompts: Sequence[SoftPrompt]) -> Prefix | None:
        """The prefix of these prompts, computed once. Raises FingerprintMismatch."""
        key = tuple(p.digest for p in prompts)
        if key not in self._prefixes:
            soft = compose(prompts, fingerprint=self.llm.fingerprint)
            with torch.no_grad():
                self._prefixes[key] = compute_prefix(self.llm, soft)
        self._prefixes.move_to_end(key)
        prompts_only = [other for other in self._prefixes if other]  # every batch needs the bare template's
        size = sum(p.nbytes for other in prompts_only if (p := self._prefixes[other]))
        for oldest in prompts_only:
            if size <= self._prefix_bytes or oldest == key:
                break
            gone = self._prefixes.pop(oldest)
            size -= gone.nbytes if gone is not None else 0
        return self._prefixes[key]

    def has_prefix(self, prompts: Sequence[SoftPrompt]) -> bool:
        """Whether the prefix of these prompts is there already."""
        return tuple(p.digest for p in prompts) in self._prefixes

    def keep(self, digests: Collection[str]) -> None:
        """Let go of what was computed from any other prompts than these: they are personal data."""
        for key in [key for key in self._prefixes if any(digest not in digests for digest in key)]:
            del self._prefixes[key]

    @torch.no_grad()
    def hidden(
        self, texts: Sequence[str | Encoded], prompts: Sequence[SoftPrompt] = (), *, batch_size: int = BATCH
    ) -> Tensor:
        """Last hidden states (N, d) in the order of ``texts``. Raises FingerprintMismatch, TextTooLong."""
        prefix = self.prefix(prompts)
        rows = self._rows(texts, prefix)
        out = torch.empty(len(rows), self.llm.hidden_size, dtype=self.llm.dtype, device=self.llm.device)
        for picked in by_length(rows, batch_size):
            out[picked], _ = self._run([rows[i] for i in picked], prefix)
        return out

    @torch.no_grad()
    def classify(
        self, texts: Sequence[str | Encoded], prompts: Sequence[SoftPrompt] = (), *, batch_size: int = BATCH
    ) -> list[Classification]:
        """One Classification per text; no prompt is ever left out.

        Raises FingerprintMismatch, TextTooLong, NotFinite.
        """
        return self.answers(answer_scores(self.llm, self.hidden(texts, prompts, batch_size=batch_size)))

    @torch.no_grad()
    def base_pass(self, texts: Sequence[str | Encoded], *, batch_size: int = BATCH) -> tuple[Tensor, Tensor]:
        """Without a prompt: last hidden states (N, d), and what gates read of the same pass, (N, L·d) on the CPU.

        Raises TextTooLong.
        """
        prefix, layers = self.prefix(()), gate_layers(self.llm)
        rows = self._rows(texts, prefix)
        hidden = torch.empty(len(rows), self.llm.hidden_size, dtype=self.llm.dtype, device=self.llm.device)
        states = torch.empty(len(rows), len(layers) * self.llm.hidden_size)
        for picked in by_length(rows, batch_size):
            hidden[picked], means = self._run([rows[i] for i in picked], prefix, layers)
            states[picked] = torch.cat(means, dim=-1).cpu()
        return hidden, states

    def take_counts(self) -> tuple[int, int]:
        """Tokens of rows since the last time, and those beside them that only padded a pass."""
        counts, self._tokens, self._padding = (self._tokens, self._padding), 0, 0
        return counts

    def _run(
        self, rows: list[Sequence[int]], prefix: Prefix | None, layers: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        self._before_pass()
        tokens, packed = sum(len(row) for row in rows), fits(self.llm, prefix.length if prefix is not None else 0, rows)
        self._tokens += tokens
        self._padding += 0 if packed else len(rows) * max(len(row) for row in rows) - tokens
        return run_rows(self.llm, rows, prefix, layers)

    def _rows(self, texts: Sequence[str | Encoded], prefix: Prefix | None) -> list[Sequence[int]]:
        """Raises TextTooLong."""
        words = iter(self.llm.rows([text for text in texts if isinstance(text, str)]))
        rows = [next(words) if isinstance(text, str) else text.row for text in texts]
        self.llm.check_fits(rows, prefix.length if prefix is not None else 0)
        return rows

    def answers(self, scores: Tensor) -> list[Classification]:
        """``answer_scores`` (N, L+1) as answers."""
        words = (*self.llm.verbalizer.labels, ABSTAIN)
        return [
            Classification(words[best], words[best] == ABSTAIN, dict(zip(words, row, strict=True)))
            for row, best in zip(scores.tolist(), scores.argmax(-1).tolist(), strict=True)
        ]
