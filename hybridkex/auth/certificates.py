"""Reading certificates. Nothing here decides whether to trust them."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import ClassVar, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import PublicKeyAlgorithmOID

from hybridkex.auth.names import PIN, DnsName, canonical_peer_name, parse_peer_name
from hybridkex.constants import Alert, CertificateType
from hybridkex.crypto.rsa_pss import RsaPssKey, certificate_key, spki_of
from hybridkex.crypto.x509_failure import parse_failure
from hybridkex.crypto.x509_parsing import certificate_from_der
from hybridkex.errors import CertificateRejected, ConfigError
from hybridkex.text import printable

MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192
"""Verification with a larger key costs too much for an unauthenticated peer."""

MAX_RSA_EXPONENT: Final = (1 << 31) - 1
"""The limit of Go. Verification with a public exponent as long as the modulus costs as much as
signing."""

MAX_CHAIN: Final = 16
"""The maximum number of certificates in a chain; on the Web, three or four are usual."""

_PARSED: Final = 64
"""The number of parsed end-entity certificates in the cache."""

CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

_KINDS: Final = (
    rsa.RSAPublicKey,
    ec.EllipticCurvePublicKey,
    ed25519.Ed25519PublicKey,
    mldsa.MLDSA44PublicKey,
    mldsa.MLDSA65PublicKey,
    mldsa.MLDSA87PublicKey,
)


@dataclass(frozen=True, repr=False)
class PeerCertificate:
    """A peer's certificates as received: DER, end entity first.

    In one from a handshake or a session, the certificate has been parsed; if you create one from
    invalid bytes, its properties raise the exceptions of `cryptography`.
    """

    certificate_type: ClassVar[CertificateType] = CertificateType.X509
    chain: tuple[bytes, ...]
    """The certificates in DER, end entity first."""

    @property
    def leaf(self) -> x509.Certificate:
        """The end entity's certificate."""
        return _parse(self.chain[0])[0]

    @cached_property
    def subject(self) -> str:
        """Its subject (RFC 4514), or its first name if the subject is empty; safe to display."""
        return subject_of(self.leaf)

    @cached_property
    def common_name(self) -> str | None:
        """The common name of its subject, safe to display. It is not an authenticated name."""
        attributes = self.leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return printable(str(attributes[0].value)) if attributes else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Its subject alternative names: DNS names, IP addresses and URIs, safe to display.

        They are the peer's claim; the names that a trusted party vouches for are in
        :attr:`VerifiedPeer.vouched_names <hybridkex.auth.VerifiedPeer.vouched_names>`.
        """
        return names_of(self.leaf)

    @cached_property
    def vouched(self) -> tuple[str, ...]:
        """The names that an authority certifies, provided that a verifier accepted the chain."""
        return vouched_names_of(self.leaf)

    @property
    def public_key(self) -> CertificatePublicKeyTypes | RsaPssKey:
        """Its public key: a class of `cryptography`, or
        :class:`~hybridkex.crypto.rsa_pss.RsaPssKey` if its algorithm is id-RSASSA-PSS."""
        return _parse(self.chain[0])[1]

    @property
    def pin(self) -> str:
        """The pin of its key, as ``--pin`` and :class:`~hybridkex.Pins` take it."""
        return spki_sha256(self.leaf)

    def __repr__(self) -> str:
        return f"PeerCertificate({self.subject!r}, {len(self.chain)} in the chain)"


@lru_cache(maxsize=_PARSED)
def _parse(data: bytes) -> tuple[x509.Certificate, CertificatePublicKeyTypes | RsaPssKey]:
    """A certificate and its key, from DER; the same bytes are parsed once, as in Go's crypto/tls.

    Only parsed values are cached, never a decision about trust. The library parses lazily; here
    everything is parsed, so that malformed input fails here.
    """
    certificate = certificate_from_der(data)
    return certificate, key_of(certificate)


def key_of(certificate: x509.Certificate) -> CertificatePublicKeyTypes | RsaPssKey:
    """The key of a certificate, as signature schemes take it.

    Raises:
        ValueError, UnsupportedAlgorithm: it does not parse.
    """
    key = certificate.public_key()
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        return certificate_key(certificate, key)
    return key


def key_bytes(key: object) -> bytes:
    """A public key as SubjectPublicKeyInfo (RFC 5280 section 4.1), to compare it with others."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]


def subject_of(certificate: x509.Certificate) -> str:
    """The name of a certificate in errors and sessions; safe to display."""
    subject = printable(certificate.subject.rfc4514_string(), most=1024)
    return subject or next(iter(names_of(certificate)), "(no name)")


def issuer_of(certificate: x509.Certificate) -> str:
    """The name of the issuer (RFC 4514); safe to display."""
    return printable(certificate.issuer.rfc4514_string(), most=1024) or "(no name)"


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The subject alternative names: DNS names, IP addresses and URIs, in this order.

    They are safe to display. An escaped name matches no host name, since none has a backslash.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (
        *map(printable, names.get_values_for_type(x509.DNSName)),
        *map(str, names.get_values_for_type(x509.IPAddress)),
        *map(printable, names.get_values_for_type(x509.UniformResourceIdentifier)),
    )


def vouched_names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names that an authority vouches for when it signs: DNS names, IP addresses and URIs.

    They are canonical (:func:`~hybridkex.auth.names.canonical_peer_name`); names without a
    canonical form, or that could be read as a name of another type, are left out, because name
    constraints apply to each type separately (RFC 5280 section 4.2.1.10). The common name is not
    included: it is not a DNS name (RFC 9525 section 2), and name constraints do not apply to it.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    found = []
    for value in names.get_values_for_type(x509.DNSName):
        with suppress(ConfigError):
            canonical = canonical_peer_name(value)
            if isinstance(parse_peer_name(canonical.removeprefix("*.")), DnsName):
                found.append(canonical)
    found += map(str, names.get_values_for_type(x509.IPAddress))
    for value in names.get_values_for_type(x509.UniformResourceIdentifier):
        with suppress(ConfigError):
            if canonical_peer_name(value) == value and _is_uri(value):
                found.append(value)
    return tuple(dict.fromkeys(found))


def _is_uri(canonical: str) -> bool:
    """Whether a canonical name is a URI, and neither a key nor a host name nor an address."""
    if canonical.startswith(PIN):
        return False
    try:
        parse_peer_name(canonical)
    except ConfigError:
        return ":" in canonical
    return False


def spki_sha256(certificate: x509.Certificate) -> str:
    """The pin of a certificate: SHA-256 over its SubjectPublicKeyInfo, in hex (RFC 7469)."""
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        # The library would encode such a key with another algorithm identifier.
        return hashlib.sha256(spki_of(certificate)).hexdigest()
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def read_chain(chain: Sequence[bytes]) -> tuple[PeerCertificate, list[x509.Certificate]]:
    """Parse the certificates that a peer sent.

    Raises:
        CertificateRejected: there is no certificate, there are too many, or one does not parse.
    """
    if not chain:
        raise CertificateRejected("the peer sent no certificate")
    if len(chain) > MAX_CHAIN:
        raise CertificateRejected(
            f"the peer sent a chain of {len(chain)} certificates; the maximum is {MAX_CHAIN}"
        )
    peer = PeerCertificate(tuple(chain))
    place = 0
    try:
        certificates = [peer.leaf]
        for place in range(1, len(chain)):
            # The verifier parses the certificates of the path; any other may be malformed.
            certificates.append(certificate_from_der(chain[place], whole=False))
    except UnsupportedAlgorithm:
        raise CertificateRejected(
            f"certificate {place + 1} of {len(chain)} that the peer sent has a key of a kind that "
            "is not supported",
            alert=Alert.UNSUPPORTED_CERTIFICATE,
        ) from None
    except Exception as error:
        # The peer chose these bytes: the result is the same for every exception of the parser.
        raise CertificateRejected(
            f"certificate {place + 1} of {len(chain)} that the peer sent does not parse: "
            f"{parse_failure(error)}"
        ) from None
    flaw = flaw_of_own(peer.leaf) if not _may_sign_handshakes(peer.leaf) else None
    if flaw is None and (cost := key_cost(peer.public_key)) is not None:
        flaw = f"has {cost}"
    if flaw is not None:
        raise CertificateRejected(
            f"certificate {peer.subject} {flaw}",
            alert=Alert.UNSUPPORTED_CERTIFICATE,
            subject=peer.subject,
        )
    return peer, certificates


def _may_sign_handshakes(certificate: x509.Certificate) -> bool:
    """RFC 9846 section 4.5.1.2: a keyUsage, where present, must have digitalSignature."""
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    except x509.ExtensionNotFound:
        return True


def bounded(certificate: x509.Certificate, constraints: x509.NameConstraints) -> bool:
    """Whether these nameConstraints of a certificate have a minimum or a maximum.

    The library ignores both, and RFC 5280 section 4.2.1.10 requires them to be processed or the
    certificate to be rejected. Without them, encoding the extension again gives the same bytes.
    """
    return constraints.public_bytes() not in certificate.tbs_certificate_bytes


def not_valid_today(certificate: x509.Certificate, at: datetime | None = None) -> str | None:
    """A problem with the validity of a certificate at a time (an aware datetime; now by
    default)."""
    at = datetime.now(UTC) if at is None else at
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= at <= end:
        return None
    when = f"expired on {_minute(end)}" if at > end else f"is not valid before {_minute(start)}"
    return f"{when} (the clock says {_minute(at)})"


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def flaw_of_own(leaf: x509.Certificate) -> str | None:
    """A flaw for which every peer rejects our own certificate."""
    if leaf.version is not x509.Version.v3:
        return "is of X.509 version 1, which has no extensions; it needs version 3"
    if not _may_sign_handshakes(leaf):
        return (
            "may not sign a handshake (keyUsage lacks digitalSignature; RFC 9846 section 4.5.1.2)"
        )
    return None


def key_cost(key: object) -> str | None:
    """Why verification with a key costs too much for an unauthenticated peer; ``None`` if it does
    not."""
    if isinstance(key, RsaPssKey):
        key = key.key
    if not isinstance(key, rsa.RSAPublicKey):
        return None
    if key.key_size > MAX_RSA_BITS:
        return _wrong_size(key)
    if key.public_numbers().e > MAX_RSA_EXPONENT:
        return "an RSA key with a public exponent of more than 31 bits"
    return None


def _wrong_size(key: rsa.RSAPublicKey) -> str:
    return f"an RSA key of {key.key_size} bits, not of {MIN_RSA_BITS} to {MAX_RSA_BITS}"


def is_signed_by(child: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether a certificate names this issuer and has its signature. Nothing else is checked.

    The key of the issuer may come from an unauthenticated peer: see :func:`key_cost`.
    """
    try:
        child.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError):
        return False
    return True


def key_weakness(key: object) -> str | None:
    """A weakness of a leaf's key; `cryptography`'s verifier checks issuers' keys only."""
    if isinstance(key, RsaPssKey):
        key = key.key
    if not isinstance(key, _KINDS):
        kind = type(key).__name__.removesuffix("PublicKey")
        return f"a key of a kind that TLS 1.3 or this library does not sign with ({kind})"
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return _wrong_size(key)
    if (cost := key_cost(key)) is not None:
        return cost
    if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, CURVES):
        return f"a key on {key.curve.name}, not on secp256r1, secp384r1 or secp521r1"
    return None
