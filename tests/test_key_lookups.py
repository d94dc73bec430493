"""Keys of callers who come together are looked up together, and what each is told was read after it came."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app import db, keys
from app.errors import Unauthenticated
from app.key_lookups import AT_ONCE, TRIPS, KeyLookups
from app.tables import utcnow

Sessions = sessionmaker[Session]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.key_lookups.SECONDS", 60.0)  # look-ups are held up here on purpose


def make_key(sessions: Sessions, name: str) -> tuple[str, str]:
    """Its id, and what a caller presents."""
    with sessions.begin() as session:
        key, plaintext = keys.create_key(session, name=name, scopes=["classify"], actor="test")
        return key.id, plaintext


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """What is asked of the database meanwhile."""
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


@contextmanager
def held_up(
    engine: Engine, when: str = "before_cursor_execute"
) -> Iterator[tuple[threading.Semaphore, threading.Event]]:
    """Look-ups stop there; what counts those that have come so far, and what lets all go."""
    begun, go = threading.Semaphore(0), threading.Event()

    def wait(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "api_key" not in statement:  # what a look-up says first, of how long it waits
            return
        begun.release()
        assert go.wait(30)

    event.listen(engine, when, wait)
    try:
        yield begun, go
    finally:
        go.set()
        event.remove(engine, when, wait)


def test_each_caller_has_its_own_answer(sessions: Sessions, engine: Engine) -> None:
    made = [make_key(sessions, f"key {n}") for n in range(3)]
    wrong = [plaintext[:-4] + "AAAA" for _, plaintext in made] + ["", "lth_nothing", "lth_" + "0" * 16 + "_" + "A" * 43]

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        asked = [plaintext for _, plaintext in made] * 20 + wrong
        with statements(engine) as seen:
            found = await asyncio.gather(*(lookups.find(one) for one in asked), return_exceptions=True)
        for n in range(60):
            key = found[n]
            assert isinstance(key, keys.ApiKey) and key.id == made[n % 3][0]
        assert [type(one) for one in found[60:]] == [Unauthenticated] * len(wrong)
        assert len([one for one in seen if "api_key" in one]) <= (len(made) + len(wrong)) * TRIPS

    asyncio.run(ask())


def test_sixty_callers_with_one_key_ask_the_database_a_few_times(sessions: Sessions, engine: Engine) -> None:
    _, plaintext = make_key(sessions, "one")

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        with statements(engine) as seen:
            await asyncio.gather(*(lookups.find(plaintext) for _ in range(60)))
        assert 1 <= len([one for one in seen if "api_key" in one]) <= 1 + TRIPS

    asyncio.run(ask())


def test_wrong_keys_hold_nobody_up(sessions: Sessions, engine: Engine) -> None:
    _, good = make_key(sessions, "good")
    wrong = [f"lth_{n:016x}_" + "A" * 43 for n in range(300)]

    async def ask() -> None:
        lookups, answered = KeyLookups(sessions), list[str]()

        async def find(presented: str) -> keys.ApiKey | None:
            try:
                return await lookups.find(presented)
            except Unauthenticated:
                return None
            finally:
                answered.append(presented)

        asked = [*wrong[:150], good, *wrong[150:]]
        with statements(engine) as seen:
            found = await asyncio.gather(*(find(one) for one in asked))
        assert [key.name for key in found if key is not None] == ["good"]
        # One trip begins with the first that comes, and the other with the second.
        assert len([one for one in seen if "api_key" in one]) <= TRIPS + -(-len(asked) // AT_ONCE)
        assert answered.index(good) < 150 + TRIPS * AT_ONCE, "first come, first served"

    asyncio.run(ask())


def test_what_a_key_is_told_does_not_depend_on_who_else_asks(sessions: Sessions) -> None:
    made = [make_key(sessions, f"key {n}") for n in range(3)]
    with sessions.begin() as session:
        keys.revoke_key(session, made[1][0], actor="test")
        session.get_one(keys.ApiKey, made[2][0]).expires_at = utcnow()
    swapped = made[0][1][:21] + made[1][1][21:]  # the id of one and the secret of another
    asked = [plaintext for _, plaintext in made] + [swapped, "", "lth_nothing"]
    with sessions() as session:
        together = keys.authenticate_all(session, asked)
        assert [isinstance(together[one], keys.ApiKey) for one in asked] == [True] + [False] * 5
        for one in asked[1:]:
            with pytest.raises(Unauthenticated):
                keys.authenticate(session, one)
        assert keys.authenticate(session, asked[0]).id == made[0][0]
        assert keys.authenticate_all(session, []) == {}


def test_who_comes_after_a_revocation_is_refused_whatever_is_under_way(
    sessions: Sessions, engine: Engine, database_url: str
) -> None:
    key_id, plaintext = make_key(sessions, "one")

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        with held_up(engine, "after_cursor_execute") as (begun, go):
            early = [asyncio.create_task(lookups.find(plaintext)) for _ in range(2)]
            assert await asyncio.to_thread(begun.acquire, True, 30)  # it has read the key, and not yet said so
            other = db.make_engine(database_url)
            with sessionmaker(other).begin() as session:
                keys.revoke_key(session, key_id, actor="test")
            other.dispose()
            late = [asyncio.create_task(lookups.find(plaintext)) for _ in range(2 * TRIPS)]
            await asyncio.sleep(0)
            go.set()
            found = await asyncio.gather(*early, *late, return_exceptions=True)
        assert isinstance(found[0], keys.ApiKey)
        assert [type(one) for one in found[2:]] == [Unauthenticated] * 2 * TRIPS

    asyncio.run(ask())


def test_a_database_that_fails_reaches_every_caller_and_no_later_one(sessions: Sessions, engine: Engine) -> None:
    _, plaintext = make_key(sessions, "one")
    broken = [True]

    def fail(*_: object) -> None:
        if broken[0]:
            raise OperationalError("select", {}, Exception("gone"))

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        found = await asyncio.gather(*(lookups.find(plaintext) for _ in range(20)), return_exceptions=True)
        assert [type(one) for one in found] == [OperationalError] * 20
        broken[0] = False
        assert (await lookups.find(plaintext)).name == "one"

    event.listen(engine, "before_cursor_execute", fail)
    try:
        asyncio.run(ask())
    finally:
        event.remove(engine, "before_cursor_execute", fail)


def test_a_caller_that_goes_takes_nobody_with_it(sessions: Sessions, engine: Engine) -> None:
    _, plaintext = make_key(sessions, "one")

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        with held_up(engine) as (begun, go):
            tasks = [asyncio.create_task(lookups.find(plaintext)) for _ in range(6)]
            assert await asyncio.to_thread(begun.acquire, True, 30)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.sleep(0)
            go.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found[::2]] == [asyncio.CancelledError] * 3
        assert all(isinstance(one, keys.ApiKey) for one in found[1::2])

    asyncio.run(ask())


def test_who_comes_just_as_the_last_look_up_ends_is_answered(sessions: Sessions) -> None:
    """At every turn of the loop around that moment: a look-up that ends must not count as one that will see them."""
    _, plaintext = make_key(sessions, "one")

    async def ask() -> None:
        for turns in range(12):
            lookups = KeyLookups(sessions)
            first = [asyncio.create_task(lookups.find(plaintext)) for _ in range(2)]
            while not any(task.done() for task in first):
                await asyncio.sleep(0)
            late = []
            for _ in range(turns):
                late.append(asyncio.create_task(lookups.find(plaintext)))
                await asyncio.sleep(0)
            async with asyncio.timeout(30):
                found = await asyncio.gather(*first, *late)
            assert {key.name for key in found} == {"one"}

    asyncio.run(ask())


def test_a_look_up_under_way_is_counted_until_it_looks_for_the_last_time(sessions: Sessions) -> None:
    """Two that end together, and a caller whose turn is before their tasks are seen to be done."""
    _, plaintext = make_key(sessions, "one")

    async def ask() -> None:
        lookups = KeyLookups(sessions)
        ended = [asyncio.create_task(lookups.find(plaintext)) for _ in range(TRIPS)]
        await asyncio.gather(*ended)
        # As it is in the step in which both have returned: their done callbacks come a step later.
        lookups._trips.update(asyncio.create_task(asyncio.sleep(60)) for _ in range(TRIPS))
        held = set(lookups._trips)
        async with asyncio.timeout(30):
            assert (await lookups.find(plaintext)).name == "one"
        for task in held:
            task.cancel()

    asyncio.run(ask())
