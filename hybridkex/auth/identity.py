"""Who we are: a certificate chain and the key of its first certificate."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from hybridkex.auth.names import DnsName, parse_peer_name
from hybridkex.auth.verify import matches_dns
from hybridkex.errors import ConfigError

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity:
    """A certificate chain (DER, leaf first) and its private key.

    Raises:
        ConfigError: the key is not the certificate's.
    """

    chain: tuple[bytes, ...] = field(repr=False)
    private_key: Any = field(repr=False)

    def __post_init__(self) -> None:
        if not self.chain:
            raise ConfigError("an identity has at least one certificate")
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ours = self.private_key.public_key().public_bytes(*form)
        if self.leaf.public_key().public_bytes(*form) != ours:
            raise ConfigError("the private key is not the certificate's")

    @cached_property
    def leaf(self) -> x509.Certificate:
        """Our own certificate."""
        return x509.load_der_x509_certificate(self.chain[0])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The DNS names and IP addresses that it is for."""
        try:
            names = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return ()
        addresses = names.get_values_for_type(x509.IPAddress)
        return (*names.get_values_for_type(x509.DNSName), *map(str, addresses))

    def matches(self, name: str) -> bool:
        """Whether the certificate is for this server name."""
        try:
            parsed = parse_peer_name(name)
        except ConfigError:
            return False
        if isinstance(parsed, DnsName):
            return any(matches_dns(pattern, parsed.a_label) for pattern in self.names)
        return str(parsed) in self.names

    @classmethod
    def from_pem(
        cls, certificates: bytes, key: bytes, *, password: bytes | None = None
    ) -> "Identity":
        """From PEM: the chain with the leaf first, and the key."""
        try:
            chain = x509.load_pem_x509_certificates(certificates)
        except ValueError as error:
            raise ConfigError(f"these are no PEM certificates: {error}") from None
        try:
            private_key = load_pem_private_key(key, password)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"this is no usable private key: {error}") from None
        return cls(tuple(one.public_bytes(Encoding.DER) for one in chain), private_key)

    @classmethod
    def from_files(
        cls, certificates: str | Path, key: str | Path, *, password: bytes | None = None
    ) -> "Identity":
        """From PEM files."""
        read = []
        for path in (certificates, key):
            try:
                read.append(Path(path).read_bytes())
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        try:
            return cls.from_pem(*read, password=password)
        except ConfigError as error:
            raise ConfigError(f"{certificates}, {key}: {error}") from None
