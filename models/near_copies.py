"""Near-duplicates among texts by their spelling: MinHash of character 5-grams, one bit kept of each hash.

It estimates the Jaccard similarity of the sets of 5-grams (Broder 1997; one bit: Li and König 2010), with a standard
error below 0.05 at ``NEAR``. A model would find paraphrases too, but would have to read the whole retain set; this is
some ten thousand integer operations for a text, once, and 32 bytes. Characters rather than words: half of SST-2's texts
have under ten words, and one that was changed takes three word trigrams with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

GRAM = 5
HASHES = 256
NEAR = 0.6
"""Unrelated sentences are far below; docs/decisions/0020 has what changed copies come to."""

Signatures = NDArray[np.uint64]
"""(HASHES / 64, n): a text's bits are a column."""

_draw = np.random.default_rng(0)
_POWERS = _draw.integers(1, 1 << 63, GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _draw.integers(1, 1 << 63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _draw.integers(0, 1 << 63, HASHES, dtype=np.uint64)
_BIT = np.uint64(20)  # of the least hash: the high ones are what makes it the least


def signature(text: str) -> NDArray[np.uint64]:
    """(HASHES / 64,) of a text that is normalised already."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < GRAM:
        codes = np.pad(codes, (0, GRAM - len(codes)))
    grams = (np.lib.stride_tricks.sliding_window_view(codes, GRAM) * _POWERS).sum(1)
    grams = (grams ^ (grams >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    grams ^= grams >> np.uint64(33)
    least = (grams[:, None] * _FACTORS + _OFFSETS).min(0)
    bits: NDArray[np.uint64] = np.packbits((least >> _BIT).astype(np.uint8) & 1).view(np.uint64)
    return bits


def side_by_side(found: Sequence[NDArray[np.uint64]]) -> Signatures:
    """Of one text or more."""
    return np.ascontiguousarray(np.stack(found).T)


def similarities(rows: Signatures, others: Signatures) -> Iterator[NDArray[np.float64]]:
    """Of each of ``others``, in order, the estimated similarities (N,) with all ``rows``; chance may put it below 0."""
    for other in others.T:
        different = np.zeros(rows.shape[1], np.uint16)
        for bits, own in zip(rows, other, strict=True):
            different += np.bitwise_count(bits ^ own)
        yield 1 - 2 * different.astype(np.float64) / HASHES
