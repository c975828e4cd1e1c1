"""RSA keys that are for RSASSA-PSS alone: id-RSASSA-PSS in place of rsaEncryption (RFC 4055).

`cryptography` reads such a key like any other RSA key and drops its object identifier and
parameters. TLS needs both: ``rsa_pss_pss_*`` is for these keys and ``rsa_pss_rsae_*`` for the
others, and "if the corresponding public key's parameters are present, then the parameters in the
signature MUST be identical to those in the public key" (RFC 9846 section 4.3.3).
"""

from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from hybridkex.values import value

_RSASSA_PSS: Final = bytes.fromhex("06092a864886f70d01010a")
"""The object identifier id-RSASSA-PSS, 1.2.840.113549.1.1.10, in DER."""


@value
class PssParameters:
    """The parameters to which a key restricts its signatures."""

    hash: str
    """Its name in `cryptography`, for example ``sha256``."""
    mask_hash: str
    """The hash of MGF1."""
    salt_length: int
    """The length of the salt in bytes."""


@value
class RsaPssKey:
    """An RSA key for RSASSA-PSS only.

    Args:
        key: an RSA key of `cryptography`, public or private.
        parameters: the restriction of the key; ``None`` allows all hashes.
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
    """SubjectPublicKeyInfo in DER, as in a certificate, whatever its algorithm."""
    spki: bytes = _der().spki_of(certificate)
    return spki


def certificate_key(certificate: x509.Certificate, key: object) -> RsaPssKey:
    """The key of a certificate whose public key algorithm is id-RSASSA-PSS.

    Raises:
        ValueError: its parameters do not parse.
    """
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("a key for RSASSA-PSS that is not an RSA key")  # noqa: TRY004
    return _restricted(key, spki_of(certificate))


def raw_key(spki: bytes, key: rsa.RSAPublicKey) -> RsaPssKey | None:
    """The key in a SubjectPublicKeyInfo; ``None`` where its algorithm is rsaEncryption.

    Raises:
        ValueError: its parameters do not parse.
    """
    if _RSASSA_PSS not in spki[:20]:
        return None
    return _restricted(key, spki)


def _restricted(key: rsa.RSAPublicKey, spki: bytes) -> RsaPssKey:
    found = _der().key_parameters(spki)
    return RsaPssKey(key, None if found is None else PssParameters(*found))


def _der() -> Any:
    from hybridkex.crypto import rsa_pss_der  # noqa: PLC0415  # see there

    return rsa_pss_der
