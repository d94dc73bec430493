"""API keys looked up for the callers of one replica, together where they come together.

A look-up is a trip to a thread and a query. Sixty callers at once would make sixty of each, and share a handful of
connections; here those who come while a look-up runs wait for the next, which is for as many as one query takes, in the
order in which they came: who sends thousands of wrong keys holds nobody up for long. Nothing is kept: what a caller is
told was read after it came, so a key that has been revoked is refused by the very next call.

Nobody waits here for longer than a few seconds, whatever the database does, and no more than so many do at a time: who
has not been identified yet has no deadline of its own, and may have hung up long ago, which nobody looks at so early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice

from anyio import CapacityLimiter, to_thread
from sqlalchemy.orm import Session, sessionmaker

from app import db, keys
from app.errors import Overloaded, Unauthenticated
from app.problems import Unavailable
from app.tables import ApiKey

TRIPS = 2  # at once: a connection that hangs does not hold up everybody
AT_ONCE = 100  # keys of one query
SECONDS = 3.0  # a look-up takes milliseconds, and one that waits for a lock is given up sooner (``db.impatient``)
MOST = 2048  # callers: by default no more texts may wait for an answer


class KeyLookups:
    """For one event loop."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._waiting: dict[str, set[asyncio.Future[ApiKey]]] = {}  # by what they presented
        self._callers = 0  # who wait, also for what is under way
        self._under_way = 0
        self._trips: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected
        self._threads = CapacityLimiter(TRIPS)  # its own: whatever keeps the routes' threads busy, callers are known

    async def find(self, presented: str) -> ApiKey:
        """The key that was presented; its session is closed.

        Raises Unauthenticated, Overloaded, Unavailable (no answer in time), and what the database raises.
        """
        if self._callers >= MOST:
            raise Overloaded("too many callers wait for their API keys to be looked up", retry_after=1)
        future: asyncio.Future[ApiKey] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(presented, set()).add(future)
        self._callers += 1
        try:
            if self._under_way < TRIPS:
                self._under_way += 1
                trip = asyncio.create_task(self._look_up())
                self._trips.add(trip)
                trip.add_done_callback(self._trips.discard)
            async with asyncio.timeout(SECONDS):
                return await future
        except TimeoutError:
            raise Unavailable("the database does not answer") from None
        finally:
            self._callers -= 1
            self._leave(presented, future)

    def _leave(self, presented: str, future: asyncio.Future[ApiKey]) -> None:
        """Whoever waits no more is looked up for no more."""
        others = self._waiting.get(presented)
        if others is not None and future in others:
            others.remove(future)
            if not others:
                del self._waiting[presented]

    async def _look_up(self) -> None:
        """Until nobody waits; counted as under way for exactly as long as it would see who comes."""
        try:
            while self._waiting:
                first = list(islice(self._waiting, AT_ONCE))  # a dict keeps the order
                await self._tell({presented: self._waiting.pop(presented) for presented in first})
        finally:
            self._under_way -= 1

    async def _tell(self, asked: dict[str, set[asyncio.Future[ApiKey]]]) -> None:
        found: dict[str, ApiKey | Unauthenticated] = {}
        failure: Exception | None = None
        try:
            found = await to_thread.run_sync(self._read, tuple(asked), limiter=self._threads)
        except Exception as error:  # reaches every caller
            failure = error
        finally:
            for presented, futures in asked.items():
                answer = found.get(presented, failure)
                for future in futures:
                    if future.done():  # its caller has gone
                        continue
                    if isinstance(answer, ApiKey):
                        future.set_result(answer)
                    elif answer is not None:
                        future.set_exception(answer)
                    else:  # the server is being torn down
                        future.cancel()

    def _read(self, presented: Sequence[str]) -> dict[str, ApiKey | Unauthenticated]:
        with self._sessions() as session:
            db.impatient(session)
            return keys.authenticate_all(session, presented)
