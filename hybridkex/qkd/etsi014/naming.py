"""Which KME or SAE a certificate stands for.

ETSI GS QKD 014 demands that IDs are confirmed from certificates and leaves open how; all four ways
below are met in the field.
"""

from enum import Enum

from cryptography import x509
from cryptography.x509.oid import NameOID

__all__ = ["IdRule", "id_of_certificate"]


class IdRule(Enum):
    """The field of a certificate that is the ID of its holder."""

    COMMON_NAME = "cn"
    SAN_URI = "san-uri"
    DISTINGUISHED_NAME = "dn"
    SERIAL_NUMBER = "serial"


def id_of_certificate(der: bytes, rule: IdRule) -> str | None:
    """The ID in a certificate, or ``None`` where it has none or more than one.

    ``dn`` is the subject in the form of RFC 4514; ``serial`` is the certificate's serial number in
    lower-case hexadecimal. A serial number is unique within one CA only.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        match rule:
            case IdRule.COMMON_NAME:
                found = [
                    str(attribute.value)
                    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
                ]
            case IdRule.SAN_URI:
                extension = certificate.extensions.get_extension_for_class(
                    x509.SubjectAlternativeName
                )
                found = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
            case IdRule.DISTINGUISHED_NAME:
                found = [certificate.subject.rfc4514_string()]
            case IdRule.SERIAL_NUMBER:
                found = [f"{certificate.serial_number:x}"]
    except (
        ValueError,
        x509.DuplicateExtension,
        x509.ExtensionNotFound,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ):
        return None
    return found[0] if len(found) == 1 and found[0] else None
