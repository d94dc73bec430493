"""What the reaper sees to beside the queue, each in transactions of its own. All may raise SQLAlchemyError."""

from __future__ import annotations

import logging

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app import audit, db, ended, expiry, idempotency, job_queue, shredding
from app.errors import LetheonError
from app.failpoints import failpoint
from app.signing_key import load_signer
from app.tracebacks import where
from app.vault import Vault

log = logging.getLogger("letheon.worker")


def end_expired(sessions: sessionmaker[Session]) -> None:
    """Revoke or fail the requests whose time is over."""
    with sessions() as session:
        expired = expiry.due(session)
    for request_id in expired:
        with sessions.begin() as session:
            ended = expiry.expire(session, request_id)
            if ended:
                failpoint("expire.before_commit")
        if ended:
            failpoint("expire.after_commit")
            log.info("%s: expired", request_id)


def forget_old_keys(sessions: sessionmaker[Session], hours: float) -> None:
    """Idempotency keys that are remembered no longer."""
    with sessions.begin() as session:
        idempotency.forget_old(session, hours=hours)


def shred_due(sessions: sessionmaker[Session], vault: Vault) -> None:
    """Texts that were kept for a while; what is left on disk; the key shares of all that was shredded or never used."""
    with sessions.begin() as session:
        job_queue.shred_due(session)
    db.empty_log(sessions)  # before the key store is asked: it may be away
    shredding.give_up(sessions, vault)
    shredding.finish(sessions, vault)


def tell_ended(sessions: sessionmaker[Session], vault: Vault, told: set[str]) -> None:
    """What has ended, to the key store; ``told`` is what it has heard of."""
    if vault.keystore is not None:
        ended.tell(sessions, vault.keystore, told)


def sign_audit_log(sessions: sessionmaker[Session], vault: Vault, every_seconds: float) -> None:
    """A checkpoint, where one is due."""
    try:
        with sessions.begin() as session:
            if audit.checkpoint_is_due(session, every_seconds):
                audit.checkpoint(session, load_signer(session, vault))
    except SQLAlchemyError:
        raise
    except LetheonError as error:  # an altered log must be seen; it must not stop requests
        log.error("the audit log gets no checkpoint: %s", error.detail)
    except Exception as error:  # nor must one that cannot even be read
        log.error("the audit log gets no checkpoint: %s", where(error))
