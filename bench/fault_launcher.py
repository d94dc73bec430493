"""Starts workers and APIs for ``bench.faults`` by forking: what they import takes seconds, and there are hundreds.

Run as a process of its own, which loads everything once, serves one JSON order per line of its standard input, and ends
its children when that is closed. It never starts a thread, so a fork of it is as good as a fresh process: the child
reads its settings, opens its database and loads its model itself, by the same ``main`` as always.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import app.cli
import app.main  # the children need it
import worker.main
from models.llm import FrozenLLM


def child(order: dict[str, Any]) -> NoReturn:
    """Becomes the process that was ordered; never returns."""
    status = 70
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
        os.chdir(order["home"])
        os.environ.clear()
        os.environ.update(order["environment"])
        if order["arguments"]:
            sys.argv = ["letheon", *order["arguments"]]
            app.cli.main()
            status = 0
        else:
            status = worker.main.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()  # a bench on made-up texts: nothing to hide
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    children: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "reap" in order:
            _, status = os.waitpid(order["reap"], 0)
            children.discard(order["reap"])
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                child(order)
            children.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def imported_by_loading(model: Path) -> list[str]:
    """What a first load imports. Found in a child: loading starts threads, which a fork of this process would lack."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = set(sys.modules)
        FrozenLLM.load(str(model), quantization="none", device="cpu")
        with os.fdopen(writer, "w") as out:
            out.write("\n".join(name for name in sys.modules if name not in before))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as names:
        found = names.read().split()
    os.waitpid(pid, 0)
    return found


def main(model: Path) -> None:
    for name in imported_by_loading(model):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise SystemExit(f"{threads} threads: a fork would not have them")
    print(json.dumps({"ready": True}), flush=True)
    serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
