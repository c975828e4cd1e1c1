"""Raw public keys (RFC 7250): keys without a certificate."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)

from hybridkex.auth.certificates import key_weakness
from hybridkex.auth.names import PeerName, any_covers
from hybridkex.constants import Alert, CertificateType
from hybridkex.crypto.private_keys import PRIVATE_KEY, load_private_key
from hybridkex.crypto.rsa_pss import raw_key
from hybridkex.crypto.sig_oqs import OqsPrivateKey, OqsPublicKey
from hybridkex.errors import CertificateRejected, ConfigError
from hybridkex.fields import check_fields, checked
from hybridkex.files import read_file

MAX_SPKI: Final = 1 << 20
"""The maximum length of a key in bytes; the largest public keys in liboqs have about 400 KB."""


def _weakness(key: Any) -> str | None:
    return None if isinstance(key, OqsPublicKey) else key_weakness(key)


@dataclass(frozen=True, repr=False)
class PeerRawKey:
    """A peer's raw public key, with the names under which it was trusted.

    It has those attributes of :class:`~hybridkex.auth.PeerCertificate` that apply to a key.
    """

    certificate_type: ClassVar[CertificateType] = CertificateType.RAW_PUBLIC_KEY
    common_name: ClassVar[None] = None
    spki: bytes
    """SubjectPublicKeyInfo in DER."""
    vouched: tuple[str, ...] = ()
    """The names for which the trust store has it."""

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The bytes on the wire: the key alone."""
        return (self.spki,)

    @cached_property
    def public_key(self) -> Any:
        """The key, of a class of `cryptography` or an :class:`OqsPublicKey`."""
        try:
            loaded = load_der_public_key(self.spki)
        except UnsupportedAlgorithm:
            key = OqsPublicKey.from_spki(self.spki)
            if key is None:
                raise
            return key
        if isinstance(loaded, rsa.RSAPublicKey):
            return raw_key(self.spki, loaded) or loaded
        return loaded

    @cached_property
    def pin(self) -> str:
        """SHA-256 of the key in hex: what ``--pin`` and :class:`~hybridkex.Pins` take."""
        return hashlib.sha256(self.spki).hexdigest()

    @property
    def subject(self) -> str:
        """The name of the key in sessions and errors."""
        return f"raw public key {self.pin}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which it was trusted, and ``sha256:`` with its pin."""
        return (*self.vouched, f"sha256:{self.pin}")

    def __repr__(self) -> str:
        return f"PeerRawKey({', '.join(self.names)})"


def read_raw_key(spki: bytes, vouched: tuple[str, ...] = ()) -> PeerRawKey:
    """Parse the key that a peer sent.

    Raises:
        CertificateRejected: the bytes are not a key, or the key is not acceptable.
    """
    if len(spki) > MAX_SPKI:
        raise CertificateRejected(f"the peer sent a raw public key of {len(spki)} bytes")
    peer = PeerRawKey(spki, vouched)
    try:
        key = peer.public_key
    except UnsupportedAlgorithm as error:
        raise CertificateRejected(
            f"the peer's raw public key is not supported here: {error}",
            alert=Alert.UNSUPPORTED_CERTIFICATE,
        ) from None
    except Exception as error:
        # The peer chose these bytes: the result is the same for every exception of the parser.
        raise CertificateRejected(f"the peer's raw public key does not parse: {error}") from None
    weakness = _weakness(key)
    if weakness is not None:
        raise CertificateRejected(
            f"the {peer.subject} is {weakness}", alert=Alert.UNSUPPORTED_CERTIFICATE
        )
    return peer


@dataclass(frozen=True)
class RawIdentity:
    """Our identity: a key pair without a certificate.

    Args:
        private_key: of a class of `cryptography`, or an :class:`OqsPrivateKey`.
        names: server names that this key is for; a server with several identities chooses by them.

    Raises:
        ConfigError: a field has the wrong type, or the key is too weak or cannot sign.
    """

    certificate_type: ClassVar[CertificateType] = CertificateType.RAW_PUBLIC_KEY
    private_key: Annotated[Any, PRIVATE_KEY] = field(repr=False)
    names: tuple[str, ...] = ()
    peer_view: PeerRawKey = field(init=False)
    """The public half, as a peer will see it."""

    @property
    def signing_key(self) -> Any:
        """The private key as signature schemes take it."""
        return self.private_key

    def __post_init__(self) -> None:
        right = 'RawIdentity.from_file("key.pem")'
        check_fields(self, {"private_key": right, "names": 'names=("localhost",)'})
        public = self.private_key.public_key()
        spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        weakness = _weakness(public)
        if weakness is not None:
            raise ConfigError(f"our own key is {weakness}")
        object.__setattr__(self, "peer_view", PeerRawKey(spki))

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The bytes on the wire: the public key alone."""
        return self.peer_view.chain

    @property
    def pin(self) -> str:
        """SHA-256 of the public key in hex, for the peer's configuration."""
        return self.peer_view.pin

    def matches(self, name: str | PeerName) -> bool:
        """Whether the key is for this server name; a wildcard stands for one label."""
        return any_covers(self.names, name)

    @classmethod
    def generate(cls, *, names: tuple[str, ...] = ()) -> "RawIdentity":
        """A fresh Ed25519 key; ``names`` are those of the class."""
        return cls(ed25519.Ed25519PrivateKey.generate(), names)

    def to_pem(self) -> bytes:
        """The private key in PEM (PKCS #8), unencrypted."""
        if isinstance(self.private_key, OqsPrivateKey):
            return self.private_key.to_pem()
        pem: bytes = self.private_key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        return pem

    @classmethod
    @checked
    def from_pem(
        cls, pem: bytes, *, names: tuple[str, ...] = (), password: bytes | None = None
    ) -> "RawIdentity":
        """From a private key in PEM.

        Args:
            pem: the private key.
            names: see the class.
            password: decrypts the key; ``None`` for a key that is not encrypted.

        Raises:
            ConfigError: it is not a private key, or the key is not acceptable.
        """
        key: Any = OqsPrivateKey.from_pem(pem)
        if key is None:
            key = load_private_key(pem, password, "the file")
        return cls(key, names)

    @classmethod
    @checked
    def from_file(
        cls, path: str | Path, *, names: tuple[str, ...] = (), password: bytes | None = None
    ) -> "RawIdentity":
        """From a file with a private key in PEM.

        Args:
            path: the file.
            names: see the class.
            password: see :meth:`from_pem`.

        Raises:
            ConfigError: as for :meth:`from_pem`; the message names the file.
        """
        pem = read_file(path)
        try:
            return cls.from_pem(pem, names=names, password=password)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
