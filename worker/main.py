"""The worker process: one model, one job at a time, a reaper beside it, and Celery's solo pool as the ear.

Solo, because CUDA does not survive a fork and a job owns its deadline anyway. A SIGTERM or SIGINT is Celery's "warm
shutdown", which waits for the running job; the job sees ``Context.stop``, stores a checkpoint, releases its request.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from celery import Celery, signals
from sqlalchemy.exc import SQLAlchemyError

from app import broker, db, job_queue
from app.defaults import resolve_model, resolve_retain
from app.errors import LetheonError
from app.settings import Settings, get_settings
from app.tracebacks import where
from app.vault import Vault
from models.errors import ModelError
from models.examples import read_examples
from models.llm import FrozenLLM
from worker.heartbeat import Reaper
from worker.tasks import Context, run_job

log = logging.getLogger("letheon.worker")

PARENT_POLL_SECONDS = 0.5
ORPHAN_GRACE_SECONDS = 30.0


def run(settings: Settings) -> int:
    """Serve training jobs until a signal; returns the exit status. Raises LetheonError, ModelError at start-up."""
    configure_logging()
    if os.environ.get("LETHEON_EXIT_WITH_PARENT") == "1":
        exit_with_parent()
    context = prepare(settings)
    celery = broker.make_celery(settings)
    register(celery, context)
    reaper = Reaper(
        context.sessions,
        ring=lambda request_id: ring(celery, settings, request_id),
        every=settings.reaper_seconds,
        ring_seconds=settings.ring_seconds,
        max_attempts=settings.max_attempts,
        on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )

    def stop(**_: Any) -> None:
        context.stop.set()

    signals.worker_shutting_down.connect(stop, weak=False)
    worker = celery.Worker(
        pool="solo",
        concurrency=1,
        hostname=f"letheon@{context.owner.replace(':', '-')}",
        loglevel="INFO",
        quiet=True,
        without_gossip=True,  # workers have nothing to tell each other: the database knows it all
        without_mingle=True,
        without_heartbeat=True,
    )
    reaper.start()
    try:
        worker.start()
    finally:
        signals.worker_shutting_down.disconnect(stop)
        reaper.stop()
        reaper.join()
    return 1 if reaper.crashed else int(worker.exitcode or 0)


def configure_logging() -> None:
    """Plain lines on stderr. Celery must not bring its own handlers: they would print tracebacks with messages."""

    def keep(**_: Any) -> None:
        """A receiver is all that Celery asks for to leave logging alone."""

    signals.setup_logging.connect(keep, weak=False, dispatch_uid="letheon")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def prepare(settings: Settings) -> Context:
    """Database, vault, model and retain set. Raises NotReady, VaultError, ModelError."""
    url = settings.effective_database_url
    if url.startswith("sqlite"):
        db.upgrade(url)  # embedded: nobody else would; the API may do the same at the same moment
    engine = db.make_engine(url)
    db.check_schema(engine)
    vault = Vault.from_settings(settings)
    llm = load_model(settings)
    retain = read_examples(resolve_retain(settings), labels=settings.labels)
    log.info("model %s on %s, %d retain rows", llm.fingerprint[:12], llm.device, len(retain))
    return Context(settings=settings, sessions=db.make_sessions(engine), vault=vault, llm=llm, retain=retain)


def load_model(settings: Settings) -> FrozenLLM:
    """The model, as the API loads it: any difference is another fingerprint. Raises NotConfigured, ModelError."""
    source, adapter = resolve_model(settings)
    return FrozenLLM.load(
        source,
        adapter=adapter,
        quantization=settings.quantization,
        device=settings.device,
        template=settings.template,
        labels=settings.labels,
        generic_labels=settings.generic_labels,
    )


def register(celery: Celery, context: Context) -> None:
    """Bind the task's name to this process's context."""

    def train(request_id: str) -> None:
        if context.stop.is_set():
            return  # a message that came with the signal; the row still waits and will be rung again
        run_job(context, request_id)
        if not context.stop.is_set():
            ring_next(celery, context)

    celery.task(name=broker.TRAIN_TASK, ignore_result=True)(train)


def ring_next(celery: Celery, context: Context) -> None:
    """Announce the oldest waiting request now instead of at the reaper's next round."""
    try:
        with context.sessions() as session:
            request_id = job_queue.next_pending(session)
    except SQLAlchemyError as error:
        log.warning("the next request waits for the reaper (%s)", type(error).__name__)
        return
    if request_id is not None:
        ring(celery, context.settings, request_id)


def ring(celery: Celery, settings: Settings, request_id: str) -> bool:
    return broker.enqueue_training(celery, request_id, expires=settings.ring_seconds)


def exit_with_parent() -> None:
    """Stop when the parent does, as an embedded worker must: first cooperatively, then by force."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        log.warning("the parent process is gone, stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> int:
    try:
        return run(get_settings())
    except (LetheonError, ModelError) as error:  # both are safe to show
        log.critical("cannot start: %s", error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        log.critical("stopped by an error: %s", where(error))
    return 1


if __name__ == "__main__":
    sys.exit(main())
