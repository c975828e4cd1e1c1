"""Signature schemes of CertificateVerify (RFC 9846 section 4.3.3; ML-DSA from its TLS draft).

Only schemes that TLS 1.3 allows in CertificateVerify are here: no PKCS#1 v1.5, no SHA-1.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa

from hybridkex.constants import SignatureSchemeCode as Code
from hybridkex.crypto.rsa_pss import PssParameters, RsaPssKey
from hybridkex.errors import DecryptError, IllegalParameter
from hybridkex.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class SignatureScheme:
    """A signature scheme; ``suits`` says whether a private or public key is of its type."""

    code: int
    name: str
    suits: Callable[[Any], bool]
    _sign: Callable[[Any, bytes], bytes]
    _verify: Callable[[Any, bytes, bytes], None]

    def sign(self, private_key: Any, content: bytes) -> bytes:
        """The signature over ``content``."""
        return self._sign(private_key, content)

    def verify(self, public_key: Any, signature: bytes, content: bytes) -> None:
        """Return if the signature is good.

        Raises:
            IllegalParameter: the key is of another kind (section 4.5.2).
            DecryptError: the signature is bad.
        """
        if not self.suits(public_key):
            raise IllegalParameter(
                f"{self.name} does not match the type of the certificate's key",
                Reason.SIGNATURE_SCHEME,
            )
        try:
            self._verify(public_key, signature, content)
        except InvalidSignature:
            raise DecryptError(
                f"the {self.name} signature does not verify", Reason.SIGNATURE
            ) from None

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


def _is(key: object, *classes: type) -> bool:
    kind: type = type(key)
    return _is_one_of(kind, classes)


@cache
def _is_one_of(kind: type, classes: tuple[type, ...]) -> bool:
    # Cached by class: the key classes are abstract, and isinstance takes longer than parsing the
    # message with the signature.
    return issubclass(kind, classes)


def _ecdsa(
    code: Code, curve: type[ec.EllipticCurve], algorithm: hashes.HashAlgorithm
) -> SignatureScheme:
    scheme = ec.ECDSA(algorithm)

    def suits(key: Any) -> bool:
        of_its_kind = _is(key, ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)
        return of_its_kind and isinstance(key.curve, curve)

    return SignatureScheme(
        code=code,
        name=code.name.lower(),
        suits=suits,
        _sign=lambda key, content: key.sign(content, scheme),
        _verify=lambda key, signature, content: key.verify(signature, content, scheme),
    )


def _rsa_pss(code: Code, algorithm: hashes.HashAlgorithm, *, alone: bool) -> SignatureScheme:
    """RFC 9846 section 4.3.3: ``rsa_pss_rsae_*`` is for keys with the object identifier
    rsaEncryption, ``rsa_pss_pss_*`` for keys with id-RSASSA-PSS (``alone``), which may name the
    parameters of all their signatures."""
    # Section 4.3.3: the salt is as long as the hash, MGF1 uses the same hash.
    pss = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=algorithm.digest_size)
    ours = PssParameters(algorithm.name, algorithm.name, algorithm.digest_size)

    def suits(key: Any) -> bool:
        if alone:
            of_its_kind = isinstance(key, RsaPssKey) and key.parameters in (None, ours)
        else:
            of_its_kind = _is(key, rsa.RSAPrivateKey, rsa.RSAPublicKey)
        # The encoded message needs room for hash, salt and two bytes (RFC 8017 section 9.1.1).
        return of_its_kind and key.key_size >= 8 * (2 * algorithm.digest_size + 2)

    def bare(key: Any) -> Any:
        return key.key if alone else key

    return SignatureScheme(
        code=code,
        name=code.name.lower(),
        suits=suits,
        _sign=lambda key, content: bare(key).sign(content, pss, algorithm),
        _verify=lambda key, signature, content: bare(key).verify(
            signature, content, pss, algorithm
        ),
    )


def _plain(code: Code, private: type, public: type) -> SignatureScheme:
    """A scheme without parameters: Ed25519, and ML-DSA with an empty context."""
    return SignatureScheme(
        code=code,
        name=code.name.lower(),
        suits=lambda key: _is(key, private, public),
        _sign=lambda key, content: key.sign(content),
        _verify=lambda key, signature, content: key.verify(signature, content),
    )


ALL_SCHEMES: Final = (
    _plain(Code.MLDSA65, mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PublicKey),
    _plain(Code.MLDSA87, mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PublicKey),
    _plain(Code.MLDSA44, mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PublicKey),
    _ecdsa(Code.ECDSA_SECP256R1_SHA256, ec.SECP256R1, hashes.SHA256()),
    _ecdsa(Code.ECDSA_SECP384R1_SHA384, ec.SECP384R1, hashes.SHA384()),
    _ecdsa(Code.ECDSA_SECP521R1_SHA512, ec.SECP521R1, hashes.SHA512()),
    _plain(Code.ED25519, ed25519.Ed25519PrivateKey, ed25519.Ed25519PublicKey),
    _rsa_pss(Code.RSA_PSS_RSAE_SHA256, hashes.SHA256(), alone=False),
    _rsa_pss(Code.RSA_PSS_RSAE_SHA384, hashes.SHA384(), alone=False),
    _rsa_pss(Code.RSA_PSS_RSAE_SHA512, hashes.SHA512(), alone=False),
    _rsa_pss(Code.RSA_PSS_PSS_SHA256, hashes.SHA256(), alone=True),
    _rsa_pss(Code.RSA_PSS_PSS_SHA384, hashes.SHA384(), alone=True),
    _rsa_pss(Code.RSA_PSS_PSS_SHA512, hashes.SHA512(), alone=True),
)
"""All schemes for signing and verifying, in order of preference."""

CERTIFICATE_ONLY_SCHEMES: Final = (
    Code.RSA_PKCS1_SHA256,
    Code.RSA_PKCS1_SHA384,
    Code.RSA_PKCS1_SHA512,
)
"""Schemes that are allowed for certificates in the chain but not for CertificateVerify; they are
sent in ``signature_algorithms_cert``."""


def choose_scheme(
    private_key: Any, ours: Iterable[SignatureScheme], theirs: Iterable[int]
) -> SignatureScheme | None:
    """The first of our schemes that suits the key and that the peer accepts."""
    accepted = frozenset(theirs)
    for scheme in ours:
        if scheme.code in accepted and scheme.suits(private_key):
            return scheme
    return None
