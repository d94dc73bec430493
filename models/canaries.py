"""Stand-ins for forget texts that were destroyed, by which later checks see whether an earlier request still holds.

A canary is a retain text behind the words that mark the request's forget texts most. It is kept when the answer to it
is ``unknown`` behind the whole stack and is not without. It holds the request's words, so it is sealed like its prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from models.examples import Example
from models.inference import Classifier
from models.parametrization import distinctive_tokens
from models.soft_prompt import SoftPrompt

MAX_CANARIES = 8
_CANDIDATES = 24
_WORDS = 4


def make_canaries(
    classifier: Classifier,
    stack: Sequence[SoftPrompt],
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    seed: int,
) -> list[str]:
    """At most MAX_CANARIES texts; none when the stack only answers ``unknown`` to the forget texts themselves."""
    llm = classifier.llm
    marks = distinctive_tokens([llm.encode(e.text) for e in forget], [llm.encode(e.text) for e in retain], _WORDS)
    words = [llm.tokenizer.decode([token]).strip() for token in marks]
    words = [word for word in words if word]
    if not words:
        return []
    draw = random.Random(seed)
    shorter = sorted((e.text for e in retain), key=len)[: max(1, len(retain) // 2)]
    frames = draw.sample(shorter, min(_CANDIDATES, len(shorter)))
    room = llm.text_room(sum(p.num_virtual_tokens for p in stack))
    texts = [" ".join([*draw.sample(words, min(2, len(words))), frame]) for frame in frames]
    texts = [text for text in texts if llm.count_tokens(text) <= room]
    bare, behind = classifier.classify(texts), classifier.classify(texts, stack)
    kept = [t for t, b, s in zip(texts, bare, behind, strict=True) if s.abstained and not b.abstained]
    return kept[:MAX_CANARIES]


def lost(classifier: Classifier, stack: Sequence[SoftPrompt], canaries: Sequence[Sequence[str]]) -> int:
    """How many of these earlier requests, each given by its canaries, no longer hold: half of them are answered."""
    texts = [text for request in canaries for text in request]
    answers = iter(classifier.classify(texts, stack))
    abstained = [sum(next(answers).abstained for _ in request) for request in canaries]
    return sum(2 * found < len(request) for found, request in zip(abstained, canaries, strict=True))
