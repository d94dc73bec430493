"""The worker process: one model, one job at a time. Celery's worker (solo pool) is the ear that hears the doorbell.

Solo, because CUDA does not survive a fork. A SIGTERM or SIGINT is Celery's "warm shutdown"; the running job sees
``Context.stop``, stores a checkpoint and releases its request, and the process waits for that.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch._dynamo  # torch.optim would import it in the first training, for seconds of whose deadline
from celery import signals
from sqlalchemy import Engine

from app import active_set, broker, db, failpoints, tracing
from app.defaults import load_arguments, resolve_held_out, resolve_retain
from app.errors import LetheonError, ModeMismatch
from app.model_thread import in_passing, keep_memory, leave_cores, take_cores
from app.reconcile import make_ready
from app.settings import Settings, get_settings
from app.tracebacks import where
from app.vault import Vault
from models.errors import DatasetError, ModelError
from models.examples import Example, read_examples
from models.llm import FrozenLLM
from worker.chores import end_expired, forget_old_keys, shred_due, sign_audit_log, tell_ended
from worker.context import Context
from worker.deliveries import Deliveries
from worker.tasks import recheck_active_set, run_job
from worker.threads import Reaper, Trainer

log = logging.getLogger("letheon.worker")

PARENT_POLL_SECONDS = 0.5
ORPHAN_GRACE_SECONDS = 30.0


def run(settings: Settings) -> int:
    """Serve training jobs until a signal; returns the exit status. Raises LetheonError, ModelError at start-up."""
    configure_logging()
    failpoints.arm(os.environ)
    parent = os.environ.get("LETHEON_EXIT_WITH_PARENT", "")
    if parent.isdigit():
        exit_with_parent(int(parent))
    if settings.traces:
        tracing.require()
    context = prepare(settings)
    stop_tracing = tracing.start("letheon-worker") if settings.traces else None
    celery = broker.make_celery(settings)

    def on_death() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    keep_memory()
    cores = torch.get_num_threads()
    trainer = Trainer(
        context.sessions,
        lambda request_id: run_job(context, request_id),
        every=settings.reaper_seconds,
        on_death=on_death,
        begin=partial(take_cores, cores),
        idle=lambda: recheck_active_set(context),
    )
    reaper = Reaper(
        context.sessions,
        lambda request_id: broker.enqueue_training(celery, request_id, expires=settings.ring_seconds),
        every=settings.reaper_seconds,
        ring_seconds=settings.ring_seconds,
        max_attempts=settings.max_attempts,
        on_death=on_death,
        chores=[
            partial(end_expired, context.sessions),
            partial(forget_old_keys, context.sessions, settings.idempotency_hours),
            partial(shred_due, context.sessions, context.vault),
            partial(tell_ended, context.sessions, context.vault, set[str]()),
            partial(sign_audit_log, context.sessions, context.vault, settings.audit_checkpoint_seconds),
        ],
    )

    deliveries = Deliveries(context.sessions, context.vault, settings, on_death=on_death)

    def train(request_id: str) -> None:
        """The task: the id says what happened, the database says what to do."""
        trainer.ring()

    def stop(**_: Any) -> None:
        context.stop.set()
        trainer.stop()
        reaper.stop()
        deliveries.stop()

    celery.task(name=broker.TRAIN_TASK, ignore_result=True)(train)
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
    leave_cores()
    trainer.start()
    reaper.start()
    deliveries.start()
    try:
        worker.start()
    finally:
        stop()
        signals.worker_shutting_down.disconnect(stop)
        trainer.join()  # the checkpoint is being stored
        reaper.join()
        deliveries.join()
        context.vault.close()
        if stop_tracing is not None:
            stop_tracing()
    return 1 if trainer.crashed or reaper.crashed or deliveries.crashed else int(worker.exitcode or 0)


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
    check_mode(engine, settings)
    vault = Vault.from_settings(settings)
    sessions = db.make_sessions(engine, keep_texts=timedelta(hours=settings.keep_texts_hours))
    make_ready(sessions, vault)
    llm = in_passing(lambda: FrozenLLM.load(**load_arguments(settings)))
    retain = read_fitting(settings, llm, resolve_retain(settings), "retain")
    held_out = resolve_held_out(settings) if settings.evidence_texts else None
    others = read_fitting(settings, llm, held_out, "held-out") if held_out else []
    log.info("model %s on %s, %d retain rows", llm.fingerprint[:12], llm.device, len(retain))
    return Context(settings=settings, sessions=sessions, vault=vault, llm=llm, retain=retain, held_out=others)


def read_fitting(settings: Settings, llm: FrozenLLM, source: str, name: str) -> list[Example]:
    """Rows no longer than any text the service takes: others would make every step slower, or not fit at all.

    Raises DatasetError, also where none is left.
    """
    rows = read_examples(source, split=settings.retain_split, labels=settings.labels)
    limit = llm.text_limit(settings.max_text_tokens, settings.num_virtual_tokens)
    lengths = [len(row) - len(llm.template.tail_ids) for row in llm.rows([row.text for row in rows])]
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    if not fitting:
        raise DatasetError(f"every row of the {name} set is longer than {limit} tokens")
    if len(fitting) < len(rows):
        log.warning("%d %s rows over %d tokens are left out", len(rows) - len(fitting), name, limit)
    return fitting


def check_mode(engine: Engine, settings: Settings) -> None:
    """Raises ModeMismatch when a prompt in force is of the other mode: every request would fail, its texts shredded."""
    with db.make_sessions(engine)() as session:
        _, members = active_set.read_members(session)
    other = next((member for member in members if member.mode != settings.mode), None)
    if other is not None:
        raise ModeMismatch(f"prompt {other.id} is of mode {other.mode}, and LETHEON_MODE is {settings.mode}")


def exit_with_parent(parent: int) -> None:
    """Stop when process ``parent`` does, as an embedded worker must: first cooperatively, then by force.

    Its pid is given, not asked for: it may have died while this process was still importing torch.
    """

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
