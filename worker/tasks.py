"""What a worker does: claim a request and see it through (``worker.job``); nothing waiting, check what a revoke left.

What can be proven hopeless (diverged, no retain rows, another model, …) fails at once. Everything else, from a lost
database to a bug, is left to the lease: the job stops, the reaper puts the request back when the lease expires, and the
attempt cap ends it. The lease's rest is the pause between attempts, another worker may do better than a broken one, and
the last attempt states what went wrong.
"""

from __future__ import annotations

import logging

from sqlalchemy.exc import SQLAlchemyError

from app import active_set, job_queue
from app.errors import LeaseLost
from app.failpoints import failpoint
from app.settings import Mode
from app.tracebacks import where
from app.tracing import span
from models.device import give_memory_back
from models.examples import Example
from worker.concatenated import recheck
from worker.context import Context, unforgotten, why_unreadable
from worker.failures import DeviceLost
from worker.job import Job
from worker.threads import TRANSIENT, Heartbeat

log = logging.getLogger("letheon.worker")


def run_job(context: Context, request_id: str) -> bool:
    """Claim a request and see it through; False when it cannot be had now, and is not worth asking for at once.

    Never raises for a request's sake; the outcome is in the database.
    """
    settings = context.settings
    try:
        if why := why_unreadable(context):
            log.error("%s: not claimed, it waits: %s", request_id, why)
            return False
        with context.sessions.begin() as session:
            claim = job_queue.claim(
                session,
                request_id,
                owner=context.owner,
                lease_seconds=settings.lease_seconds,
                max_attempts=settings.max_attempts,
            )
            if claim is not None:
                failpoint("claim.before_commit")
    except TRANSIENT as error:
        log.warning("%s: not claimed, it waits on (%s)", request_id, type(error).__name__)
        return False
    if claim is None:
        log.info("%s: nothing to do, it is taken, ended or unknown", request_id)
        return False
    failpoint("claim.after_commit")
    log.info("%s: attempt %d starts", request_id, claim.attempt)
    try:
        # A trace of its own: the message is a doorbell and the trainer asks the database, so no submit leads here.
        with (
            span("letheon.attempt", request=request_id, attempt=claim.attempt),
            Heartbeat(
                context.sessions, claim, lease_seconds=settings.lease_seconds, every=settings.heartbeat_seconds
            ) as heartbeat,
        ):
            return Job(context, claim, heartbeat).run()
    except DeviceLost:
        raise  # ends the process
    except LeaseLost:
        log.warning("%s: attempt %d lost its lease; nothing more is written", request_id, claim.attempt)
    except Exception as error:
        # Nothing is hidden: type and frames are logged, and the request is still owed to the client (see above).
        log.error("%s: attempt %d broke off, left to its lease: %s", request_id, claim.attempt, where(error))
    finally:
        give_memory_back(context.llm)
    return True


def recheck_active_set(context: Context) -> None:
    """What a worker does when nothing waits: in mode ``concatenate``, check a set that a revoke has left unchecked."""
    if context.settings.mode != Mode.CONCATENATE:
        return

    def retain() -> list[Example]:
        with context.sessions() as session:
            return unforgotten(context, active_set.forgotten_digests(session))

    try:
        recheck(context.sessions, context.settings, context.vault, context.llm, retain)
    except SQLAlchemyError:
        raise  # the caller's business: it tries again
    except Exception as error:  # a set that cannot be checked now must not end the worker
        log.warning("the active set cannot be checked: %s", where(error))
