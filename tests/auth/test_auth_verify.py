"""Chains of every kind, good and bad: who is let in, and what the others are told."""

import base64
import ipaddress
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from hybridkex.auth import (
    DevCa,
    DnsName,
    InsecureNoVerification,
    PeerCertificate,
    Pins,
    TrustStore,
    VerifiedPeer,
    certificates,
    diagnosis,
    parse_peer_name,
    spki_sha256,
)
from hybridkex.auth import connected as connected_module
from hybridkex.auth.connected import Authorities
from hybridkex.auth.dev_ca import ALGORITHMS
from hybridkex.constants import Alert
from hybridkex.errors import CertificateRejected, ConfigError

NOW = datetime(2030, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
NAME = parse_peer_name("a.example")
ROOT_KEY = ec.generate_private_key(ec.SECP256R1())
MIDDLE_KEY = ec.generate_private_key(ec.SECP256R1())
LEAF_KEY = ec.generate_private_key(ec.SECP256R1())
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def dn(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def usage(*, sign: bool = True, certify: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(sign, False, False, False, False, certify, certify, False, False)


A_CA, NO_CA = x509.BasicConstraints(True, None), x509.BasicConstraints(False, None)
CERTIFIES, SIGNS = usage(sign=False, certify=True), usage()


def craft(
    subject: str,
    key: Any,
    issuer: str,
    issuer_key: Any,
    *extensions: tuple[x509.ExtensionType, bool],
    start: datetime = NOW - DAY,
    end: datetime = NOW + DAY,
    identifiers: bool = True,
) -> x509.Certificate:
    """A certificate of which every detail can be wrong."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(dn(subject))
        .issuer_name(dn(issuer))
        .public_key(key.public_key())
        .serial_number(1000)
        .not_valid_before(start)
        .not_valid_after(end)
    )
    if identifiers:
        extensions = (
            *extensions,
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False),
        )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    eddsa = isinstance(issuer_key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(issuer_key, None if eddsa else hashes.SHA256())


def authority(
    subject: str = "Root",
    key: Any = ROOT_KEY,
    issuer: str = "Root",
    issuer_key: Any = ROOT_KEY,
    *,
    constraints: x509.BasicConstraints | None = A_CA,
    key_usage: x509.KeyUsage | None = CERTIFIES,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    **more: Any,
) -> x509.Certificate:
    extensions = list(extra)
    if constraints is not None:
        extensions.append((constraints, True))
    if key_usage is not None:
        extensions.append((key_usage, True))
    return craft(subject, key, issuer, issuer_key, *extensions, **more)


def leaf(
    *names: str,
    subject: str = "leaf",
    key: Any = LEAF_KEY,
    issuer: str = "Root",
    issuer_key: Any = ROOT_KEY,
    san_critical: bool = False,
    usages: Sequence[x509.ObjectIdentifier] | None = (SERVER, CLIENT),
    usages_critical: bool = False,
    constraints: x509.BasicConstraints | None = NO_CA,
    key_usage: x509.KeyUsage | None = SIGNS,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    **more: Any,
) -> x509.Certificate:
    extensions: list[tuple[x509.ExtensionType, bool]] = list(extra)
    if names:
        general: list[x509.GeneralName] = []
        for name in names:
            try:
                general.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                general.append(x509.DNSName(name))
        extensions.append((x509.SubjectAlternativeName(general), san_critical))
    if usages is not None:
        extensions.append((x509.ExtendedKeyUsage(list(usages)), usages_critical))
    if constraints is not None:
        extensions.append((constraints, True))
    if key_usage is not None:
        extensions.append((key_usage, True))
    return craft(subject, key, issuer, issuer_key, *extensions, **more)


ROOT = authority()
MIDDLE = authority("Middle", MIDDLE_KEY)
GOOD = leaf("a.example")
UNDER_MIDDLE = leaf("a.example", issuer="Middle", issuer_key=MIDDLE_KEY)
STORE = TrustStore((ROOT,))


def der(*certificates: x509.Certificate) -> list[bytes]:
    return [one.public_bytes(Encoding.DER) for one in certificates]


def accepted(
    chain: Sequence[x509.Certificate],
    *,
    store: TrustStore = STORE,
    name: str = "a.example",
    client: bool = False,
    at: datetime = NOW,
) -> VerifiedPeer:
    if client:
        return store.verify_client(der(*chain), at=at)
    return store.verify_server(der(*chain), parse_peer_name(name), at=at)


def refused(
    chain: Sequence[x509.Certificate], alert: Alert, *words: str, about: str = "CN=leaf", **how: Any
) -> None:
    """The chain is refused, with this alert, these words, and the name of the certificate."""
    with pytest.raises(CertificateRejected) as caught:
        accepted(chain, **how)
    message = str(caught.value)
    assert caught.value.alert is alert, message
    assert caught.value.subject == about, message
    assert about in message
    for word in words:
        assert word in message
    assert caught.value.__cause__ is None
    assert "candidates exhausted" not in message


# Good chains: each bad one below differs from one of these in one thing.


def test_good() -> None:
    peer = accepted([GOOD])
    assert peer.verified_by == "ca"
    assert peer.subject == "CN=leaf"
    assert peer.vouched_names == ("a.example",)
    assert peer.certificate.chain == tuple(der(GOOD))
    assert peer.certificate.leaf == GOOD
    assert peer.certificate.public_key == LEAF_KEY.public_key()
    assert accepted([GOOD], client=True).verified_by == "ca"


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        (leaf("b.example", "a.example"), "a.example"),
        (leaf("A.EXAMPLE"), "a.example"),
        (leaf("*.example.org"), "a.example.org"),
        (leaf("xn--bcher-kva.example"), "bücher.example"),
        (leaf("127.0.0.1"), "127.0.0.1"),
        (leaf("2001:db8::1"), "[2001:DB8:0::1]"),
        (leaf("fe80::1"), "fe80::1%eth0"),
        (leaf("a.example", usages=None), "a.example"),
        (leaf("a.example", usages=[SERVER]), "a.example"),
        (leaf("a.example", key_usage=None, constraints=None), "a.example"),
        # What small authorities leave out, or write otherwise than the Web's.
        (leaf("a.example", identifiers=False), "a.example"),
        (leaf("a.example", san_critical=True), "a.example"),
        (leaf("a.example", usages_critical=True), "a.example"),
        (leaf("a.example", subject="", san_critical=True), "a.example"),
    ],
)
def test_good_leaves(certificate: x509.Certificate, name: str) -> None:
    assert accepted([certificate], name=name).verified_by == "ca"


@pytest.mark.parametrize("key_usage", [None, CERTIFIES])
def test_good_roots(key_usage: x509.KeyUsage | None) -> None:
    """`openssl req -x509` makes roots without keyUsage."""
    store = TrustStore((authority(key_usage=key_usage),))
    assert accepted([GOOD], store=store).verified_by == "ca"


def test_good_longer_chains() -> None:
    assert accepted([UNDER_MIDDLE, MIDDLE])
    assert accepted([UNDER_MIDDLE, MIDDLE, ROOT])
    # Out of order, with a stranger among them: the verifier finds its way.
    other = authority("Other", LEAF_KEY, "Other", LEAF_KEY)
    assert accepted([UNDER_MIDDLE, other, ROOT, MIDDLE])
    # An intermediate that is trusted itself ends the chain.
    assert accepted([UNDER_MIDDLE], store=TrustStore((MIDDLE,)))
    longest = TrustStore((authority(constraints=x509.BasicConstraints(True, 1)),))
    assert accepted([UNDER_MIDDLE, MIDDLE], store=longest)


def test_a_self_signed_leaf_that_is_trusted_itself() -> None:
    own = leaf("a.example", issuer="leaf", issuer_key=LEAF_KEY)
    assert accepted([own], store=TrustStore((own,)))
    refused(
        [own],
        Alert.BAD_CERTIFICATE,
        "not for b.example",
        store=TrustStore((own,)),
        name="b.example",
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm(algorithm: str) -> None:
    root = DevCa.create(algorithm=algorithm)
    middle = root.intermediate(algorithm=algorithm)
    identity = middle.issue("a.example", algorithm=algorithm)
    store = TrustStore.from_pem(root.pem)
    assert store.verify_server(identity.chain, NAME).verified_by == "ca"
    assert store.verify_client(identity.chain).vouched_names == ("a.example",)
    with pytest.raises(CertificateRejected, match=r"is for a\.example, not for b\.example"):
        store.verify_server(identity.chain, DnsName("b.example"))


def test_the_clock_is_the_machines_where_none_is_given() -> None:
    identity = DevCa.create().issue("a.example")
    later = datetime.now(UTC) + 4000 * DAY
    store = TrustStore((DevCa.create().certificate,))
    with pytest.raises(CertificateRejected) as caught:
        store.verify_server(identity.chain, NAME)
    assert caught.value.alert is Alert.UNKNOWN_CA
    root = DevCa.create(not_before=later - DAY, not_after=later + DAY)
    future = root.issue("a.example", not_before=later - DAY, not_after=later + DAY)
    store = TrustStore((root.certificate,))
    assert store.verify_server(future.chain, NAME, at=later)
    with pytest.raises(CertificateRejected) as caught:
        store.verify_server(future.chain, NAME)
    assert caught.value.alert is Alert.CERTIFICATE_EXPIRED


# Dates


def test_expired() -> None:
    refused(
        [leaf("a.example", start=NOW - 9 * DAY, end=NOW - DAY)],
        Alert.CERTIFICATE_EXPIRED,
        "expired on 2030-05-31 12:00 UTC (the clock says 2030-06-01 12:00 UTC)",
    )
    second = timedelta(seconds=1)
    assert accepted([GOOD], at=NOW + DAY)
    refused([GOOD], Alert.CERTIFICATE_EXPIRED, "expired on", at=NOW + DAY + second)


def test_not_yet_valid() -> None:
    refused(
        [leaf("a.example", start=NOW + DAY, end=NOW + 9 * DAY)],
        Alert.CERTIFICATE_EXPIRED,
        "is not valid before 2030-06-02 12:00 UTC (the clock says 2030-06-01 12:00 UTC)",
    )


def test_expired_authorities() -> None:
    old: dict[str, Any] = {"start": NOW - 9 * DAY, "end": NOW - DAY}
    refused(
        [UNDER_MIDDLE, authority("Middle", MIDDLE_KEY, **old)],
        Alert.CERTIFICATE_EXPIRED,
        "expired on",
        about="CN=Middle",
    )
    refused(
        [GOOD],
        Alert.CERTIFICATE_EXPIRED,
        "expired on",
        about="CN=Root",
        store=TrustStore((authority(**old),)),
    )


def test_the_time_may_be_of_any_zone() -> None:
    east = timezone(timedelta(hours=9))
    assert accepted([GOOD], at=(NOW + DAY).astimezone(east))
    refused(
        [GOOD],
        Alert.CERTIFICATE_EXPIRED,
        "the clock says 2030-06-02 13:00 UTC",
        at=(NOW + DAY + timedelta(hours=1)).astimezone(east),
    )


# Names


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.example", "b.example"], "c.example"),
        (["*.example.org"], "example.org"),
        (["*.example.org"], "a.b.example.org"),
        (["a*.example.org"], "ab.example.org"),
        (["*.*.example.org"], "a.b.example.org"),
        (["example.org"], "a.example.org"),
        (["127.0.0.1"], "127.0.0.2"),
        (["127.0.0.1"], "localhost"),
        (["localhost"], "127.0.0.1"),
        (["::1"], "127.0.0.1"),
        (["xn--bcher-kva.example"], "bucher.example"),
    ],
)
def test_wrong_name(names: list[str], wanted: str) -> None:
    refused(
        [leaf(*names)],
        Alert.BAD_CERTIFICATE,
        f"is for {', '.join(names)}, not for {wanted}",
        name=wanted,
    )


def test_an_address_written_as_a_dns_name_is_no_address() -> None:
    certificate = leaf(extra=[(x509.SubjectAlternativeName([x509.DNSName("127.0.0.1")]), False)])
    with pytest.raises(CertificateRejected):
        accepted([certificate], name="127.0.0.1")


def test_no_alternative_name() -> None:
    """The common name is not looked at; a client may do without a name."""
    nameless = leaf(subject="a.example")
    refused([nameless], Alert.BAD_CERTIFICATE, "has no subjectAltName", about="CN=a.example")
    assert accepted([nameless], client=True).vouched_names == ()
    assert accepted([nameless], client=True).subject == "CN=a.example"


def test_uris_do_not_stand_for_hosts() -> None:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:sae:alice")])
    certificate = leaf(extra=[(names, False)])
    refused([certificate], Alert.BAD_CERTIFICATE, "is for urn:sae:alice, not for a.example")
    assert accepted([certificate], client=True).vouched_names == ("urn:sae:alice",)


def test_a_host_with_an_underscore() -> None:
    refused([GOOD], Alert.BAD_CERTIFICATE, "underscore", "pin", name="kme_1")


def test_a_server_without_a_name_is_not_checked_at_all() -> None:
    with pytest.raises(CertificateRejected, match="server_hostname"):
        STORE.verify_server(der(GOOD), None, at=NOW)


# Authorities


def test_unknown_authority() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    refused(
        [leaf("a.example", issuer="Stranger", issuer_key=key)],
        Alert.UNKNOWN_CA,
        "was issued by CN=Stranger",
        "the trusted one in roots.pem",
        "was not sent by the peer",
        store=TrustStore((ROOT,), source="roots.pem"),
    )


def test_missing_intermediate() -> None:
    refused(
        [UNDER_MIDDLE],
        Alert.UNKNOWN_CA,
        "was issued by CN=Middle, which is not any of the 2 trusted certificates",
        "was not sent by the peer",
        store=TrustStore((ROOT, GOOD)),
    )


def test_self_signed() -> None:
    own = leaf("a.example", issuer="leaf", issuer_key=LEAF_KEY)
    refused([own], Alert.UNKNOWN_CA, "is self-signed", f"pin {spki_sha256(own)}")
    # The pin that the error names is one that works.
    assert Pins(frozenset({spki_sha256(own)})).verify_server(der(own), NAME)


def test_a_chain_to_a_root_that_is_not_trusted() -> None:
    other = TrustStore((authority("Other", LEAF_KEY, "Other", LEAF_KEY),))
    refused(
        [UNDER_MIDDLE, MIDDLE, ROOT],
        Alert.UNKNOWN_CA,
        "ends the chain",
        about="CN=Root",
        store=other,
    )


def test_an_authority_made_anew_under_its_old_name() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    again = TrustStore((authority(key=key, issuer_key=key),))
    refused(
        [GOOD], Alert.UNKNOWN_CA, "has the same name and another key", "created again", store=again
    )


def test_a_signature_by_somebody_else() -> None:
    """Without key identifiers, or with false ones, nothing but the signature tells."""
    key = ec.generate_private_key(ec.SECP256R1())
    refused(
        [leaf("a.example", issuer_key=key, identifiers=False)],
        Alert.BAD_CERTIFICATE,
        "has a signature that is not CN=Root's",
    )
    false = x509.AuthorityKeyIdentifier.from_issuer_public_key(ROOT_KEY.public_key())
    forged = leaf("a.example", issuer_key=key, identifiers=False, extra=[(false, False)])
    refused([forged], Alert.BAD_CERTIFICATE, "has a signature that is not CN=Root's")


def test_a_loop_ends() -> None:
    """Two authorities that vouch for each other, and nobody for them."""
    one = authority("One", ROOT_KEY, "Two", MIDDLE_KEY)
    two = authority("Two", MIDDLE_KEY, "One", ROOT_KEY)
    refused(
        [leaf("a.example", issuer="One"), one, two],
        Alert.UNKNOWN_CA,
        "was issued by CN=One",
        about="CN=Two",
        store=TrustStore((authority("Root", LEAF_KEY, "Root", LEAF_KEY),)),
    )


# What a stranger's chain may cost: a verifier that looks for a path among certificates that sign
# each other tries very many.


def mesh(shape: str, count: int) -> list[x509.Certificate]:
    """A leaf, and as many issuers that nobody knows and that sign each other."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(count + 2)]
    if shape == "one key":
        return [authority("X", MIDDLE_KEY, "X", MIDDLE_KEY) for _ in range(count)]
    if shape == "one name":
        return [authority("X", key, "X", MIDDLE_KEY) for key in keys[:count]]
    if shape == "each signs the next":
        return [authority("X", keys[at], "X", keys[at + 1]) for at in range(count)][::-1]
    if shape == "the root's name":
        return [authority("Root", key, "Root", MIDDLE_KEY) for key in keys[:count]]
    assert shape == "two of each name"
    step = [at // 2 for at in range(count)]
    return [authority(f"X{at}", keys[at], f"X{at + 1}", keys[at + 1]) for at in step]


@pytest.mark.parametrize("count", [2, 5, 15])
@pytest.mark.parametrize(
    "shape",
    ["one key", "one name", "each signs the next", "the root's name", "two of each name"],
)
def test_certificates_that_sign_each_other(
    shape: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them reaches the verifier, and few signatures are checked to say why."""
    sent = mesh(shape, count)
    checks: list[x509.Certificate] = []
    reached: list[x509.Certificate] = []

    def is_signed_by(child: x509.Certificate, issuer: x509.Certificate) -> bool:
        checks.append(child)
        return certificates.is_signed_by(child, issuer)

    def connected(store: Authorities, given: Sequence[x509.Certificate]) -> list[x509.Certificate]:
        reached.extend(found := whole(store, given))
        return found

    whole = Authorities.connected
    for module in (connected_module, diagnosis):
        monkeypatch.setattr(module, "is_signed_by", is_signed_by)
    monkeypatch.setattr(Authorities, "connected", connected)
    issuer = "X0" if shape == "two of each name" else sent[0].subject.rfc4514_string()[3:]
    for client in (False, True):
        for key in (MIDDLE_KEY, LEAF_KEY):
            with pytest.raises(CertificateRejected):
                accepted([leaf("a.example", issuer=issuer, issuer_key=key), *sent], client=client)
            assert not reached
            assert len(checks) <= 32 + count
            checks.clear()


def test_issuers_that_are_connected() -> None:
    """In any order, some of them twice, with strangers between them."""
    inner_key = ec.generate_private_key(ec.SECP256R1())
    inner = authority("Inner", inner_key, "Middle", MIDDLE_KEY)
    again = authority("Middle", MIDDLE_KEY, start=NOW - DAY / 2)
    stranger, forged = (
        authority("X", LEAF_KEY, "X", LEAF_KEY),
        authority("Inner", LEAF_KEY, "Middle"),
    )
    sent = [inner, forged, stranger, MIDDLE, again, MIDDLE, ROOT]
    assert set(Authorities((ROOT,)).connected(sent)) == {inner, MIDDLE, again, ROOT}
    accepted([leaf("a.example", issuer="Inner", issuer_key=inner_key), *sent])


def test_a_costly_key_of_a_stranger() -> None:
    """Nobody's signature is checked with it."""
    numbers = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    costly = rsa.RSAPublicNumbers((1 << 2047) + 1, numbers.n).public_key()
    held = type("Held", (), {"public_key": lambda self: costly})()
    for subject, issuer in (("X", "X"), ("X", "Y"), ("X", "Root")):
        one = authority(subject, held, issuer, identifiers=False)
        refused(
            [leaf("a.example", issuer="X"), one],
            Alert.UNSUPPORTED_CERTIFICATE,
            "a public exponent of more than 31 bits",
            about="CN=X",
        )


def test_of_many_names_the_first_are_told() -> None:
    names = [f"h{number}.example" for number in range(3000)]
    with pytest.raises(CertificateRejected, match="and 2984 more, not for") as caught:
        accepted([leaf(*names)])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"constraints": NO_CA, "key_usage": SIGNS}, "CA:FALSE"),
        ({"constraints": None}, "no basicConstraints"),
        ({"key_usage": SIGNS}, "may not sign certificates"),
    ],
)
def test_an_issuer_that_is_no_authority(wrong: dict[str, Any], words: str) -> None:
    refused(
        [UNDER_MIDDLE, authority("Middle", MIDDLE_KEY, **wrong)],
        Alert.BAD_CERTIFICATE,
        words,
        "signed CN=leaf",
        about="CN=Middle",
    )
    refused(
        [GOOD],
        Alert.BAD_CERTIFICATE,
        words,
        about="CN=Root",
        store=TrustStore((authority(**wrong),)),
    )


def test_path_length() -> None:
    none_below = TrustStore((authority(constraints=x509.BasicConstraints(True, 0)),))
    assert accepted([GOOD], store=none_below)
    refused(
        [UNDER_MIDDLE, MIDDLE],
        Alert.BAD_CERTIFICATE,
        "allows 0 authorities below itself (pathLenConstraint), and there are 1",
        about="CN=Root",
        store=none_below,
    )


def test_name_constraints() -> None:
    only = x509.NameConstraints([x509.DNSName("example.org")], None)
    store = TrustStore((authority(extra=[(only, True)]),))
    assert accepted([leaf("b.example.org")], store=store, name="b.example.org")
    with pytest.raises(
        CertificateRejected, match="nameConstraints in the certificate CN=Root do not allow"
    ) as caught:
        accepted([GOOD], store=store)
    assert caught.value.alert is Alert.BAD_CERTIFICATE
    assert caught.value.subject == "CN=leaf"
    assert "encountered processing" not in str(caught.value)


@pytest.mark.parametrize(
    "key", [ed25519.Ed25519PrivateKey.generate(), ed448.Ed448PrivateKey.generate()]
)
def test_an_authority_with_an_eddsa_key(key: Any) -> None:
    refused(
        [leaf("a.example", issuer_key=key)],
        Alert.UNSUPPORTED_CERTIFICATE,
        "signs with EdDSA",
        "ECDSA, RSA or ML-DSA",
        about="CN=Root",
        store=TrustStore((authority(key=key, issuer_key=key),)),
    )


def test_an_authority_with_a_weak_key() -> None:
    key = rsa.generate_private_key(65537, 1024)
    refused(
        [leaf("a.example", issuer_key=key)],
        Alert.UNSUPPORTED_CERTIFICATE,
        "RSA key of 1024 bits",
        about="CN=Root",
        store=TrustStore((authority(key=key, issuer_key=key),)),
    )


def tlv(tag: int, *content: bytes) -> bytes:
    """DER: tag, length, value."""
    value = b"".join(content)
    size = len(value).to_bytes((len(value).bit_length() + 7) // 8 or 1, "big")
    length = size if len(value) < 128 else bytes([0x80 | len(size)]) + size
    return bytes([tag]) + length + value


def children(sequence: bytes) -> list[bytes]:
    """What a DER SEQUENCE holds."""

    def skip(data: bytes, start: int) -> tuple[int, int]:
        first = data[start + 1]
        width = first & 0x7F if first & 0x80 else 0
        size = int.from_bytes(data[start + 2 : start + 2 + width], "big") if width else first
        return start + 2 + width, start + 2 + width + size

    place, end = skip(sequence, 0)
    found = []
    while place < end:
        _, after = skip(sequence, place)
        found.append(sequence[place:after])
        place = after
    return found


def resigned(tbs: list[bytes], algorithm: bytes, digest: hashes.HashAlgorithm) -> x509.Certificate:
    """A certificate with this content, which the library would not make, signed by the root."""
    content = tlv(0x30, *tbs)
    signature = ROOT_KEY.sign(content, ec.ECDSA(digest))
    return x509.load_der_x509_certificate(
        tlv(0x30, content, algorithm, tlv(0x03, b"\x00", signature))
    )


def test_a_broken_hash() -> None:
    version, serial, _, *rest = children(GOOD.tbs_certificate_bytes)
    ecdsa_with_sha1 = bytes.fromhex("300906072a8648ce3d0401")
    weak = resigned([version, serial, ecdsa_with_sha1, *rest], ecdsa_with_sha1, hashes.SHA1())
    refused([weak], Alert.UNSUPPORTED_CERTIFICATE, "signed with SHA1, which is broken")


def test_version_one() -> None:
    _version, *rest, _extensions = children(GOOD.tbs_certificate_bytes)
    old = resigned(rest, rest[1], hashes.SHA256())
    assert old.version is x509.Version.v1
    refused([old], Alert.UNSUPPORTED_CERTIFICATE, "X.509 version 1")
    refused([old], Alert.UNSUPPORTED_CERTIFICATE, "X.509 version 1", client=True)


# The leaf


def test_usages() -> None:
    critical = leaf("a.example", usages=[CLIENT], usages_critical=True)
    refused([critical], Alert.UNSUPPORTED_CERTIFICATE, "is not for a server", "serverAuth")
    any_use = leaf("a.example", usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
    refused([any_use], Alert.UNSUPPORTED_CERTIFICATE, "is not for a server", "serverAuth")
    for_clients = leaf("a.example", usages=[CLIENT])
    assert accepted([for_clients], client=True)
    refused([for_clients], Alert.UNSUPPORTED_CERTIFICATE, "is not for a server", "serverAuth")
    for_servers = leaf("a.example", usages=[SERVER])
    refused(
        [for_servers],
        Alert.UNSUPPORTED_CERTIFICATE,
        "is not for a client",
        "clientAuth",
        client=True,
    )


@pytest.mark.parametrize(
    ("wrong", "alert", "words"),
    [
        (
            {"extra": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b""), True)]},
            Alert.UNSUPPORTED_CERTIFICATE,
            "critical extension that is not supported: extension 1.2.3.4",
        ),
    ],
)
def test_leaves_that_are_none(wrong: dict[str, Any], alert: Alert, words: str) -> None:
    refused([leaf("a.example", **wrong)], alert, words)
    refused([leaf("a.example", **wrong)], alert, words, client=True)


def test_an_authority_may_serve() -> None:
    """RFC 5280 section 6 has nothing against it, and ``openssl req -x509`` makes such servers."""
    for right in ({"constraints": A_CA}, {"key_usage": usage(certify=True)}):
        for client in (False, True):
            assert accepted([leaf("a.example", **right)], client=client)  # type: ignore[arg-type]


def test_an_unknown_extension_that_is_not_critical_is_ignored() -> None:
    extra = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    assert accepted([leaf("a.example", extra=[(extra, False)])])


class OnlyPublic:
    """A key pair of which only the public half is needed, and can be had cheaply."""

    def __init__(self, key: Any) -> None:
        self.public_key = lambda: key


HUGE = rsa.RSAPublicNumbers(65537, (1 << 8199) + 1).public_key()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (rsa.generate_private_key(65537, 1024), "RSA key of 1024 bits, not of 2048 to 8192"),
        (OnlyPublic(HUGE), "RSA key of 8200 bits"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (ec.generate_private_key(ec.BrainpoolP256R1()), "brainpoolP256r1"),
        (dsa.generate_private_key(1024), "does not sign with (DSA)"),
        (ed448.Ed448PrivateKey.generate(), "does not sign with (Ed448)"),
        (x25519.X25519PrivateKey.generate(), "does not sign with (X25519)"),
    ],
)
def test_keys_that_are_not_good_enough(key: Any, words: str) -> None:
    certificate = leaf("a.example", key=key)
    refused([certificate], Alert.UNSUPPORTED_CERTIFICATE, words)
    refused([certificate], Alert.UNSUPPORTED_CERTIFICATE, words, client=True)
    with pytest.raises(CertificateRejected, match="has a"):
        Pins(frozenset({spki_sha256(certificate)})).verify_server(der(certificate), NAME)


# Pins


def test_pins_alone() -> None:
    """The key counts, and nothing around it: not the issuer, the dates, or the name."""
    pins = Pins(frozenset({spki_sha256(GOOD)}))
    stranger = leaf("x.example", issuer="leaf", issuer_key=LEAF_KEY, end=NOW - DAY / 2)
    for peer in (
        pins.verify_server(der(stranger), NAME, at=NOW),
        pins.verify_server(der(stranger), None),
        pins.verify_client(der(stranger)),
    ):
        assert peer.verified_by == "pin"
        assert peer.certificate.pin in pins.pins
    other = leaf("x.example", key=MIDDLE_KEY)
    with pytest.raises(CertificateRejected) as caught:
        pins.verify_server(der(other, GOOD), NAME)  # Only the leaf's key counts.
    assert caught.value.alert is Alert.CERTIFICATE_UNKNOWN
    assert spki_sha256(other) in str(caught.value)


def test_pins_beside_authorities() -> None:
    both = TrustStore((ROOT,), frozenset({spki_sha256(GOOD)}))
    assert accepted([GOOD], store=both).verified_by == "ca"
    assert accepted([GOOD], store=both, client=True).verified_by == "ca"
    refused([GOOD], Alert.BAD_CERTIFICATE, "not for b.example", store=both, name="b.example")
    wrong = replace(both, pins=frozenset({spki_sha256(ROOT)}))
    refused([GOOD], Alert.CERTIFICATE_UNKNOWN, "which is not pinned", store=wrong)
    refused([GOOD], Alert.CERTIFICATE_UNKNOWN, "which is not pinned", store=wrong, client=True)


@pytest.mark.parametrize(
    "digest",
    [bytes.fromhex(spki_sha256(GOOD)), b"\xff" * 32, b"\xfc" + bytes(31)],
    ids=["usual", "slashes", "slash"],
)
def test_how_a_pin_is_written(digest: bytes) -> None:
    """In base64, two of them begin with a slash."""
    in_base64 = base64.b64encode(digest).decode()
    for text in (
        digest.hex(),
        digest.hex().upper(),
        digest.hex(":").upper(),
        f" {digest.hex()}\n",
        f"sha256:{digest.hex()}",
        in_base64,
        f"sha256//{in_base64}",
        f"sha256/{in_base64}",
    ):
        assert Pins(frozenset({text})).pins == {digest.hex()}
        assert TrustStore((ROOT,), frozenset({text})).pins == {digest.hex()}


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 31, "00" * 33, "é" * 44, "A" * 44])
def test_what_is_no_pin(text: str) -> None:
    with pytest.raises(ConfigError, match="a pin is"):
        Pins(frozenset({text}))
    with pytest.raises(ConfigError, match="a pin is"):
        TrustStore((ROOT,), frozenset({text}))


def test_pins_are_a_set_of_some() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Pins(frozenset())
    with pytest.raises(ConfigError, match="a set"):
        Pins("00" * 32)  # type: ignore[arg-type]


# No verification


def test_insecure() -> None:
    nobody = InsecureNoVerification()
    weak = leaf("a.example", key=rsa.generate_private_key(65537, 1024), end=NOW - DAY / 2)
    for peer in (nobody.verify_server(der(weak), NAME), nobody.verify_client(der(weak))):
        assert peer.verified_by == "insecure"
        assert peer.subject == "CN=leaf"


# What is no chain

VERIFIERS: list[Callable[[Sequence[bytes]], VerifiedPeer]] = [
    lambda chain: STORE.verify_server(chain, NAME, at=NOW),
    lambda chain: STORE.verify_client(chain, at=NOW),
    lambda chain: Pins(frozenset({spki_sha256(GOOD)})).verify_server(chain, NAME),
    lambda chain: Pins(frozenset({spki_sha256(GOOD)})).verify_client(chain),
    lambda chain: InsecureNoVerification().verify_server(chain, NAME),
    lambda chain: InsecureNoVerification().verify_client(chain),
]


@pytest.mark.parametrize("verify", VERIFIERS)
def test_no_chain(verify: Callable[[Sequence[bytes]], VerifiedPeer]) -> None:
    good = der(GOOD)
    assert verify(good)
    assert verify([*good, *der(ROOT) * 15])
    for chain, words in (
        ([], "sent no certificate"),
        ([b""], "certificate 1 of 1 that the peer sent does not parse"),
        ([b"\x00" * 100], "does not parse"),
        ([*good, b"rubbish"], "certificate 2 of 2 that the peer sent does not parse"),
        ([good[0] + b"\x00"], "does not parse"),
        ([GOOD.public_bytes(Encoding.PEM)], "does not parse"),
        (good * 17, "a chain of 17 certificates"),
    ):
        with pytest.raises(CertificateRejected, match=words) as caught:
            verify(chain)
        assert caught.value.alert is Alert.BAD_CERTIFICATE


def test_a_key_of_an_algorithm_that_nobody_knows() -> None:
    """The identifier of EC keys, 1.2.840.10045.2.1, changed into another one."""
    oid = bytes.fromhex("06072a8648ce3d0201")
    strange = der(GOOD)[0].replace(oid, oid[:-1] + b"\x63")
    with pytest.raises(CertificateRejected) as caught:
        InsecureNoVerification().verify_server([strange], NAME)
    assert caught.value.alert is Alert.UNSUPPORTED_CERTIFICATE


def test_an_authority_whose_extensions_do_not_parse() -> None:
    broken = x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"\xff\xff")
    middle = authority("Middle", MIDDLE_KEY, constraints=None, extra=[(broken, True)])
    refused([UNDER_MIDDLE, middle], Alert.BAD_CERTIFICATE, "does not parse", about="CN=Middle")


def unharmed(chain: Sequence[bytes]) -> None:
    """Whatever a peer sends: our error, or a certificate of which everything can be read."""
    for verify in VERIFIERS:
        try:
            peer = verify(chain)
        except CertificateRejected:
            pass
        else:
            assert peer.certificate.public_key
            assert isinstance(peer.subject, str)
            assert isinstance(peer.vouched_names, tuple)
            assert peer.certificate.pin


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_byte_counts(place: int, mask: int, thorough: bool) -> None:
    """A chain with any one byte changed is refused, and nothing but our error comes out. Without
    ``--thorough``, each byte is changed by one mask, and each third one by the others.

    One byte is outside of what is signed and of the signature: how many bits of the last byte of
    the signature do not count. The parser takes 1 for 0 there if that bit is 0, and the same
    certificate comes out.
    """
    original = (UNDER_MIDDLE, MIDDLE)[place]
    good = der(UNDER_MIDDLE, MIDDLE)
    positions = range(0, len(good[place]), 1 if thorough or mask == 1 else 3)
    refusals = 0
    for position in positions:
        changed = bytearray(good[place])
        changed[position] ^= mask
        chain = [*good[:place], bytes(changed), *good[place + 1 :]]
        unharmed(chain[place:])
        try:
            STORE.verify_server(chain, NAME, at=NOW)
        except CertificateRejected:
            refusals += 1
        else:
            same = x509.load_der_x509_certificate(bytes(changed))
            assert same.tbs_certificate_bytes == original.tbs_certificate_bytes
            assert same.signature == original.signature
    assert refusals >= len(positions) - 1


@given(st.lists(st.binary(max_size=200), max_size=3))
@example([b"\x30\x03\x02\x01\x00"])
def test_any_bytes(chain: list[bytes]) -> None:
    unharmed(chain)


MATERIAL = der(GOOD, ROOT, leaf("127.0.0.1", "x.example"))


@given(st.data())
def test_cut_grown_and_spliced_certificates(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(MATERIAL))
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 40)))
    middle = data.draw(st.one_of(st.binary(max_size=40), st.just(good[start:end] * 2)))
    unharmed([good[:start] + middle + good[end:]])


# Proof, and what is printed


def test_a_proof_cannot_be_made() -> None:
    certificate = PeerCertificate(tuple(der(GOOD)))
    with pytest.raises(TypeError, match="only a verifier"):
        VerifiedPeer(object(), certificate, "ca")
    with pytest.raises((TypeError, ValueError)):
        replace(accepted([GOOD]), verified_by="insecure")  # type: ignore[call-arg]


def test_certificates_print_well() -> None:
    peer = accepted([UNDER_MIDDLE, MIDDLE])
    assert repr(peer.certificate) == "PeerCertificate('CN=leaf', 2 in the chain)"
    assert "CN=leaf" in repr(peer)
    anonymous = leaf("a.example", subject="", san_critical=True)
    assert PeerCertificate(tuple(der(anonymous))).subject == "a.example"
    nothing = leaf(subject="")
    assert PeerCertificate(tuple(der(nothing))).subject == "(no name)"
    assert repr(TrustStore((ROOT,), source="roots.pem")) == (
        "TrustStore(pins=frozenset(), source='roots.pem')"
    )
    again = pickle.loads(pickle.dumps(PeerCertificate(tuple(der(GOOD)))))
    assert again == PeerCertificate(tuple(der(GOOD)))


@pytest.mark.parametrize("place", [0, 1])
def test_a_certificate_with_an_extension_twice(place: int) -> None:
    """At any place of the chain."""
    ca, other = DevCa.create(), DevCa.create()
    leaf = ca.issue("localhost").chain[0]
    twice = leaf.replace(b"\x06\x03\x55\x1d\x23", b"\x06\x03\x55\x1d\x0e", 1)
    assert twice != leaf
    chain = [leaf, leaf]
    chain[place] = twice
    with pytest.raises(CertificateRejected):
        TrustStore((other.certificate,)).verify_server(chain, parse_peer_name("localhost"))
    if place == 0:
        with pytest.raises(CertificateRejected, match=r"certificate 1 of 2 .* twice"):
            InsecureNoVerification().verify_server(chain, parse_peer_name("localhost"))
