"""The model's thread keeps the memory that it works with."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LEFT = """
import sys, threading
import psutil, torch
from app.arenas import keep_memory

if sys.argv[1] == "kept":
    assert keep_memory()
process = psutil.Process()

def work():
    before = process.memory_info().rss
    blocks = [torch.ones(3 * 2**20) for _ in range(8)]  # 12 MiB each
    blocks.clear()
    print((process.memory_info().rss - before) // 2**20)

threading.Thread(target=work).start()
"""


def left(which: str) -> int:
    """MiB that a thread's work leaves with the process."""
    done = subprocess.run([sys.executable, "-c", LEFT, which], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_a_thread_keeps_its_memory() -> None:
    assert left("given back") < 30 < 80 < left("kept")
