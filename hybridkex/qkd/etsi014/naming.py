"""Which KME or SAE a certificate identifies.

ETSI GS QKD 014 requires that IDs are confirmed from certificates but not how; all four rules below
are in use.
"""

from enum import Enum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hybridkex.crypto.x509_parsing import UNREADABLE, certificate_from_der, certificates_from_pem
from hybridkex.errors import ConfigError
from hybridkex.files import read_file
from hybridkex.text import printable


class IdRule(Enum):
    """The field of a certificate that is the ID of its holder."""

    COMMON_NAME = "cn"
    SAN_URI = "san-uri"
    DISTINGUISHED_NAME = "dn"
    SERIAL_NUMBER = "serial"


def own_certificate(path: Path) -> x509.Certificate | None:
    """The certificate of a KME or an SAE from its own file; ``None`` if the file cannot be read or
    parsed, or is a pipe: TLS refuses the former, and has emptied the latter."""
    try:
        return certificates_from_pem(read_file(path, pipe=False))[0]
    except (ConfigError, *UNREADABLE):
        return None


def problem_of_name(
    path: Path, certificate: x509.Certificate, kme_id: str, rule: IdRule
) -> str | None:
    """The reason for which others will refuse the ID of a KME's own certificate, if any.

    ``path`` is where the certificate comes from.
    """
    found = id_of_certificate(certificate.public_bytes(Encoding.DER), rule)
    if found == kme_id:
        return None
    return (
        f"our own certificate {path} names {found or 'no ID'} by the rule {rule.value}, not "
        "us: SAEs and KMEs that confirm our ID (ETSI GS QKD 014, clause 5.1) refuse us. Use a "
        "certificate for this id, or change id or id_rule"
    )


def id_of_certificate(der: bytes, rule: IdRule) -> str | None:
    """The ID in a certificate, or ``None`` if it has none, several, or one with unprintable
    characters.

    ``dn`` is the subject in the form of RFC 4514; ``serial`` is the certificate's serial number in
    lower-case hexadecimal. A serial number is unique within one CA only.
    """
    try:
        certificate = certificate_from_der(der)
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
    except (*UNREADABLE, x509.ExtensionNotFound):
        return None
    if len(found) != 1 or not found[0] or printable(found[0]) != found[0]:
        return None
    return found[0]
