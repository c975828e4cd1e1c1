"""A small certificate authority for tests and first steps, not for production."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificateIssuerPrivateKeyTypes,
    CertificatePublicKeyTypes,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hybridkex.auth.identity import Identity
from hybridkex.auth.names import DnsName, parse_peer_name
from hybridkex.crypto.private_keys import PRIVATE_KEY
from hybridkex.crypto.x509_parsing import certificate_from_der
from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields, checked
from hybridkex.files import PRIVATE, PUBLIC, write_files
from hybridkex.machine import write_error

_ONE_DAY: Final = timedelta(days=1)
_MAX_COMMON_NAME: Final = 64  # characters, RFC 5280 appendix A.1


@dataclass(frozen=True, kw_only=True)
class _Algorithm:
    """A key algorithm: how a key is generated, and how an authority signs with it."""

    generate: Callable[[], CertificateIssuerPrivateKeyTypes]
    digest: hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None = None
    rsa_padding: padding.PSS | None = None


def _ecdsa(
    curve: ec.EllipticCurve, digest: hashes.SHA256 | hashes.SHA384 | hashes.SHA512
) -> _Algorithm:
    return _Algorithm(generate=lambda: ec.generate_private_key(curve), digest=digest)


def _rsa(scheme: padding.PSS | None = None) -> _Algorithm:
    return _Algorithm(
        generate=lambda: rsa.generate_private_key(65537, 2048),
        digest=hashes.SHA256(),
        rsa_padding=scheme,
    )


ALGORITHMS: Final[dict[str, _Algorithm]] = {
    "ecdsa": _ecdsa(ec.SECP256R1(), hashes.SHA256()),
    "ecdsa-p384": _ecdsa(ec.SECP384R1(), hashes.SHA384()),
    "ecdsa-p521": _ecdsa(ec.SECP521R1(), hashes.SHA512()),
    # The same RSA key signs the handshake with PSS in either case (RFC 9846 section 4.3.3); the two
    # differ in how an authority signs certificates with it.
    "rsa": _rsa(),
    "rsa-pss": _rsa(padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)),
    "ed25519": _Algorithm(generate=ed25519.Ed25519PrivateKey.generate),
    "mldsa44": _Algorithm(generate=mldsa.MLDSA44PrivateKey.generate),
    "mldsa65": _Algorithm(generate=mldsa.MLDSA65PrivateKey.generate),
    "mldsa87": _Algorithm(generate=mldsa.MLDSA87PrivateKey.generate),
}
"""Kinds of keys, by the names of ``hybridkex dev-ca --alg``."""


def _algorithm(name: str) -> _Algorithm:
    try:
        return ALGORITHMS[name]
    except KeyError:
        known = ", ".join(ALGORITHMS)
        raise ConfigError(f"unknown algorithm {name!r}; known are {known}") from None


@dataclass(frozen=True)
class DevCa:
    """An authority and its key: a self-signed root, or an intermediate under one.

    Raises:
        ConfigError: a field has the wrong type.
    """

    certificate: x509.Certificate
    """The authority's certificate."""
    private_key: Annotated[CertificateIssuerPrivateKeyTypes, PRIVATE_KEY] = field(repr=False)
    """Its key."""
    algorithm: str = "ecdsa"
    """The algorithm of the authority's own key."""
    intermediates: tuple[bytes, ...] = field(default=(), repr=False)
    """The intermediate certificates (DER) that follow each certificate it issues."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    @checked
    def create(
        cls,
        name: str = "hybridkex development CA",
        algorithm: str = "ecdsa",
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        path_length: int | None = 1,
    ) -> "DevCa":
        """A new root certificate, valid for ten years by default.

        Args:
            name: its common name.
            algorithm: one of :data:`ALGORITHMS`. ``ed25519`` gives the root an ECDSA key instead,
                since `cryptography` accepts Ed25519 in end entities' certificates only.
            not_before: aware; yesterday by default.
            not_after: aware.
            path_length: the maximum number of intermediates below it in a path.

        Raises:
            ConfigError: the algorithm is unknown, or the dates or the name are invalid.
        """
        algorithm = "ecdsa" if algorithm == "ed25519" else algorithm
        chosen = _algorithm(algorithm)
        key = chosen.generate()
        builder = _builder(name, key.public_key(), not_before, not_after, days=3650)
        builder = _as_authority(builder.issuer_name(_common_name(name)), path_length)
        return cls(_sign(builder, key, chosen), key, algorithm)

    @checked
    def intermediate(
        self,
        name: str = "hybridkex development intermediate CA",
        algorithm: str = "ecdsa",
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        path_length: int | None = 0,
    ) -> "DevCa":
        """A new authority below this one.

        Args:
            name: its common name.
            algorithm: see :meth:`create`.
            not_before: aware; yesterday by default.
            not_after: aware; ten years from now by default.
            path_length: the maximum number of intermediates below it in a path.

        Raises:
            ConfigError: see :meth:`create`.
        """
        algorithm = "ecdsa" if algorithm == "ed25519" else algorithm
        key = _algorithm(algorithm).generate()
        builder = _builder(name, key.public_key(), not_before, not_after, days=3650)
        certificate = self._issue(_as_authority(builder, path_length))
        chain = (certificate.public_bytes(Encoding.DER), *self.intermediates)
        return DevCa(certificate, key, algorithm, chain)

    @checked
    def issue(
        self,
        *names: str,
        algorithm: str = "ecdsa",
        common_name: str | None = None,
        uris: Iterable[str] = (),
        usages: Iterable[x509.ObjectIdentifier] = (
            ExtendedKeyUsageOID.SERVER_AUTH,
            ExtendedKeyUsageOID.CLIENT_AUTH,
        ),
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        private_key: Annotated[CertificateIssuerPrivateKeyTypes, PRIVATE_KEY] | None = None,
    ) -> Identity:
        """A certificate for these DNS names and IP addresses, valid for a year by default.

        Args:
            names: host names (also beyond ASCII, or ``*.example.org``) and IP addresses.
            algorithm: one of :data:`ALGORITHMS`.
            common_name: the subject's; the first name by default.
            uris: further subject alternative names.
            usages: servers and clients by default.
            not_before: aware; yesterday by default.
            not_after: aware.
            private_key: the key to certify instead of a new one.

        Raises:
            ConfigError: a name, a URI, the algorithm or the dates are invalid.
        """
        key = private_key if private_key is not None else _algorithm(algorithm).generate()
        alternatives: list[x509.GeneralName] = [_general_name(name) for name in names]
        try:
            alternatives.extend(x509.UniformResourceIdentifier(uri) for uri in uris)
        except ValueError as error:
            raise ConfigError(f"not a URI for a certificate: {error}") from None
        subject = common_name or (names[0] if names else "hybridkex")
        builder = (
            _builder(subject, key.public_key(), not_before, not_after, days=365)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
        )
        if alternatives:
            # Not critical: RFC 5280 section 4.2.1.6 says so for certificates with a subject.
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        certificate = self._issue(builder)
        return Identity((certificate.public_bytes(Encoding.DER), *self.intermediates), key)

    def _issue(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = builder.issuer_name(self.certificate.subject).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False
        )
        return _sign(builder, self.private_key, _algorithm(self.algorithm))

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


def _common_name(name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_MAX_COMMON_NAME])])
    except ValueError as error:
        raise ConfigError(f"{name!r} cannot be a common name: {error}") from None


def _builder(
    name: str,
    key: CertificatePublicKeyTypes,
    not_before: datetime | None,
    not_after: datetime | None,
    *,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    try:
        # A day ago, for peers whose clock is slow.
        builder = builder.not_valid_before(not_before or now - _ONE_DAY)
        return builder.not_valid_after(not_after or now + days * _ONE_DAY)
    except ValueError as error:
        raise ConfigError(f"a certificate cannot have these dates: {error}") from None


def _as_authority(
    builder: x509.CertificateBuilder, path_length: int | None
) -> x509.CertificateBuilder:
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    return builder.add_extension(constraints, critical=True).add_extension(
        _usage(ca=True), critical=True
    )


def _sign(
    builder: x509.CertificateBuilder, key: CertificateIssuerPrivateKeyTypes, algorithm: _Algorithm
) -> x509.Certificate:
    return builder.sign(key, algorithm.digest, rsa_padding=algorithm.rsa_padding)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    wildcard = "*." if name.startswith("*.") else ""
    parsed = parse_peer_name(name.removeprefix(wildcard))
    if isinstance(parsed, DnsName):
        return x509.DNSName(wildcard + parsed.a_label)
    if wildcard:
        raise ConfigError(f"{name!r} is neither a host name nor an IP address")
    return x509.IPAddress(parsed.address)


def write_identity(
    directory: Path, ca: DevCa, identity: Identity, *, overwrite: bool = False
) -> list[Path]:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem``; the key is readable by its owner alone.

    The authority's own key is not written.

    Raises:
        ConfigError: a file exists and ``overwrite`` is false, or one cannot be written; in that
            case none of them is.
    """
    files = identity_files(directory, ca, identity)
    present = [path for path in files if os.path.lexists(path)]
    if present and not overwrite:
        raise ConfigError(f"{present[0]} exists already; --force replaces it")
    try:
        write_files(files)
    except OSError as error:
        raise write_error(error.filename or directory, error) from None
    return list(files)


def identity_files(directory: Path, ca: DevCa, identity: Identity) -> dict[Path, tuple[bytes, int]]:
    """The files that :func:`write_identity` writes: content and mode by path."""
    certificates = b"".join(
        certificate_from_der(der).public_bytes(Encoding.PEM) for der in identity.chain
    )
    key = identity.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {
        directory / "ca.pem": (ca.pem, PUBLIC),
        directory / "cert.pem": (certificates, PUBLIC),
        directory / "key.pem": (key, PRIVATE),
    }
