"""Certificates from bytes: the one place that parses them, and knows what that may raise.

`cryptography` warns of odd certificates (a serial number of 0, a NULL in an algorithm identifier)
with the line of our source that parsed them. Whoever sends a certificate would choose when; these
warnings are switched off for this module.
"""

import re
import warnings
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

__all__ = ["UNREADABLE", "certificate_from_der", "certificates_from_pem", "pem_blocks"]

warnings.filterwarnings("ignore", module=re.escape(__name__))

UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for bytes that are no certificate, at once or when it is used."""

_BLOCK: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def certificate_from_der(data: bytes) -> x509.Certificate:
    """One certificate, with the parts parsed that the library leaves for later.

    Raises:
        UNREADABLE: the bytes are no certificate, or one of its extensions does not parse.
    """
    certificate = x509.load_der_x509_certificate(data)
    _ = (certificate.subject, certificate.issuer, certificate.extensions, certificate.serial_number)
    return certificate


def certificates_from_pem(data: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM file, in its order.

    Raises:
        UNREADABLE: there is none, or one does not parse.
    """
    return x509.load_pem_x509_certificates(data)


def pem_blocks(data: bytes) -> list[bytes]:
    """The certificates of a PEM file, each for itself and not parsed yet."""
    return _BLOCK.findall(data)
