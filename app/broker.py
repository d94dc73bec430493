"""Celery as a doorbell: a message holds a request id and nothing else, and losing one costs only seconds.

The database is the queue. Messages are acknowledged before the work starts and expire, so ringing again never piles up.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from queue import Empty
from typing import Any

from celery import Celery
from kombu.exceptions import ChannelError, KombuError
from kombu.transport import TRANSPORT_ALIASES, filesystem

from app.settings import Settings

log = logging.getLogger(__name__)

TRAIN_TASK = "letheon.train"
QUEUE = "letheon"
_CONNECT_SECONDS = 2.0


class DoorbellChannel(filesystem.Channel):
    """kombu's filesystem channel writes a message in place, so a reader may take it half-written and crash on it.

    It also dies of a folder that someone deleted; messages may be lost, so an empty new one serves as well.
    """

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        os.makedirs(self.data_folder_in, mode=0o700, exist_ok=True)
        try:
            return super()._get(queue)  # type: ignore[no-untyped-call]
        except FileNotFoundError:  # between the two
            raise Empty from None

    def _size(self, queue: str) -> int:
        os.makedirs(self.data_folder_in, mode=0o700, exist_ok=True)
        return int(super()._size(queue))  # type: ignore[no-untyped-call]

    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]  # as kombu's own
        name = f"{time.time_ns():020d}_{secrets.token_hex(8)}.{queue}.msg"  # kombu reads them in order of name
        target = os.path.join(self.data_folder_out, name)
        try:
            os.makedirs(self.data_folder_out, mode=0o700, exist_ok=True)
            with open(target + ".part", "w", encoding="utf-8") as file:
                json.dump(payload, file)
            os.replace(target + ".part", target)
        except OSError as error:
            raise ChannelError("cannot write to the broker folder") from error


class DoorbellTransport(filesystem.Transport):
    Channel = DoorbellChannel


TRANSPORT_ALIASES["doorbell"] = "app.broker:DoorbellTransport"


def make_celery(settings: Settings) -> Celery:
    """The Celery app of API and worker: the folder ``settings.broker_dir``, or the configured broker."""
    options: dict[str, Any] = {
        # These bound how long a send waits for a broker that is down; kombu would otherwise retry 100 times.
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0.2,
        "interval_max": 0.2,
        "connect_retries_timeout": _CONNECT_SECONDS,
    }
    if settings.broker_url:
        url = settings.broker_url
        if url.startswith(("redis://", "rediss://")):
            options |= {"socket_connect_timeout": _CONNECT_SECONDS, "socket_timeout": 5.0, "socket_keepalive": True}
    else:
        url = "doorbell://localhost/"  # a folder has no host, but kombu warns where none is named
        messages, control = settings.broker_dir / "messages", settings.broker_dir / "control"
        for folder in (messages, control):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        options |= {"data_folder_in": str(messages), "data_folder_out": str(messages), "control_folder": str(control)}
    celery = Celery("letheon", set_as_current=False)
    celery.conf.update(
        broker_url=url,
        broker_transport_options=options,
        broker_connection_timeout=_CONNECT_SECONDS,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a worker waits for its broker for as long as it takes
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=False,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        enable_utc=True,
    )
    return celery


def enqueue_training(celery: Celery, request_id: str, *, expires: float) -> bool:
    """Ring for a request. False, within seconds, when the broker is down: the reaper rings again."""
    try:
        celery.send_task(
            TRAIN_TASK,
            args=[request_id],
            expires=expires,
            ignore_result=True,
            retry=True,  # once: a connection that the broker closed in the meantime is opened anew
            retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2},
        )
    except (KombuError, ChannelError, OSError) as error:
        log.warning("the broker did not take the message for %s (%s)", request_id, type(error).__name__)
        return False
    return True
