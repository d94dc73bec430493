"""A receiver of webhooks, and what became of every message: sent at least once, under one id, and none left out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import webhooks
from app.tables import DeliveryState, RequestEvent, WebhookDelivery, utcnow
from app.webhook_queue import OPEN
from bench.fault_judge import Outcome
from bench.fault_processes import FaultFailed, wait_for
from bench.fault_site import Site

COPIES = 2
"""A message is sent once more for each sender that dies, and one dies in a trial."""


@dataclass
class Ears:
    """What has arrived: how often each ``webhook-id``."""

    webhook_id: str = ""
    since: int = 0  # the event after which messages are owed
    copies: Counter[str] = field(default_factory=Counter)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ears: Ears) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.ears, self.lock = ears, threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A worker that was killed while it sent."""


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Server)
        size = int(self.headers["Content-Length"])
        if len(self.rfile.read(size)) < size:
            return  # its sender died meanwhile
        with self.server.lock:
            self.server.ears.copies[self.headers["webhook-id"]] += 1
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def listening(site: Site) -> Iterator[Ears]:
    """A receiver, and a webhook for every state change of every request."""
    ears = Ears()
    server = _Server(ears)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        with site.sessions.begin() as session:
            made, _ = webhooks.create_webhook(
                session,
                site.vault,
                api_key_id=site.key_id,
                scopes=["admin"],
                url=f"http://127.0.0.1:{server.server_port}/",
                all_requests=True,
                private=True,
            )
            ears.webhook_id = made.id
            ears.since = max(session.scalars(select(RequestEvent.id)), default=0)
        yield ears
    finally:
        server.shutdown()
        server.server_close()


def kept_ears(site: Site) -> Ears:
    """One receiver for all trials of a site."""
    ears: Ears | None = site.shared.get("ears")
    if ears is None:
        ears = site.shared["ears"] = site.stack.enter_context(listening(site))
    return ears


def let_leases_pass(site: Site) -> None:
    """As if the minute and more had gone by for which a message stays with a sender that died."""
    with site.sessions.begin() as session:
        sending = update(WebhookDelivery).where(WebhookDelivery.state == DeliveryState.SENDING)
        session.execute(sending.values(next_at=utcnow()).execution_options(synchronize_session=False))


def judge_messages(site: Site, ears: Ears, outcome: Outcome) -> None:
    """Each change was told of in one message, and each message has arrived. A worker has to be running."""
    try:
        wait_for(lambda: not site.read(on_their_way), "the messages to be sent")
    except FaultFailed as error:
        outcome.reasons.append(str(error))
    owed = select(RequestEvent.id).where(RequestEvent.type == "state", RequestEvent.id > ears.since)
    changes: list[int] = site.read(lambda session: list(session.scalars(owed)))
    logged = select(WebhookDelivery.id, WebhookDelivery.state, WebhookDelivery.payload)
    logged = logged.where(WebhookDelivery.webhook_id == ears.webhook_id)
    rows = site.read(lambda session: session.execute(logged).all())
    told = Counter(row.payload["data"]["sequence"] for row in rows)
    silent = [change for change in changes if not told[change]]
    twice = [change for change, count in told.items() if count > 1]
    unsent = [row.id for row in rows if row.state != DeliveryState.DELIVERED or not ears.copies[row.id]]
    outcome.lost += len(silent) + len(unsent)
    outcome.doubled += len(twice)
    if silent or twice:
        outcome.reasons.append(f"{len(silent)} changes without a message, {len(twice)} with two")
    if unsent:
        states = Counter(row.state for row in rows if row.id in unsent)
        outcome.reasons.append(f"{len(unsent)} of {len(rows)} messages have not arrived; the log says {dict(states)}")
    unknown = set(ears.copies) - {row.id for row in rows}
    if unknown:
        outcome.reasons.append(f"{len(unknown)} messages arrived under ids that the log does not have")
    most = max(ears.copies.values(), default=0)
    outcome.figures |= {"copies_of_a_message_max": most, "messages_max": len(rows)}
    outcome.figures["messages_sent_again_max"] = sum(count - 1 for count in ears.copies.values())
    if most > COPIES:
        outcome.reasons.append(f"a message arrived {most} times")


def on_their_way(session: Session) -> bool:
    query = select(WebhookDelivery.id).where(WebhookDelivery.state.in_(OPEN)).limit(1)
    return session.scalar(query) is not None
