"""Where webhooks may go: nothing that is written or resolved in a clever way reaches what is not public."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidInput
from app.webhook_urls import MAX_URL, is_public, parse

PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",  # shared by carriers; Alibaba's metadata service
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # Azure's host
    "169.254.169.254",  # metadata services
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",  # Oracle's
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",  # NAT64 of 127.0.0.1
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808",  # NAT64 of a network's own
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2001:0:7f00:1::",  # Teredo
    "2001:db8::1",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1%1",
    "fec0::1",
    "ff02::1",
    "4000::1",
    "",
    "localhost",
    "127.1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_the_same_however_it_is_wrapped(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    wrapped = [
        ipaddress.IPv6Address(0xFFFF << 32 | number),
        ipaddress.IPv6Address(0x64FF9B << 96 | number),
        ipaddress.IPv6Address(0x2002 << 112 | number << 80),
    ]
    assert {is_public(str(one)) for one in wrapped} == {is_public(str(address))}
    if address.is_private or address.is_multicast or address.is_reserved or address.is_link_local:
        assert not is_public(str(address))


@given(st.ip_addresses(v=6))
def test_what_python_calls_special_is_never_public(address: ipaddress.IPv6Address) -> None:
    special = address.is_private or address.is_multicast or address.is_reserved or address.is_link_local
    if special and address.ipv4_mapped is None and address not in ipaddress.IPv6Network("64:ff9b::/96"):
        assert not is_public(str(address))


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com/hook?token=a%20b&x=@y",
        "https://hooks.example.com:8443/",
        "https://xn--bcher-kva.example/hook",
        "https://8.8.8.8/hook",
        "https://[2606:4700:4700::1111]:443/hook",
        "https://example.com.",
        "https://127.0.0.1.nip.io/",  # a name; what it resolves to is judged when it is connected to
    ],
)
def test_good_urls(url: str) -> None:
    target = parse(url, private=False)
    assert target.scheme == "https" and target.path.startswith("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "http://example.com/",
        "HTTPS://example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "https://",
        "https:///hook",
        "https://user@example.com/",
        "https://user:pass@example.com/",
        "https://8.8.8.8@127.0.0.1/",
        "https://example.com#fragment",
        "https://example.com/#fragment",
        "https://example.com\\@127.0.0.1/",
        "https://example.com/a b",
        "https://example.com/\n",
        "https://example.com/\r\nX: y",
        "https://example.com/\0",
        "https://exämple.com/",
        "https://１２７.0.0.1/",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:/",
        "https://example..com/",
        "https://" + "a" * 64 + ".com/",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://app.localhost/",
        "https://2130706433/",
        "https://127.1/",
        "https://127.0.0.1./",
        "https://0177.0.0.1/",
        "https://127.0.0.01/",
        "https://0x7f.0.0.1/",
        "https://0x7f000001/",
        "https://127.0.0.0x1/",
        "https://[::1]/",
        "https://[fe80::1%25eth0]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[1::2::3]/",
        "https://[8.8.8.8]x/",
        *(f"https://{a}/" for a in PRIVATE if a.count(".") == 3 and ":" not in a),
        *(f"https://[{a}]/" for a in PRIVATE if ":" in a),
    ],
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(url, private=False)
    assert caught.value.extra["field"] == "url"
    assert len(url) <= len("https://") or url not in caught.value.detail


def test_a_long_url_is_told_its_limit() -> None:
    fitting = "https://example.com/".ljust(MAX_URL, "a")
    assert parse(fitting, private=False).host == "example.com"
    with pytest.raises(InvalidInput, match=f"{MAX_URL + 1} characters, the limit is {MAX_URL}"):
        parse(fitting + "a", private=False)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/hook", "http://localhost/", "https://[::1]/", "http://receiver/x"]
)
def test_private_ones_where_they_are_allowed(url: str) -> None:
    parse(url, private=True)


@pytest.mark.parametrize("url", ["http://0x7f000001/", "http://u@127.0.0.1/", "ftp://127.0.0.1/"])
def test_odd_ones_are_refused_even_then(url: str) -> None:
    with pytest.raises(InvalidInput):
        parse(url, private=True)


@given(st.text(alphabet="0123456789abcdefxX.", min_size=1, max_size=20))
def test_no_way_to_write_a_number_is_taken_for_a_name(host: str) -> None:
    """Whatever the C library reads as an address is either plain and public, or refused."""
    try:
        packed = socket.inet_aton(host)
    except OSError:
        return
    try:
        target = parse(f"https://{host}/", private=False)
    except InvalidInput:
        return
    assert target.host == str(ipaddress.IPv4Address(packed)) and is_public(target.host)


def test_the_parts_of_a_url() -> None:
    target = parse("https://Example.com:8443?x=1", private=False)
    assert (target.host, target.port, target.path, target.authority) == (
        "Example.com",
        8443,
        "/?x=1",
        "Example.com:8443",
    )
    assert target.at("8.8.8.8") == "https://8.8.8.8:8443/?x=1"
    assert target.at("2606::1") == "https://[2606::1]:8443/?x=1"
    assert "Example" not in repr(target)
    assert parse("https://[2606:4700::1]/", private=False).authority == "[2606:4700::1]"
