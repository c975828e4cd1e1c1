"""Private keys from PEM, in the forms that `cryptography` reads and in those of RFC 9881.

An ML-DSA private key is a seed, an expanded key, or both (RFC 9881 section 6). `cryptography` reads
the seed alone; OpenSSL 3.5 writes both. From a file with both, the seed is used after a check that
it matches the expanded key.
"""

import base64
import binascii
import hashlib
import re
from typing import Annotated, Any, Final

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
)

from hybridkex.crypto.pem import PemBlock, PemError, contents_of, pem_blocks
from hybridkex.errors import ConfigError
from hybridkex.fields import Kind

PRIVATE_KEY: Final = Kind(
    lambda key: hasattr(key, "public_key") and not isinstance(key, type), "a private key"
)
"""A field or an argument that takes a private key."""

_LABELS: Final = (
    "PRIVATE KEY",
    "ENCRYPTED PRIVATE KEY",
    "RSA PRIVATE KEY",
    "EC PRIVATE KEY",
    "DSA PRIVATE KEY",
)

_REFUSALS: Final = (TypeError, ValueError, UnsupportedAlgorithm, InternalError)
"""The errors of `cryptography` for a key; the last one is for Ed25519 keys of a wrong length."""

_BLOCK: Final = re.compile(rb"-----BEGIN PRIVATE KEY-----(.*?)-----END PRIVATE KEY-----", re.DOTALL)

# Class, and rows and columns of the matrix (FIPS 204 table 1) by object identifier.
_PARAMETERS: Final[dict[str, tuple[Any, int, int]]] = {
    "2.16.840.1.101.3.4.3.17": (mldsa.MLDSA44PrivateKey, 4, 4),
    "2.16.840.1.101.3.4.3.18": (mldsa.MLDSA65PrivateKey, 6, 5),
    "2.16.840.1.101.3.4.3.19": (mldsa.MLDSA87PrivateKey, 8, 7),
}


@asn1.sequence
class _Algorithm:
    algorithm: x509.ObjectIdentifier


@asn1.sequence
class _PrivateKeyInfo:
    """OneAsymmetricKey (RFC 5958 section 2)."""

    version: int
    algorithm: _Algorithm
    private: bytes
    attributes: Annotated[asn1.SetOf[asn1.TLV] | None, asn1.Implicit(0)]
    public: Annotated[asn1.BitString | None, asn1.Implicit(1)]


@asn1.sequence
class _Both:
    """The form ``both`` of RFC 9881 section 6."""

    seed: bytes
    expanded: bytes


def load_private_key(pem: bytes, password: bytes | None, name: str) -> Any:
    """The private key in a PEM file, of a class of `cryptography`.

    Args:
        pem: PKCS #8, PKCS #1 or SEC 1.
        password: the password, if the key is encrypted.
        name: the name of the file in errors.

    Raises:
        ConfigError: it is not a private key, the password is wrong, or it is an ML-DSA key that
            cannot be used. The message contains neither parts of the key nor the library's message.
    """
    try:
        encrypted = _is_encrypted(pem)
    except PemError as error:
        raise ConfigError(f"{name} is not a private key in PEM form: {error}") from None
    if encrypted and password is None:
        raise ConfigError(
            f"{name} is encrypted, and no password was given; 'openssl pkey -in FILE -out NEW' "
            "decrypts it"
        )
    if encrypted is False and password is not None:
        raise ConfigError(f"{name} is not encrypted, and a password was given")
    try:
        return load_pem_private_key(pem, password)
    except _REFUSALS:
        pass  # Outside the handler, so that the library's error is not the context of ours.
    key = _key_with_public(pem, name) or _mldsa_key(pem, name) or _mislabelled_key(pem)
    if key is not None:
        return key
    if encrypted is None:
        raise ConfigError(f"{name} is not a private key in PEM form: it is {contents_of(pem)}")
    if encrypted:
        raise ConfigError(
            f"{name} is not a private key in PEM form, or the password is wrong, or its cipher is "
            "not supported (AES and 3DES are)"
        )
    raise ConfigError(
        f"{name} is not a private key in PEM form: its content is malformed or of an unknown type"
    )


def _key_block(pem: bytes) -> PemBlock | None:
    """The first private key of a file."""
    keys = (block for block in pem_blocks(pem) if block.label in _LABELS)
    return next(keys, None)


def _is_encrypted(pem: bytes) -> bool | None:
    """Whether the first private key of a file is encrypted; ``None`` without a key."""
    block = _key_block(pem)
    return None if block is None else block.encrypted


def _mislabelled_key(pem: bytes) -> Any:
    """A key of PKCS #8, PKCS #1 or SEC 1 under the label of another of them. OpenSSL reads it."""
    block = _key_block(pem)
    if block is None or block.encrypted:
        return None
    try:
        return load_der_private_key(block.der(), None)
    except _REFUSALS:
        return None


def _private_key_info(pem: bytes) -> _PrivateKeyInfo | None:
    """The first PKCS #8 key of an unencrypted file, if its algorithm has no parameters."""
    block = _BLOCK.search(pem)
    if block is None:
        return None
    try:
        return asn1.decode_der(_PrivateKeyInfo, base64.b64decode(block[1]))
    except (ValueError, binascii.Error):
        return None


def _key_with_public(pem: bytes, name: str) -> Any:
    """A key of PKCS #8 version 2, which has its public key beside it (RFC 5958, RFC 8410 section
    10.3): Bouncy Castle and ring write Ed25519 keys so, and `cryptography` reads version 1."""
    info = _private_key_info(pem)
    if info is None or info.public is None:
        return None
    alone = _PrivateKeyInfo(
        version=0, algorithm=info.algorithm, private=info.private, attributes=None, public=None
    )
    try:
        key: Any = load_der_private_key(asn1.encode_der(alone), None)
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except _REFUSALS:
        return None
    if not spki.endswith(b"\0" + info.public.as_bytes()):
        raise ConfigError(f"{name} has a private key and a public key that do not match")
    return key


def _mldsa_key(pem: bytes, name: str) -> Any:
    """The ML-DSA key in an unencrypted file; ``None`` where it is something else."""
    info = _private_key_info(pem)
    if info is None:
        return None
    oid = info.algorithm.algorithm.dotted_string
    if oid not in _PARAMETERS:
        return None
    kind, rows, columns = _PARAMETERS[oid]
    try:
        both = asn1.decode_der(_Both, info.private)
    except ValueError:
        if info.private[:1] == b"\x04":  # expandedKey, an OCTET STRING
            raise ConfigError(
                f"{name} holds an expanded ML-DSA key without its seed, which cannot be used here; "
                "make a new key and keep its seed (OpenSSL 3.5 does so by default)"
            ) from None
        raise ConfigError(f"{name} holds an ML-DSA key that does not parse") from None
    if len(both.seed) != 32:
        raise ConfigError(f"{name} holds an ML-DSA seed of {len(both.seed)} bytes instead of 32")
    key = kind.from_seed_bytes(both.seed)
    if not _consistent(both, key.public_key().public_bytes_raw(), rows, columns):
        # RFC 9881 on consistency testing: a key whose halves differ is refused.
        raise ConfigError(f"{name} holds an ML-DSA seed and an expanded key that do not match")
    return key


def _consistent(both: _Both, public: bytes, rows: int, columns: int) -> bool:
    """Whether the parts of the expanded key that the seed gives by a hash alone are its own:
    ``rho``, ``K`` and ``tr`` (FIPS 204 algorithm 6), which determine the public key."""
    s_bytes, t_bytes = (96 if rows != 6 else 128), 416
    length = 128 + (rows + columns) * s_bytes + rows * t_bytes
    expansion = hashlib.shake_256(both.seed + bytes((rows, columns))).digest(128)
    rho, key, tr = expansion[:32], expansion[96:], hashlib.shake_256(public).digest(64)
    return len(both.expanded) == length and both.expanded[:128] == rho + key + tr
