# ruff: noqa: E501 - reasons are sentences
"""Chains as authorities make them, and as nobody should: each with OpenSSL's verdict beside ours.

A case says what is special, who is the server, and what the two verifiers say; where they differ,
why. ``tests/auth/test_corpus.py`` asks both, and ``docs/certificates-compared.md`` shows the differences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from hybridkex.constants import Alert
from tests.auth.der import (
    BMP,
    COMMON_NAME,
    COUNTRY,
    DAY,
    IA5,
    NOW,
    NULL,
    ORGANIZATION,
    PRINTABLE,
    T61,
    UNIVERSAL,
    UTF8,
    Cert,
    ext,
    extension,
    generalized_time,
    integer,
    key,
    key_id,
    name,
    oid,
    pss,
    seq,
    spki,
    time,
    tlv,
    utc_time,
)

BAD, UNKNOWN_CA = Alert.BAD_CERTIFICATE, Alert.UNKNOWN_CA
UNSUPPORTED, EXPIRED = Alert.UNSUPPORTED_CERTIFICATE, Alert.CERTIFICATE_EXPIRED


@dataclass(frozen=True, kw_only=True)
class Case:
    """One chain."""

    title: str
    chain: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    refused: str | None
    """Words of our refusal; ``None`` where we accept."""
    alert: Alert = BAD
    openssl: bool
    """Whether OpenSSL accepts it."""
    why: str = ""
    """Why the two differ."""
    host: str = "a.example"
    client: bool = False
    at: datetime = NOW


CASES: dict[str, Callable[[], Case]] = {}


def case(
    title: str,
    make: Callable[[], tuple[Sequence[bytes], Sequence[bytes]]],
    refused: str | None = None,
    alert: Alert = BAD,
    *,
    openssl: bool | None = None,
    **more: Any,
) -> None:
    """A chain that is made when it is asked for."""
    assert title not in CASES

    def build() -> Case:
        chain, roots = make()
        return Case(
            title=title,
            chain=tuple(chain),
            roots=tuple(roots),
            refused=refused,
            alert=alert,
            openssl=refused is None if openssl is None else openssl,
            **more,
        )

    CASES[title] = cache(build)


# --- the usual parts ------------------------------------------------------------------------------


def usage(*names: str) -> x509.KeyUsage:
    every = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{one: one in names for one in every})


def general(*names: str) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for one in names:
        if one.startswith("uri:"):
            found.append(x509.UniformResourceIdentifier(one[4:]))
        elif one.startswith("mail:"):
            found.append(x509.RFC822Name(one[5:]))
        elif one.startswith("dir:"):
            attribute = x509.NameAttribute(x509.NameOID.COMMON_NAME, one[4:])
            found.append(x509.DirectoryName(x509.Name([attribute])))
        elif "/" in one:
            found.append(x509.IPAddress(ip_network(one)))
        else:
            try:
                found.append(x509.IPAddress(ip_address(one)))
            except ValueError:
                found.append(x509.DNSName(one))
    return found


def san(*names: str, critical: bool = False) -> bytes:
    return ext(x509.SubjectAlternativeName(general(*names)), critical)


def constraints(
    permitted: Sequence[str] = (), excluded: Sequence[str] = (), critical: bool = True
) -> bytes:
    """Written by hand: the library refuses to write some forms that authorities have written."""
    trees = []
    for tag, names in ((0xA0, permitted), (0xA1, excluded)):
        if names:
            trees.append(tlv(tag, *(seq(_base(one)) for one in names)))
    return extension("2.5.29.30", seq(*trees), critical)


def _base(text: str) -> bytes:
    for prefix, tag in (("uri:", 0x86), ("mail:", 0x81), ("dns:", 0x82)):
        if text.startswith(prefix):
            return tlv(tag, text.removeprefix(prefix).encode())
    if text.startswith("dir:"):
        return tlv(0xA4, name(text[4:]))
    if "/" in text:
        network = ip_network(text)
        return tlv(0x87, network.network_address.packed + network.netmask.packed)
    return tlv(0x82, text.encode())


def basic(ca: bool, length: int | None = None, critical: bool = True) -> bytes:
    return ext(x509.BasicConstraints(ca, length), critical)


def ski(public: bytes) -> bytes:
    return ext(x509.SubjectKeyIdentifier(key_id(public)))


def aki(public: bytes) -> bytes:
    return ext(x509.AuthorityKeyIdentifier(key_id(public), None, None))


CERT_SIGN = ext(usage("key_cert_sign", "crl_sign"), True)
SIGN = ext(usage("digital_signature"), True)
SERVER = ext(x509.ExtendedKeyUsage([Usage.SERVER_AUTH, Usage.CLIENT_AUTH]))


def authority(
    subject: str | bytes = "Root",
    kind: str = "p256/root",
    issuer: str | bytes | None = None,
    issuer_kind: str | None = None,
    *extra: bytes,
    bc: bytes | None = basic(True),
    ku: bytes | None = CERT_SIGN,
    ids: bool = True,
    **changes: Any,
) -> bytes:
    """A root; with an issuer, an authority below it."""
    subject = name(subject) if isinstance(subject, str) else subject
    issuer = subject if issuer is None else name(issuer) if isinstance(issuer, str) else issuer
    own, signer = key_of(kind), key_of(issuer_kind or kind)
    extensions = [one for one in (bc, ku, *extra) if one is not None]
    if ids:
        extensions += [ski(spki(own)), aki(spki(signer))]
    made = Cert(
        subject=subject, issuer=issuer, public=spki(own), signer=signer, extensions=extensions
    )
    return made.but(**changes).der()


@cache
def key_of(kind: str) -> Any:
    """A key by kind and number: ``p256/leaf``."""
    return key.__wrapped__(kind)


def leaf(
    *extra: bytes,
    subject: str | bytes = "leaf",
    names: bytes | None = san("a.example"),
    kind: str = "p256/leaf",
    issuer: str | bytes = "Root",
    issuer_kind: str = "p256/root",
    bc: bytes | None = basic(False),
    ku: bytes | None = SIGN,
    eku: bytes | None = SERVER,
    ids: bool = True,
    **changes: Any,
) -> bytes:
    """A server's certificate."""
    own, signer = key_of(kind), key_of(issuer_kind)
    extensions = [one for one in (bc, ku, eku, names, *extra) if one is not None]
    if ids:
        extensions += [ski(spki(own)), aki(spki(signer))]
    made = Cert(
        subject=name(subject) if isinstance(subject, str) else subject,
        issuer=name(issuer) if isinstance(issuer, str) else issuer,
        public=spki(own),
        signer=signer,
        extensions=extensions,
    )
    return made.but(**changes).der()


def middle(*extra: bytes, subject: str | bytes = "Middle", **more: Any) -> bytes:
    more = {"kind": "p256/middle", "issuer": "Root", "issuer_kind": "p256/root", **more}
    return authority(
        subject, more.pop("kind"), more.pop("issuer"), more.pop("issuer_kind"), *extra, **more
    )


def only_openssl(refused: str, why: str, *, alert: Alert = UNSUPPORTED) -> dict[str, Any]:
    """What is expected of a chain that OpenSSL accepts and this library refuses."""
    return {"refused": refused, "alert": alert, "openssl": True, "why": why}


BELOW: dict[str, Any] = {"issuer": "Middle", "issuer_kind": "p256/middle"}


def one(
    title: str,
    *words: Any,
    refused: str | None = None,
    alert: Alert = BAD,
    root: Callable[[], bytes] = authority,
    openssl: bool | None = None,
    why: str = "",
    host: str = "a.example",
    client: bool = False,
    at: datetime = NOW,
    **leaf_changes: Any,
) -> None:
    """A leaf under a root."""
    case(
        title,
        lambda: ([leaf(*words, **leaf_changes)], [root()]),
        refused,
        alert,
        openssl=openssl,
        why=why,
        host=host,
        client=client,
        at=at,
    )


def two(
    title: str,
    *words: bytes,
    refused: str | None = None,
    alert: Alert = BAD,
    openssl: bool | None = None,
    why: str = "",
    host: str = "a.example",
    leaf_changes: dict[str, Any] | None = None,
    client: bool = False,
    **changes: Any,
) -> None:
    """A leaf under an authority under a root; what is special is the authority between."""
    case(
        title,
        lambda: (
            [leaf(**{**BELOW, **(leaf_changes or {})}), middle(*words, **changes)],
            [authority()],
        ),
        refused,
        alert,
        openssl=openssl,
        why=why,
        host=host,
        client=client,
    )


# --- plain ----------------------------------------------------------------------------------------

one("plain: a leaf under a root")
two("plain: an intermediate")
one("plain: a client", client=True)
one("plain: a client without subjectAltName", client=True, names=None)

# --- roots ----------------------------------------------------------------------------------------

one("root: basicConstraints not critical", root=lambda: authority(bc=basic(True, critical=False)))
one("root: no keyUsage", root=lambda: authority(ku=None))
one("root: keyUsage not critical", root=lambda: authority(ku=ext(usage("key_cert_sign"))))
one("root: no key identifiers", root=lambda: authority(ids=False))
one(
    "root: X.509 version 1",
    root=lambda: authority(version=None, extensions=None),
    **only_openssl(
        "X.509 version 1",
        "`cryptography` accepts version 3 only, also for roots: version 1 cannot say that a "
        "certificate is an authority.",
    ),
)
one(
    "root: no basicConstraints",
    root=lambda: authority(bc=None),
    **only_openssl(
        "no basicConstraints",
        "RFC 5280 section 4.2.1.9 requires the extension in an authority; OpenSSL accepts a root "
        "whose keyUsage has keyCertSign.",
        alert=BAD,
    ),
)
one("root: CA:FALSE", root=lambda: authority(bc=basic(False)), refused="CA:FALSE")
one("root: keyUsage without keyCertSign", root=lambda: authority(ku=SIGN), refused="keyUsage")
one(
    "root: expired",
    root=lambda: authority(not_after=time(NOW - DAY / 2)),
    refused="expired",
    alert=EXPIRED,
)
one("root: serial number 0", root=lambda: authority(serial=integer(0)))
one(
    "root: a critical extension that nobody knows",
    root=lambda: authority("Root", "p256/root", None, None, extension("1.2.3.4", NULL, True)),
    refused="critical extension",
    alert=UNSUPPORTED,
)
one(
    "root: extendedKeyUsage for servers",
    root=lambda: authority(
        "Root", "p256/root", None, None, ext(x509.ExtendedKeyUsage([Usage.SERVER_AUTH]))
    ),
)
one(
    "root: extendedKeyUsage for mail only",
    root=lambda: authority(
        "Root", "p256/root", None, None, ext(x509.ExtendedKeyUsage([Usage.EMAIL_PROTECTION]))
    ),
    refused="extendedKeyUsage",
    alert=UNSUPPORTED,
)
case("root: sent along", lambda: ([leaf(), authority()], [authority()]))
case(
    "root: unknown",
    lambda: ([leaf()], [authority("Other", "p256/other")]),
    "not the trusted one",
    UNKNOWN_CA,
)
case(
    "root: same name, new key",
    lambda: ([leaf()], [authority("Root", "p256/other")]),
    "created again",
    UNKNOWN_CA,
)
case(
    "root: same name, old and new key",
    lambda: ([leaf()], [authority("Root", "p256/other"), authority()]),
)
case(
    "root: a trusted intermediate",
    lambda: ([leaf(**BELOW)], [middle()]),
    openssl=False,
    why=(
        "A certificate in the trust store ends the chain, self-signed or not. OpenSSL does so "
        "with -partial_chain."
    ),
)

# --- a leaf that is trusted itself ----------------------------------------------------------------

SELF: dict[str, Any] = {"issuer": "leaf", "issuer_kind": "p256/leaf"}


@cache
def untouched() -> bytes:
    """The same bytes each time; ECDSA signatures differ."""
    return leaf()


def own(**changes: Any) -> Callable[[], tuple[list[bytes], list[bytes]]]:
    def make() -> tuple[list[bytes], list[bytes]]:
        made = leaf(**{**SELF, **changes})
        return [made], [made]

    return make


case("self-signed: CA:FALSE", own())
case(
    "self-signed: CA:TRUE, no keyUsage (openssl req -x509)", own(bc=basic(True), ku=None, eku=None)
)
case(
    "self-signed: CA:TRUE, digitalSignature and keyCertSign",
    own(bc=basic(True), ku=ext(usage("digital_signature", "key_cert_sign"), True)),
)
case("self-signed: no basicConstraints", own(bc=None))
case("self-signed: no extension but the name", own(bc=None, ku=None, eku=None, ids=False))
case("self-signed: wrong name", own(names=san("b.example")), "is for b.example")
case("self-signed: expired", own(not_after=time(NOW - DAY / 2)), "expired", EXPIRED)
case("self-signed: not trusted", lambda: ([leaf(**SELF)], [authority()]), "self-signed", UNKNOWN_CA)
case(
    "trusted leaf: issued by an authority that is unknown",
    lambda: ([untouched()], [untouched()]),
    openssl=False,
    why=(
        "A certificate in the trust store ends the chain, self-signed or not. OpenSSL does so "
        "with -partial_chain."
    ),
)

# --- the leaf -------------------------------------------------------------------------------------

one("leaf: CA:TRUE under an authority", bc=basic(True))
one("leaf: no basicConstraints", bc=None)
one("leaf: no keyUsage", ku=None)
one(
    "leaf: keyUsage keyAgreement only",
    ku=ext(usage("key_agreement"), True),
    **only_openssl("keyUsage", "TLS 1.3 requires digitalSignature (RFC 9846 section 4.5.1.2)."),
)
one(
    "leaf: keyUsage keyEncipherment only",
    ku=ext(usage("key_encipherment"), True),
    **only_openssl("keyUsage", "TLS 1.3 requires digitalSignature (RFC 9846 section 4.5.1.2)."),
)
one(
    "leaf: keyUsage with many bits",
    ku=ext(
        usage("digital_signature", "key_encipherment", "content_commitment", "key_cert_sign"), True
    ),
)
one(
    "leaf: keyUsage of no bits",
    ku=extension("2.5.29.15", b"\3\1\0", True),
    refused="keyUsage",
    alert=UNSUPPORTED,
)
one("leaf: extendedKeyUsage absent", eku=None)
one("leaf: extendedKeyUsage critical", eku=ext(x509.ExtendedKeyUsage([Usage.SERVER_AUTH]), True))
one(
    "leaf: extendedKeyUsage for clients only",
    eku=ext(x509.ExtendedKeyUsage([Usage.CLIENT_AUTH])),
    refused="extendedKeyUsage",
    alert=UNSUPPORTED,
)
one(
    "leaf: extendedKeyUsage for servers only, as a client",
    eku=ext(x509.ExtendedKeyUsage([Usage.SERVER_AUTH])),
    client=True,
    refused="extendedKeyUsage",
    alert=UNSUPPORTED,
)
one(
    "leaf: extendedKeyUsage any",
    eku=ext(x509.ExtendedKeyUsage([Usage.ANY_EXTENDED_KEY_USAGE])),
    refused="extendedKeyUsage",
    alert=UNSUPPORTED,
)
one(
    "leaf: extendedKeyUsage with an unknown use beside",
    eku=ext(x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.2.3"), Usage.SERVER_AUTH])),
)
one(
    "leaf: X.509 version 1",
    version=None,
    extensions=None,
    refused="X.509 version 1",
    alert=UNSUPPORTED,
)
one("leaf: expired", not_after=time(NOW - DAY / 2), refused="expired", alert=EXPIRED)
one(
    "leaf: not yet valid", not_before=time(NOW + DAY / 2), refused="not valid before", alert=EXPIRED
)
one(
    "leaf: certificatePolicies critical",
    ext(
        x509.CertificatePolicies(
            [x509.PolicyInformation(x509.ObjectIdentifier("2.23.140.1.2.1"), None)]
        ),
        True,
    ),
)
one(
    "leaf: certificatePolicies with an unknown qualifier",
    extension("2.5.29.32", seq(seq(oid("1.2.3"), seq(seq(oid("1.2.3.4"), tlv(UTF8, b"x")))))),
    **only_openssl(
        "certificatePolicies (2.5.29.32), its DER encoding is malformed (qualifier",
        "`cryptography` parses only the two policy qualifiers of RFC 5280.",
        alert=BAD,
    ),
)
one("leaf: an unknown extension", extension("1.2.3.4", NULL))
one(
    "leaf: a critical extension that nobody knows",
    extension("1.2.3.4", NULL, True),
    refused="critical extension",
    alert=UNSUPPORTED,
)
one("leaf: TLS feature (must-staple)", ext(x509.TLSFeature([x509.TLSFeatureType.status_request])))
one(
    "leaf: nameConstraints on a leaf",
    constraints(["b.example"]),
    **only_openssl(
        "nameConstraints",
        "`cryptography` applies nameConstraints also to the certificate that has them.",
        alert=BAD,
    ),
)
one("leaf: an extension twice", san("b.example"), refused="twice", openssl=False)
one("leaf: issuer and subject unique IDs", unique_ids=tlv(0x81, b"\0\1") + tlv(0x82, b"\0\2"))
one("leaf: signed by another key", signer=key_of("p256/other"), refused="signature")
one(
    "leaf: two signature algorithms",
    inner_algorithm=seq(oid("1.2.840.10045.4.3.3")),
    refused="signature",
)
one(
    "leaf: precertificate (poison)",
    extension("1.3.6.1.4.1.11129.2.4.3", NULL, True),
    refused="critical extension",
    alert=UNSUPPORTED,
)
one(
    "leaf: CRL distribution points critical",
    ext(
        x509.CRLDistributionPoints(
            [
                x509.DistributionPoint(
                    [x509.UniformResourceIdentifier("http://a.example/crl")], None, None, None
                )
            ]
        ),
        True,
    ),
)

# --- key identifiers ------------------------------------------------------------------------------

one("identifiers: none in the leaf", ids=False)
one(
    "identifiers: authorityKeyIdentifier of another key",
    aki(b"another"),
    ski(spki(key_of("p256/leaf"))),
    ids=False,
    openssl=False,
    why="Path validation (RFC 5280 section 6) does not use this extension; the signature decides.",
)
one(
    "identifiers: authorityKeyIdentifier critical",
    ext(x509.AuthorityKeyIdentifier(key_id(spki(key_of("p256/root"))), None, None), True),
    ids=False,
    openssl=False,
    why="RFC 5280 says that this extension is not critical. Its content is not used.",
)
one(
    "identifiers: subjectKeyIdentifier critical",
    ext(x509.SubjectKeyIdentifier(b"12"), True),
    ids=False,
    openssl=False,
    why="RFC 5280 says that this extension is not critical. Its content is not used.",
)
one(
    "identifiers: authorityKeyIdentifier by issuer and serial number",
    ext(x509.AuthorityKeyIdentifier(None, general("dir:Root"), 0x1234_5678_9ABC)),
    ids=False,
)
one("identifiers: empty authorityKeyIdentifier", extension("2.5.29.35", seq()), ids=False)
two("identifiers: none in the intermediate", ids=False)

# --- serial numbers and dates ---------------------------------------------------------------------

for shown, serial, refusal in (
    ("0", integer(0), None),
    ("negative", integer(-5), "negative serial number"),
    ("of 20 bytes", tlv(2, b"\x7f" + b"\xff" * 19), None),
    ("of 21 bytes", tlv(2, b"\0" + b"\xff" * 20), None),
    ("of 40 bytes", tlv(2, b"\1" * 40), "more than 20 octets"),
):
    one(
        f"serial number: {shown}",
        serial=serial,
        refused=refusal,
        openssl=True,
        why="RFC 5280 section 4.1.2.2 allows positive numbers of at most 20 octets."
        if refusal
        else "",
    )
for shown, start, end, refusal in (
    ("UTCTime without seconds", utc_time("3005311200Z"), time(NOW + DAY), "parse"),
    (
        "GeneralizedTime before 2050",
        generalized_time("20300531120000Z"),
        time(NOW + DAY),
        "as GeneralizedTime",
    ),
    (
        "GeneralizedTime with fractions",
        generalized_time("20300531120000.5Z"),
        time(NOW + DAY),
        "parse",
    ),
    ("until 2049, UTCTime", time(NOW - DAY), utc_time("491231235959Z"), None),
    ("from 1950, UTCTime", utc_time("500101000000Z"), time(NOW + DAY), None),
    ("until 9999", time(NOW - DAY), generalized_time("99991231235959Z"), None),
    ("with a time zone", utc_time("300531120000+0100"), time(NOW + DAY), "parse"),
    ("end before start", time(NOW + DAY), time(NOW - DAY), "expired"),
):
    one(
        f"dates: {shown}",
        not_before=start,
        not_after=end,
        refused=refusal,
        alert=EXPIRED if refusal == "expired" else BAD,
        openssl=refusal in (None, "as GeneralizedTime"),
        why="RFC 5280 section 4.1.2.5 requires UTCTime through 2049."
        if refusal == "as GeneralizedTime"
        else "",
    )
one(
    "dates: at the last second",
    not_after=time(NOW),
    openssl=False,
    why="RFC 5280 section 4.1.2.5: the validity period includes its last second.",
)
one("dates: at the first second", not_before=time(NOW))

# --- names of subjects and issuers ----------------------------------------------------------------

for tag, word in (
    (PRINTABLE, "PrintableString"),
    (T61, "TeletexString"),
    (BMP, "BMPString"),
    (UNIVERSAL, "UniversalString"),
    (IA5, "IA5String"),
):
    both = name((COMMON_NAME, tag, "Root"))
    case(
        f"names: issuer in {word} both times",
        lambda both=both: ([leaf(issuer=both)], [authority(both)]),
    )
    case(
        f"names: issuer in {word}, the root's in UTF8String",
        lambda both=both: ([leaf(issuer=both)], [authority()]),
        "other string types",
        UNSUPPORTED,
        openssl=True,
        why="`cryptography` compares names byte by byte.",
    )
case(
    "names: issuer differs in case and spaces",
    lambda: (
        [leaf(issuer=name((COMMON_NAME, PRINTABLE, "ROOT  ca")))],
        [authority(name((COMMON_NAME, PRINTABLE, "Root CA")))],
    ),
    **only_openssl(
        "not the trusted one", "`cryptography` compares names byte by byte.", alert=UNKNOWN_CA
    ),
)
case(
    "names: root without a subject",
    lambda: ([leaf(issuer=name())], [authority(name())]),
    **only_openssl(
        "no issuer name",
        "RFC 5280 section 4.1.2.4: the name of an issuer must not be empty.",
        alert=BAD,
    ),
)
one(
    "names: empty subject, critical subjectAltName",
    subject=name(),
    names=san("a.example", critical=True),
)
one("names: empty subject, subjectAltName not critical", subject=name())
one("names: long country code", subject=name((COUNTRY, PRINTABLE, "Germany"), "leaf"))
one("names: long common name", subject=name("x" * 200))
one(
    "names: malformed UTF-8",
    subject=seq(tlv(0x31, seq(oid(COMMON_NAME), tlv(UTF8, b"\xff\xfe")))),
    refused="parse",
)
one(
    "names: multi-valued RDN",
    subject=seq(
        tlv(0x31, seq(oid(COMMON_NAME), tlv(UTF8, b"a")), seq(oid(ORGANIZATION), tlv(UTF8, b"b")))
    ),
)

# --- names of servers -----------------------------------------------------------------------------

one(
    "server name: wildcard",
    names=san("*.example"),
    openssl=False,
    why="OpenSSL requires two labels after a wildcard; RFC 9525 does not.",
)
one("server name: wildcard below", names=san("*.b.example"), host="a.b.example")
one(
    "server name: wildcard for two labels",
    names=san("*.b.example"),
    host="x.a.b.example",
    refused="is for",
)
one(
    "server name: wildcard for no label",
    names=san("*.b.example"),
    host="b.example",
    refused="is for",
)
one(
    "server name: part of a label",
    names=san("a*.b.example"),
    host="ab.b.example",
    **only_openssl("is for", "RFC 9525 section 6.3: a wildcard must be a whole label.", alert=BAD),
)
one("server name: wildcard alone", names=san("*"), host="a", refused="is for")
one("server name: upper case", names=san("A.EXAMPLE"))
one("server name: trailing dot in the certificate", names=san("a.example."), refused="is for")
one(
    "server name: common name only",
    subject="a.example",
    names=None,
    **only_openssl(
        "no subjectAltName", "RFC 9525 section 2: a common name is not a server name.", alert=BAD
    ),
)
one(
    "server name: common name beside another subjectAltName",
    subject="a.example",
    names=san("b.example"),
    refused="is for b.example",
)
one("server name: IPv4 address", names=san("192.0.2.1"), host="192.0.2.1")
one("server name: IPv6 address", names=san("2001:db8::1"), host="2001:db8::1")
one("server name: another IPv4 address", names=san("192.0.2.2"), host="192.0.2.1", refused="is for")
one(
    "server name: IPv4 address as a DNS name",
    names=extension("2.5.29.17", seq(tlv(0x82, b"192.0.2.1"))),
    host="192.0.2.1",
    refused="as a DNS name",
)
one(
    "server name: underscore",
    names=san("a_b.example"),
    host="a_b.example",
    **only_openssl(
        "underscore",
        "A host name must not contain an underscore (RFC 5280 section 4.2.1.6, RFC 1123). Use a "
        "pin.",
        alert=BAD,
    ),
)
one("server name: A-label", names=san("xn--bcher-kva.example"), host="xn--bcher-kva.example")
one("server name: URI only", names=san("uri:https://a.example"), refused="is for", openssl=False)
one("server name: empty subjectAltName", names=extension("2.5.29.17", seq()), refused="")
one("server name: mail beside", names=san("mail:x@a.example", "a.example"))
one("server name: directory name beside", names=san("dir:x", "a.example"))
one(
    "server name: otherName beside",
    names=extension(
        "2.5.29.17",
        seq(
            tlv(0xA0, oid("1.3.6.1.4.1.311.20.2.3"), tlv(0xA0, tlv(UTF8, b"x"))),
            tlv(0x82, b"a.example"),
        ),
    ),
)
one(
    "server name: x400Address beside",
    names=extension("2.5.29.17", seq(tlv(0xA3, b""), tlv(0x82, b"a.example"))),
    **only_openssl("parse", "`cryptography` does not parse this form of name.", alert=BAD),
)
one(
    "server name: DNS name with a zero byte",
    names=extension("2.5.29.17", seq(tlv(0x82, b"a.example\0.evil"))),
    refused="is for",
)

# --- name constraints -----------------------------------------------------------------------------

two("constraints: permitted", constraints(["example"]))
two("constraints: permitted, not critical", constraints(["example"], critical=False))
two("constraints: not permitted", constraints(["other"]), refused="nameConstraints")
two("constraints: excluded", constraints([], ["example"]), refused="nameConstraints")
two("constraints: excluded elsewhere", constraints([], ["other"]))
two("constraints: the whole name", constraints(["a.example"]))
two(
    "constraints: a leading dot",
    constraints([".example"]),
    **only_openssl(
        "leading dot",
        "RFC 5280 section 4.2.1.10 has no leading dot in DNS constraints; `cryptography` treats "
        "the constraint as malformed.",
    ),
)
two(
    "constraints: excluded with a leading dot",
    constraints([], [".other"]),
    **only_openssl("leading dot", "As above."),
)
two(
    "constraints: all DNS names permitted (empty)",
    constraints(["dns:"]),
    **only_openssl("empty", "`cryptography` treats an empty DNS constraint as malformed."),
)
two(
    "constraints: all DNS names excluded (empty)",
    constraints([], ["dns:"]),
    refused="empty",
    alert=UNSUPPORTED,
    openssl=False,
)
two("constraints: IP addresses permitted, DNS name asked", constraints(["192.0.2.0/24"]))
two(
    "constraints: IP address permitted",
    constraints(["192.0.2.0/24"]),
    host="192.0.2.1",
    leaf_changes={"names": san("192.0.2.1")},
)
two(
    "constraints: IP address not permitted",
    constraints(["198.51.100.0/24"]),
    host="192.0.2.1",
    leaf_changes={"names": san("192.0.2.1")},
    refused="nameConstraints",
)
two("constraints: all IP addresses excluded", constraints([], ["0.0.0.0/0", "::/0"]))
two("constraints: mail permitted", constraints(["mail:example"]))
two("constraints: URI permitted, none in the leaf", constraints(["uri:.example"]))
two(
    "constraints: URI permitted, one in the leaf",
    constraints(["uri:.example"]),
    leaf_changes={"names": san("a.example", "uri:https://a.example/")},
    **only_openssl("nameConstraints", "`cryptography` does not compare URIs with constraints."),
)
two(
    "constraints: directory name permitted",
    constraints(["dir:leaf"]),
    **only_openssl(
        "nameConstraints", "`cryptography` does not compare directory names with constraints."
    ),
)
two(
    "constraints: directory name permitted, not critical",
    constraints(["dir:leaf"], critical=False),
    openssl=True,
)
two(
    "constraints: directory name excluded",
    constraints([], ["dir:other"]),
    **only_openssl(
        "nameConstraints", "`cryptography` does not compare directory names with constraints."
    ),
)
two(
    "constraints: none at all",
    extension("2.5.29.30", seq(), True),
    **only_openssl(
        "neither permittedSubtrees nor",
        "RFC 5280 section 4.2.1.10: at least one of the two lists must be present.",
        alert=BAD,
    ),
)
two(
    "constraints: wildcard in the leaf, permitted",
    constraints(["b.example"]),
    host="a.b.example",
    leaf_changes={"names": san("*.b.example")},
)
two(
    "constraints: wildcard in the leaf over an excluded name",
    constraints([], ["x.b.example"]),
    host="a.b.example",
    leaf_changes={"names": san("*.b.example")},
    **only_openssl("nameConstraints", "The wildcard also matches the excluded name.", alert=BAD),
)
two(
    "constraints: common name outside, subjectAltName inside",
    constraints(["example"]),
    leaf_changes={"subject": "evil.test"},
)
two(
    "constraints: client by its common name alone",
    constraints(["example"]),
    client=True,
    leaf_changes={"subject": "evil.test", "names": None},
    openssl=False,
    why=(
        "Without a subjectAltName, OpenSSL applies DNS constraints to the common name. Here a "
        "common name is never a DNS name."
    ),
)
for where in ((), ("excluded",)):
    two(
        f"constraints: an IP address of no bytes {'excluded' if where else 'permitted'}",
        extension("2.5.29.30", tlv(0x30, tlv(0xA1 if where else 0xA0, seq(tlv(0x87)))), True),
        **only_openssl(
            "an IP address or a range of addresses is malformed",
            "Windows authorities have written this for no IP address. RFC 5280 section 4.2.1.10: "
            "a constraint on IP addresses has 8 or 32 octets.",
            alert=BAD,
        ),
    )
two(
    "constraints: on DNS names, and the authority itself has another name",
    constraints(["example"]),
    san("x.other"),
    **only_openssl(
        "certificate CN=Middle is for x.other, which its own nameConstraints do not allow",
        "`cryptography` applies nameConstraints also to the certificate that has them.",
    ),
)
two(
    "constraints: on DNS names, and the authority itself has such a name",
    constraints(["example"], ["b.example"]),
    san("x.example"),
)
case(
    "constraints: an authority between has another name",
    lambda: (
        [
            leaf(issuer="Lower", issuer_kind="p256/lower"),
            authority("Lower", "p256/lower", "Middle", "p256/middle", san("x.other")),
            middle(constraints(["example"])),
        ],
        [authority()],
    ),
    "certificate CN=Lower is for x.other, which nameConstraints in the certificate CN=Middle",
)
case(
    "constraints: on the root",
    lambda: ([leaf()], [authority("Root", "p256/root", None, None, constraints(["other"]))]),
    "nameConstraints",
)

# --- policies -------------------------------------------------------------------------------------

POLICY = ext(
    x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("1.2.3.9"), None)])
)
two(
    "policies: certificatePolicies critical",
    ext(
        x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("1.2.3.9"), None)]),
        True,
    ),
)
two(
    "policies: policyConstraints, explicit policy required",
    ext(x509.PolicyConstraints(0, None), True),
    **only_openssl(
        "requireExplicitPolicy",
        "The certificate requires policy processing (RFC 5280 section 6.1), which is not "
        "implemented. OpenSSL ignores the requirement unless -policy_check is given.",
    ),
)
two("policies: policyConstraints, mapping inhibited", ext(x509.PolicyConstraints(None, 0), True))
two("policies: inhibitAnyPolicy", ext(x509.InhibitAnyPolicy(0), True))
two(
    "policies: policyMappings",
    extension("2.5.29.33", seq(seq(oid("1.2.3.9"), oid("1.2.3.10"))), True),
)

# --- path lengths ---------------------------------------------------------------------------------


def ladder(
    rungs: int, *, top_length: int | None = None, kind: str = "p256"
) -> tuple[list[bytes], list[bytes]]:
    """A leaf under so many intermediates."""
    chain = [leaf(issuer=f"M{rungs}", issuer_kind=f"{kind}/m{rungs}")] if rungs else [leaf()]
    for rung in range(rungs, 0, -1):
        above = ("Root", "p256/root") if rung == 1 else (f"M{rung - 1}", f"{kind}/m{rung - 1}")
        chain.append(authority(f"M{rung}", f"{kind}/m{rung}", *above))
    return chain, [authority(bc=basic(True, top_length))]


for rungs in (2, 7, 8, 9, 14):
    case(f"path: {rungs + 1} certificates sent", lambda rungs=rungs: ladder(rungs))
case("path: 16 certificates sent", lambda: ladder(15))
case(
    "path: 17 certificates sent",
    lambda: ladder(16),
    "chain of 17 certificates",
    openssl=True,
    why="A chain may have at most 16 certificates.",
)
case("path: pathLenConstraint 1 with one intermediate", lambda: ladder(1, top_length=1))
case(
    "path: pathLenConstraint 0 with one intermediate",
    lambda: ladder(1, top_length=0),
    "pathLenConstraint",
)
case(
    "path: pathLenConstraint 1 with two intermediates",
    lambda: ladder(2, top_length=1),
    "pathLenConstraint",
)
case(
    "path: pathLenConstraint 0 and a self-issued intermediate",
    lambda: (
        [leaf(issuer_kind="p256/root2"), authority("Root", "p256/root2", "Root", "p256/root")],
        [authority(bc=basic(True, 0))],
    ),
    **only_openssl(
        "pathLenConstraint",
        "RFC 5280 section 6.1.4 (l) does not count self-issued certificates; `cryptography` does.",
        alert=BAD,
    ),
)
two("path: intermediate without basicConstraints", bc=None, refused="no basicConstraints")
two("path: intermediate basicConstraints not critical", bc=basic(True, critical=False))
two("path: intermediate CA:FALSE", bc=basic(False), refused="CA:FALSE")
two("path: intermediate keyUsage without keyCertSign", ku=SIGN, refused="keyUsage")
two(
    "path: intermediate of version 1",
    version=None,
    extensions=None,
    refused="X.509 version 1",
    alert=UNSUPPORTED,
)
two("path: intermediate expired", not_after=time(NOW - DAY / 2), refused="expired", alert=EXPIRED)
two(
    "path: intermediate extendedKeyUsage for servers",
    ext(x509.ExtendedKeyUsage([Usage.SERVER_AUTH])),
)
two(
    "path: intermediate extendedKeyUsage for any use",
    ext(x509.ExtendedKeyUsage([Usage.ANY_EXTENDED_KEY_USAGE])),
    openssl=False,
    why=(
        "RFC 5280 section 4.2.1.12: anyExtendedKeyUsage allows every use. OpenSSL does not take "
        "it for serverAuth."
    ),
)
two(
    "path: intermediate extendedKeyUsage for clients only",
    ext(x509.ExtendedKeyUsage([Usage.CLIENT_AUTH])),
    refused="extendedKeyUsage",
    alert=UNSUPPORTED,
)
two(
    "path: intermediate with a critical extension that nobody knows",
    extension("1.2.3.4", NULL, True),
    refused="critical extension",
    alert=UNSUPPORTED,
)
two(
    "path: pathLenConstraint without CA",
    bc=extension("2.5.29.19", seq(integer(0)), True),
    refused="pathLenConstraint",
)

# --- what is sent beside --------------------------------------------------------------------------

case("sent: a certificate twice", lambda: ([leaf(**BELOW), *[middle()] * 2], [authority()]))
case("sent: the leaf twice", lambda: ([leaf()] * 2, [authority()]))
case(
    "sent: out of order",
    lambda: (
        [
            leaf(issuer="M2", issuer_kind="p256/m2"),
            authority("M1", "p256/m1", "Root", "p256/root"),
            authority("M2", "p256/m2", "M1", "p256/m1"),
        ],
        [authority()],
    ),
)
case(
    "sent: a stranger among them",
    lambda: ([leaf(**BELOW), authority("Other", "p256/other"), middle()], [authority()]),
)
case(
    "sent: intermediate missing",
    lambda: ([leaf(**BELOW)], [authority()]),
    "was not sent by the peer",
    UNKNOWN_CA,
)
case(
    "sent: leaf last",
    lambda: ([middle(), leaf(**BELOW)], [authority()]),
    "digitalSignature",
    UNSUPPORTED,
)
case(
    "sent: an expired cross-signed intermediate first",
    lambda: (
        [leaf(**BELOW), middle(not_after=time(NOW - DAY / 2), serial=integer(2)), middle()],
        [authority()],
    ),
)
case(
    "sent: cross-signed by an unknown root first",
    lambda: (
        [leaf(**BELOW), middle(issuer="Old", issuer_kind="p256/old"), middle()],
        [authority()],
    ),
    openssl=False,
    why="OpenSSL tries only the first issuer that matches.",
)
case(
    "sent: cross-signed root, the new root trusted",
    lambda: ([leaf(), authority("Root", "p256/root", "Old", "p256/old")], [authority()]),
)
case(
    "sent: cross-signed root, the old root trusted",
    lambda: (
        [leaf(), authority("Root", "p256/root", "Old", "p256/old")],
        [authority("Old", "p256/old")],
    ),
)
case(
    "sent: an expired cross-signed root beside a good one in the store (2021)",
    lambda: (
        [leaf(), authority("Root", "p256/root", "Old", "p256/old")],
        [authority("Old", "p256/old", not_after=time(NOW - DAY / 2)), authority()],
    ),
)
case(
    "sent: two authorities that sign each other",
    lambda: (
        [
            leaf(issuer="M1", issuer_kind="p256/m1"),
            authority("M1", "p256/m1", "M2", "p256/m2"),
            authority("M2", "p256/m2", "M1", "p256/m1"),
        ],
        [authority()],
    ),
    "loop",
    UNKNOWN_CA,
)

# --- keys and signatures --------------------------------------------------------------------------

for kind, refusal in (
    ("rsa2048", None),
    ("rsa2048e3", None),
    ("p384", None),
    ("p521", None),
    ("ed25519", None),
):
    one(f"leaf's key: {kind}", kind=f"{kind}/leaf", refused=refusal)
one(
    "leaf's key: ed448",
    kind="ed448/leaf",
    **only_openssl("Ed448", "This library does not support Ed448 signatures."),
)
one(
    "leaf's key: secp256k1",
    kind="k256/leaf",
    **only_openssl("secp256k1", "TLS 1.3 has no signature scheme for this curve."),
)
one(
    "leaf's key: rsa1024",
    kind="rsa1024/leaf",
    **only_openssl(
        "1024 bits",
        "RSA keys below 2048 bits are weak; OpenSSL refuses them from security level 2 on.",
    ),
)


def modulus(bits: int, exponent: int = 65537) -> bytes:
    number = (1 << bits) - 0x10001 * 3
    return seq(
        seq(oid("1.2.840.113549.1.1.1"), NULL),
        tlv(3, b"\0", seq(integer(number | 1), integer(exponent))),
    )


one("leaf's key: rsa8192", public=modulus(8192))
one("leaf's key: RSA, public exponent of 31 bits", public=modulus(2048, (1 << 31) - 1))
one(
    "leaf's key: RSA, public exponent of 3072 bits",
    public=modulus(3072, (1 << 3071) + 1),
    **only_openssl(
        "a public exponent of more than 31 bits",
        "An RSA exponent above 2^31 - 1 makes verification slow, and Go refuses it, too.",
    ),
)
two(
    "path: intermediate's key RSA, public exponent of 3072 bits",
    public=modulus(3072, (1 << 3071) + 1),
    refused="a public exponent of more than 31 bits",
    alert=UNSUPPORTED,
    openssl=False,
)
one(
    "leaf's key: rsa16384",
    public=modulus(16384),
    **only_openssl(
        "16384 bits",
        "RSA keys above 8192 bits are refused: an unknown peer must not cause that much work.",
    ),
)
one(
    "leaf's key: on an explicit curve",
    public=seq(seq(oid("1.2.840.10045.2.1"), seq(integer(1))), tlv(3, b"\0", b"\4" + b"\1" * 64)),
    refused="",
    openssl=False,
)
one(
    "leaf's key: of an unknown algorithm",
    public=seq(seq(oid("1.2.3.4.5")), tlv(3, b"\0", b"\4")),
    refused="not supported",
    alert=UNSUPPORTED,
    openssl=False,
)
for kind, refusal, alert, taken, why in (
    ("rsa2048", None, BAD, True, ""),
    ("rsa2048e3", None, BAD, True, ""),
    ("p384", None, BAD, True, ""),
    ("p521", None, BAD, True, ""),
    (
        "ed25519",
        "EdDSA",
        UNSUPPORTED,
        True,
        "`cryptography` does not accept Ed25519 signatures of authorities.",
    ),
    (
        "ed448",
        "EdDSA",
        UNSUPPORTED,
        True,
        "`cryptography` does not accept Ed448 signatures of authorities.",
    ),
    (
        "rsa1024",
        "1024 bits",
        UNSUPPORTED,
        True,
        "RSA keys below 2048 bits are weak; OpenSSL refuses them from security level 2 on.",
    ),
    ("k256", "secp256k1", UNSUPPORTED, True, "TLS 1.3 has no signature scheme for this curve."),
):
    case(
        f"root's key: {kind}",
        lambda kind=kind: ([leaf(issuer_kind=f"{kind}/root")], [authority(kind=f"{kind}/root")]),
        refusal,
        alert,
        openssl=taken,
        why=why,
    )


def signed(**changes: Any) -> Callable[[], tuple[list[bytes], list[bytes]]]:
    return lambda: ([leaf(issuer_kind="rsa2048/root", **changes)], [authority(kind="rsa2048/root")])


def pss_changes(digest: str, salt: int | None) -> dict[str, Any]:
    algorithm, used = pss(digest, salt)
    return {
        "algorithm": algorithm,
        "padding": used,
        "digest": hashes.SHA1() if digest == "sha1" else hashes.SHA256(),
    }


case("signature: RSA PSS, salt of the digest's length", signed(**pss_changes("sha256", 32)))
case(
    "signature: RSA PSS, salt of 20 bytes",
    signed(**pss_changes("sha256", None)),
    **only_openssl(
        "salt", "`cryptography` accepts only salts of the digest's length, as the Web PKI does."
    ),
)
case(
    "signature: RSA PSS, no salt",
    signed(**pss_changes("sha256", 0)),
    **only_openssl(
        "salt", "`cryptography` accepts only salts of the digest's length, as the Web PKI does."
    ),
)
case(
    "signature: RSA PSS with SHA-1",
    signed(**pss_changes("sha1", None)),
    "SHA1",
    UNSUPPORTED,
    openssl=True,
    why=(
        "SHA-1 is broken (RFC 9155). `openssl verify` does not check the digest; OpenSSL's TLS "
        "does."
    ),
)
case(
    "signature: RSA without the NULL",
    signed(algorithm=seq(oid("1.2.840.113549.1.1.11"))),
    **only_openssl(
        "without the NULL",
        "RFC 4055 section 5 requires the NULL of the signer and requires verifiers to accept its "
        "absence; `cryptography` does not accept it.",
    ),
)
case(
    "signature: RSA with SHA-1",
    signed(digest=hashes.SHA1()),
    "SHA1",
    UNSUPPORTED,
    openssl=True,
    why=(
        "SHA-1 is broken (RFC 9155). `openssl verify` does not check the digest; OpenSSL's TLS "
        "does."
    ),
)
case("signature: RSA with SHA-512", signed(digest=hashes.SHA512()))
one(
    "signature: ECDSA with SHA-1",
    digest=hashes.SHA1(),
    **only_openssl(
        "SHA1",
        "SHA-1 is broken (RFC 9155). `openssl verify` does not check the digest; OpenSSL's TLS "
        "does.",
    ),
)
one("signature: ECDSA P-256 with SHA-512", digest=hashes.SHA512())
one(
    "signature: ECDSA with a NULL",
    algorithm=seq(oid("1.2.840.10045.4.3.2"), NULL),
    **only_openssl(
        "malformed (signatureAlgorithm of tbsCertificate",
        "RFC 5758 section 3.2: the parameters must be absent.",
        alert=BAD,
    ),
)
case("signature: a root signed with SHA-1", lambda: ([leaf()], [authority(digest=hashes.SHA1())]))

# --- encodings that are not DER, and values outside their types ------------------------------------

NOT_DER = "RFC 5280 section 4.1 requires DER; `cryptography` parses nothing else."
NOT_OF_ITS_TYPE = "The ASN.1 type does not allow the value; `cryptography` does not parse it."
FALSE, TRUE, ONE = b"\1\1\0", b"\1\1\xff", b"\1\1\1"
A_EXAMPLE = tlv(0x82, b"a.example")


def flagged(kind: str, flag: bytes, value: bytes) -> bytes:
    """An extension with its critical flag in any encoding."""
    return seq(oid(kind), flag, tlv(0x04, value))


def named_by(kind: str, value: bytes) -> bytes:
    """A name of one attribute of any type."""
    return seq(tlv(0x31, seq(oid(kind), value)))


def alternatives(*names: bytes) -> bytes:
    return extension("2.5.29.17", seq(*names))


def policy(qualifier: str, value: bytes) -> bytes:
    return extension("2.5.29.32", seq(seq(oid("1.2.3.4"), seq(seq(oid(qualifier), value)))))


def notice(tag: int, text: bytes) -> bytes:
    return policy("1.3.6.1.5.5.7.2.2", seq(tlv(tag, text)))


MALFORMED_LEAVES: tuple[tuple[str, tuple[bytes, ...], dict[str, Any], str, str], ...] = (
    # what, extensions, other changes, words of the refusal, why
    ("critical FALSE written out", (), {"ku": flagged("2.5.29.15", FALSE, b"\3\2\7\x80")},
     "critical of extension 2: DER omits a field that has its default value", NOT_DER),
    ("critical TRUE as 1", (), {"ku": flagged("2.5.29.15", ONE, b"\3\2\7\x80")},
     "critical of extension 2: the type does not allow", NOT_DER),
    ("cA FALSE written out", (), {"bc": extension("2.5.29.19", seq(FALSE))},
     "in basicConstraints (2.5.29.19), its DER encoding is malformed (cA: DER omits", NOT_DER),
    ("version 1 written out", (), {"version": 0}, "version of tbsCertificate: DER omits", NOT_DER),
    ("X.509 version 2", (), {"version": 1}, "it is of X.509 version 2; it needs version 3",
     "RFC 5280 section 4.1.2.1: extensions require version 3."),
    ("X.509 version 4", (), {"version": 3}, "it is of X.509 version 4; it needs version 3",
     "There is no such version."),
    ("attributes of a name out of order", (),
     {"subject": seq(tlv(0x31, seq(oid(ORGANIZATION), tlv(UTF8, b"zz")),
                         seq(oid(COMMON_NAME), tlv(UTF8, b"aa"))))},
     "subject of tbsCertificate: a SET is not in DER's order", NOT_DER),
    ("a star in a PrintableString", (), {"subject": name((COMMON_NAME, PRINTABLE, "*.a.example"))},
     "PrintableString of value: the type does not allow", NOT_OF_ITS_TYPE),
    ("an underscore in a PrintableString", (), {"subject": name((COMMON_NAME, PRINTABLE, "a_b"))},
     "PrintableString of value: the type does not allow", NOT_OF_ITS_TYPE),
    ("an ampersand in a PrintableString", (), {"subject": name((COMMON_NAME, PRINTABLE, "a&b"))},
     "PrintableString of value: the type does not allow", NOT_OF_ITS_TYPE),
    ("Latin-1 in an IA5String", (), {"subject": name((COMMON_NAME, IA5, "é"))},
     "subject: the type does not allow", NOT_OF_ITS_TYPE),
    ("Latin-1 in a TeletexString", (), {"subject": name((COMMON_NAME, T61, "é"))},
     "subject: the type does not allow",
     "RFC 5280 does not say what the bytes of a TeletexString mean; `cryptography` reads ASCII."),
    ("postalAddress, a SEQUENCE", (), {"subject": named_by("2.5.4.16", seq(tlv(UTF8, b"x")))},
     "subject: a field has the wrong type", "`cryptography` parses attributes that are strings."),
    ("a name with an empty attribute", (), {"subject": seq(tlv(0x31))},
     "a relative distinguished name cannot be empty", NOT_OF_ITS_TYPE),
    ("ediPartyName in subjectAltName", (),
     {"names": alternatives(tlv(0xA5, tlv(0xA1, tlv(UTF8, b"x"))), A_EXAMPLE)},
     "in subjectAltName (2.5.29.17), it has an x400Address or an ediPartyName",
     "`cryptography` does not parse this form of name."),
    *((f"IP address of {size} "
    "bytes", (), {"names": alternatives(tlv(0x87, bytes(size)), A_EXAMPLE)},
       "in subjectAltName (2.5.29.17), an IP address or a range of addresses is malformed",
       "RFC 5280 section 4.2.1.6: an IP address has 4 or 16 octets.") for size in (0, 5, 9)),
    ("VisibleString with Latin-1 in a policy", (notice(0x1A, b"\xfc"),), {},
     "(VisibleString of explicitText: the type does not allow", NOT_OF_ITS_TYPE),
    ("IA5String with Latin-1 in a policy", (notice(IA5, b"\xfc"),), {},
     "(IA5String of explicitText: the type does not allow", NOT_OF_ITS_TYPE),
    ("PrintableString as the text of a policy", (notice(PRINTABLE, b"x"),), {},
     "in certificatePolicies (2.5.29.32), its DER encoding is malformed (UserNotice",
     NOT_OF_ITS_TYPE),
    ("UTF8String as the URI of a policy", (policy("1.3.6.1.5.5.7.2.1", tlv(UTF8, b"http://x")),),
     {}, "in certificatePolicies (2.5.29.32), its DER encoding is malformed (qualifier",
     NOT_OF_ITS_TYPE),
    ("authorityInfoAccess that is no DER", (extension("1.3.6.1.5.5.7.1.1", b"abc"),), {},
     "in authorityInfoAccess (1.3.6.1.5.5.7.1.1), its DER encoding is malformed (it ends", NOT_DER),
    ("issuerAltName that is no DER", (extension("2.5.29.18", b"zz"),), {},
     "in issuerAltName (2.5.29.18), its DER encoding is malformed", NOT_DER),
    ("TLS feature that is no DER", (extension("1.3.6.1.5.5.7.1.24", b"zz"),), {},
     "in TLS feature (1.3.6.1.5.5.7.1.24), its DER encoding is malformed", NOT_DER),
)  # fmt: skip
for what, extra, changed, refusal, because in MALFORMED_LEAVES:
    one(
        f"encoding: {what}",
        *extra,
        **changed,
        **only_openssl(refusal, because, alert=BAD),
    )
case(
    "encoding: bytes behind the certificate",
    lambda: ([leaf() + b"\0\0"], [authority()]),
    **only_openssl("malformed (bytes follow its end)", NOT_DER, alert=BAD),
)
case(
    "encoding: a length that is not in its shortest form",
    lambda: ([b"\x30\x83\0" + leaf()[2:]], [authority()]),
    **only_openssl("a length is not in its shortest form", NOT_DER, alert=BAD),
)
two(
    "encoding: cA TRUE as 1 in an intermediate",
    bc=flagged("2.5.29.19", TRUE, seq(ONE)),
    **only_openssl("CN=Middle does not parse: in basicConstraints (2.5.29.19)", NOT_DER, alert=BAD),
)
case(
    "encoding: cA TRUE as 1 in a root",
    lambda: ([leaf()], [authority(bc=flagged("2.5.29.19", TRUE, seq(ONE)))]),
    **only_openssl("CN=Root does not parse: in basicConstraints (2.5.29.19)", NOT_DER, alert=BAD),
)
one("encoding: VisibleString with UTF-8 in a policy", notice(0x1A, "ü".encode()))
one("encoding: a text of 400 characters in a policy", notice(UTF8, b"x" * 400))
one(
    "encoding: keyUsage with bits that are not trimmed",
    ku=flagged("2.5.29.15", TRUE, b"\3\2\0\x80"),
)
one("encoding: an unknown extension of no bytes", extension("1.2.3.4.5", b""))
one("encoding: a country of three letters", subject=name((COUNTRY, PRINTABLE, "usa"), "leaf"))
one("encoding: x500UniqueIdentifier", subject=named_by("2.5.4.45", b"\3\2\0\x41"))
one("encoding: names beside that are none", names=alternatives(
    tlv(0x82), tlv(0x82, b"a.example:443"), tlv(0x82, b"https://a.example/"), tlv(0x82, b"b\n"),
    tlv(0x86, b"::::"), tlv(0x86), tlv(0x81, b"foo"), tlv(0xA4, seq()), A_EXAMPLE))  # fmt: skip


def subtree(*parts: bytes) -> bytes:
    """nameConstraints with one permitted subtree for DNS names."""
    return extension("2.5.29.30", seq(tlv(0xA0, seq(tlv(0x82, b"example"), *parts))), True)


two(
    "constraints: minimum 0 written out",
    subtree(tlv(0x80, b"\0")),
    **only_openssl("(minimum of permittedSubtrees: DER omits", NOT_DER, alert=BAD),
)
for bound, tag in (("minimum", 0x80), ("maximum", 0x81)):
    two(
        f"constraints: a {bound} of 1",
        subtree(tlv(tag, b"\1")),
        refused="a minimum or a maximum",
        alert=UNSUPPORTED,
    )
two(
    "constraints: both lists empty",
    extension("2.5.29.30", seq(tlv(0xA0), tlv(0xA1)), True),
    **only_openssl(
        "neither permittedSubtrees nor excludedSubtrees",
        "RFC 5280 section 4.2.1.10: a list has at least one subtree.",
        alert=BAD,
    ),
)
for what, network in (
    ("with bits below its mask", b"\x0a\1\2\3\xff\0\0\0"),
    ("with gaps in its mask", b"\1\2\3\4\xff\0\xff\0"),
):
    two(
        f"constraints: a network {what}",
        extension(
            "2.5.29.30",
            seq(tlv(0xA0, seq(tlv(0x82, b"example")), seq(tlv(0x87, network)))),
            True,
        ),
        **only_openssl(
            "in nameConstraints (2.5.29.30), an IP address or a range of addresses is malformed",
            "RFC 5280 section 4.2.1.10: a range in the style of CIDR (RFC 4632).",
            alert=BAD,
        ),
    )
# --- more forms that OpenSSL reads over -----------------------------------------------------------

YEAR_0 = generalized_time("00000101000000Z")
for who, make in (
    ("leaf", lambda: ([leaf(not_before=YEAR_0)], [authority()])),
    ("intermediate", lambda: ([leaf(**BELOW), middle(not_before=YEAR_0)], [authority()])),
    ("root", lambda: ([leaf()], [authority(not_before=YEAR_0)])),
):
    case(
        f"dates: from the year 0, {who}",
        make,
        **only_openssl("a date in the year 0", "There is no year 0 in GeneralizedTime.", alert=BAD),
    )
for what, kind, content, words in (
    ("a malformed list of SCTs", "1.3.6.1.4.1.11129.2.4.2", tlv(4, b"\0\5junk"), "not read"),
    (
        "an SCT of a later version",
        "1.3.6.1.4.1.11129.2.4.2",
        tlv(4, b"\0\x35\0\x33\1" + bytes(50)),
        "not read",
    ),
    ("a TLS feature that is unknown", "1.3.6.1.5.5.7.1.24", seq(integer(99)), "unknown value"),
):
    one(
        f"encoding: {what}",
        extension(kind, content),
        **only_openssl(words, "`cryptography` cannot parse it.", alert=BAD),
    )
one(
    "encoding: keyUsage decipherOnly without keyAgreement",
    ku=extension("2.5.29.15", b"\3\3\7\x80\x80", True),
    **only_openssl(
        "in keyUsage (2.5.29.15), it is malformed",
        "RFC 5280 section 4.2.1.3: the bit has a meaning beside keyAgreement only.",
        alert=BAD,
    ),
)
two(
    "encoding: pathLenConstraint of 9 bytes",
    bc=extension("2.5.29.19", seq(b"\1\1\xff", tlv(2, b"\1" + bytes(8))), True),
    **only_openssl("a number is too large", "`cryptography` cannot parse it.", alert=BAD),
)
one(
    "leaf: pathLenConstraint beside CA:FALSE",
    bc=extension("2.5.29.19", seq(tlv(2, b"\0")), True),
    **only_openssl(
        "has a pathLenConstraint but is not a CA",
        "RFC 5280 section 4.2.1.9: only an authority may have it.",
        alert=BAD,
    ),
)
for what, kind, content in (
    ("netscape-cert-type", "2.16.840.1.113730.1.1", b"\3\2\6\x40"),
    ("IP address blocks", "1.3.6.1.5.5.7.1.7", seq(seq(tlv(4, b"\0\1"), NULL))),
):
    one(
        f"leaf: {what}, critical",
        extension(kind, content, True),
        **only_openssl(
            "has a critical extension that is not supported",
            "RFC 5280 section 4.2: a critical extension that is not processed is refused.",
        ),
    )
two(
    "path: intermediate extendedKeyUsage for server gated cryptography",
    extension("2.5.29.37", seq(oid("1.3.6.1.4.1.311.10.3.3"))),
    **only_openssl(
        "extendedKeyUsage lacks serverAuth",
        "This purpose, from the years of export restrictions, does not imply serverAuth.",
    ),
)
for what, base in (("an underscore", "a_b.test"), ("a blank", "a b.test")):
    two(
        f"constraints: a DNS name with {what} beside a good one",
        constraints([base, "example"]),
        **only_openssl(
            "which is not a DNS name",
            "RFC 5280 section 4.2.1.10: a constraint on DNS names must be a DNS name.",
        ),
    )
