"""What the thread that computes, in a server or a worker, needs of its process: memory that stays, and the cores.

A thread that computes has a pool of OpenMP threads for as long as it lives. Once a process has more of these than
processors, libgomp has none of them spin between two parallel parts: each falls asleep and has to be woken, hundreds of
times in a pass. That took a fifth of the throughput (docs/LOG.md), for a pool that had loaded the model and one that
had once looked at a prompt. So only that thread has one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

KEPT = 256 * 2**20
"""Bytes that the process keeps at most when they are freed."""
LARGEST = 32 * 2**20
"""Bytes of the largest block that is kept; malloc allows no more."""

T = TypeVar("T")


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


def in_passing(run: Callable[[], T]) -> T:
    """``run()`` with all cores, in a thread that has ended when this returns, and its pool with it."""
    with ThreadPoolExecutor(1, thread_name_prefix="in-passing") as pool:
        return pool.submit(run).result()


def take_cores(count: int) -> None:
    """The calling thread computes on ``count`` cores from now on, whatever others set."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # settles it: a thread asks once, at its first computation, what was set last by any


def leave_cores() -> None:
    """The calling thread, and all that begin to compute before another takes cores, do so on one and have no pool."""
    torch.set_num_threads(1)
    torch.get_num_threads()
