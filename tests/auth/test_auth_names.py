"""Names of peers: what a person writes, and what certificates and SNI need of it."""

import ipaddress

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from hybridkex.auth import DevCa, DnsName, IpAddress, parse_peer_name
from hybridkex.auth.names import covers
from hybridkex.errors import ConfigError

ROOT = Store([DevCa.create().certificate])


@pytest.mark.parametrize(
    ("text", "a_label"),
    [
        ("example.org", "example.org"),
        ("EXAMPLE.Org.", "example.org"),
        ("localhost", "localhost"),
        ("a-b.example", "a-b.example"),
        ("r3---sn.example", "r3---sn.example"),
        ("kme_1", "kme_1"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        # IDNA 2008 keeps the sharp s, which IDNA 2003 turned into another name.
        ("faß.example", "xn--fa-hia.example"),
        # UTS #46: the ideographic full stop separates labels, full-width letters are letters.
        ("bücher。example", "xn--bcher-kva.example"),
        ("ｅｘａｍｐｌｅ.org", "example.org"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_host_names(text: str, a_label: str) -> None:
    name = parse_peer_name(text)
    assert name == DnsName(a_label)
    assert str(name) == a_label


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]", "fe80::1"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    name = parse_peer_name(text)
    assert name == IpAddress(ipaddress.ip_address(address))
    assert str(name) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "a..b", ".a", "a b", "a/b", "-a.example", "a-.example", "*.example"),
        *("a" * 64 + ".example", "a." * 127 + "a", "[example.org]", "[::1", "::1]", "[]", "a:b"),
        *("127.1", "1.2.3.4.5", "256.1.1.1", "a.1", "host\x00.example", "host\n", "☃.example"),
        *("ü_x.example", "-ü.example", "ü" * 64, "１２７.1", "xn--ü.example"),
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_peer_name(text)


@given(st.text(max_size=80))
def test_any_text_is_a_name_or_an_error(text: str) -> None:
    """A parsed host name is ASCII, is stable, and is one for the verifier (underscores apart)."""
    try:
        name = parse_peer_name(text)
    except ConfigError:
        return
    assert parse_peer_name(str(name)) == name
    if isinstance(name, DnsName) and "_" not in name.a_label:
        PolicyBuilder().store(ROOT).build_server_verifier(x509.DNSName(name.a_label))


@pytest.mark.parametrize(
    ("presented", "name", "same"),
    [
        ("a.example", "a.example", True),
        ("A.Example", "a.example", True),
        ("a.example", "b.example", False),
        ("*.example", "a.example", True),
        ("*.example", "example", False),
        ("*.example", "a.b.example", False),
        ("a*.example", "ab.example", False),
        ("*", "localhost", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("*.0.0.1", "127.0.0.1", False),
        ("::1", "[0:0::1]", True),
        ("::1", "127.0.0.1", False),
    ],
)
def test_covers(presented: str, name: str, same: bool) -> None:
    assert covers(presented, parse_peer_name(name)) is same
