"""One POST to a webhook's receiver, whoever that is: bounded in time, and only to an address that was checked.

The name is resolved here, every address of it is judged, and the connection goes to one of these addresses (with the
name in the Host header and in the TLS handshake), so a name cannot mean another address a moment later.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

from app.errors import InvalidInput
from app.webhook_queue import DeliveryError, Outcome
from app.webhook_urls import Target, is_public, parse

MAX_ADDRESSES = 4

# Their lines have URLs in them, which can hold a receiver's own secrets.
for _name in ("httpx2", "httpcore2"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class ForbiddenAddress(Exception):
    """The name stands for an address that a webhook must not reach."""


class UnknownName(Exception):
    """The name stands for no address."""


async def post(
    url: str, body: bytes, headers: Mapping[str, str], *, private: bool, seconds: float, tls: ssl.SSLContext
) -> Outcome:
    """Send, and say how it went; ``seconds`` is for all of it. The answer's body is not read."""
    try:
        async with asyncio.timeout(seconds):
            target = parse(url, private=private)  # again: the setting may have changed since the webhook was made
            addresses = await _addresses(target, private=private)
            return await _try_each(target, addresses, body, headers, seconds=seconds, tls=tls)
    except TimeoutError:
        return Outcome(DeliveryError.TIMEOUT)
    except (InvalidInput, ForbiddenAddress):
        return Outcome(DeliveryError.ADDRESS)
    except UnknownName:
        return Outcome(DeliveryError.NAME)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        return Outcome(DeliveryError.TLS if _is_tls(error) else DeliveryError.CONNECT)
    except (httpx2.RequestError, OSError):
        return Outcome(DeliveryError.BROKEN)


async def _try_each(
    target: Target,
    addresses: list[str],
    body: bytes,
    headers: Mapping[str, str],
    *,
    seconds: float,
    tls: ssl.SSLContext,
) -> Outcome:
    # A client for each message: neither cookies nor a connection to this address made for another name are kept.
    timeout = httpx2.Timeout(None, connect=seconds / len(addresses))
    async with httpx2.AsyncClient(verify=tls, trust_env=False, follow_redirects=False, timeout=timeout) as client:
        for address in addresses[:-1]:
            try:
                return await _send(client, target, address, body, headers)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue  # nothing was sent
        return await _send(client, target, addresses[-1], body, headers)


async def _send(
    client: httpx2.AsyncClient, target: Target, address: str, body: bytes, headers: Mapping[str, str]
) -> Outcome:
    sent = {
        "Host": target.authority,
        "Content-Type": "application/json",
        "User-Agent": "Letheon",
        "Accept-Encoding": "identity",
        "Connection": "close",
        **headers,
    }
    name = {"sni_hostname": target.host.removesuffix(".")}
    async with client.stream("POST", target.at(address), content=body, headers=sent, extensions=name) as response:
        return _judge(response.status_code, response.headers.get("Retry-After", ""))


def _judge(status: int, retry_after: str) -> Outcome:
    if 200 <= status < 300:
        return Outcome(status=status)
    if status == 410:
        return Outcome(DeliveryError.GONE, status)
    error = DeliveryError.REDIRECT if 300 <= status < 400 else DeliveryError.STATUS
    return Outcome(error, status, _seconds(retry_after))


def _seconds(retry_after: str) -> float | None:
    """Of a Retry-After header in either form; None for what is neither."""
    if retry_after.isdecimal() and len(retry_after) < 10:
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
        return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


async def _addresses(target: Target, *, private: bool) -> list[str]:
    """Raises ForbiddenAddress, UnknownName."""
    try:
        found = await _resolve(target.host, target.port)
    except (OSError, UnicodeError):
        raise UnknownName from None
    if not private and not all(is_public(address) for address in found):
        raise ForbiddenAddress
    return found[:MAX_ADDRESSES]


async def _resolve(host: str, port: int) -> list[str]:
    """Every address of a name. In a thread of its own: a resolver that hangs cannot be stopped, only left behind."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(found: list[str] | Exception) -> None:
        if answer.done():
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def look() -> None:
        found: list[str] | Exception
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(info[4][0]) for info in infos))
        except (OSError, UnicodeError) as error:
            found = error
        with suppress(RuntimeError):  # nobody waits any more, and the loop is closed
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=look, name="resolver", daemon=True).start()
    return await answer


def _is_tls(error: BaseException) -> bool:
    link: BaseException | None = error
    while link is not None and not isinstance(link, ssl.SSLError):
        link = link.__cause__ or link.__context__
    return link is not None
