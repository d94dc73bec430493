"""A scrape: who may see it, what is read for it, and that it ends in seconds whatever the database does.

Prometheus asks most of all when something is broken. So nothing here waits for the database for longer than
``DATABASE_SECONDS``, and while it does not answer, a key is let through that it confirmed a short while ago.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from anyio import CapacityLimiter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from sqlalchemy.orm import Session, sessionmaker

from app import keys
from app.database_metrics import Seen, families, observe
from app.db import UNANSWERED
from app.errors import Forbidden, LetheonError, Unauthenticated
from app.keystore import KeyStore
from app.metrics import Metrics
from app.tables import ApiKey, utcnow
from app.tracebacks import where

log = logging.getLogger(__name__)

T = TypeVar("T")

SCOPE = "metrics"
DATABASE_SECONDS = 2.0
READY_SECONDS = 2.0
THREADS = 4
REMEMBERED_SECONDS = 3600.0


class Patience:
    """Runs what may hang in a thread of its own and waits for a while only; while one hangs, no other is started."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._busy = threading.Lock()
        self._hangs = False

    def __call__(self, work: Callable[[], T]) -> T:
        """Raises TimeoutError, and what ``work`` raises."""
        if not self._busy.acquire(timeout=0 if self._hangs else self._seconds):
            raise TimeoutError
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._hangs = False
                self._busy.release()

        threading.Thread(target=run, name="scrape", daemon=True).start()
        try:
            return future.result(self._seconds)
        except TimeoutError:
            self._hangs = not future.done()
            raise


class Scrapes:
    """What ``GET /metrics`` answers. Also the collector of what is read at each scrape: the database, and readiness."""

    def __init__(
        self,
        metrics: Metrics,
        sessions: sessionmaker[Session],
        check: Callable[[], None],
        admitted: Callable[[ApiKey], None],
        keystore: KeyStore | None,
    ) -> None:
        """Within an event loop. ``check`` raises LetheonError when a classification would not be answered now.

        ``admitted`` is told of each key that is let through, and may raise RateLimited.
        """
        # In threads of their own: with the database away, those that all other routes share may all wait for it.
        self.threads = CapacityLimiter(THREADS)
        self._registry = metrics.registry
        self._sessions, self._check, self._admitted = sessions, check, admitted
        self._keystore = keystore
        self._database, self._readiness = Patience(DATABASE_SECONDS), Patience(READY_SECONDS)
        # Digest of a presented key → when the database last confirmed it, and the seconds for which it still held then.
        self._confirmed: dict[bytes, tuple[float, float]] = {}
        self._registry.register(self)

    def close(self) -> None:
        self._registry.unregister(self)

    def answer(self, presented: str, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, for a key with the scope ``metrics``; takes a few seconds at most.

        Raises Unauthenticated, Forbidden, RateLimited, and one of ``db.UNANSWERED`` or TimeoutError when the database
        does not answer and did not confirm this key lately.
        """
        self._admit(presented)
        # The library's own negotiation dies of a version that is no number and repeats it in the answer.
        if any(kind.split(";")[0].strip() == "application/openmetrics-text" for kind in accept.split(",")):
            content: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
            return content, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        yield from families(self._observe())
        yield GaugeMetricFamily(
            "letheon_keystore_configured",
            "1 when this process has a key store, without which shredding does not reach copies of the database.",
            value=float(self._keystore is not None),
        )
        if self._keystore is not None:
            yield GaugeMetricFamily(
                "letheon_keystore_up",
                "1 when the key store answered this process when it was last asked, else 0. Absent without one.",
                value=float(self._keystore.answers),
            )
        yield GaugeMetricFamily(
            "letheon_ready", "1 when a classification would be answered now, as /readyz has it.", value=self._ready()
        )

    def _admit(self, presented: str) -> None:
        digest = keys.secret_digest(presented)

        def confirm() -> float:
            with self._sessions() as session:
                key = keys.authenticate(session, presented)
                keys.require(key.scopes, SCOPE)
            self._admitted(key)
            return (key.expires_at - utcnow()).total_seconds() if key.expires_at is not None else math.inf

        try:
            left = self._database(confirm)
        except (Unauthenticated, Forbidden):
            self._confirmed.pop(digest, None)
            raise
        except (*UNANSWERED, TimeoutError):
            confirmed, left = self._confirmed.get(digest, (0.0, -1.0))
            if time.monotonic() - confirmed > min(left, REMEMBERED_SECONDS):
                raise
        else:
            self._confirmed[digest] = (time.monotonic(), left)

    def _observe(self) -> Seen | None:
        def read() -> Seen:
            with self._sessions() as session:
                return observe(session, utcnow())

        try:
            return self._database(read)
        except (*UNANSWERED, TimeoutError) as error:
            log.warning("the database did not answer a scrape: %s", where(error))
            return None

    def _ready(self) -> float:
        try:
            self._readiness(self._check)
        except (LetheonError, TimeoutError):
            return 0.0
        return 1.0
