"""Messages on their way: a real receiver that fails, hangs, redirects, hangs up, says 410, then accepts."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from databases import migrated_database
from sqlalchemy import event
from sqlalchemy.orm import Session, sessionmaker
from tiny_models import make_tiny_model
from webhook_kit import (
    Received,
    Receiver,
    accept,
    add_key,
    add_webhook,
    deliveries,
    make_due,
    receiving,
    sender,
    submit,
    webhook,
)
from worker_kit import ROOT, deploy, wait_for

from app import db, lifecycle, webhooks
from app.tables import utcnow
from app.vault import Vault

Sessions = sessionmaker[Session]


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Sessions]:
    """SQLite only: for what does not depend on the database."""
    engine = db.make_engine(migrated_database(tmp_path / "letheon.db"))
    yield db.make_sessions(engine)
    engine.dispose()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def send(sessions: Sessions, vault: Vault, **changes: Any) -> None:
    sender(sessions, vault, **changes).work()


def test_a_message_arrives_signed_and_nothing_of_it_is_logged(
    sessions: Sessions, vault: Vault, log: pytest.LogCaptureFixture
) -> None:
    with receiving() as receiver:
        key = add_key(sessions)
        hook, secret = add_webhook(sessions, vault, key, receiver.url("/hook?token=Quillfeather"))
        request_id = submit(sessions, vault, key)
        send(sessions, vault)
        send(sessions, vault)  # nothing is left to do
    [got] = receiver.received
    [row] = deliveries(sessions, hook)
    assert (row.state, row.attempts, row.last_status, row.last_error) == ("delivered", 1, 204, None)
    assert got.path == "/hook?token=Quillfeather" and got.id == row.id
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}" and got.headers["content-type"] == "application/json"
    assert webhooks.sign(secret, row.id, int(got.headers["webhook-timestamp"]), got.body).items() <= got.headers.items()
    assert json.loads(got.body) == row.payload and row.payload["data"]["request_id"] == request_id
    assert b"Quillfeather" not in got.body
    assert row.id in log.text and "Quillfeather" not in log.text and "127.0.0.1" not in log.text


Answer = Callable[[Received], tuple[int, dict[str, str]]]


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (lambda _: (500, {}), 500, "status"),
        (lambda _: (404, {}), 404, "status"),
        (lambda _: (302, {"Location": "/elsewhere"}), 302, "redirect"),
        (lambda _: (307, {"Location": "http://169.254.169.254/"}), 307, "redirect"),
        (lambda _: (101, {}), 101, "broken"),
        (lambda _: (204, {"X": "\r\n\x00garbage"}), None, "broken"),
    ],
)
def test_answers_that_are_no_success(
    answer: Answer, status: int | None, error: str, embedded: Sessions, vault: Vault
) -> None:
    with receiving(answer) as receiver:
        key = add_key(embedded)
        add_webhook(embedded, vault, key, receiver.url())
        submit(embedded, vault, key)
        send(embedded, vault)
        [row] = deliveries(embedded)
        if error == "broken":
            assert row.last_error == "broken"
        else:
            assert (row.last_status, row.last_error) == (status, error)
        assert row.state == "pending" and len(receiver.received) == 1, "not followed"
        receiver.answer = accept
        make_due(embedded)
        send(embedded, vault)
    [row] = deliveries(embedded)
    assert (row.state, row.attempts) == ("delivered", 2)
    assert len({got.id for got in receiver.received}) == 1
    assert len({got.body for got in receiver.received}) == 1


def test_a_receiver_that_is_not_there(embedded: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "no-such-host.invalid":  # the machine's own resolver may take longer than it is given
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, and nobody listens
        key = add_key(embedded)
        add_webhook(embedded, vault, key, f"http://127.0.0.1:{bound.getsockname()[1]}/")
        add_webhook(embedded, vault, key, "http://no-such-host.invalid/")
        submit(embedded, vault, key)
        send(embedded, vault)
    assert sorted(str(row.last_error) for row in deliveries(embedded)) == ["connect", "name"]


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_heeded_within_bounds(dated: bool, embedded: Sessions, vault: Vault) -> None:
    def busy(_: Received) -> tuple[int, dict[str, str]]:
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
        return 503, {"Retry-After": at if dated else "3600"}

    with receiving(busy) as receiver:
        key = add_key(embedded)
        add_webhook(embedded, vault, key, receiver.url())
        submit(embedded, vault, key)
        send(embedded, vault)
        [row] = deliveries(embedded)
        assert row.next_at is not None
        assert 3500 < (row.next_at - utcnow()).total_seconds() < 3601
        receiver.answer = lambda _: (429, {"Retry-After": "soon"})
        make_due(embedded)
        send(embedded, vault)
    [row] = deliveries(embedded)
    assert row.next_at is not None and (row.next_at - utcnow()).total_seconds() < 40


def test_gone(sessions: Sessions, vault: Vault) -> None:
    with receiving(lambda _: (410, {})) as receiver:
        key = add_key(sessions)
        hook, _ = add_webhook(sessions, vault, key, receiver.url())
        submit(sessions, vault, key)
        send(sessions, vault)
        submit(sessions, vault, key)
        send(sessions, vault)
    assert len(receiver.received) == 1 and webhook(sessions, hook).disabled_at is not None


def test_a_receiver_that_hangs_holds_up_no_other(sessions: Sessions, vault: Vault) -> None:
    """It is left waiting until the other has got a message that was written after it began to hang."""
    hangs, freed, arrived = threading.Event(), threading.Event(), threading.Event()

    def answer(got: Received) -> tuple[int, dict[str, str]]:
        if got.path == "/hang":
            hangs.set()
            assert freed.wait(60)
        else:
            arrived.set()
        return 200, {}

    with receiving(answer) as receiver:
        slow, quick = add_key(sessions), add_key(sessions)
        add_webhook(sessions, vault, slow, receiver.url("/hang"))
        fine, _ = add_webhook(sessions, vault, quick, receiver.url("/fine"))
        for _ in range(4):
            submit(sessions, vault, slow)
        thread = sender(sessions, vault, webhook_timeout_seconds=60)
        thread.start()
        assert hangs.wait(60)
        submit(sessions, vault, quick)
        assert arrived.wait(60)
        wait_for(lambda: deliveries(sessions, fine)[0].state == "delivered", "the record of it")
        # No more than these two, as is counted below: its others wait for their turn.
        wait_for(lambda: Counter(got.path for got in receiver.received)["/hang"] == 2, "both of its places taken")
        thread.stop()  # what is under way is let end, and written down; what waits stays
        freed.set()
        thread.join(60)
        assert not thread.is_alive() and not thread.crashed
    assert Counter(row.state for row in deliveries(sessions)) == {"delivered": 3, "pending": 2}


def test_an_attempt_has_an_end_whatever_the_receiver_does(embedded: Sessions, vault: Vault) -> None:
    """It accepts and says nothing, or a byte at a time: the time is for all of it."""
    with socket.create_server(("127.0.0.1", 0)) as mute, receiving() as receiver:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = mute.accept()
            with connection:
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000:
                    if stop.wait(0.02):
                        return
                    try:
                        connection.sendall(bytes([byte]))
                    except OSError:
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        key = add_key(embedded)
        hook, _ = add_webhook(embedded, vault, key, f"http://127.0.0.1:{mute.getsockname()[1]}/")
        add_webhook(embedded, vault, key, receiver.url())
        submit(embedded, vault, key)
        send(embedded, vault, webhook_timeout_seconds=0.5)
        stop.set()
        socket.create_connection(mute.getsockname(), timeout=20).close()  # if nobody has come
        dripping.join()
    [row] = deliveries(embedded, hook)
    assert (row.state, row.last_error, row.last_status) == ("pending", "timeout", None)


def test_two_workers_at_once_send_each_message_once(sessions: Sessions, database_url: str, vault: Vault) -> None:
    with receiving() as receiver:
        for _ in range(4):
            key = add_key(sessions)
            add_webhook(sessions, vault, key, receiver.url())
            for _ in range(5):
                submit(sessions, vault, key)
        engines = [db.make_engine(database_url) for _ in range(2)]
        workers = [sender(db.make_sessions(engine), vault) for engine in engines]
        for worker in workers:
            worker.start()
        wait_for(lambda: {row.state for row in deliveries(sessions)} == {"delivered"}, "all deliveries")
        for worker in workers:
            worker.stop()
            worker.join(20)
            assert not worker.crashed
        for engine in engines:
            engine.dispose()
    assert sorted(got.id for got in receiver.received) == sorted(row.id for row in deliveries(sessions))
    assert {row.attempts for row in deliveries(sessions)} == {1}


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from app import db
from app.vault import Vault
from webhook_kit import sender
sender(db.make_sessions(db.make_engine(sys.argv[1])), Vault(bytes(range(32)))).work()
"""


def test_kill_9_between_send_and_commit_sends_again_under_the_same_id(
    sessions: Sessions, database_url: str, vault: Vault
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    known = threading.Event()

    def kill(_: Received) -> tuple[int, dict[str, str]]:
        assert known.wait(60)
        os.kill(started[0].pid, signal.SIGKILL)
        started[0].wait(60)
        return 200, {}

    with receiving(kill) as receiver:
        key = add_key(sessions)
        add_webhook(sessions, vault, key, receiver.url())
        submit(sessions, vault, key)
        script = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
        started.append(subprocess.Popen([sys.executable, "-c", script, database_url]))
        known.set()
        assert started[0].wait(240) == -signal.SIGKILL
        [row] = deliveries(sessions)
        assert (row.state, row.attempts) == ("sending", 1)
        receiver.answer = accept
        send(sessions, vault)
        assert len(receiver.received) == 1  # its lease holds
        make_due(sessions)
        send(sessions, vault)
    [row] = deliveries(sessions)
    assert (row.state, row.attempts) == ("delivered", 2)
    assert [got.id for got in receiver.received] == [row.id, row.id]
    assert receiver.received[0].body == receiver.received[1].body


def test_a_real_worker_sends_and_stops(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    with receiving() as receiver, deploy(tmp_path / "site", model, webhook_private="true") as site:
        key = add_key(site.sessions)
        hook, _ = add_webhook(site.sessions, site.vault, key, receiver.url("/Quillfeather"))
        with site.sessions.begin() as session:
            webhooks.ping(session, hook, of=key)
        worker = site.start_worker()
        wait_for(lambda: deliveries(site.sessions)[0].state == "delivered", "the ping", seconds=240)
        assert worker.terminate(120) == 0
        assert receiver.received[0].id in worker.output() and "Quillfeather" not in worker.output()


def test_a_database_that_is_away_is_told_later(
    embedded: Sessions, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent while the database went away is not sent again when it comes back within the lease."""
    key = add_key(embedded)
    engine, gone = embedded.kw["bind"], threading.Event()

    @event.listens_for(engine, "do_connect")
    def refuse(*_: Any) -> None:
        if gone.is_set():
            raise sqlite3.OperationalError("unable to open database file")

    def vanish(_: Received) -> tuple[int, dict[str, str]]:
        gone.set()
        engine.dispose()
        return 200, {}

    with receiving(vanish) as receiver:
        add_webhook(embedded, vault, key, receiver.url())
        submit(embedded, vault, key)
        thread = sender(embedded, vault)
        thread.start()
        wait_for(lambda: gone.is_set() and len(thread._untold) == 1, "the answer that nobody can be told")
        assert thread.is_alive()
        receiver.answer = accept
        gone.clear()
        wait_for(lambda: deliveries(embedded)[0].state == "delivered", "the database to be told")
        thread.stop()
        thread.join(20)
        assert not thread.crashed and len(receiver.received) == 1


def test_a_bug_or_a_secret_that_does_not_open_ends_no_worker(
    embedded: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    with receiving() as receiver:
        key = add_key(embedded)
        add_webhook(embedded, vault, key, receiver.url("/Quillfeather"))
        submit(embedded, vault, key)
        send(embedded, Vault(bytes(32)))
        assert [row.last_error for row in deliveries(embedded)] == ["secret"]

        def broken(*_: Any, **__: Any) -> Any:
            raise KeyError("Quillfeather")

        monkeypatch.setattr("worker.sending._judge", broken)
        make_due(embedded)
        send(embedded, vault)
    assert [row.last_error for row in deliveries(embedded)] == ["internal"]
    assert "KeyError <" in log.text and "Quillfeather" not in log.text


# --- addresses and names ---------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Name → its addresses, as the resolver has it; what was asked is under ``asked``."""
    real, table = socket.getaddrinfo, {"asked": []}

    def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in table:
            return real(host, port, *arguments, **options)
        table["asked"].append(host)
        return [found for address in table[host] for found in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return table


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]]
)
def test_a_name_for_an_address_that_is_not_public_is_not_connected_to(
    addresses: list[str], embedded: Sessions, vault: Vault, names: dict[str, list[str]], certificate: Path
) -> None:
    names["hooks.example"] = addresses
    with receiving(certificate=certificate) as receiver:
        key = add_key(embedded)
        add_webhook(embedded, vault, key, receiver.url(host="hooks.example"), private=False)
        submit(embedded, vault, key)
        send(embedded, vault, webhook_private=False)
        assert receiver.received == [] and receiver.server_names == []
    assert [row.last_error for row in deliveries(embedded)] == ["address"]
    assert names["asked"] == ["hooks.example"]


def test_what_was_allowed_once_is_judged_again(embedded: Sessions, vault: Vault) -> None:
    """The setting was turned off since the webhook was made."""
    with receiving() as receiver:
        key = add_key(embedded)
        add_webhook(embedded, vault, key, receiver.url())
        submit(embedded, vault, key)
        send(embedded, vault, webhook_private=False)
        assert receiver.received == []
    assert [row.last_error for row in deliveries(embedded)] == ["address"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, for hooks.example; key and certificate in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hooks.example")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "hooks.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def over_tls(
    receiver: Receiver, host: str, sessions: Sessions, vault: Vault, names: dict[str, list[str]]
) -> str | None:
    """Sends one message to this name; how that went."""
    key = add_key(sessions)
    hook, _ = add_webhook(sessions, vault, key, receiver.url(host=host))
    submit(sessions, vault, key)
    send(sessions, vault)
    return deliveries(sessions, hook)[0].last_error


def test_tls_is_for_the_name_and_the_connection_for_the_checked_address(
    embedded: Sessions,
    vault: Vault,
    names: dict[str, list[str]],
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names |= {"hooks.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing is sent through a proxy of the environment
    with receiving(certificate=certificate) as receiver:
        assert over_tls(receiver, "hooks.example", embedded, vault, names) == "tls"  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert over_tls(receiver, "other.example", embedded, vault, names) == "tls"  # a certificate for another name
        assert receiver.received == []
        names["asked"].clear()
        assert over_tls(receiver, "hooks.example", embedded, vault, names) is None
    assert names["asked"] == ["hooks.example"]  # asked once: no second answer can lead elsewhere
    assert receiver.server_names[-1] == "hooks.example"
    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"


def test_the_next_address_is_tried_where_one_does_not_answer(
    embedded: Sessions, vault: Vault, names: dict[str, list[str]]
) -> None:
    names["hooks.example"] = ["127.0.0.2", "127.0.0.1"]  # the receiver listens on the second only
    with receiving() as receiver:
        assert over_tls(receiver, "hooks.example", embedded, vault, names) is None
    assert len(receiver.received) == 1


def test_a_resolver_that_hangs_costs_its_own_message_only(
    embedded: Sessions, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, freed = socket.getaddrinfo, threading.Event()

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "hangs.example":
            assert freed.wait(60)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with receiving() as receiver:
        key = add_key(embedded)
        hook, _ = add_webhook(embedded, vault, key, "http://hangs.example/")
        fine, _ = add_webhook(embedded, vault, key, receiver.url())
        submit(embedded, vault, key)
        send(embedded, vault, webhook_timeout_seconds=5.0)
    assert deliveries(embedded, hook)[0].last_error == "timeout"
    assert deliveries(embedded, fine)[0].state == "delivered"
    freed.set()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "resolver"], "the resolver's thread")


# --- the documentation's receiver ------------------------------------------------------------------------------------


def test_the_receiver_of_the_documentation_tells_good_from_bad(sessions: Sessions, vault: Vault) -> None:
    text = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    verify = scope["verify"]
    with receiving() as receiver:
        key = add_key(sessions)
        _, secret = add_webhook(sessions, vault, key, receiver.url())
        request_id = submit(sessions, vault, key)
        with sessions.begin() as session:
            lifecycle.request_cancel(session, request_id, actor=key)
        send(sessions, vault)
    first, second = receiver.received
    for got in (first, second):
        assert verify(secret, got.headers, got.body)["data"]["request_id"] == request_id
    bad = [
        (secret, first.headers, first.body.replace(b"pending", b"active")),
        (secret, first.headers, second.body),
        (secret, {**first.headers, "webhook-id": second.id}, first.body),
        (secret, {**first.headers, "webhook-timestamp": str(int(first.headers["webhook-timestamp"]) - 1)}, first.body),
        ("whsec_" + "A" * 44, first.headers, first.body),
    ]
    old = webhooks.sign(secret, first.id, int(first.headers["webhook-timestamp"]) - 3600, first.body)
    for arguments in [*bad, (secret, old, first.body)]:
        with pytest.raises(ValueError, match="webhook"):
            verify(*arguments)


def test_the_receiver_of_the_how_to_takes_messages_and_pings(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "how-to" / "webhooks.md").read_text(encoding="utf-8")
    [block] = re.findall(r" ```python\n(.*?) ```", text, flags=re.DOTALL)
    last = 'HTTPServer(("127.0.0.1", 9000), Receiver).serve_forever()'
    code = textwrap.dedent(block)
    assert last in code
    scope: dict[str, Any] = {}
    exec(code.replace(last, 'server = HTTPServer(("127.0.0.1", 0), Receiver)'), scope)
    secret = "whsec_" + "A" * 44
    monkeypatch.setenv("HOOK_SECRET", secret)
    message = {"type": "request.active", "timestamp": "…", "data": {"request_id": "req_1", "sequence": 7}}
    ping = {"type": "ping", "timestamp": "…", "data": {"webhook_id": "whk_1"}}
    thread = threading.Thread(target=scope["server"].serve_forever, daemon=True)
    thread.start()
    try:
        for said, signed_by, status in ((message, secret, 204), (ping, secret, 204), (ping, "whsec_" + "B" * 44, 400)):
            body = json.dumps(said).encode()
            headers = webhooks.sign(signed_by, "dlv_1", int(time.time()), body)
            connection = http.client.HTTPConnection(*scope["server"].server_address)
            connection.request("POST", "/letheon", body, headers)
            assert connection.getresponse().status == status
            connection.close()
    finally:
        scope["server"].shutdown()
        scope["server"].server_close()
        thread.join()
    assert "dlv_1 request.active req_1 7\ndlv_1 ping None None\n" in capfd.readouterr().out
