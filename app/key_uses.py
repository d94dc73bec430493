"""When API keys were last used: noted in memory by every call, written once a minute for all of them together.

No call waits for that write. SQLite has one writer at a time, and a call that only reads must not stand in its queue;
what a replica noted in its last minute before a kill -9 is lost.
"""

from __future__ import annotations

import logging
import threading
from datetime import datetime

from sqlalchemy.orm import Session, sessionmaker

from app import keys
from app.tables import utcnow
from app.tracebacks import where

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0


class KeyUses:
    """What one replica has seen of its callers' keys, and the thread that writes it down."""

    def __init__(self, sessions: sessionmaker[Session], *, every: float = 60.0) -> None:
        self._sessions, self._every = sessions, every
        self._noted: dict[str, datetime] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="key-uses", daemon=True)
        self._thread.start()

    def note(self, key_id: str) -> None:
        """A key that has been authenticated is in use now."""
        with self._lock:
            self._noted[key_id] = utcnow()

    def write(self) -> None:
        """Write what was noted, in a transaction of its own. What cannot be written is kept for the next time."""
        with self._lock:
            noted, self._noted = self._noted, {}
        if not noted:
            return
        try:
            with self._sessions.begin() as session:
                keys.note_uses(session, noted)
        except Exception as error:  # whatever it is, no call and no later write may suffer from it
            log.warning("last uses of %d API keys are not written yet: %s", len(noted), where(error))
            with self._lock:
                self._noted = noted | self._noted

    def close(self) -> None:
        """Write what is left, for as long as a shutdown can wait."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            self.write()
        self.write()
