"""Our identity: a certificate chain and the private key of its first certificate."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from hybridkex.auth.certificates import (
    flaw_of_own,
    key_bytes,
    key_of,
    key_weakness,
    names_of,
    not_valid_today,
    subject_of,
)
from hybridkex.auth.names import PeerName, any_covers
from hybridkex.constants import CertificateType
from hybridkex.crypto.private_keys import PRIVATE_KEY, load_private_key
from hybridkex.crypto.rsa_pss import RsaPssKey
from hybridkex.crypto.x509_failure import parse_failure
from hybridkex.crypto.x509_parsing import (
    UNREADABLE,
    certificate_from_der,
    certificates_from_pem,
)
from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields, checked
from hybridkex.files import read_file


@dataclass(frozen=True)
class Identity:
    """A certificate chain (DER, leaf first) and its private key.

    Raises:
        ConfigError: a certificate that does not parse or that no peer can accept, a key that is not
            the leaf's, or a weak key.
    """

    certificate_type: ClassVar[CertificateType] = CertificateType.X509
    chain: tuple[bytes, ...] = field(repr=False)
    """The certificates in DER, leaf first."""
    private_key: Annotated[CertificateIssuerPrivateKeyTypes, PRIVATE_KEY] = field(repr=False)
    """The key of the leaf."""
    names: tuple[str, ...] = field(init=False)
    """The DNS names, IP addresses and URIs that the certificate is for."""

    def __post_init__(self) -> None:
        right = 'Identity.from_files("cert.pem", "key.pem")'
        check_fields(self, {"chain": right, "private_key": right})
        if not self.chain:
            raise ConfigError("an identity needs at least one certificate")
        try:
            certificates = [certificate_from_der(der) for der in self.chain]
            object.__setattr__(self, "names", names_of(certificates[0]))
            keys = [key_bytes(certificate.public_key()) for certificate in certificates]
        except UNREADABLE as error:
            raise ConfigError(
                f"our own certificate does not parse: {parse_failure(error)}"
            ) from None
        subject = subject_of(certificates[0])
        own = key_bytes(self.private_key.public_key())
        if own != keys[0]:
            if own in keys:
                raise ConfigError(f"the chain starts with {subject}: put the leaf first")
            raise ConfigError(f"the private key is not that of the certificate {subject}")
        weakness = key_weakness(key_of(certificates[0]))
        if weakness is not None:
            raise ConfigError(f"our own certificate {subject} has {weakness}")
        flaw = flaw_of_own(certificates[0])
        if flaw is not None:
            raise ConfigError(f"our own certificate {subject} {flaw}")

    @cached_property
    def signing_key(self) -> Any:
        """The private key as signature schemes take it: where the certificate's public key
        algorithm is id-RSASSA-PSS, it signs by ``rsa_pss_pss_*`` alone (RFC 9846 section 4.3.3)."""
        public = key_of(self.leaf)
        if isinstance(public, RsaPssKey) and isinstance(self.private_key, rsa.RSAPrivateKey):
            return RsaPssKey(self.private_key, public.parameters)
        return self.private_key

    @cached_property
    def leaf(self) -> x509.Certificate:
        """Our own certificate."""
        return certificate_from_der(self.chain[0])

    def require_role(self, *, server: bool) -> None:
        """Refuse a certificate whose extendedKeyUsage excludes this role.

        Args:
            server: whether we use it as a server; otherwise as a client.

        Raises:
            ConfigError: no peer can accept it (RFC 5280 section 4.2.1.12).
        """
        side = "server" if server else "client"
        wanted = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        try:
            usages = self.leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return
        if wanted not in usages:
            raise ConfigError(
                f"our own certificate {subject_of(self.leaf)} is not for a {side} "
                f"(extendedKeyUsage lacks {side}Auth)"
            )

    def matches(self, name: str | PeerName) -> bool:
        """Whether the certificate is for this server name; a wildcard stands for one label."""
        return any_covers(self.names, name)

    @classmethod
    @checked
    def from_pem(
        cls, certificates: bytes, key: bytes, *, password: bytes | None = None
    ) -> "Identity":
        """From PEM: the chain with the leaf first, and the key.

        Args:
            certificates: the chain, with the leaf first.
            key: the private key of the leaf.
            password: decrypts the key; ``None`` for a key that is not encrypted.

        Raises:
            ConfigError: the certificates or the key cannot be read, they do not match, or the
                certificate is not valid today.
        """
        return cls._load("the certificate", certificates, "the private key", key, password)

    @classmethod
    @checked
    def from_files(
        cls, certificates: str | Path, key: str | Path, *, password: bytes | None = None
    ) -> "Identity":
        """From PEM files.

        Args:
            certificates: the path of the chain, with the leaf first.
            key: the path of the private key.
            password: see :meth:`from_pem`.

        Raises:
            ConfigError: as for :meth:`from_pem`; the message names the file.
        """
        read = [read_file(path) for path in (certificates, key)]
        try:
            return cls._load(str(certificates), read[0], str(key), read[1], password)
        except ConfigError as error:
            raise ConfigError(f"{error} ({certificates}, {key})") from None

    @classmethod
    def _load(
        cls,
        chain_name: str,
        chain_pem: bytes,
        key_name: str,
        key_pem: bytes,
        password: bytes | None,
    ) -> "Identity":
        try:
            chain = certificates_from_pem(chain_pem)
        except UNREADABLE as error:
            raise ConfigError(
                f"{chain_name} is not a certificate in PEM form: {parse_failure(error)}"
            ) from None
        dates = not_valid_today(chain[0])
        if dates is not None:
            raise ConfigError(f"our own certificate {subject_of(chain[0])} {dates}")
        private_key = load_private_key(key_pem, password, key_name)
        # A key that no certificate can have (X25519, for example) is refused when it is compared
        # with the leaf.
        return cls(tuple(one.public_bytes(Encoding.DER) for one in chain), private_key)
