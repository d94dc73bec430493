"""The thread that computes keeps the memory that it works with, and has the cores for itself."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LEFT = """
import sys, threading
import psutil, torch
from app.model_thread import keep_memory

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


ALONE = """
import os, threading
import torch
from app.model_thread import in_passing, leave_cores, take_cores

ones = torch.ones(1 << 22)
def compute():
    return float((ones * ones).sum())  # on every core that the thread may use

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(wanted):  # what has ended is listed for a moment longer
    for _ in range(1000):
        if threads() - before == wanted:
            break
        threading.Event().wait(0.01)
    return threads() - before

torch.set_num_threads(3)  # whatever the machine has
before = threads()
assert in_passing(compute) == 1 << 22
print(settled(0))  # its pool went with it

began, others, seen = threading.Event(), threading.Event(), []
def model():
    take_cores(3)
    began.set()
    others.wait()
    compute()
    seen.append(torch.get_num_threads())
    seen.append(threads())

thread = threading.Thread(target=model)
thread.start()
began.wait()
leave_cores()
compute()
other = threading.Thread(target=lambda: (compute(), seen.append(torch.get_num_threads())))
other.start()
other.join()
print(settled(1))  # the model's thread alone
others.set()
thread.join()
print(*seen[:2], seen[2] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads that Linux shows")
def test_no_other_thread_has_a_pool() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    # One core for the other thread, three for the model's, which has two more beside it while it lives.
    assert done.stdout.split() == ["0", "1", "1", "3", "3"]
