"""Verifiers of certificates: by authorities, by pins, or without verification.

The verifier of `cryptography` alone accepts a chain (RFC 5280 section 6). This module passes it the
chain and the trusted authorities, checks the strength of the leaf's key, which it does not check,
and has :mod:`~hybridkex.auth.diagnosis` explain a rejection. Revocation is not checked.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from hybridkex.auth.certificates import (
    MAX_CHAIN,
    PeerCertificate,
    bounded,
    key_weakness,
    read_chain,
)
from hybridkex.auth.connected import Authorities
from hybridkex.auth.diagnosis import Roots, explain
from hybridkex.auth.names import DnsName, PeerName
from hybridkex.auth.raw_keys import read_raw_key
from hybridkex.auth.system import system_roots
from hybridkex.auth.verified import PROOF, Presented, VerifiedPeer
from hybridkex.constants import Alert
from hybridkex.crypto.x509_failure import parse_failure
from hybridkex.crypto.x509_parsing import UNREADABLE, certificates_from_pem
from hybridkex.errors import CertificateRejected, ConfigError
from hybridkex.fields import check_fields, checked, described
from hybridkex.files import read_file


class _PolicyMappings(x509.ExtensionType):
    """RFC 5280 section 4.2.1.5; the library has no class for it."""

    oid = x509.ObjectIdentifier("2.5.29.33")


def _may_certify(_: Policy, issuer: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    # RFC 5280 section 6.1.4 (n): only where the extension is present.
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("keyUsage lacks keyCertSign")


def _serves(_policy: Policy, _leaf: x509.Certificate, usages: x509.ExtendedKeyUsage | None) -> None:
    # RFC 5280 section 4.2.1.12: where it is present, it must name the use.
    if usages is not None and _policy.extended_key_usage not in usages:
        raise ValueError("extendedKeyUsage does not allow this use")


def _needs_no_policy(
    _: Policy, _certificate: x509.Certificate, policies: x509.PolicyConstraints | None
) -> None:
    # RFC 5280 section 6.1: without a required policy, any set of policies is a valid one.
    if policies is not None and policies.require_explicit_policy is not None:
        raise ValueError("policyConstraints requires explicit policies")


def _is_authority(_: Policy, _issuer: x509.Certificate, constraints: x509.BasicConstraints) -> None:
    # RFC 5280 section 6.1.4 (k).
    if not constraints.ca:
        raise ValueError("basicConstraints says CA:FALSE")


def _no_bounds(
    _: Policy, issuer: x509.Certificate, constraints: x509.NameConstraints | None
) -> None:
    if constraints is not None and bounded(issuer, constraints):
        raise ValueError("nameConstraints have a minimum or a maximum")


def _authority_policy() -> ExtensionPolicy:
    """The extensions that an issuer must and may have.

    The library's defaults are the rules of the Web PKI. Some of them refuse certificates that
    private authorities often issue and RFC 5280 section 6 accepts: basicConstraints that is not
    critical, an authority without keyUsage (``openssl req -x509``), critical policy extensions. The
    content of these extensions is still checked.
    """
    either = Criticality.AGNOSTIC
    return _with_policies(
        ExtensionPolicy.webpki_defaults_ca()
        .require_present(x509.BasicConstraints, either, _is_authority)
        .may_be_present(x509.KeyUsage, either, _may_certify)
        .may_be_present(x509.NameConstraints, either, _no_bounds)
        .may_be_present(x509.AuthorityKeyIdentifier, either, None)
    )


def _with_policies(policy: ExtensionPolicy) -> ExtensionPolicy:
    either = Criticality.AGNOSTIC
    for kind in (x509.CertificatePolicies, x509.InhibitAnyPolicy, _PolicyMappings):
        policy = policy.may_be_present(kind, either, None)
    # Revocation is not checked, so distribution points are ignored.
    policy = policy.may_be_present(x509.CRLDistributionPoints, either, None)
    return policy.may_be_present(x509.PolicyConstraints, either, _needs_no_policy)


def _leaf_policies() -> tuple[ExtensionPolicy, ExtensionPolicy]:
    """The extensions that the certificates of servers and clients must and may have.

    Less strict than the rules of the Web PKI: no authorityKeyIdentifier, extendedKeyUsage or
    subjectAltName marked critical (``trustme``), an authority's certificate used by a server
    (``openssl req -x509``). A client certificate may lack a subjectAltName; a server's must have
    one, and the library matches the name. Whether the key may sign a handshake was checked when the
    chain was read.
    """
    either = Criticality.AGNOSTIC
    leaf = (
        ExtensionPolicy.webpki_defaults_ee()
        .may_be_present(x509.BasicConstraints, either, None)
        .may_be_present(x509.KeyUsage, either, None)
        .may_be_present(x509.NameConstraints, either, None)
        .may_be_present(x509.AuthorityKeyIdentifier, either, None)
        .may_be_present(x509.ExtendedKeyUsage, either, _serves)
    )
    leaf = _with_policies(leaf)
    return (
        leaf.require_present(x509.SubjectAlternativeName, either, None),
        leaf.may_be_present(x509.SubjectAlternativeName, either, None),
    )


_AUTHORITY = _authority_policy()
_SERVER, _CLIENT = _leaf_policies()


_MAX_KEPT: Final = 64
"""The number of cached verification results of a trust store."""


@dataclass(frozen=True)
class _Kept:
    """The result of a verification, and the period in which all certificates of its path are
    valid."""

    peer: VerifiedPeer
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True)
class TrustStore:
    """Verifies servers (by name) and clients by the certificates of trusted authorities.

    Args:
        authorities: the roots. A self-signed certificate of an end entity is trusted, too.
        pins: if not empty, the leaf's key must also be one of these (see :class:`Pins`).
        source: the source of the authorities, for messages.

    Raises:
        ConfigError: no authority was given, or a pin is malformed.
    """

    authorities: tuple[x509.Certificate, ...] = field(repr=False)
    pins: frozenset[str] = frozenset()
    source: str = ""
    _kept: dict[tuple[tuple[bytes, ...], PeerName | None], _Kept] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", _normal_pins(self.pins))
        check_fields(self, {"authorities": 'TrustStore.from_file("ca.pem")'})
        if not self.authorities:
            raise ConfigError("a trust store needs at least one certificate")

    @classmethod
    @checked
    def from_pem(cls, data: bytes, *, pins: Iterable[str] = (), source: str = "") -> "TrustStore":
        """From concatenated PEM certificates.

        Args:
            data: the certificates.
            pins: see the class.
            source: where they come from, for messages.

        Raises:
            ConfigError: a certificate or a pin cannot be read.
        """
        try:
            authorities = certificates_from_pem(data)
        except UNREADABLE as error:
            where = source or "the trust store"
            raise ConfigError(
                f"cannot use the certificates of {where}: {parse_failure(error)}"
            ) from None
        return cls(tuple(authorities), _normal_pins(pins), source)

    @classmethod
    @checked
    def from_file(cls, path: str | Path, *, pins: Iterable[str] = ()) -> "TrustStore":
        """From a PEM file.

        Args:
            path: the file.
            pins: see the class.

        Raises:
            ConfigError: the file, a certificate or a pin cannot be read.
        """
        return cls.from_pem(read_file(path), pins=pins, source=str(path))

    @classmethod
    @checked
    def system(cls, *, pins: Iterable[str] = ()) -> "TrustStore":
        """The authorities of this machine, or those in ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``.

        ``pins`` are those of the class.

        Raises:
            ConfigError: the certificates or a pin cannot be read.
        """
        authorities, source = system_roots()
        return cls(tuple(authorities), _normal_pins(pins), source)

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Chain, validity, usages, strength of the leaf's key, and name.

        Raises:
            CertificateRejected: one of these is wrong, or ``name`` is ``None``.
        """
        if name is None:
            raise CertificateRejected(
                "the server's certificate cannot be checked without a name; pass server_hostname"
            )
        return self._verify(tuple(chain), name, at)

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """Chain, validity, usages, and strength of the leaf's key."""
        return self._verify(tuple(chain), None, at)

    def _verify(
        self, chain: tuple[bytes, ...], name: PeerName | None, at: datetime | None
    ) -> VerifiedPeer:
        """Verify a server's chain for ``name``, or a client's if it is ``None``.

        The result is cached in this object, whose authorities and pins never change, for the same
        bytes and name and only while all certificates of the path are valid: path validation
        depends on nothing else.
        """
        now = datetime.now(UTC) if at is None else at.astimezone(UTC)
        kept = self._kept.get((chain, name))
        if kept is not None and kept.not_before <= now <= kept.not_after:
            return kept.peer
        peer, certificates = read_chain(chain)
        _refuse_weak_key(peer)
        try:
            path = self._path(certificates, name, now)
            not_before = max(one.not_valid_before_utc for one in path)
            not_after = min(one.not_valid_after_utc for one in path)
        # ValueError: a name that no certificate can have, or a date in the year 0.
        except (VerificationError, ValueError) as error:
            roots = Roots(self.authorities, self.source)
            raise explain(certificates, roots=roots, name=name, at=now, refusal=error) from None
        if self.pins:
            _require_pin(peer, self.pins)
        verified = VerifiedPeer(PROOF, peer, "ca")
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        self._kept[chain, name] = _Kept(verified, not_before, not_after)
        return verified

    def _path(
        self, certificates: list[x509.Certificate], name: PeerName | None, now: datetime
    ) -> list[x509.Certificate]:
        """The path that the verifier of `cryptography` finds, from the leaf to an authority."""
        leaf, intermediates = certificates[0], self._authorities.connected(certificates[1:])
        if name is None:
            clients = self._for_clients.time(now).build_client_verifier()
            return clients.verify(leaf, intermediates).chain
        subject: x509.DNSName | x509.IPAddress = (
            x509.DNSName(name.a_label)
            if isinstance(name, DnsName)
            else x509.IPAddress(name.address)
        )
        servers = self._for_servers.time(now).build_server_verifier(subject)
        return servers.verify(leaf, intermediates)

    @cached_property
    def _store(self) -> Store:
        return Store(list(self.authorities))

    @cached_property
    def _authorities(self) -> Authorities:
        return Authorities(self.authorities)

    @cached_property
    def _for_servers(self) -> PolicyBuilder:
        return self._builder(_SERVER)

    @cached_property
    def _for_clients(self) -> PolicyBuilder:
        return self._builder(_CLIENT)

    def _builder(self, leaf: ExtensionPolicy) -> PolicyBuilder:
        builder = PolicyBuilder().store(self._store).max_chain_depth(MAX_CHAIN)
        return builder.extension_policies(ca_policy=_AUTHORITY, ee_policy=leaf)


@dataclass(frozen=True)
class Pins:
    """Verifies peers by pinned keys. Authorities, names and dates are not checked.

    The key may be in a certificate or raw (RFC 7250); the pin is the same. A pin states that this
    key is the peer's, and the handshake proves possession of it; as in RFC 7671 section 5.1
    (DANE-EE), the rest of the certificate is not used.

    Args:
        pins: SHA-256 of the leaf's SubjectPublicKeyInfo, in hex (colons allowed) or in base64 as
            in RFC 7469 and curl's ``sha256//``.

    Raises:
        ConfigError: there is no pin, or one is malformed.
    """

    pins: frozenset[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", _normal_pins(self.pins))
        if not self.pins:
            raise ConfigError("at least one pin is required")

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """The leaf's key is pinned, and strong enough."""
        return self.verify_client(chain)

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """The leaf's key is pinned, and strong enough."""
        peer, _ = read_chain(chain)
        _refuse_weak_key(peer)
        _require_pin(peer, self.pins)
        return VerifiedPeer(PROOF, peer, "pin")

    def verify_server_key(
        self, spki: bytes, name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """The raw public key is pinned, and strong enough."""
        return self.verify_client_key(spki)

    def verify_client_key(self, spki: bytes, *, at: datetime | None = None) -> VerifiedPeer:
        """The raw public key is pinned, and strong enough."""
        peer = read_raw_key(spki)
        _require_pin(peer, self.pins)
        return VerifiedPeer(PROOF, peer, "pin")


@dataclass(frozen=True)
class InsecureNoVerification:
    """Accepts every certificate that parses, so an attacker in the middle can read and change all
    data."""

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept every chain that parses."""
        return self.verify_client(chain)

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """Accept every chain that parses."""
        peer, _ = read_chain(chain)
        return VerifiedPeer(PROOF, peer, "insecure")


def _refuse_weak_key(peer: PeerCertificate) -> None:
    weakness = key_weakness(peer.public_key)
    if weakness is not None:
        raise CertificateRejected(
            f"certificate {peer.subject} has {weakness}",
            alert=Alert.UNSUPPORTED_CERTIFICATE,
            subject=peer.subject,
        )


def _require_pin(peer: Presented, pins: frozenset[str]) -> None:
    if peer.pin not in pins:
        what = f"certificate {peer.subject}" if isinstance(peer, PeerCertificate) else "the peer"
        raise CertificateRejected(
            f"{what} has the key {peer.pin}, which is not pinned",
            alert=Alert.CERTIFICATE_UNKNOWN,
            subject=peer.subject,
        )


def _normal_pins(pins: Iterable[str]) -> frozenset[str]:
    """Pins in canonical form. Raises ``ConfigError``, also for a single string."""
    if isinstance(pins, str | bytes | type | Mapping) or not isinstance(pins, Iterable):
        raise ConfigError(
            f"pins are given as a set or a list of strings, not {described(pins)}; write, for "
            'example: pins=["3f0c..."]'
        )
    return frozenset(map(_normal_pin, pins))


def _normal_pin(pin: str) -> str:
    if not isinstance(pin, str):
        raise ConfigError(f"pins are strings, not {described(pin)}")
    # In base64 the first character may also be a slash.
    text = re.sub(r"^sha256(//|/|:)(?=.{44}$|[\da-fA-F:]+$)", "", pin.strip())
    bare = text.replace(":", "")
    try:
        digest = bytes.fromhex(bare) if len(bare) == 64 else base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != 32:
        raise ConfigError(
            f"a pin is the SHA-256 of a public key, 64 digits in hex or 44 in base64, not {pin!r}"
        )
    return digest.hex()
