"""A small certificate authority for tests and first steps; not one to run a company on."""

import ipaddress
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hybridkex.auth.identity import Identity
from hybridkex.auth.names import DnsName, parse_peer_name
from hybridkex.errors import ConfigError

__all__ = ["ALGORITHMS", "DevCa"]

ALGORITHMS: Final[dict[str, Callable[[], Any]]] = {
    "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ecdsa-p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "mldsa44": mldsa.MLDSA44PrivateKey.generate,
    "mldsa65": mldsa.MLDSA65PrivateKey.generate,
    "mldsa87": mldsa.MLDSA87PrivateKey.generate,
}
"""Kinds of keys, by the names of ``hybridkex dev-ca --alg``."""

_ONE_DAY: Final = timedelta(days=1)


def _new_key(algorithm: str) -> Any:
    try:
        return ALGORITHMS[algorithm]()
    except KeyError:
        known = ", ".join(ALGORITHMS)
        raise ConfigError(f"unknown algorithm {algorithm!r}; known are {known}") from None


@dataclass(frozen=True)
class DevCa:
    """A self-signed authority and its key."""

    certificate: x509.Certificate
    private_key: Any = field(repr=False)

    @classmethod
    def create(cls, name: str = "hybridkex development CA", algorithm: str = "ecdsa") -> "DevCa":
        """A new one. Ed25519 cannot issue, since `cryptography` refuses it: it gets ECDSA."""
        key = _new_key("ecdsa" if algorithm == "ed25519" else algorithm)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _ONE_DAY)
            .not_valid_after(now + 3650 * _ONE_DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, _digest(key))
        )
        return cls(certificate, key)

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
        private_key: Any = None,
    ) -> Identity:
        """A certificate for these DNS names and IP addresses, good for a year by default."""
        key = private_key if private_key is not None else _new_key(algorithm)
        now = datetime.now(UTC)
        alternatives: list[x509.GeneralName] = [_general_name(name) for name in names]
        alternatives.extend(x509.UniformResourceIdentifier(uri) for uri in uris)
        subject = common_name or (names[0] if names else "hybridkex")
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now - _ONE_DAY)
            .not_valid_after(not_after or now + 365 * _ONE_DAY)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.private_key.public_key()),
                critical=False,
            )
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        certificate = builder.sign(self.private_key, _digest(self.private_key))
        return Identity((certificate.public_bytes(Encoding.DER),), key)

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _digest(key: Any) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None:
    """What an issuer hashes with; Ed25519 and ML-DSA hash by themselves."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        size = key.curve.key_size
        return (
            hashes.SHA256() if size <= 256 else hashes.SHA384() if size <= 384 else hashes.SHA512()
        )
    return hashes.SHA256() if isinstance(key, rsa.RSAPrivateKey) else None


def _general_name(name: str) -> x509.GeneralName:
    if name.startswith("*."):
        return x509.DNSName(name)
    parsed = parse_peer_name(name)
    if isinstance(parsed, DnsName):
        return x509.DNSName(parsed.a_label)
    return x509.IPAddress(ipaddress.ip_address(str(parsed)))


def write_identity(
    directory: Path, ca: DevCa, identity: Identity, *, overwrite: bool = False
) -> list[Path]:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem``; the key is readable by its owner alone."""
    certificates = b"".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in identity.chain
    )
    key = identity.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files = {"ca.pem": (ca.pem, 0o644), "cert.pem": (certificates, 0o644), "key.pem": (key, 0o600)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = [name for name in files if (directory / name).exists()]
        if present and not overwrite:
            raise ConfigError(f"{directory / present[0]} is there already; --force replaces it")
        for name, (content, mode) in files.items():
            # A new file under another name: the key is never there with other rights.
            temporary = directory / f".{name}.{os.getpid()}"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(directory / name)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}") from None
    return [directory / name for name in files]
