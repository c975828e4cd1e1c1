"""Parse failures of certificates, in the terms of RFC 5280.

`cryptography` describes a failure by its own data structures, and does not say which extension has
it.
"""

import re
from typing import Annotated, Final

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import ed25519

from hybridkex.crypto.pem import PemError

_MOST: Final = 64
"""The maximum number of extensions that are examined to find the malformed one; the peer decides
how many there are."""


class MalformedExtension(ValueError):
    """An extension does not parse; the cause says why."""

    def __init__(self, oid: str) -> None:
        super().__init__(oid)
        self.oid = oid


@asn1.sequence
class _Extension:
    """Extension (RFC 5280 section 4.1)."""

    oid: x509.ObjectIdentifier
    critical: Annotated[bool, asn1.Default(False)]
    value: bytes


@asn1.sequence
class TbsCertificate:
    """TBSCertificate (RFC 5280 section 4.1)."""

    version: Annotated[int | None, asn1.Explicit(0)]
    serial: int
    signature: asn1.TLV
    issuer: asn1.TLV
    validity: asn1.TLV
    subject: asn1.TLV
    key: asn1.TLV
    issuer_id: Annotated[asn1.BitString | None, asn1.Implicit(1)]
    subject_id: Annotated[asn1.BitString | None, asn1.Implicit(2)]
    extensions: Annotated[list[asn1.TLV] | None, asn1.Explicit(3)]


def parse_extensions(certificate: x509.Certificate) -> None:
    """Parse the extensions, which the library does only on access.

    Raises:
        MalformedExtension: one does not parse.
        x509.DuplicateExtension: one is there twice.
    """
    try:
        _ = certificate.extensions
    except x509.DuplicateExtension:
        raise
    except Exception as error:
        oid = _first_malformed(certificate)
        if oid is None:
            raise
        raise MalformedExtension(oid) from error


def _first_malformed(certificate: x509.Certificate) -> str | None:
    extensions = asn1.decode_der(TbsCertificate, certificate.tbs_certificate_bytes).extensions or []
    key = ed25519.Ed25519PrivateKey.generate()
    for one in extensions[:_MOST]:
        extension = one.parse(_Extension)
        # Also a certificate request with only this extension must parse.
        alone = (
            x509.CertificateSigningRequestBuilder(x509.Name([]))
            .add_extension(x509.UnrecognizedExtension(extension.oid, extension.value), False)
            .sign(key, None)
        )
        try:
            _ = alone.extensions
        except Exception:
            return str(extension.oid.dotted_string)
    return None


def extension_name(oid: str) -> str:
    """An extension's name in its RFC; its object identifier if it is unknown."""
    name = _EXTENSIONS.get(oid)
    return f"{name} ({oid})" if name is not None else f"extension {oid}"


_EXTENSIONS: Final = {
    "1.3.6.1.4.1.11129.2.4.2": "signedCertificateTimestampList",
    "1.3.6.1.4.1.11129.2.4.3": "the precertificate poison",
    "1.3.6.1.4.1.311.21.7": "certificateTemplate",
    "1.3.6.1.5.5.7.1.1": "authorityInfoAccess",
    "1.3.6.1.5.5.7.1.11": "subjectInfoAccess",
    "1.3.6.1.5.5.7.1.24": "TLS feature",
    "1.3.6.1.5.5.7.48.1.5": "id-pkix-ocsp-nocheck",
    "1.3.36.8.3.3": "admission",
    "2.16.840.1.113730.1.1": "netscape-cert-type",
    "2.5.29.9": "subjectDirectoryAttributes",
    "2.5.29.14": "subjectKeyIdentifier",
    "2.5.29.15": "keyUsage",
    "2.5.29.16": "privateKeyUsagePeriod",
    "2.5.29.17": "subjectAltName",
    "2.5.29.18": "issuerAltName",
    "2.5.29.19": "basicConstraints",
    "2.5.29.30": "nameConstraints",
    "2.5.29.31": "cRLDistributionPoints",
    "2.5.29.32": "certificatePolicies",
    "2.5.29.33": "policyMappings",
    "2.5.29.35": "authorityKeyIdentifier",
    "2.5.29.36": "policyConstraints",
    "2.5.29.37": "extendedKeyUsage",
    "2.5.29.46": "freshestCRL",
    "2.5.29.54": "inhibitAnyPolicy",
}


def parse_failure(error: BaseException) -> str:
    """Why `cryptography` could not read a certificate or a key, as a clause: *it has ...*."""
    if isinstance(error, PemError):
        return str(error)
    if isinstance(error, MalformedExtension):
        inside = parse_failure(error.__cause__ or error)
        return f"in {extension_name(error.oid)}, {inside}"
    if isinstance(error, x509.DuplicateExtension):
        return f"it has {extension_name(error.oid.dotted_string)} twice"
    if isinstance(error, x509.InvalidVersion):
        return f"it is of X.509 version {error.parsed_version + 1}; it needs version 3"
    text = str(error)
    if "ParseError" in text:
        kind = re.search(r"kind: (\w+)", text)
        why = _KINDS.get(kind[1], "") if kind else ""
        where: str = _place(text.partition("location: [")[2])
        inside = f"{where}: {why}" if where and why else where or why
        return (
            f"its DER encoding is malformed ({inside})"
            if inside
            else ("its DER encoding is malformed")
        )
    for pattern, said in _WORDS:
        if pattern.search(text):
            return said
    # Other messages of the library are kept only if they are plain words without Python values.
    return (
        text if re.fullmatch(r"[\w ,.;:()/*'-]+", text) and "_" not in text else "it is malformed"
    )


_KINDS: Final = {
    "EncodedDefault": "DER omits a field that has its default value",
    "ExtraData": "bytes follow its end",
    "InvalidLength": "a length is not in its shortest form",
    "InvalidSetOrdering": "a SET is not in DER's order",
    "InvalidSize": "a list is too short or too long",
    "InvalidTag": "a tag is malformed",
    "InvalidValue": "the type does not allow this value",
    "IntegerOverflow": "a number is too large",
    "ShortData": "it ends too early",
    "UnexpectedTag": "a field has the wrong type",
}

_WORDS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (
        re.compile(r"IPv4 or IPv6|Invalid IPNetwork|[Nn]etmask|host bits"),
        "an IP address or a range of addresses is malformed",
    ),
    (re.compile("x400Address"), "it has an x400Address or an ediPartyName, which is not supported"),
    (re.compile("path_length"), "it has a pathLenConstraint but is not a CA"),
    (re.compile("full_name"), "a distribution point has no name"),
    (re.compile("^year 0 "), "it has a date in the year 0, which does not exist"),
    (
        re.compile("Invalid SCT"),
        "its signedCertificateTimestampList (1.3.6.1.4.1.11129.2.4.2) has a form that is not read",
    ),
    (re.compile(r"^\d+$"), "it has an unknown value"),
    (re.compile("_subtrees"), "it has neither permittedSubtrees nor excludedSubtrees"),
)


def _place(location: str) -> str:
    """The fields that a location names, innermost first, as ASN.1 spells them."""
    fields: list[str] = []
    for text, number in re.findall(r'"(?:\w+::)?(\w+)"|(\d+)', location.partition("]")[0]):
        if number:
            if fields and fields[-1] == "rawExtensions":
                fields[-1] = f"extension {int(number) + 1}"
        else:
            fields.append(_SPELLED.get(text) or re.sub(r"_(\w)", lambda one: one[1].upper(), text))
    return " of ".join(reversed(fields[-2:]))


_SPELLED: Final = {
    "BmpString": "BMPString",
    "CpsUri": "cPSuri",
    "UtcTime": "UTCTime",
    "ca": "cA",
    "serial": "serialNumber",
    "signature_alg": "signatureAlgorithm",
    "tbs_cert": "tbsCertificate",
}
