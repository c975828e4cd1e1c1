"""The DER encoding of keys for RSASSA-PSS in certificates (RFC 4055).

:mod:`hybridkex.crypto.rsa_pss` imports this module for the first such key; most programs never need
it.
"""

from typing import Annotated, Final

from cryptography import x509
from cryptography.hazmat import asn1

from hybridkex.crypto.x509_failure import TbsCertificate

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


def spki_of(certificate: x509.Certificate) -> bytes:
    """SubjectPublicKeyInfo, as in a certificate."""
    tbs = asn1.decode_der(TbsCertificate, certificate.tbs_certificate_bytes)
    return asn1.encode_der(tbs.key.parse(_Info))


def key_parameters(spki: bytes) -> tuple[str, str, int] | None:
    """The parameters of a restricted key: hash, hash of MGF1, bytes of salt.

    Raises ``ValueError``: it does not parse, or its parameters do not.
    """
    given = asn1.decode_der(_Info, spki).algorithm.parse(_Algorithm).parameters
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
    return "sha1" if given.hash is None else _hash(given.hash), mask, salt


def _hash(algorithm: _Hash) -> str:
    name = _HASHES.get(algorithm.algorithm.dotted_string)
    if name is None:
        raise ValueError(f"RSASSA-PSS with the hash {algorithm.algorithm.dotted_string}")
    return name
