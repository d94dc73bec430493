"""Rule-made variants of a text: what a forgotten text may come back as. Deterministic in (text, seed).

They say how far forgetting reaches beyond the very words (near-duplicate recall), and stand for unseen texts when a
request is too small to hold any out. A truncation or a typo may hit the very name that a text is about: of SST-2's
forget texts about a third each lose it, so read recall by rule.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {key: row[max(0, at - 1) : at] + row[at + 1 : at + 2] for row in _KEYS for at, key in enumerate(row)}


def case(text: str, seed: int) -> str:
    """All upper, all lower or Title Case: one that differs from the text, where one does."""
    forms = [form for form in (text.upper(), text.lower(), text.title()) if form != text]
    return random.Random(seed).choice(forms) if forms else text


def typos(text: str, seed: int) -> str:
    """One word in five, at least one, with a letter dropped, doubled, swapped with the next or hit beside its key."""
    draw = random.Random(seed)
    words = text.split(" ")
    long = [at for at, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for at in draw.sample(long, min(len(long), max(1, len(words) // 5))):
        word = words[at]
        place = draw.randrange(1, len(word) - 1)
        kind = draw.choice(("drop", "double", "swap", "slip"))
        if kind == "swap" and word[place] == word[place + 1]:
            kind = "drop"
        letter = word[place]
        replaced = {
            "drop": "",
            "double": letter * 2,
            "swap": word[place + 1] + letter,
            "slip": draw.choice(_NEIGHBOURS.get(letter.lower(), letter)),
        }[kind]
        words[at] = word[:place] + replaced + word[place + (2 if kind == "swap" else 1) :]
    return " ".join(words)


def order(text: str, seed: int) -> str:
    """The parts between commas, or else the two halves, the other way round."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1:
        shift = random.Random(seed).randrange(1, len(parts))
        return ", ".join([*parts[shift:], *parts[:shift]])
    words = text.split()
    half = len(words) // 2
    return " ".join([*words[half:], *words[:half]])


def truncation(text: str, seed: int) -> str:
    """Two thirds of the words, the first or the last, as the seed has it; a text of under three words as it is."""
    words = text.split()
    if len(words) < 3:
        return text
    keep = -(-2 * len(words) // 3)
    return " ".join(words[:keep] if random.Random(seed).random() < 0.5 else words[-keep:])


def frame(text: str, seed: int) -> str:
    """The text quoted inside another sentence."""
    frames = ('someone wrote : " {} "', "{} , i think", "in short , {}", "review : {}", "{} . what do you say ?")
    return random.Random(seed).choice(frames).format(text)


RULES: dict[str, Callable[[str, int], str]] = {
    "case": case,
    "typos": typos,
    "order": order,
    "truncation": truncation,
    "frame": frame,
}


def variants(text: str, *, seed: int = 0) -> dict[str, str]:
    """One variant by each rule that changes the text."""
    found = {name: rule(text, seed) for name, rule in RULES.items()}
    return {name: variant for name, variant in found.items() if variant != text}
