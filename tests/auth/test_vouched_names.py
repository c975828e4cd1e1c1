"""Names decide only where somebody vouches for them, and they have one spelling."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from hybridkex.apps.tunnel.config import TunnelConfig
from hybridkex.auth import (
    DevCa,
    InsecureNoVerification,
    KnownPeers,
    PeerCertificate,
    Pins,
    RawIdentity,
    TrustStore,
    canonical_peer_name,
    parse_peer_name,
    spki_sha256,
)
from hybridkex.auth.certificates import vouched_names_of
from hybridkex.errors import CertificateRejected, ConfigError
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.shell.qkd_keys import QkdPeer

CA = DevCa.create()
STORE = TrustStore((CA.certificate,))
PIN = "ab" * 32


def with_names(*names: x509.GeneralName, common_name: str = "alice.example") -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    template = CA.issue("unused.example", private_key=key).leaf
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]))
        .issuer_name(template.issuer)
        .public_key(key.public_key())
        .serial_number(template.serial_number)
        .not_valid_before(template.not_valid_before_utc)
        .not_valid_after(template.not_valid_after_utc)
    )
    for extension in template.extensions:
        if not isinstance(extension.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(extension.value, extension.critical)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    return builder.sign(CA.private_key, hashes.SHA256())


def dns(name: str) -> x509.DNSName:
    return x509.DNSName(name)


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize(
    ("name", "vouched"),
    [
        (dns("Bob.Example"), ("bob.example",)),
        (dns("bob.example."), ("bob.example",)),
        (dns("*.Bob.Example"), ("*.bob.example",)),
        (x509.IPAddress(ipaddress.ip_address("2001:DB8::0:1")), ("2001:db8::1",)),
        (uri("urn:sae:bob"), ("urn:sae:bob",)),
        (uri("https://bob.example/x"), ("https://bob.example/x",)),
        # Names of one type that would read as names of another.
        (dns("10.0.0.1"), ()),
        (dns("::1"), ()),
        (dns("urn:sae:bob"), ()),
        (dns(f"sha256:{PIN}"), ()),
        (dns("bob example"), ()),
        (dns("bob\nexample"), ()),
        (dns(""), ()),
        (dns("*.10.0.0.1"), ()),
        (uri("bob.example"), ()),
        (uri("10.0.0.1"), ()),
        (uri("fe80::1"), ()),
        (uri("[::1]"), ()),
        (uri(f"sha256:{PIN}"), ()),
        (uri(f"SHA256:{PIN}"), ()),
        (uri("*.bob.example"), ()),
        (uri("urn:sae:bob\nalice"), ()),
        (uri("urn:sae:bob alice"), ()),
        (x509.RFC822Name("bob@bob.example"), ()),
        (x509.RegisteredID(x509.ObjectIdentifier("1.2.3")), ()),
    ],
)
def test_each_type_stands_for_itself(name: x509.GeneralName, vouched: tuple[str, ...]) -> None:
    """Name constraints hold per type: a URI that reads as a host name would evade those on DNS."""
    certificate = with_names(name)
    assert vouched_names_of(certificate) == vouched
    peer = STORE.verify_client([certificate.public_bytes(Encoding.DER)])
    assert peer.vouched_names == vouched
    assert not peer.is_one_of({"alice.example", f"sha256:{PIN}", "10.0.0.1", "::1", "fe80::1"})


def test_a_common_name_is_not_vouched_for() -> None:
    """RFC 9525 section 2, beside a subjectAltName and without one."""
    for names in ((), (dns("x.eve.example"),)):
        certificate = with_names(*names, common_name="alice.example")
        peer = STORE.verify_client([certificate.public_bytes(Encoding.DER)])
        assert "alice.example" not in peer.vouched_names
        assert not peer.is_one_of({"alice.example"})


def test_the_holder_of_a_pinned_key_writes_no_names() -> None:
    """Another pin lets them in as themselves, under no name that they chose."""
    eve = DevCa.create("eve").issue("alice.example", "10.0.0.1", uris=["urn:sae:alice"])
    pin = spki_sha256(eve.leaf)
    assert PeerCertificate(eve.chain).names == ("alice.example", "10.0.0.1", "urn:sae:alice")
    for verifier in (Pins(frozenset({PIN, pin})), InsecureNoVerification()):
        peer = verifier.verify_client(eve.chain)
        assert peer.vouched_names == ()
        assert not peer.is_one_of({"alice.example", "10.0.0.1", "urn:sae:alice", f"sha256:{PIN}"})
        assert peer.is_one_of({f"sha256:{pin}"})


def test_raw_keys_have_the_names_of_the_trust_store(tmp_path: Path) -> None:
    key = RawIdentity.generate()
    spki = key.chain[0]
    known = KnownPeers(tmp_path / "known")
    known.add("Alice.Example", spki)
    assert known.verify_client_key(spki).vouched_names == ("alice.example",)
    assert Pins(frozenset({key.pin})).verify_client_key(spki).vouched_names == ()
    assert Pins(frozenset({key.pin})).verify_client_key(spki).is_one_of({f"sha256:{key.pin}"})


# --- one spelling ---------------------------------------------------------------------------------

SPELLINGS = {
    "server.example": ["Server.Example", "server.example.", "SERVER.EXAMPLE.", "ｓerver。example"],
    "xn--bcher-kva.example": [
        "bücher.example",
        "BÜCHER.example.",
        "bu\N{COMBINING DIAERESIS}cher.example",
        "xn--bcher-kva.example",
        "XN--BCHER-KVA.EXAMPLE",
        "bücher。example。",
    ],
    "2001:db8::1": [
        "2001:DB8::1",
        "[2001:db8::1]",
        "2001:0db8:0000:0000:0000:0000:0000:0001",
        "[2001:db8:0:0::0:1]",
    ],
    "fe80::1": ["fe80::1%eth0", "[FE80::0:1%eth0]"],
    "192.0.2.1": ["192.0.2.1", "[192.0.2.1]"],
    "urn:sae:Alice": ["urn:sae:Alice"],
}
PAIRS = [(canonical, other) for canonical, others in SPELLINGS.items() for other in others]
NOT_NAMES = [
    *("", ".", " ", "a b", "a\nb", "a\tb", "a\0b", "a\x85b", "a\u2028b", "\ud800", "a..b", "-a"),
    *("127.1", "1.2.3.4.5", "[a.example]", "[::1", "::1]", "a#b", "a" * 64),
    *("*.10.0.0.1", "*", "a.*.example", "urn:", "urn:a b", "urn:a\nb", "a:80 x"),
    *("sha256:", "sha256:zz", f"sha256:{PIN}0", "999.1.1.1", "::g"),
]


@pytest.mark.parametrize(("canonical", "spelling"), PAIRS)
def test_one_spelling(canonical: str, spelling: str) -> None:
    assert canonical_peer_name(spelling) == canonical
    assert canonical_peer_name(canonical) == canonical


@pytest.mark.parametrize("text", NOT_NAMES)
def test_what_has_no_canonical_form(text: str) -> None:
    with pytest.raises(ConfigError):
        canonical_peer_name(text)


@given(st.text(max_size=40))
def test_the_canonical_form_is_stable(text: str) -> None:
    try:
        canonical = canonical_peer_name(text)
    except ConfigError:
        return
    assert canonical_peer_name(canonical) == canonical
    assert all("!" <= character <= "~" for character in canonical)


# --- known peers ----------------------------------------------------------------------------------

ONE, OTHER = RawIdentity.generate().chain[0], RawIdentity.generate().chain[0]


@pytest.mark.parametrize(("canonical", "spelling"), PAIRS)
def test_a_known_peer_in_any_spelling(canonical: str, spelling: str, tmp_path: Path) -> None:
    """An entry that never matches would make every key a first use."""
    path = tmp_path / "known"
    known = KnownPeers(path)
    known.add(canonical, ONE)
    path.write_text(path.read_text().replace(canonical, spelling, 1), encoding="utf-8")
    if not canonical.startswith("urn:"):
        name = parse_peer_name(spelling)
        assert known.verify_server_key(ONE, name).verified_by == "known"
        with pytest.raises(CertificateRejected, match="another key"):
            known.verify_server_key(OTHER, name)
    assert known.verify_client_key(ONE).vouched_names == (canonical,)
    known.add(spelling, ONE)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("text", [*NOT_NAMES, f"sha256:{PIN}", "*.example.org"])
def test_an_entry_that_cannot_be_read_again_is_not_written(text: str, tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "known")
    known.add("server.example", ONE)
    before = (tmp_path / "known").read_bytes()
    with pytest.raises(ConfigError):
        known.add(text, OTHER)
    with pytest.raises(ConfigError):
        known.add("server.example", b"no key")
    assert (tmp_path / "known").read_bytes() == before
    assert known.verify_server_key(ONE, parse_peer_name("server.example")).verified_by == "known"


@pytest.mark.parametrize(
    "line",
    [
        *("one", "one two three", "bad_name! AAAA", "a..b AAAA", "127.1 AAAA", "*.example AAAA"),
        *(f"sha256:{PIN} AAAA", "[::1 AAAA", "server.example A", "server.example AA=A"),
        *("server.example\x85AAAA", "server.example\u2028AAAA", "server.example ÄÄÄÄ"),
    ],
)
def test_a_bad_line_never_makes_first_use(line: str, tmp_path: Path) -> None:
    path = tmp_path / "known"
    known = KnownPeers(path)
    known.add("other.example", ONE)
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    known.refresh()
    for name in ("server.example", "other.example"):
        with pytest.raises(CertificateRejected, match="line 2"):
            known.verify_server_key(ONE, parse_peer_name(name))
    with pytest.raises(CertificateRejected, match="line 2"):
        known.verify_client_key(ONE)
    with pytest.raises(ConfigError, match="line 2"):
        KnownPeers(path)
    with pytest.raises(ConfigError, match="line 2"):
        known.add("third.example", ONE)


def test_comments_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "known"
    known = KnownPeers(path)
    known.add("urn:sae:a#b", ONE)
    text = path.read_text()
    path.write_bytes(f"# comment\r\n\r\n  {text.strip()}\t# mine\r\n#x\n".encode())
    known.refresh()
    assert known.verify_client_key(ONE).vouched_names == ("urn:sae:a#b",)


def test_lists_of_names_are_canonical_too() -> None:
    source = in_process_pair("a", "b")[0]
    assert QkdPeer(source=source, names=("Alice.Example.",)).names == ("alice.example",)
    where = TcpAddress("127.0.0.1", 1)
    parts: dict[str, Any] = {"name": "t", "local": where, "forward": where, "channel": object}
    config = TunnelConfig(**parts, allowed=frozenset({"[::0:1]", "Alice.example"}))
    assert config.allowed == {"::1", "alice.example"}
    for bad in ("a b", "sha256:1", ""):
        with pytest.raises(ConfigError):
            QkdPeer(source=source, names=(bad,))
        with pytest.raises(ConfigError):
            TunnelConfig(**parts, allowed=frozenset({bad}))
