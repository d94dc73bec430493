"""Destroying key shares, once the transaction that shreds has committed.

The share's id goes into ``pending_shreds`` in that transaction. After its commit ``attach`` has the share destroyed and
the row deleted; what a crash leaves, the worker's reaper finishes. So at any moment either nothing was shredded or the
share is destroyed within one interval of the reaper.
"""

from __future__ import annotations

import logging

from sqlalchemy import delete, event, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from app import db
from app.errors import KeyStoreAway
from app.failpoints import failpoint
from app.keystore import CHUNK
from app.tables import PendingShred, utcnow
from app.vault import Vault, share_id

log = logging.getLogger(__name__)

_BUSY_SECONDS = 0.5
_PENDING = "pending_shreds"


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
