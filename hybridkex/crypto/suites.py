"""Cipher suites: a hash for the key schedule and an AEAD for the records."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from hybridkex.constants import CipherSuiteCode, KdfCode

IV_LENGTH: Final = 12
"""Bytes of the per-record nonce of every suite (RFC 9846 section 5.3)."""

TAG_LENGTH: Final = 16
"""The length of the AEAD tag of every suite in bytes."""


class Aead(Protocol):
    """The part of `cryptography`'s AEAD interface that records use."""

    def encrypt(self, nonce: Any, data: Any, associated_data: Any, /) -> bytes: ...
    def decrypt(self, nonce: Any, data: Any, associated_data: Any, /) -> bytes: ...
    def encrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int: ...
    def decrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class HashFunction:
    """A hash function, as hashlib, `cryptography` and the KDF registry name it. There is one object
    for each."""

    name: str
    size: int
    algorithm: hashes.HashAlgorithm
    kdf: KdfCode
    new: Callable[..., "hashlib._Hash"]

    def digest(self, data: bytes) -> bytes:
        """The hash of ``data``: ``size`` bytes."""
        return self.new(data).digest()

    @cached_property
    def empty_digest(self) -> bytes:
        """The hash of the empty string, which several steps of the key schedule use."""
        return self.digest(b"")

    def __repr__(self) -> str:
        return self.name.upper()


SHA256: Final = HashFunction(
    name="sha256", size=32, algorithm=hashes.SHA256(), kdf=KdfCode.HKDF_SHA256, new=hashlib.sha256
)
SHA384: Final = HashFunction(
    name="sha384", size=48, algorithm=hashes.SHA384(), kdf=KdfCode.HKDF_SHA384, new=hashlib.sha384
)


@dataclass(frozen=True, kw_only=True)
class CipherSuite:
    """One suite of RFC 9846 appendix B.4."""

    code: int
    name: str
    hash: HashFunction
    aead: Callable[[bytes], Aead]
    key_length: int
    record_limit: int
    """The number of records after which the sender must update its key (RFC 9846 section 5.5)."""

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


# RFC 9846 section 5.5: 2^24.5 full-size records for AES-GCM. ChaCha20-Poly1305 would reach the end
# of its sequence numbers first; one limit for all keeps the rotation exercised.
_RECORD_LIMIT: Final = 1 << 24

TLS_AES_128_GCM_SHA256: Final = CipherSuite(
    code=CipherSuiteCode.TLS_AES_128_GCM_SHA256,
    name="TLS_AES_128_GCM_SHA256",
    hash=SHA256,
    aead=AESGCM,
    key_length=16,
    record_limit=_RECORD_LIMIT,
)
TLS_AES_256_GCM_SHA384: Final = CipherSuite(
    code=CipherSuiteCode.TLS_AES_256_GCM_SHA384,
    name="TLS_AES_256_GCM_SHA384",
    hash=SHA384,
    aead=AESGCM,
    key_length=32,
    record_limit=_RECORD_LIMIT,
)
TLS_CHACHA20_POLY1305_SHA256: Final = CipherSuite(
    code=CipherSuiteCode.TLS_CHACHA20_POLY1305_SHA256,
    name="TLS_CHACHA20_POLY1305_SHA256",
    hash=SHA256,
    aead=ChaCha20Poly1305,
    key_length=32,
    record_limit=_RECORD_LIMIT,
)

ALL_SUITES: Final = (
    TLS_AES_256_GCM_SHA384,
    TLS_AES_128_GCM_SHA256,
    TLS_CHACHA20_POLY1305_SHA256,
)
"""The default order: AES-256 first, since Grover's algorithm halves the bits of a key."""
