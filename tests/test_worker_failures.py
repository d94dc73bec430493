"""What a client learns of an error that nobody foresaw."""

from __future__ import annotations

import pytest
import torch

from app.errors import NotReady
from worker.failures import last_word


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("could not create a primitive"),  # seen under RLIMIT_AS, from a linear layer
    ],
)
def test_too_little_memory_is_told_as_that(error: Exception) -> None:
    assert last_word(error).code == "out-of-memory"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("could not create a primitive descriptor for a matmul"), ValueError("could not create a primitive")],
)
def test_anything_else_is_told_by_its_kind(error: Exception) -> None:
    failure = last_word(error)
    assert (failure.code, failure.detail) == ("internal", f"training broke off with {type(error).__name__}")
    assert last_word(NotReady("why")).detail == "not-ready: why"
