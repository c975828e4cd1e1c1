"""Who the peer is: certificate chains, names and pins.

`cryptography`'s verifier is the only one that says yes to a chain. What is here gives it the chain,
checks what it leaves out (the strength of the leaf's key), and finds out *why* it said no, so that
the error names the reason and the certificate.
"""

import hashlib
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from hybridkex.auth.names import DnsName, IpAddress, PeerName
from hybridkex.constants import Alert
from hybridkex.errors import CertificateRejected, ConfigError

__all__ = [
    "ClientVerifier",
    "InsecureNoVerification",
    "PeerCertificate",
    "Pins",
    "ServerVerifier",
    "TrustStore",
    "VerifiedPeer",
    "spki_sha256",
]

MIN_RSA_BITS = 2048
_MAX_CHAIN = 16


@dataclass(frozen=True)
class PeerCertificate:
    """A peer's certificates as they came: DER, the end entity's first."""

    chain: tuple[bytes, ...]

    @cached_property
    def leaf(self) -> x509.Certificate:
        """The end entity's certificate."""
        return x509.load_der_x509_certificate(self.chain[0])

    @cached_property
    def subject(self) -> str:
        """Its subject (RFC 4514)."""
        return self.leaf.subject.rfc4514_string()

    @cached_property
    def public_key(self) -> Any:
        """Its key."""
        return self.leaf.public_key()


_PROOF = object()


@final
class VerifiedPeer:
    """Proof that a chain was accepted; only a verifier of this module makes one."""

    __slots__ = ("certificate", "verified_by")

    def __init__(
        self,
        proof: object,
        certificate: PeerCertificate,
        verified_by: Literal["ca", "pin", "insecure"],
    ) -> None:
        if proof is not _PROOF:
            raise TypeError("only a verifier makes a VerifiedPeer")
        self.certificate = certificate
        self.verified_by = verified_by

    @property
    def subject(self) -> str:
        """The subject of the end entity's certificate."""
        return self.certificate.subject


class ServerVerifier(Protocol):
    """Decides about a server's certificates."""

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept ``chain`` (DER, leaf first) for ``name``, or raise ``CertificateRejected``."""
        ...


class ClientVerifier(Protocol):
    """Decides about a client's certificates."""

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """Accept ``chain`` (DER, leaf first), or raise ``CertificateRejected``."""
        ...


def spki_sha256(certificate: x509.Certificate) -> str:
    """The pin of a certificate: SHA-256 over its SubjectPublicKeyInfo, in hex."""
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _load(chain: Sequence[bytes]) -> tuple[PeerCertificate, list[x509.Certificate]]:
    """Parse a chain, and refuse what no verifier should see."""
    if not chain:
        raise CertificateRejected("the peer sent no certificate", alert=Alert.BAD_CERTIFICATE)
    if len(chain) > _MAX_CHAIN:
        raise CertificateRejected(f"a chain of {len(chain)} certificates; {_MAX_CHAIN} may be")
    peer = PeerCertificate(tuple(chain))
    try:
        leaf = peer.leaf
        # Parsed lazily by the library: touch what is used later, so that it fails here.
        _ = (peer.subject, leaf.extensions, leaf.not_valid_after_utc, leaf.not_valid_before_utc)
        key = peer.public_key
        certificates = [leaf, *(x509.load_der_x509_certificate(der) for der in chain[1:])]
    except UnsupportedAlgorithm as error:
        raise CertificateRejected(
            f"the certificate uses an unsupported algorithm: {error}",
            alert=Alert.UNSUPPORTED_CERTIFICATE,
        ) from None
    except (ValueError, TypeError, x509.DuplicateExtension, x509.InvalidVersion) as error:
        raise CertificateRejected(f"the certificate does not parse: {error}") from None
    _check_key(peer, key)
    return peer, certificates


def _check_key(peer: PeerCertificate, key: Any) -> None:
    """The strength of the leaf's key, which `cryptography`'s verifier does not look at."""
    reason = None
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            reason = f"an RSA key of {key.key_size} bits; {MIN_RSA_BITS} are the least"
    elif isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
            reason = f"a key on the curve {key.curve.name}"
    elif isinstance(key, dsa.DSAPublicKey) or not isinstance(
        key,
        ed25519.Ed25519PublicKey
        | ed448.Ed448PublicKey
        | mldsa.MLDSA44PublicKey
        | mldsa.MLDSA65PublicKey
        | mldsa.MLDSA87PublicKey,
    ):
        reason = f"a key of the unsupported kind {type(key).__name__}"
    if reason is not None:
        raise CertificateRejected(
            f"certificate {peer.subject} has {reason}",
            alert=Alert.UNSUPPORTED_CERTIFICATE,
            subject=peer.subject,
        )


@dataclass(frozen=True)
class TrustStore:
    """Certificates of authorities that we trust.

    Args:
        authorities: the roots.
        pins: if not empty, the leaf's key must also be one of these (SPKI SHA-256, hex).
    """

    authorities: tuple[x509.Certificate, ...] = field(repr=False)
    pins: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.authorities:
            raise ConfigError("a trust store without certificates trusts nobody")
        object.__setattr__(self, "pins", frozenset(map(_normal_pin, self.pins)))

    @classmethod
    def from_pem(cls, data: bytes, *, pins: Iterable[str] = ()) -> "TrustStore":
        """From PEM certificates in a row."""
        try:
            authorities = x509.load_pem_x509_certificates(data)
        except ValueError as error:
            raise ConfigError(f"these are no PEM certificates: {error}") from None
        return cls(tuple(authorities), frozenset(pins))

    @classmethod
    def from_file(cls, path: str | Path, *, pins: Iterable[str] = ()) -> "TrustStore":
        """From a PEM file."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        try:
            return cls.from_pem(data, pins=pins)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def system(cls) -> "TrustStore":
        """The platform's authorities, where OpenSSL looks for them (``SSL_CERT_FILE`` too)."""
        context = ssl.create_default_context()
        loaded = []
        for der in context.get_ca_certs(binary_form=True):
            try:
                loaded.append(x509.load_der_x509_certificate(der))
            except ValueError:
                continue  # A root that does not parse can vouch for nobody.
        paths = ssl.get_default_verify_paths()
        if not loaded and paths.capath and Path(paths.capath).is_dir():
            for file in sorted(Path(paths.capath).glob("*.pem")):
                try:
                    loaded.extend(x509.load_pem_x509_certificates(file.read_bytes()))
                except (ValueError, OSError):
                    continue
        if not loaded:
            raise ConfigError(
                "this machine has no system trust store; name a CA file, or install ca-certificates"
            )
        return cls(tuple(loaded))

    @cached_property
    def _store(self) -> Store:
        return Store(list(self.authorities))

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Chain, validity, usages and name."""
        peer, certificates = _load(chain)
        if name is None:
            raise CertificateRejected(
                "no server name to check the certificate against; pass server_hostname",
                alert=Alert.BAD_CERTIFICATE,
            )
        subject = (
            x509.DNSName(name.a_label)
            if isinstance(name, DnsName)
            else x509.IPAddress(name.address)
        )
        now = at or datetime.now(UTC)
        try:
            self._policy(now).build_server_verifier(subject).verify(
                certificates[0], certificates[1:]
            )
        except (VerificationError, ValueError, UnsupportedAlgorithm) as error:
            raise self._why(peer, certificates, name, now, error) from None
        return self._accept(peer)

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """Chain, validity and usages."""
        peer, certificates = _load(chain)
        now = at or datetime.now(UTC)
        try:
            self._policy(now).build_client_verifier().verify(certificates[0], certificates[1:])
        except (VerificationError, ValueError, UnsupportedAlgorithm) as error:
            raise self._why(peer, certificates, None, now, error) from None
        return self._accept(peer)

    def _policy(self, now: datetime) -> PolicyBuilder:
        return PolicyBuilder().store(self._store).time(now)

    def _accept(self, peer: PeerCertificate) -> VerifiedPeer:
        if self.pins and spki_sha256(peer.leaf) not in self.pins:
            raise _pin_mismatch(peer)
        return VerifiedPeer(_PROOF, peer, "ca")

    def _why(
        self,
        peer: PeerCertificate,
        certificates: list[x509.Certificate],
        name: PeerName | None,
        now: datetime,
        error: Exception,
    ) -> CertificateRejected:
        """The reason for a no, as a person would give it."""
        alert, reason = Alert.BAD_CERTIFICATE, f"was not accepted: {error}"
        expired = _validity(certificates, now)
        if expired is not None:
            alert, reason = Alert.CERTIFICATE_EXPIRED, expired
        elif name is not None and not _covers(peer.leaf, name):
            reason = f"is for {_names_of(peer.leaf) or 'no name'}, not for {name}"
        elif not self._knows_issuer(certificates):
            issuer = certificates[-1].issuer.rfc4514_string()
            alert, reason = Alert.UNKNOWN_CA, f"comes from an authority we do not trust: {issuer}"
        elif (usage := _wrong_usage(peer.leaf, server=name is not None)) is not None:
            alert, reason = Alert.UNSUPPORTED_CERTIFICATE, usage
        return CertificateRejected(
            f"certificate {peer.subject} {reason}", alert=alert, subject=peer.subject
        )

    def _knows_issuer(self, certificates: list[x509.Certificate]) -> bool:
        trusted = {authority.subject for authority in self.authorities}
        return any(certificate.issuer in trusted for certificate in certificates)


def _validity(certificates: list[x509.Certificate], now: datetime) -> str | None:
    for certificate in certificates:
        if certificate.not_valid_after_utc < now:
            return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        if certificate.not_valid_before_utc > now:
            return f"is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on"
    return None


def _names_of(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    dns = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    return ", ".join((*dns, *map(str, addresses)))


def _covers(certificate: x509.Certificate, name: PeerName) -> bool:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    if isinstance(name, IpAddress):
        return name.address in names.get_values_for_type(x509.IPAddress)
    return any(
        matches_dns(pattern, name.a_label) for pattern in names.get_values_for_type(x509.DNSName)
    )


def matches_dns(pattern: str, name: str) -> bool:
    """RFC 6125 section 6.4: a wildcard stands for one whole leftmost label."""
    pattern, name = pattern.lower().removesuffix("."), name.lower().removesuffix(".")
    if pattern.startswith("*."):
        return name.partition(".")[2] == pattern[2:] and "." in pattern[2:]
    return pattern == name


def _wrong_usage(certificate: x509.Certificate, *, server: bool) -> str | None:
    wanted = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return None
    if wanted in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages:
        return None
    return f"is not for use as a {'server' if server else 'client'}'s"


def _normal_pin(pin: str) -> str:
    text = pin.strip().lower().replace(":", "")
    if len(text) != 64 or any(char not in "0123456789abcdef" for char in text):
        raise ConfigError(f"a pin is a SHA-256 hash in hex, 64 digits, not {pin!r}")
    return text


def _pin_mismatch(peer: PeerCertificate) -> CertificateRejected:
    return CertificateRejected(
        f"certificate {peer.subject} has the key {spki_sha256(peer.leaf)}, which is not pinned",
        alert=Alert.BAD_CERTIFICATE,
        subject=peer.subject,
    )


@dataclass(frozen=True)
class Pins:
    """Keys that we know, whoever vouches for them: no authority, no name and no dates are asked.

    A pin is the promise that this very key is the peer's; a certificate around it adds nothing.
    """

    pins: frozenset[str]

    def __post_init__(self) -> None:
        if not self.pins:
            raise ConfigError("at least one pin is needed")
        object.__setattr__(self, "pins", frozenset(map(_normal_pin, self.pins)))

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """The leaf's key is pinned."""
        return self._verify(chain)

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """The leaf's key is pinned."""
        return self._verify(chain)

    def _verify(self, chain: Sequence[bytes]) -> VerifiedPeer:
        peer, _ = _load(chain)
        if spki_sha256(peer.leaf) not in self.pins:
            raise _pin_mismatch(peer)
        return VerifiedPeer(_PROOF, peer, "pin")


@dataclass(frozen=True)
class InsecureNoVerification:
    """Takes every certificate that parses: anybody in the middle can read and change everything."""

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Anybody."""
        return VerifiedPeer(_PROOF, _load(chain)[0], "insecure")

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """Anybody."""
        return VerifiedPeer(_PROOF, _load(chain)[0], "insecure")
