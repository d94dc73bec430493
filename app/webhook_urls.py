"""Where a webhook may go. What is no public address is refused: a server's own network must not be reached through it.

A name is judged twice: its form when the webhook is made, its addresses each time before one of them is connected to.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from app.errors import InvalidInput

MAX_URL = 2000
# Strict on purpose: what two parsers may read in two ways is no URL here. No user, no fragment, ASCII only.
_URL = re.compile(
    r"(https?)://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?((?:[/?][\x21\x22\x24-\x5b\x5d-\x7e]*)?)"
)
_LAST_LABEL_IS_NUMBER = re.compile(r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)")
_PORTS = {"http": 80, "https": 443}
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NEVER = (
    ipaddress.ip_network("168.63.129.16/32"),  # public by number, Azure's host by what answers
    # Special, and not all of it known to Python 3.11.
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("3fff::/20"),
)


@dataclass(frozen=True, repr=False)
class Target:
    """A URL in parts. ``host`` is a name or a literal address without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def at(self, address: str) -> str:
        """The URL with an address in place of the name."""
        return f"{self.scheme}://{f'[{address}]' if ':' in address else address}:{self.port}{self.path}"


def parse(url: str, *, private: bool) -> Target:
    """Raises InvalidInput; the URL is not repeated. ``private``: http:// and every address will do."""
    if len(url) > MAX_URL:
        raise InvalidInput(f"has {len(url)} characters, the limit is {MAX_URL}", field="url")
    match = _URL.fullmatch(url)
    if match is None:
        raise _refused("must look like https://host/path: ASCII, without user, password or fragment")
    scheme, host, port = match[1], match[2].strip("[]"), int(match[3] or _PORTS[match[1]])
    if scheme == "http" and not private:
        raise _refused("must begin with https://")
    if not 1 <= port <= 65535:
        raise _refused("the port must be from 1 to 65535")
    if _literal(match[2]):
        if not private and not is_public(host):
            raise _refused("must not name a private, loopback, link-local, multicast or reserved address")
    elif not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise _refused("the host is no name")
    elif not private and host.removesuffix(".").lower().split(".")[-1] == "localhost":
        raise _refused("must not name this machine")
    path = match[4]
    return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")


def is_public(text: str) -> bool:
    """Whether an address is one of the internet's, also where it wraps an IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if any(address in network for network in _NEVER if network.version == address.version):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if address not in _GLOBAL_V6:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _literal(host: str) -> bool:
    """Whether this is an address and no name. Raises InvalidInput for one that is written in an odd way."""
    if not host.startswith("[") and not _LAST_LABEL_IS_NUMBER.fullmatch(host.removesuffix(".").split(".")[-1]):
        return False
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:  # 127.1, 0177.0.0.1, 0x7f000001, 2130706433: resolvers read them as addresses
        raise _refused("an address must be four decimal numbers, or IPv6 in brackets") from None
    return True


def _refused(message: str) -> InvalidInput:
    return InvalidInput(message, field="url")
