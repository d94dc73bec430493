from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import shutil
import socket
import time
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import redis
from databases import redis_url

from app import broker
from app.settings import Settings

REQUEST_ID = "req_0123456789ab0123456789abcdef"


def check_message(message: dict[str, Any]) -> None:
    """Nothing but the id: not in the arguments, not in what Celery adds for people to read."""
    body = json.loads(base64.b64decode(message["body"]))
    assert body[:2] == [[REQUEST_ID], {}]
    assert all(value is None for value in body[2].values())
    headers = message["headers"]
    assert headers["task"] == broker.TRAIN_TASK
    assert headers["argsrepr"] == repr([REQUEST_ID])
    assert headers["kwargsrepr"] == "{}"
    assert headers["expires"] is not None
    assert message["content-type"] == "application/json"


def receive(celery: Any) -> list[Any]:
    """What a worker would get."""
    with celery.connection_for_read() as connection, connection.SimpleQueue(celery.amqp.queues[broker.QUEUE]) as queue:
        message = queue.get(timeout=5)
        message.ack()
        return list(message.payload)


def test_filesystem(tmp_path: Path) -> None:
    celery = broker.make_celery(Settings(home=tmp_path))
    assert broker.enqueue_training(celery, REQUEST_ID, expires=60)
    messages = tmp_path / "broker" / "messages"
    (file,) = messages.iterdir()
    check_message(json.loads(file.read_text()))
    assert receive(celery)[0] == [REQUEST_ID]
    assert list(messages.iterdir()) == []
    assert (tmp_path / "broker" / "messages").stat().st_mode & 0o077 == 0
    celery.close()


def test_a_folder_that_someone_deleted_is_made_again(tmp_path: Path) -> None:
    celery = broker.make_celery(Settings(home=tmp_path))
    shutil.rmtree(tmp_path / "broker")
    with pytest.raises(Empty):
        receive(celery)
    shutil.rmtree(tmp_path / "broker", ignore_errors=True)
    assert broker.enqueue_training(celery, REQUEST_ID, expires=60)
    assert receive(celery)[0] == [REQUEST_ID]
    celery.close()


def test_filesystem_keeps_the_order(tmp_path: Path) -> None:
    celery = broker.make_celery(Settings(home=tmp_path))
    for number in range(5):
        assert broker.enqueue_training(celery, f"req_{number}", expires=60)
    assert [receive(celery)[0] for _ in range(5)] == [[f"req_{number}"] for number in range(5)]
    celery.close()


def test_filesystem_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    celery = broker.make_celery(Settings(home=tmp_path))
    folder = tmp_path / "broker" / "messages"
    folder.rmdir()
    folder.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert not broker.enqueue_training(celery, REQUEST_ID, expires=60)
    assert REQUEST_ID in caplog.text
    celery.close()


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_broker_that_is_down_costs_seconds_not_the_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()  # accepts, then never answers
        url = f"redis://:hunter2@127.0.0.1:{listener.getsockname()[1]}/0"
        celery = broker.make_celery(Settings(home=tmp_path, LETHEON_BROKER_URL=url))  # type: ignore[call-arg]
        started = time.monotonic()
        assert not broker.enqueue_training(celery, REQUEST_ID, expires=60)
        assert time.monotonic() - started < 60  # not a hundred attempts
        assert REQUEST_ID in caplog.text
        assert "hunter2" not in caplog.text
        celery.close()


def own_addresses() -> set[str]:
    """Local ends of this process's connections, so that the test closes no one else's."""
    addresses = set()
    for descriptor in range(3, 512):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as own:
                host, port = own.getsockname()[:2]
        except (OSError, ValueError):
            continue  # closed, no socket, or a local one without a port
        addresses.add(f"{host}:{port}")
    return addresses


if URL := redis_url():

    def test_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A queue of its own name: another worker may listen on the real one.
        queue = f"letheon-test-{secrets.token_hex(8)}"
        monkeypatch.setattr(broker, "QUEUE", queue)
        celery = broker.make_celery(Settings(home=tmp_path, LETHEON_BROKER_URL=URL))  # type: ignore[call-arg]
        client = redis.Redis.from_url(str(URL))
        try:
            assert broker.enqueue_training(celery, REQUEST_ID, expires=60)
            raw = client.lindex(queue, 0)
            assert isinstance(raw, bytes)
            check_message(json.loads(raw))
            assert receive(celery)[0] == [REQUEST_ID]
            assert client.llen(queue) == 0

            # The server closes the connections that the producer keeps: the next message still gets through.
            own, me = own_addresses(), str(client.client_id())
            kept = [entry["id"] for entry in client.client_list() if entry["addr"] in own and entry["id"] != me]
            assert kept
            for client_id in kept:
                client.client_kill_filter(_id=client_id)
            assert broker.enqueue_training(celery, REQUEST_ID, expires=60)
        finally:
            client.delete(queue, f"_kombu.binding.{queue}")
            client.close()
            celery.close()
