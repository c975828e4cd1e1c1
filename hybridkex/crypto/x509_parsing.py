"""Parsing of certificates, and the exceptions that it may raise.

`cryptography` warns about unusual certificates (a serial number of 0, a long common name). A peer
could trigger such warnings at will, so they are disabled for the modules of this package.
"""

import re
import warnings
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.utils import CryptographyDeprecationWarning

from hybridkex.crypto.pem import CERTIFICATES, PemError, contents_of, pem_blocks
from hybridkex.crypto.x509_failure import parse_extensions, parse_failure

warnings.filterwarnings("ignore", category=CryptographyDeprecationWarning, module=r"hybridkex\.")
warnings.filterwarnings("ignore", "Attribute's length must be", module=r"hybridkex\.")

UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""The exceptions that `cryptography` raises for a malformed certificate, at once or on use."""

_BLOCK: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def certificate_from_der(data: bytes, *, whole: bool = True) -> x509.Certificate:
    """One certificate.

    Args:
        data: DER.
        whole: whether to parse also the parts that the library parses lazily, such as the
            extensions.

    Raises:
        UNREADABLE: the bytes are not a certificate, or one of its extensions does not parse.
    """
    certificate = x509.load_der_x509_certificate(data)
    if whole:
        _ = certificate.subject, certificate.issuer, certificate.serial_number
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        parse_extensions(certificate)
    return certificate


def certificates_from_pem(data: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM file, in its order; blocks of other kinds are skipped.

    Raises:
        UNREADABLE: the file has no certificate, one does not parse, one carries trust settings of
            OpenSSL, or the file is truncated. No certificate is skipped.
    """
    blocks = pem_blocks(data)
    certificates = [block for block in blocks if block.label in CERTIFICATES]
    if not certificates or any("TRUSTED" in block.label for block in blocks):
        raise PemError(f"it is {contents_of(data)}")
    # A program that turns warnings into errors must still be able to read its trust store.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            _certificate(block.der(), f"certificate {place} of {len(certificates)}")
            for place, block in enumerate(certificates, 1)
        ]


def _certificate(der: bytes, name: str) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except UNREADABLE as error:
        raise PemError(f"{name} in it does not parse: {parse_failure(error)}") from None


def pem_certificates(data: bytes) -> list[bytes]:
    """The certificates of a PEM file, unparsed."""
    return _BLOCK.findall(data)
