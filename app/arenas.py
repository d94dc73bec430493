"""Where the model's thread gets its memory from."""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

KEPT = 256 * 2**20
"""Bytes that the process keeps at most when they are freed."""
LARGEST = 32 * 2**20
"""Bytes of the largest block that is kept; malloc allows no more."""


def keep_memory() -> bool:
    """Have threads that start from now on keep what they free; False where malloc is not glibc's.

    They would give large blocks back to the system at once and get them back page by page: 60,000 faults for a batch of
    64 texts, and a tenth to a fifth of the throughput (docs/LOG.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    options = ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, KEPT), (_M_MMAP_THRESHOLD, LARGEST))
    return mallopt is not None and all(mallopt(*option) == 1 for option in options)
