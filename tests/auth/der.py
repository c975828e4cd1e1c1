"""Certificates of which every byte can be chosen: a small writer of DER (X.690), for tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

NOW = datetime(2030, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def tlv(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + body


def seq(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def integer(value: int) -> bytes:
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    body = bytearray()
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        body += bytes(reversed(groups))
    return tlv(0x06, bytes(body))


NULL = b"\5\0"
UTF8, PRINTABLE, T61, IA5, BMP, UNIVERSAL = 0x0C, 0x13, 0x14, 0x16, 0x1E, 0x1C
CODECS = {UTF8: "utf-8", T61: "latin-1", BMP: "utf-16-be", UNIVERSAL: "utf-32-be"}
COMMON_NAME, ORGANIZATION, COUNTRY = "2.5.4.3", "2.5.4.10", "2.5.4.6"


def name(*attributes: tuple[str, int, str] | str) -> bytes:
    """A distinguished name: common names as UTF8String, or attributes with their string type."""
    sets = []
    for one in attributes:
        kind, tag, text = (COMMON_NAME, UTF8, one) if isinstance(one, str) else one
        sets.append(tlv(0x31, seq(oid(kind), tlv(tag, text.encode(CODECS.get(tag, "latin-1"))))))
    return seq(*sets)


def utc_time(text: str) -> bytes:
    return tlv(0x17, text.encode())


def generalized_time(text: str) -> bytes:
    return tlv(0x18, text.encode())


def time(moment: datetime) -> bytes:
    """RFC 5280 section 4.1.2.5: UTCTime until 2049."""
    if moment.year < 2050:
        return utc_time(f"{moment:%y%m%d%H%M%SZ}")
    return generalized_time(f"{moment:%Y%m%d%H%M%SZ}")


def extension(kind: str, value: bytes, critical: bool = False) -> bytes:
    return seq(oid(kind), b"\1\1\xff" if critical else b"", tlv(0x04, value))


def ext(value: x509.ExtensionType, critical: bool = False) -> bytes:
    return extension(value.oid.dotted_string, value.public_bytes(), critical)


def pss(digest: str, salt: int | None) -> tuple[bytes, Any]:
    """AlgorithmIdentifier and padding; ``None`` leaves the salt's length at its default of 20."""
    oids = {"sha256": "2.16.840.1.101.3.4.2.1", "sha1": "1.3.14.3.2.26"}
    hasher = seq(oid(oids[digest]), NULL)
    parts = (
        []
        if digest == "sha1"
        else [
            tlv(0xA0, hasher),
            tlv(0xA1, seq(oid("1.2.840.113549.1.1.8"), hasher)),
        ]
    )
    if salt is not None:
        parts.append(tlv(0xA2, integer(salt)))
    algorithm = hashes.SHA1() if digest == "sha1" else hashes.SHA256()
    used = padding.PSS(padding.MGF1(algorithm), 20 if salt is None else salt)
    return seq(oid("1.2.840.113549.1.1.10"), seq(*parts)), used


@cache
def key(kind: str) -> Any:
    """One key of each kind for the whole run."""
    kind = kind.partition("/")[0]
    if kind.startswith("rsa"):
        bits, _, exponent = kind[3:].partition("e")
        return rsa.generate_private_key(int(exponent or 65537), int(bits))
    curves: dict[str, ec.EllipticCurve] = {
        "p256": ec.SECP256R1(),
        "p384": ec.SECP384R1(),
        "p521": ec.SECP521R1(),
        "k256": ec.SECP256K1(),
    }
    if kind in curves:
        return ec.generate_private_key(curves[kind])
    return {"ed25519": ed25519.Ed25519PrivateKey, "ed448": ed448.Ed448PrivateKey}[kind].generate()


@cache
def named_key(kind: str, number: str) -> Any:
    """Several keys of one kind."""
    return key.__wrapped__(kind) if number else key(kind)


def spki(private: Any) -> bytes:
    data: bytes = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data


def key_id(public: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public)
    return digest.finalize()[:20]


_DEFAULT = object()


@dataclass(frozen=True, kw_only=True)
class Cert:
    """What a certificate shall be; :meth:`der` makes it."""

    subject: bytes
    issuer: bytes
    public: bytes
    signer: Any
    algorithm: bytes | None = None
    padding: Any = None
    digest: hashes.HashAlgorithm = field(default_factory=hashes.SHA256)
    inner_algorithm: bytes | None = None
    version: int | None = 2
    serial: bytes = integer(0x1234_5678_9ABC)
    not_before: bytes = time(NOW - DAY)
    not_after: bytes = time(NOW + DAY)
    extensions: Sequence[bytes] | None = ()
    unique_ids: bytes = b""

    def der(self) -> bytes:
        algorithm = self.algorithm or self._algorithm()
        body = seq(
            b"" if self.version is None else tlv(0xA0, integer(self.version)),
            self.serial,
            self.inner_algorithm or algorithm,
            self.issuer,
            seq(self.not_before, self.not_after),
            self.subject,
            self.public,
            self.unique_ids,
            b"" if self.extensions is None else tlv(0xA3, seq(*self.extensions)),
        )
        return seq(body, algorithm, tlv(0x03, b"\0", self._sign(body)))

    def _algorithm(self) -> bytes:
        signer, size = self.signer, self.digest.name
        if isinstance(signer, ed25519.Ed25519PrivateKey):
            return seq(oid("1.3.101.112"))
        if isinstance(signer, ed448.Ed448PrivateKey):
            return seq(oid("1.3.101.113"))
        if isinstance(signer, ec.EllipticCurvePrivateKey):
            kinds = {"sha1": "1", "sha256": "3.2", "sha384": "3.3", "sha512": "3.4"}
            return seq(oid(f"1.2.840.10045.4.{kinds[size]}"))
        kinds = {"sha1": "5", "sha256": "11", "sha384": "12", "sha512": "13"}
        return seq(oid(f"1.2.840.113549.1.1.{kinds[size]}"), NULL)

    def _sign(self, body: bytes) -> bytes:
        signer = self.signer
        if isinstance(signer, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
            return signer.sign(body)
        if isinstance(signer, ec.EllipticCurvePrivateKey):
            return signer.sign(body, ec.ECDSA(self.digest))
        signature: bytes = signer.sign(body, self.padding or padding.PKCS1v15(), self.digest)
        return signature

    def but(self, **changes: Any) -> "Cert":
        return replace(self, **changes)
