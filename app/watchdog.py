"""Ends a process that only a new one can help: not every supervisor asks ``/livez`` (compose does not)."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from app.errors import Stuck

log = logging.getLogger(__name__)

EXIT_STATUS = 70  # EX_SOFTWARE
EVERY_SECONDS = 5.0


def end_when_stuck(check: Callable[[], None], *, every: float = EVERY_SECONDS) -> threading.Event:
    """Ask ``check`` until it raises Stuck; then end the process at once. Set the event to stop asking.

    Nothing is in progress then that could still be answered, and a thread that hangs would hold up an orderly end.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            try:
                check()
            except Stuck as error:
                log.critical("ending the process: %s", error.detail)
                logging.shutdown()
                os._exit(EXIT_STATUS)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    return done
