"""Sends the messages of webhooks: a thread of the worker with an event loop, so that one that hangs is alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection

import httpx2
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app import webhook_queue
from app.errors import KeyStoreAway, NotFound, VaultError
from app.failpoints import failpoint
from app.settings import Settings
from app.tracebacks import where
from app.vault import Vault
from app.webhook_queue import DeliveryError, Due, Outcome
from app.webhooks import encode, open_secret, sign
from worker.sending import post
from worker.threads import _Service

log = logging.getLogger("letheon.worker")

POLL_SECONDS = 1.0
CLEAN_SECONDS = 60.0
IN_FLIGHT = 32
LEASE_MARGIN_SECONDS = 60.0  # beyond an attempt's own time: to write down how it went


class Deliveries(_Service):
    """Claims what is due, sends it, and records how that went. At shutdown it lets what is under way end."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        vault: Vault,
        settings: Settings,
        *,
        on_death: Callable[[], None],
        every: float = POLL_SECONDS,
    ) -> None:
        super().__init__("deliveries", every=every, on_death=on_death)
        self._sessions, self._vault, self._settings = sessions, vault, settings
        self._tls = httpx2.create_ssl_context()
        self._untold: list[tuple[Due, Outcome]] = []  # what the database has not heard yet
        self._clean_at = 0.0

    def work(self) -> None:
        taken = self._look([])
        if taken:
            asyncio.run(self._send_all(taken))

    async def _send_all(self, taken: list[Due]) -> None:
        """Send, and go on claiming while anything is under way. Raises SQLAlchemyError once nothing is."""
        tasks: dict[asyncio.Task[Outcome], Due] = {}
        failed: SQLAlchemyError | None = None
        while taken or tasks:
            tasks.update({asyncio.create_task(self._send(due)): due for due in taken})
            done, _ = await asyncio.wait(tasks, timeout=self._every, return_when=asyncio.FIRST_COMPLETED)
            self._untold += [(tasks.pop(task), task.result()) for task in done]
            try:
                taken, failed = await asyncio.to_thread(self._look, list(tasks.values())), None
            except SQLAlchemyError as error:
                taken, failed = [], error
        if failed is not None:
            raise failed

    def _look(self, in_flight: Collection[Due]) -> list[Due]:
        """What there is to do with the database: tell it how it went, clean up, and ask for more."""
        while self._untold:
            self._record(*self._untold[0])
            del self._untold[0]
        if self._end.is_set():
            return []
        if time.monotonic() >= self._clean_at:
            with self._sessions.begin() as session:
                webhook_queue.clean(session, log_days=self._settings.webhook_log_days)
            self._clean_at = time.monotonic() + CLEAN_SECONDS
        if len(in_flight) >= IN_FLIGHT:
            return []
        with self._sessions.begin() as session:
            taken = webhook_queue.claim(
                session,
                limit=IN_FLIGHT - len(in_flight),
                lease_seconds=self._settings.webhook_timeout_seconds + LEASE_MARGIN_SECONDS,
                max_attempts=self._settings.webhook_attempts,
                in_flight=in_flight,
            )
            if taken:
                failpoint("webhook_claim.before_commit")
        if taken:
            failpoint("webhook_claim.after_commit")
        return taken

    def _record(self, due: Due, outcome: Outcome) -> None:
        try:
            with self._sessions.begin() as session:
                known = webhook_queue.record(session, due, outcome, max_attempts=self._settings.webhook_attempts)
                failpoint("webhook_record.before_commit")
            failpoint("webhook_record.after_commit")
        except NotFound:
            known = False
        said = outcome.error or "delivered"
        log.info("%s: %s (attempt %d)%s", due.id, said, due.attempt, "" if known else ", too late to count")

    async def _send(self, due: Due) -> Outcome:
        """Never raises: a receiver must not be able to end a worker."""
        try:
            # In a thread: a key store that is away takes seconds to say so.
            secret = await asyncio.to_thread(
                open_secret, self._vault, due.webhook_id, due.wrapped_key, due.sealed_secret
            )
            body = encode(due.payload)
            return await post(
                due.url,
                body,
                sign(secret, due.id, int(time.time()), body),
                private=self._settings.webhook_private,
                seconds=self._settings.webhook_timeout_seconds,
                tls=self._tls,
            )
        except KeyStoreAway:
            return Outcome(DeliveryError.KEY_STORE)
        except VaultError:
            return Outcome(DeliveryError.SECRET)
        except Exception as error:
            log.error("%s: cannot be sent: %s", due.id, where(error))
            return Outcome(DeliveryError.INTERNAL)
