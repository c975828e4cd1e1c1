"""Signatures of liboqs that `cryptography` lacks, for raw public keys (RFC 7250).

liboqs is needed only to generate a key, to sign and to verify. Code points are those of
draft-reddy-tls-slhdsa for SLH-DSA and, like the object identifiers of algorithms without an
assigned one, oqs-provider's defaults (private use, RFC 9846 section 4.3.3), so that OpenSSL with it
can be the peer. The context string, where an algorithm takes one, is empty.
"""

import base64
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hybridkex.crypto import oqs
from hybridkex.crypto.signatures import SignatureScheme
from hybridkex.errors import ConfigError, LocalStateError
from hybridkex.secret import Secret


def _series(names: str, code: int, oid: str, start: int, *, step: int = 1) -> dict[str, Any]:
    """Algorithms whose code points and identifiers follow each other; ``{}`` in ``oid`` counts."""
    return {
        name: (code + step * place, oid.format(start + place))
        for place, name in enumerate(names.split())
    }


ALGORITHMS: Final[dict[str, tuple[int, str]]] = {
    **_series(
        "SLH_DSA_PURE_SHA2_128S SLH_DSA_PURE_SHA2_128F SLH_DSA_PURE_SHA2_192S "
        "SLH_DSA_PURE_SHA2_192F SLH_DSA_PURE_SHA2_256S SLH_DSA_PURE_SHA2_256F "
        "SLH_DSA_PURE_SHAKE_128S SLH_DSA_PURE_SHAKE_128F SLH_DSA_PURE_SHAKE_192S "
        "SLH_DSA_PURE_SHAKE_192F SLH_DSA_PURE_SHAKE_256S SLH_DSA_PURE_SHAKE_256F",
        0x0911,
        "2.16.840.1.101.3.4.3.{}",
        20,
    ),
    "Falcon-512": (0xFED7, "1.3.9999.3.11"),
    "Falcon-1024": (0xFEDA, "1.3.9999.3.14"),
    "Falcon-padded-512": (0xFEDC, "1.3.9999.3.16"),
    "Falcon-padded-1024": (0xFEDF, "1.3.9999.3.19"),
    **_series(
        "OV-Is OV-Ip OV-III OV-V OV-Is-pkc OV-Ip-pkc OV-III-pkc OV-V-pkc "
        "OV-Is-pkc-skc OV-Ip-pkc-skc OV-III-pkc-skc OV-V-pkc-skc",
        0xFF0A,
        "1.3.9999.9.{}.1",
        1,
    ),
    "MAYO-1": (0xFF32, "1.3.9999.8.1.3"),
    "MAYO-2": (0xFF33, "1.3.9999.8.2.3"),
    "MAYO-3": (0xFF34, "1.3.9999.8.3.3"),
    "MAYO-5": (0xFF35, "1.3.9999.8.5.3"),
    **_series(
        "SNOVA_24_5_4 SNOVA_24_5_4_SHAKE SNOVA_24_5_4_esk SNOVA_24_5_4_SHAKE_esk SNOVA_37_17_2 "
        "SNOVA_25_8_3 SNOVA_56_25_2 SNOVA_49_11_3 SNOVA_37_8_4 SNOVA_24_5_5 SNOVA_60_10_4",
        0xFF3A,
        "1.3.9999.10.{}.1",
        1,
        step=2,
    ),
    "SNOVA_29_6_5": (0xFF51, "1.3.9999.10.12.1"),
    **_series(
        "cross-rsdp-128-balanced cross-rsdp-128-fast cross-rsdp-128-small "
        "cross-rsdp-192-balanced cross-rsdp-192-fast cross-rsdp-192-small",
        0xFF53,
        "1.3.6.1.4.1.62245.2.1.{}.2.2",
        1,
    ),
    **_series(
        "cross-rsdp-256-small cross-rsdpg-128-balanced cross-rsdpg-128-fast "
        "cross-rsdpg-128-small cross-rsdpg-192-balanced cross-rsdpg-192-fast "
        "cross-rsdpg-192-small cross-rsdpg-256-balanced cross-rsdpg-256-fast "
        "cross-rsdpg-256-small",
        0xFF59,
        "1.3.6.1.4.1.62245.2.1.{}.2.2",
        9,
    ),
    **{
        f"mqom2_{category}_gf16_{variant}": (
            first + 2 * place,
            f"1.3.9999.11.{arc}.{1 + 2 * place}",
        )
        for category, arc, first in (("cat1", 1, 0xFF63), ("cat3", 3, 0xFF6B), ("cat5", 5, 0xFF73))
        for place, variant in enumerate(("fast_r5", "fast_r3", "short_r5", "short_r3"))
    },
}
"""Code point and object identifier by liboqs's names.

Not here: pre-hashed SLH-DSA, which has no code points in TLS, and cross-rsdp-256-balanced and
-fast, which oqs-provider leaves out as well: signatures of 53,527 and 74,590 bytes."""

_BY_OID: Final = {oid: name for name, (_, oid) in ALGORITHMS.items()}


@asn1.sequence
class _AlgorithmIdentifier:
    """RFC 5280 section 4.1.1.2, without parameters."""

    algorithm: x509.ObjectIdentifier


@asn1.sequence
class _SubjectPublicKeyInfo:
    """RFC 5280 section 4.1.2.7."""

    algorithm: _AlgorithmIdentifier
    key: asn1.BitString


@asn1.sequence
class _OneAsymmetricKey:
    """RFC 5958 section 2, version 2: with the public key."""

    version: int
    algorithm: _AlgorithmIdentifier
    private: bytes
    public: Annotated[asn1.BitString, asn1.Implicit(1)]


_PEM_BEGIN: Final = b"-----BEGIN PRIVATE KEY-----"
_PEM_END: Final = b"-----END PRIVATE KEY-----"


@dataclass(frozen=True)
class OqsPublicKey:
    """A public key of one of :data:`ALGORITHMS`."""

    algorithm: str
    key: bytes = field(repr=False)

    @classmethod
    def from_spki(cls, spki: bytes) -> "OqsPublicKey | None":
        """Read a SubjectPublicKeyInfo; ``None`` if its algorithm is not one of these.

        Its length is checked when a signature is verified.
        """
        try:
            info = asn1.decode_der(_SubjectPublicKeyInfo, spki)
        except ValueError:
            return None
        algorithm = _BY_OID.get(info.algorithm.algorithm.dotted_string)
        return None if algorithm is None else cls(algorithm, info.key.as_bytes())

    def public_bytes(self, encoding: Encoding, format: PublicFormat) -> bytes:
        """The SubjectPublicKeyInfo in DER, the only form there is."""
        if (encoding, format) != (Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
            raise ConfigError("a key of liboqs is written as SubjectPublicKeyInfo in DER")
        identifier = x509.ObjectIdentifier(ALGORITHMS[self.algorithm][1])
        return asn1.encode_der(
            _SubjectPublicKeyInfo(
                algorithm=_AlgorithmIdentifier(algorithm=identifier),
                key=asn1.BitString(self.key, 0),
            )
        )

    def verify(self, signature: bytes, content: bytes) -> None:
        """Return if the signature is good; raise ``InvalidSignature`` if it is not."""
        with _algorithm(self.algorithm)(self.algorithm) as one:
            lengths_fit = len(self.key) == one.details["length_public_key"] and (
                0 < len(signature) <= one.details["length_signature"]
            )
            if not (lengths_fit and one.verify(content, signature, self.key)):
                raise InvalidSignature


@dataclass(frozen=True)
class OqsPrivateKey:
    """A private key of one of :data:`ALGORITHMS`, with its public key."""

    public: OqsPublicKey
    private: Secret = field(repr=False)

    @classmethod
    def generate(cls, algorithm: str) -> "OqsPrivateKey":
        """Generate a new key pair.

        Raises:
            ProviderMissing: liboqs is not installed.
            ConfigError: the algorithm is unknown to us or to this liboqs.
        """
        with _algorithm(algorithm)(algorithm) as one:
            public = one.generate_keypair()
            return cls(OqsPublicKey(algorithm, public), Secret(one.export_secret_key()))

    @classmethod
    def from_pem(cls, pem: bytes) -> "OqsPrivateKey | None":
        """The key that :meth:`to_pem` wrote; ``None`` for any other content.

        Raises:
            ProviderMissing: liboqs is not installed.
            ConfigError: the algorithm is unknown to this liboqs, or a key of it has another length.
        """
        _, begin, rest = pem.partition(_PEM_BEGIN)
        body, end, _ = rest.partition(_PEM_END)
        if not (begin and end):
            return None
        try:
            info = asn1.decode_der(_OneAsymmetricKey, base64.b64decode(body))
        except ValueError:
            return None
        algorithm = _BY_OID.get(info.algorithm.algorithm.dotted_string)
        if algorithm is None:
            return None
        public, private = info.public.as_bytes(), info.private
        with _algorithm(algorithm)(algorithm) as one:
            expected = one.details["length_public_key"], one.details["length_secret_key"]
        if (len(public), len(private)) != expected:
            # The wrapper would pad a short key with zeros.
            raise ConfigError(f"the keys of {algorithm} have other lengths than these")
        return cls(OqsPublicKey(algorithm, public), Secret(private))

    def to_pem(self) -> bytes:
        """The key in PEM, unencrypted: OneAsymmetricKey of RFC 5958 with liboqs's own bytes."""
        identifier = x509.ObjectIdentifier(ALGORITHMS[self.public.algorithm][1])
        der = asn1.encode_der(
            _OneAsymmetricKey(
                version=1,
                algorithm=_AlgorithmIdentifier(algorithm=identifier),
                private=self.private.reveal(),
                public=asn1.BitString(self.public.key, 0),
            )
        )
        text = base64.b64encode(der)
        lines = [text[start : start + 64] for start in range(0, len(text), 64)]
        return b"\n".join([_PEM_BEGIN, *lines, _PEM_END, b""])

    def public_key(self) -> OqsPublicKey:
        """The public half."""
        return self.public

    def sign(self, content: bytes) -> bytes:
        """The signature over ``content``.

        Raises:
            LocalStateError: liboqs cannot sign with this key.
        """
        name = self.public.algorithm
        with _algorithm(name)(name, secret_key=self.private.reveal()) as one:
            try:
                signature: bytes = one.sign(content)
            except RuntimeError:
                raise LocalStateError(f"liboqs cannot sign with our key of {name}") from None
            return signature


@cache
def _algorithm(name: str) -> Any:
    """liboqs's class, after a check that it supports this algorithm."""
    module = oqs.load()
    if name not in ALGORITHMS or name not in module.get_enabled_sig_mechanisms():
        known = [one for one in module.get_enabled_sig_mechanisms() if one in ALGORITHMS]
        raise ConfigError(f"no signature algorithm {name!r} in this liboqs; known are {known}")
    return module.Signature


_MAX_SIGNATURE: Final = 0xFFFF
"""The maximum length of a signature in CertificateVerify, in bytes (RFC 9846 section 4.5.2)."""


def oqs_scheme(name: str) -> SignatureScheme:
    """A signature algorithm of liboqs for ``signature_schemes`` of a configuration.

    Raises:
        ProviderMissing: liboqs is not installed.
        ConfigError: an unknown algorithm, or one whose signatures CertificateVerify cannot hold.
    """
    with _algorithm(name)(name) as one:
        length = one.details["length_signature"]
    if length > _MAX_SIGNATURE:
        raise ConfigError(
            f"{name} has signatures of {length} bytes, and CertificateVerify holds at most "
            f"{_MAX_SIGNATURE}"
        )

    def suits(key: object) -> bool:
        public = key.public if isinstance(key, OqsPrivateKey) else key
        return isinstance(public, OqsPublicKey) and public.algorithm == name

    return SignatureScheme(
        code=ALGORITHMS[name][0],
        name=name,
        suits=suits,
        _sign=lambda key, content: key.sign(content),
        _verify=lambda key, signature, content: key.verify(signature, content),
    )
