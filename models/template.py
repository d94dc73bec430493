"""The classification template around ``{text}`` and the verbalizer (label word → one token id).

A template is tokenised in three segments, head / text / tail, each on its own. The head is the same for every row,
so it lives in the shared prefix; training, fine-tuning and serving all use these segments, so they see equal ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from models.errors import InvalidTemplate, InvalidVerbalizer

TEXT_ONLY = {"add_special_tokens": False, "split_special_tokens": True}
"""How a user's text is tokenised: a "<|im_end|>" in it is ten characters, never the end of a turn."""

ABSTAIN = "unknown"
"""The answer when the generic labels win."""

TEMPLATES = {
    # The wording of the SPUL authors' code (arXiv 2406.12038).
    "paper": "### Text: {text}\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:",
    # Same words, instruction first: all but a short tail is shared by every row and computed once.
    "instruction-first": "### Question: What is the sentiment of the given text?\n\n### Text: {text}\n\n### Sentiment:",
}


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that Letheon uses."""

    bos_token_id: int | None
    unk_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...
    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Template:
    """``head_ids`` (with BOS where the tokenizer adds one), ``lead`` (glued to the text), ``tail_ids``."""

    source: str
    head_ids: tuple[int, ...]
    lead: str
    tail_ids: tuple[int, ...]

    @classmethod
    def build(cls, name_or_source: str, tokenizer: Tokenizer) -> Template:
        """Tokenise a named template or a string with one ``{text}``. Raises InvalidTemplate."""
        source = TEMPLATES.get(name_or_source, name_or_source)
        if source.count("{text}") != 1:
            raise InvalidTemplate(f"template must hold exactly one {{text}}, or be one of {sorted(TEMPLATES)}")
        head, tail = source.split("{text}")
        if not tail:
            raise InvalidTemplate("template must say something after {text}: its last token predicts the label")
        # A space before the text belongs to the text's first token in every BPE vocabulary.
        lead = " " if head.endswith(" ") else ""
        head = head.removesuffix(lead) if lead else head
        bos = tokenizer.encode("a")[:1]
        adds_bos = tokenizer.bos_token_id is not None and bos == [tokenizer.bos_token_id]
        head_ids = tokenizer.encode(head, add_special_tokens=False) if head else []
        return cls(
            source=source,
            head_ids=tuple(
                ([tokenizer.bos_token_id] if adds_bos and tokenizer.bos_token_id is not None else []) + head_ids
            ),
            lead=lead,
            tail_ids=tuple(tokenizer.encode(tail, add_special_tokens=False)),
        )


@dataclass(frozen=True)
class Verbalizer:
    """Token ids of the labels and of the generic labels (``neutral``, ``unknown``), in configured order."""

    labels: tuple[str, ...]
    generic_labels: tuple[str, ...]
    label_ids: tuple[int, ...]
    generic_ids: tuple[int, ...]

    @classmethod
    def build(cls, labels: tuple[str, ...], generic_labels: tuple[str, ...], tokenizer: Tokenizer) -> Verbalizer:
        """Raises InvalidVerbalizer when a word is not a single token or words collide."""
        if len(labels) < 2 or not generic_labels:
            raise InvalidVerbalizer("a verbalizer needs at least two labels and one generic label")
        if ABSTAIN in labels:
            raise InvalidVerbalizer(f"{ABSTAIN!r} is the answer of abstaining and cannot be a label")
        ids = {word: cls._token_of(word, tokenizer) for word in (*labels, *generic_labels)}
        if len(set(ids.values())) != len(labels) + len(generic_labels):
            raise InvalidVerbalizer(f"label words must be distinct tokens, got {ids}")
        return cls(labels, generic_labels, tuple(ids[w] for w in labels), tuple(ids[w] for w in generic_labels))

    @staticmethod
    def _token_of(word: str, tokenizer: Tokenizer) -> int:
        # The answer follows ':' so " word" is what a BPE model says; sentencepiece adds its own space to "word".
        pieces: list[int] = []
        for surface in (" " + word, word):
            pieces = tokenizer.encode(surface, add_special_tokens=False)
            if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id and tokenizer.decode(pieces).strip() == word:
                return pieces[0]
        raise InvalidVerbalizer(f"label word {word!r} is {len(pieces)} tokens (or unknown) in this tokenizer, not one")

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.labels, *self.generic_labels)

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.label_ids, *self.generic_ids)

    def id_of(self, word: str) -> int:
        return self.ids[self.words.index(word)]
