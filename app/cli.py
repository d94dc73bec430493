"""The ``letheon`` command: ``serve`` and ``worker`` here, the rest in the modules ``cli_…``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from app import cli_admin, cli_audit, cli_doctor, cli_interop, cli_local, cli_remote, cli_vault, cli_webhooks
from app.cli_output import CommandGroup, note
from app.defaults import resolve_model, resolve_retain
from app.settings import get_settings
from app.supervise import WORKER, WorkerSupervisor
from app.watchdog import end_when_stuck

# No pretty tracebacks: they print local variables, and a local variable may be a forget text or a key.
app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a deployed LLM text classifier forget on request, at inference time.",
    epilog="LETHEON_URL and LETHEON_API_KEY say which server to talk to; LETHEON_HOME and others configure one.",
)
app.add_typer(cli_local.model, name="model")
app.add_typer(cli_local.data, name="data")
app.command("finetune")(cli_local.finetune)
app.add_typer(cli_remote.requests, name="requests")
app.command("classify")(cli_remote.classify)
app.add_typer(cli_webhooks.webhooks, name="webhooks")
cli_admin.prompts.command("export")(cli_interop.export)
cli_admin.prompts.command("import")(cli_interop.import_adapter)
app.add_typer(cli_admin.prompts, name="prompts")
app.add_typer(cli_admin.active_sets, name="active-sets")
app.add_typer(cli_local.keys_app, name="keys")
app.add_typer(cli_vault.vault_app, name="vault")
app.add_typer(cli_audit.audit_app, name="audit")
app.add_typer(cli_audit.receipt, name="receipt")
app.command("doctor")(cli_doctor.doctor)


@app.command("serve")
def serve(
    host: Annotated[str | None, typer.Option(help="Default: LETHEON_HOST, 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 picks a free one. Default: LETHEON_PORT.")
    ] = None,
    worker: Annotated[bool, typer.Option(help="Also run the training worker, as a child process.")] = True,
) -> None:
    """Run the API and, unless --no-worker, the worker, until SIGTERM or Ctrl-C."""
    chosen = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = get_settings().model_copy(update=chosen)
    resolve_model(settings)  # before anything is started: what is missing is told in one line
    if worker:
        resolve_retain(settings)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    from app.main import create_app, make_server

    server = make_server(create_app(settings, alone=True), settings)
    # The server restores these handlers when it is done and raises the signal again. By then it is dealt with.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    socket = server.config.bind_socket()  # before the worker: a port that is taken must not cost a model load
    supervisor = WorkerSupervisor() if worker else None

    def check_alive() -> None:
        service = getattr(server.app.state, "service", None)  # none before the start and where it failed
        if service is not None:
            service.serving.check_alive()

    watchdog = end_when_stuck(check_alive)
    if supervisor is not None:
        supervisor.start()
    try:
        note(f"Letheon listens on http://{settings.host}:{socket.getsockname()[1]} (API documentation under /docs)")
        server.run(sockets=[socket])
    finally:
        watchdog.set()  # a model thread that has ended is in order now
        if supervisor is not None:
            supervisor.stop()
    if not server.started:
        raise typer.Exit(3)


@app.command("worker")
def worker() -> None:
    """Run a training worker alone, for a deployment where the API runs elsewhere."""
    settings = get_settings()
    resolve_model(settings)
    resolve_retain(settings)
    os.execv(WORKER[0], list(WORKER))  # the worker is a program of its own: nothing imports it


def main() -> None:
    app()


if __name__ == "__main__":
    main()
