"""The HTTP application: what starts, what stops, and which routes there are."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.telemetry import TelemetryConfig
from starlette.responses import Response

from app import console, db, document, failpoints, problems, tracing
from app.auth import create_first_key, describe_scopes
from app.broker import make_celery
from app.defaults import load_arguments
from app.deps import Service
from app.dry_run import DryRuns
from app.errors import LetheonError
from app.event_streams import EventStreams
from app.http_limits import bounded
from app.key_lookups import KeyLookups
from app.key_uses import KeyUses
from app.metrics import Metrics
from app.middleware import BodyLimit, RequestContext
from app.model_thread import in_passing, keep_memory
from app.rate_limits import RateLimits
from app.reconcile import make_ready
from app.routes import (
    admin,
    approvals,
    audit,
    classify,
    docs,
    evidence,
    exports,
    health,
    metrics,
    reports,
    unlearn_requests,
    webhooks,
)
from app.scrape import Scrapes
from app.security_headers import SecurityHeaders
from app.serving import Serving
from app.settings import Settings
from app.tables import ApiKey
from app.vault import Vault
from models.compiling import compile_where_it_pays, keep_compiled_in
from models.errors import ModelError
from models.inference import rows_of_a_pass
from models.llm import FrozenLLM

READERS = 6  # connections: two look-ups of keys, the model's thread, who watches the active set, two probes
DESCRIPTION = (
    "Makes a deployed LLM text classifier suppress, at inference time, what it was asked to forget. "
    "No weight changes: the frozen weights still hold the data, and revoking a prompt brings the old behaviour back."
)

SILENT: TelemetryConfig = {
    # FastAPI's own tells a process-wide OpenTelemetry provider paths, queries and exceptions with their messages, also
    # where somebody else, such as Ray or an agent, has set one up. What is told is in app.metrics and app.tracing.
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


class ModelFailed(LetheonError):
    """The ML core refused; its messages are safe to show."""

    status, code, title = 500, "model", "The model cannot do this"


class LetheonAPI(FastAPI):
    """FastAPI, with an OpenAPI document that tells what scopes mean and this server's limits."""

    settings: Settings

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        schema = super().openapi()
        describe_scopes(schema)
        document.complete(schema, self.settings)
        return schema


def create_app(settings: Settings, llm: FrozenLLM | None = None, *, alone: bool = False) -> FastAPI:
    """The application. ``llm`` saves loading a model twice where one process holds several apps.

    ``alone``: nothing else computes in this process, so that the model's thread may have all cores to itself.

    Raises MissingExtra and BadFailpoint. Its start raises NotReady (schema not migrated, on PostgreSQL), VaultError and
    ModelError.
    """
    failpoints.arm(os.environ)
    if settings.traces:
        tracing.require()
    counts = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The server's own access log has query strings; ours does not.
        logging.getLogger("uvicorn.access").disabled = True
        with ExitStack() as stack:
            app.state.service = service = _start(settings, llm, counts, stack, alone=alone)
            try:
                yield
            finally:
                service.stopping.set()

    app = LetheonAPI(
        title="Letheon",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # app.routes.docs has them without another host's scripts
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        telemetry=SILENT,
    )
    app.settings = settings
    problems.install(app)
    app.state.problem_page = console.problem_page
    app.add_exception_handler(ModelError, _model_error)
    app.add_middleware(
        BodyLimit,
        admit=console.admit,
        max_bytes=settings.max_body_bytes,
        max_held=settings.max_held_body_bytes,
        seconds=settings.body_seconds,
    )
    app.add_middleware(RequestContext, metrics=counts)
    app.add_middleware(SecurityHeaders)  # added last, so outermost
    for module in (
        *(unlearn_requests, approvals, reports, evidence, webhooks, classify),
        *(admin, exports, audit, health, metrics, docs),
    ):
        app.include_router(module.router)
    app.include_router(console.router)
    return app


def _start(settings: Settings, llm: FrozenLLM | None, counts: Metrics, stack: ExitStack, *, alone: bool) -> Service:
    if settings.traces:
        stack.callback(tracing.start("letheon-api"))
    url = settings.effective_database_url
    if url.startswith("sqlite"):
        db.upgrade(url)
    engine = db.make_engine(url)
    stack.callback(engine.dispose)
    db.check_schema(engine)
    sessions = db.make_sessions(engine, keep_texts=timedelta(hours=settings.keep_texts_hours))
    vault = Vault.from_settings(settings)
    stack.callback(vault.close)
    make_ready(sessions, vault)
    if vault.keystore is not None:
        stack.callback(vault.keystore.watch(settings.active_set_poll_seconds))
    celery = make_celery(settings)
    stack.callback(celery.close)
    # Of their own: whatever the routes wait for, and they may hold all their connections, has no say in these.
    readers = db.make_engine(url, pool_size=READERS, max_overflow=0, pool_timeout=db.LOCK_SECONDS)
    stack.callback(readers.dispose)
    reads = db.make_sessions(readers)
    keep_memory()  # what starts from here on computes as the model's thread will
    model = in_passing(lambda: _model(settings, llm, counts))
    serving = Serving(model, reads, vault, settings, counts, alone=alone)
    stack.callback(serving.close)
    rates, key_uses = RateLimits(settings), KeyUses(sessions)
    stack.callback(key_uses.close)

    def admitted(key: ApiKey) -> None:
        key_uses.note(key.id)
        rates.take_call(key.id, key.limits)

    scrapes = Scrapes(counts, sessions, serving.check, admitted, vault.keystore)
    stack.callback(scrapes.close)
    first = create_first_key(sessions) if settings.first_key else None
    if first is not None:
        # Not through logging: a log is kept and shipped, this is shown once.
        print(f"Letheon: first API key (all scopes, shown only now): {first}", file=sys.stderr, flush=True)
    dry_runs = DryRuns(serving, sessions, vault, settings)
    return Service(
        settings,
        engine,
        readers,
        sessions,
        vault,
        celery,
        serving,
        counts,
        scrapes,
        rates,
        EventStreams(settings.max_event_streams),
        key_uses,
        KeyLookups(reads),
        dry_runs,
        stopping=asyncio.Event(),
    )


def _model(settings: Settings, llm: FrozenLLM | None, counts: Metrics) -> FrozenLLM:
    """In a thread with all cores: what is compiled is for that number of threads."""
    model = llm if llm is not None else FrozenLLM.load(**load_arguments(settings))
    if settings.compile != "off":
        keep_compiled_in(settings.home / "compiled")
        rows = rows_of_a_pass(model, settings.max_batch_texts)
        counts.compiled(compile_where_it_pays(model, rows=rows, always=settings.compile == "on"))
    return model


async def _model_error(request: Request, exc: Exception) -> Response:
    return problems.problem_response(request.scope, ModelFailed(str(exc)))


class Server(uvicorn.Server):
    """uvicorn waits for open responses before it tells the application to stop; event streams have to know first."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service: Service | None = getattr(self.app.state, "service", None)  # none when the start failed
        if service is not None:
            service.stopping.set()
        await super().shutdown(sockets)


def make_server(app: FastAPI, settings: Settings) -> Server:
    """The server that `letheon serve` runs: ``make_server(app, settings).run()``."""
    return Server(
        app,
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=bounded(settings.max_connections),
            ws="none",  # there are none, and a library for them would have limits of its own
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=30,
        ),
    )
