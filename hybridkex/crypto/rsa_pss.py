"""RSA keys that are for RSASSA-PSS alone: id-RSASSA-PSS in place of rsaEncryption (RFC 4055).

`cryptography` reads such a key as any other RSA key and forgets its object identifier and its
parameters. TLS needs both: ``rsa_pss_pss_*`` is for these keys and ``rsa_pss_rsae_*`` for the
others, and "if the corresponding public key's parameters are present, then the parameters in the
signature MUST be identical to those in the public key" (RFC 9846 section 4.3.3).
"""

from dataclasses import dataclass
from typing import Annotated, Final

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import rsa

__all__ = ["PssParameters", "RsaPssKey", "certificate_key", "raw_key", "spki_of"]

_RSASSA_PSS: Final = bytes.fromhex("06092a864886f70d01010a")
"""The object identifier id-RSASSA-PSS, 1.2.840.113549.1.1.10, in DER."""
_MGF1: Final = "1.2.840.113549.1.1.8"
_HASHES: Final = {
    "1.3.14.3.2.26": "sha1",
    "2.16.840.1.101.3.4.2.4": "sha224",
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}


@asn1.sequence
class _Hash:
    """HashAlgorithm (RFC 4055 section 2.1): its parameters are NULL or absent."""

    algorithm: x509.ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class _Mask:
    """MaskGenAlgorithm (RFC 4055 section 2.2)."""

    algorithm: x509.ObjectIdentifier
    hash: _Hash


@asn1.sequence
class _Parameters:
    """RSASSA-PSS-params (RFC 4055 section 3.1); what is absent has its default."""

    hash: Annotated[_Hash | None, asn1.Explicit(0)]
    mask: Annotated[_Mask | None, asn1.Explicit(1)]
    salt_length: Annotated[int | None, asn1.Explicit(2)]
    trailer: Annotated[int | None, asn1.Explicit(3)]


@asn1.sequence
class _Algorithm:
    """AlgorithmIdentifier of a key for RSASSA-PSS (RFC 4055 section 1.2)."""

    algorithm: x509.ObjectIdentifier
    parameters: _Parameters | None


@asn1.sequence
class _Info:
    """SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7)."""

    algorithm: asn1.TLV
    key: asn1.BitString


@asn1.sequence
class _Certified:
    """TBSCertificate (RFC 5280 section 4.1)."""

    version: Annotated[int | None, asn1.Explicit(0)]
    serial: int
    signature: asn1.TLV
    issuer: asn1.TLV
    validity: asn1.TLV
    subject: asn1.TLV
    info: _Info
    issuer_id: Annotated[asn1.BitString | None, asn1.Implicit(1)]
    subject_id: Annotated[asn1.BitString | None, asn1.Implicit(2)]
    extensions: Annotated[list[asn1.TLV] | None, asn1.Explicit(3)]


@dataclass(frozen=True)
class PssParameters:
    """What a key restricts its signatures to."""

    hash: str
    """As `cryptography` names it, for example ``sha256``."""
    mask_hash: str
    """The hash of MGF1."""
    salt_length: int
    """Bytes."""


@dataclass(frozen=True)
class RsaPssKey:
    """An RSA key that signs by RSASSA-PSS alone.

    Args:
        key: of `cryptography`, the public or the private half.
        parameters: what the key is restricted to; ``None`` leaves all hashes open.
    """

    key: rsa.RSAPublicKey | rsa.RSAPrivateKey
    parameters: PssParameters | None

    @property
    def key_size(self) -> int:
        """Bits of the modulus."""
        return self.key.key_size

    def public_key(self) -> "RsaPssKey":
        """The public half, under the same parameters."""
        key = self.key.public_key() if isinstance(self.key, rsa.RSAPrivateKey) else self.key
        return RsaPssKey(key, self.parameters)


def spki_of(certificate: x509.Certificate) -> bytes:
    """SubjectPublicKeyInfo in DER as it stands in a certificate, whatever its algorithm."""
    return asn1.encode_der(_certified(certificate).info)


def certificate_key(certificate: x509.Certificate, key: object) -> RsaPssKey:
    """The key of a certificate whose public key algorithm is id-RSASSA-PSS.

    Raises:
        ValueError: its parameters do not parse.
    """
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("a key for RSASSA-PSS that is not an RSA key")  # noqa: TRY004
    return RsaPssKey(key, _parameters(_certified(certificate).info))


def raw_key(spki: bytes, key: rsa.RSAPublicKey) -> RsaPssKey | None:
    """The key in a SubjectPublicKeyInfo; ``None`` where its algorithm is rsaEncryption.

    Raises:
        ValueError: its parameters do not parse.
    """
    if _RSASSA_PSS not in spki[:20]:
        return None
    return RsaPssKey(key, _parameters(asn1.decode_der(_Info, spki)))


def _certified(certificate: x509.Certificate) -> _Certified:
    return asn1.decode_der(_Certified, certificate.tbs_certificate_bytes)


def _parameters(info: _Info) -> PssParameters | None:
    given = info.algorithm.parse(_Algorithm).parameters
    if given is None:
        return None
    if given.trailer not in (None, 1):
        raise ValueError("RSASSA-PSS with another trailer field than 1")
    mask = "sha1"
    if given.mask is not None:
        if given.mask.algorithm.dotted_string != _MGF1:
            raise ValueError("RSASSA-PSS with another mask generation function than MGF1")
        mask = _hash(given.mask.hash)
    salt = 20 if given.salt_length is None else given.salt_length
    return PssParameters("sha1" if given.hash is None else _hash(given.hash), mask, salt)


def _hash(algorithm: _Hash) -> str:
    name = _HASHES.get(algorithm.algorithm.dotted_string)
    if name is None:
        raise ValueError(f"RSASSA-PSS with the hash {algorithm.algorithm.dotted_string}")
    return name
