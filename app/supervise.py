"""The worker as a child process of ``letheon serve``: started, restarted when it dies, stopped with the server."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

log = logging.getLogger("letheon.serve")

WORKER = (sys.executable, "-m", "worker.main")
FIRST_DELAY = 1.0
MAX_DELAY = 60.0
SOUND_SECONDS = 60.0  # a worker that lived this long did not fail at start; the next restart is quick again
STOP_SECONDS = 60.0  # for the checkpoint; after that, the lease and the reaper take care of the request


class WorkerSupervisor:
    """Keeps one worker process alive. It is a session of its own, so Ctrl-C reaches it through ``stop`` only.

    Its environment asks it to end when this process does, however that ends: no orphan goes on training.
    """

    def __init__(self, command: Sequence[str] = WORKER, *, first_delay: float = FIRST_DELAY) -> None:
        self._command = list(command)
        self._first_delay = first_delay
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no process is started once stop() has begun
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="worker-supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """The worker's process id, None between two lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask the worker to stop and wait for it; kill it when it takes longer than ``seconds``."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                log.warning("the worker did not stop within %.0f s and is killed", seconds)
                process.kill()
                process.wait()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        delay = self._first_delay
        while True:
            with self._lock:
                if self._stopping.is_set():
                    return
                environment = os.environ | {"LETHEON_EXIT_WITH_PARENT": str(os.getpid())}
                try:
                    self._process = subprocess.Popen(self._command, env=environment, start_new_session=True)
                except OSError as error:  # out of processes or memory: as passing as a worker that dies
                    log.error("the worker cannot be started: %s", error.strerror)
                    self._process = None
            started = time.monotonic()
            if self._process is not None:
                status = self._process.wait()
                if self._stopping.is_set():
                    return
                if time.monotonic() - started > SOUND_SECONDS:
                    delay = self._first_delay
                log.error("the worker ended with status %d; it is started again in %.0f s", status, delay)
            if self._stopping.wait(delay):
                return
            delay = min(delay * 2, MAX_DELAY)
