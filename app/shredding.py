"""The two ends of a key share: made before the row that needs it, destroyed once what shreds it has committed.

A share's id goes into ``pending_shreds`` in the transaction that shreds. After its commit ``attach`` has the share
destroyed and the row deleted; what a crash leaves, the worker's reaper finishes. So at any moment either nothing was
shredded or the share is destroyed within one interval of the reaper.

Whoever asks the key store may wait for it, so a transaction that holds a lock which others want must not. A key that
such a transaction stores is made before it (``prepare_key``), with its share's id in ``prepared_shares``, and the
transaction takes it out again (``use_key``). Where it never does, the reaper has the share destroyed (``give_up``).
"""

from __future__ import annotations

import logging
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, event, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from app import db
from app.errors import KeyDestroyed, KeyStoreAway
from app.failpoints import failpoint
from app.keystore import CHUNK, ID_BYTES
from app.tables import PendingShred, PreparedShare, utcnow
from app.vault import Vault, share_id

log = logging.getLogger(__name__)

PREPARED_HOURS = 24
"""For so long a prepared key waits for its row. It is a matter of seconds, but clocks may differ."""
_BUSY_SECONDS = 0.5
_PENDING = "pending_shreds"


def prepare_key(sessions: sessionmaker[Session], vault: Vault) -> bytes:
    """A data key for a row that a later transaction stores with ``use_key``. Raises KeyStoreAway.

    The id of its share is on record before the share is, so that none is left behind when the process is killed. (One
    that sleeps for a day between the two, as a laptop may, leaves a share that opens nothing.)
    """
    if vault.keystore is None:
        return vault.new_key()
    vault.keystore.ping()  # while it is away nothing needs to be on record
    name = secrets.token_bytes(ID_BYTES)
    with sessions.begin() as session:
        session.add(PreparedShare(share_id=name, at=utcnow()))
    return vault.new_key(name)


def use_key(session: Session, wrapped: bytes) -> None:
    """This transaction stores a prepared key. Raises KeyDestroyed where it was given up: then another is needed."""
    name = share_id(wrapped)
    if name is None:
        return
    statement = delete(PreparedShare).where(PreparedShare.share_id == name).returning(PreparedShare.share_id)
    if session.scalar(statement.execution_options(synchronize_session=False)) is None:
        raise KeyDestroyed("the key waited too long for what it was made for, and was given up")


def give_up(sessions: sessionmaker[Session], vault: Vault, *, now: datetime | None = None) -> int:
    """Hand over to ``finish`` the shares whose row has not come; how many. Raises KeyStoreAway."""
    if vault.keystore is None:
        return 0
    old = PreparedShare.at < (now or utcnow()) - timedelta(hours=PREPARED_HOURS)
    with sessions() as session:
        names = list(session.scalars(select(PreparedShare.share_id).where(old).limit(CHUNK)))
    if not names:
        return 0
    known = vault.keystore.destroyed(names)
    with sessions.begin() as session:
        # Whoever takes a row out has its share: of this and ``use_key`` only one gets it.
        statement = delete(PreparedShare).where(PreparedShare.share_id.in_(names)).returning(PreparedShare.share_id)
        gone = session.scalars(statement.execution_options(synchronize_session=False)).all()
        shares = [name for name in gone if name in known]  # others broke off before there was a share
        for name in shares:
            session.merge(PendingShred(share_id=name, at=utcnow()))
    return len(shares)


def destroy_key(session: Session, wrapped: bytes | None) -> None:
    """The caller nulls or deletes this wrapped key: with the commit it is gone from the disk, and its share goes too.

    It has to be read under the lock of its row, or it may be one that a rotation is about to replace.
    """
    db.note_shredding(session)
    found = share_id(wrapped)
    if found is not None:
        session.merge(PendingShred(share_id=found, at=utcnow()))
        session.info[_PENDING] = True


def finish(sessions: sessionmaker[Session], vault: Vault) -> int:
    """Destroy the shares that committed shreddings name; how many. Safe to do twice, and at once in two processes.

    A share that the key store does not know stays pending: it may lie in another one, which is then still to be told.
    Raises KeyStoreAway.
    """
    with sessions() as session:
        pending = list(session.scalars(select(PendingShred.share_id)))
    if not pending:
        return 0
    if vault.keystore is None:
        log.warning("%d key shares are to be destroyed, and no key store is configured", len(pending))
        return 0
    failpoint("shares.pending")
    gone = list(vault.keystore.destroy(pending))
    failpoint("shares.destroyed")
    with sessions.begin() as session:
        for start in range(0, len(gone), CHUNK):
            session.execute(delete(PendingShred).where(PendingShred.share_id.in_(gone[start : start + CHUNK])))
    if len(gone) < len(pending):
        log.warning("%d key shares could not be destroyed yet", len(pending) - len(gone))
    return len(gone)


def attach(sessions: sessionmaker[Session], vault: Vault) -> None:
    """Have ``finish`` run after every commit of these sessions that shreds. Without a key store there is nothing to do.

    On connections of its own: the committing session still holds one, and others wait for one.
    """
    if vault.keystore is None:
        return
    engine = db.make_engine(_url(sessions), busy_seconds=_BUSY_SECONDS, poolclass=NullPool)
    own = db.make_sessions(engine)

    def after_commit(session: Session) -> None:
        # What was rolled back, or is only a savepoint yet, is not in the table: it says what has happened.
        if session.info.pop(_PENDING, False):
            try:
                finish(own, vault)
            except (SQLAlchemyError, KeyStoreAway) as error:  # the commit itself has happened
                log.warning("key shares are destroyed later (%s)", type(error).__name__)

    event.listen(sessions, "after_commit", after_commit)


def _url(sessions: sessionmaker[Session]) -> str:
    url: str = sessions.kw["bind"].url.render_as_string(hide_password=False)
    return url
