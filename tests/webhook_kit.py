"""A real receiver of webhooks on a loopback port, and short ways to fill the queue, shared by the tests of webhooks."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from app import keys, lifecycle, webhooks
from app.lifecycle import ForgetText
from app.settings import Settings
from app.tables import UnlearnRequest, Webhook, WebhookDelivery, utcnow
from app.vault import Vault
from app.webhook_queue import PAUSES
from worker.deliveries import Deliveries

SECRET_TEXT = "Zyxomma Quillfeather is dreadful"
Sessions = sessionmaker[Session]


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass
class Receiver:
    """``answer`` gets each message and says (status, headers); what it has got is in ``received``."""

    answer: Callable[[Received], tuple[int, dict[str, str]]]
    port: int = 0
    scheme: str = "http"
    received: list[Received] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"


def accept(_: Received) -> tuple[int, dict[str, str]]:
    return 204, {}


@contextmanager
def receiving(
    answer: Callable[[Received], tuple[int, dict[str, str]]] = accept, certificate: Path | None = None
) -> Iterator[Receiver]:
    """A receiver for the length of the block; with TLS where there is a certificate."""
    receiver = Receiver(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            receiver.received.append(got)
            status, headers = receiver.answer(got)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # what a followed redirect would ask

        def log_message(self, *_: Any) -> None:
            """Not on stderr."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128  # with the default of 5, a connection of many at once waits seconds for its next try

        def handle_error(self, *_: Any) -> None:
            """A client that hung up is what some of these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda _socket, name, _context: receiver.server_names.append(name)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        receiver.scheme = "https"
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


def settings(**changes: Any) -> Settings:
    values = {"webhook_private": True, "webhook_timeout_seconds": 30.0, "webhook_attempts": 3}
    return Settings(_env_file=None, **{**values, **changes})


def add_key(sessions: Sessions, *scopes: str) -> str:
    with sessions.begin() as session:
        key, _ = keys.create_key(session, name="test", scopes=scopes or ("requests",), actor="test")
    return key.id


def add_webhook(sessions: Sessions, vault: Vault, key_id: str, url: str, **options: Any) -> tuple[str, str]:
    """Its id and its secret."""
    with sessions.begin() as session:
        options = {"scopes": ["requests"], "private": True, **options}
        webhook, secret = webhooks.create_webhook(session, vault, api_key_id=key_id, url=url, **options)
    return webhook.id, secret


def submit(sessions: Sessions, vault: Vault, key_id: str | None) -> str:
    with sessions.begin() as session:
        return lifecycle.create_request(
            session,
            vault,
            texts=[ForgetText(SECRET_TEXT)],
            reason="asked by Quillfeather",
            options={},
            fingerprint="f" * 64,
            api_key_id=key_id,
        ).id


def deliveries(sessions: Sessions, webhook_id: str | None = None) -> list[WebhookDelivery]:
    """Oldest first; of all webhooks when none is named."""
    query = select(WebhookDelivery).order_by(WebhookDelivery.created_at, WebhookDelivery.id)
    with sessions() as session:
        return [row for row in session.scalars(query) if webhook_id in (None, row.webhook_id)]


def webhook(sessions: Sessions, webhook_id: str) -> Webhook:
    with sessions() as session:
        return session.get_one(Webhook, webhook_id)


def request(sessions: Sessions, request_id: str) -> UnlearnRequest:
    with sessions() as session:
        return lifecycle.get_request(session, request_id)


def make_due(sessions: Sessions) -> None:
    """The pauses and leases of everything that has not ended are over."""
    with sessions.begin() as session:
        session.execute(
            update(WebhookDelivery).where(WebhookDelivery.next_at.is_not(None)).values(next_at=utcnow()),
            execution_options={"synchronize_session": False},
        )


def sent_long_ago(sessions: Sessions) -> None:
    """So that what was sent may be sent once more."""
    with sessions.begin() as session:
        session.execute(
            update(WebhookDelivery).values(sent_at=utcnow() - timedelta(seconds=PAUSES[0])),
            execution_options={"synchronize_session": False},
        )


def sender(sessions: Sessions, vault: Vault, **changes: Any) -> Deliveries:
    """Not started: ``work()`` sends what is due and returns."""
    return Deliveries(sessions, vault, settings(**changes), on_death=lambda: None, every=0.02)
