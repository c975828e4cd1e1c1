"""The query methods of the ssl module's connections, answered from a session, and its exceptions.

The results have the form of :meth:`ssl.SSLSocket.getpeercert` and the other query methods.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509

from hybridkex.auth import PeerCertificate
from hybridkex.errors import (
    AlertReceived,
    CertificateRejected,
    HandshakeTimeout,
    KeySourceError,
    PeerError,
)
from hybridkex.tls.session import Session

_BITS: Final = {
    "TLS_AES_128_GCM_SHA256": 128,
    "TLS_AES_256_GCM_SHA384": 256,
    "TLS_CHACHA20_POLY1305_SHA256": 256,
}
_SSL_ERROR_SSL: Final = 1
_X509_V_ERR_UNSPECIFIED: Final = 1
_NAMES: Final = {
    "CN": "commonName",
    "O": "organizationName",
    "OU": "organizationalUnitName",
    "C": "countryName",
    "ST": "stateOrProvinceName",
    "L": "localityName",
    "DC": "domainComponent",
    "UID": "userId",
    "STREET": "streetAddress",
}

Name = tuple[tuple[tuple[str, str], ...], ...]


def is_ssl_error(cause: BaseException) -> bool:
    """Whether the ``ssl`` module has an exception for an error of the engine: ``SSLError``, and
    ``SSLCertVerificationError`` for ``CertificateRejected``. It has none for a connection that
    ended or that this side ended."""
    return isinstance(cause, PeerError | AlertReceived | KeySourceError) and not isinstance(
        cause, HandshakeTimeout
    )


def describe(error: Any, cause: BaseException) -> None:
    """Set the attributes that programs read from an ``ssl.SSLError``."""
    error.errno, error.strerror = _SSL_ERROR_SSL, str(cause)
    error.library, error.reason = "SSL", "INTERNAL_ERROR"
    if isinstance(cause, CertificateRejected):
        error.reason = "CERTIFICATE_VERIFY_FAILED"
        error.verify_message = str(cause)
        error.verify_code = _X509_V_ERR_UNSPECIFIED
    elif isinstance(cause, PeerError):
        error.reason = cause.alert.name
    elif isinstance(cause, AlertReceived):
        error.reason = cause.name.upper()


@dataclass(frozen=True)
class SslObject:
    """A read-only stand-in for ``ssl.SSLObject``."""

    session: Session
    server_side: bool

    @property
    def server_hostname(self) -> str | None:
        """The server name that the client requested."""
        return self.session.server_name

    def version(self) -> str:
        """``TLSv1.3``."""
        return "TLSv1.3"

    def cipher(self) -> tuple[str, str, int]:
        """Name of the cipher suite, protocol, and bits of the key."""
        return cipher_of(self.session)

    def compression(self) -> None:
        """TLS 1.3 has none."""

    def getpeercert(self, binary_form: bool = False) -> dict[str, Any] | bytes | None:
        """The peer's certificate; see :meth:`ssl.SSLSocket.getpeercert`."""
        if not binary_form:
            return peercert_of(self.session)
        shown = self.session.peer_credential
        return shown.chain[0] if isinstance(shown, PeerCertificate) else None

    def selected_alpn_protocol(self) -> str | None:
        return self.session.alpn


def cipher_of(session: Session) -> tuple[str, str, int]:
    """Name of the cipher suite, protocol, and bits of the key."""
    return session.cipher_suite, "TLSv1.3", _BITS[session.cipher_suite]


def peercert_of(session: Session) -> dict[str, Any] | None:
    """The peer's certificate in the form of :meth:`ssl.SSLSocket.getpeercert`.

    ``None`` without a certificate; an empty dictionary if it was not verified.
    """
    shown = session.peer_credential
    if not isinstance(shown, PeerCertificate):
        return None
    if session.verified_by == "insecure":
        return {}
    certificate = x509.load_der_x509_certificate(shown.chain[0])
    found: dict[str, Any] = {
        "subject": _name(certificate.subject),
        "issuer": _name(certificate.issuer),
        "version": certificate.version.value + 1,
        "serialNumber": serial_number(certificate.serial_number),
        "notBefore": _time(certificate.not_valid_before_utc),
        "notAfter": _time(certificate.not_valid_after_utc),
    }
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return found
    found["subjectAltName"] = tuple(filter(None, map(_alternative, names)))
    return found


def serial_number(number: int) -> str:
    """Format a number in hexadecimal, in whole bytes, as the ssl module does."""
    digits = f"{number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def _name(name: x509.Name) -> Name:
    return tuple(
        tuple(
            (
                _NAMES.get(one.rfc4514_attribute_name, one.oid.dotted_string),
                one.value if isinstance(one.value, str) else one.value.hex(),
            )
            for one in relative
        )
        for relative in name.rdns
    )


def _alternative(name: x509.GeneralName) -> tuple[str, str] | None:
    if isinstance(name, x509.DNSName):
        return "DNS", name.value
    if isinstance(name, x509.IPAddress):
        return "IP Address", str(name.value)
    if isinstance(name, x509.UniformResourceIdentifier):
        return "URI", name.value
    if isinstance(name, x509.RFC822Name):
        return "email", name.value
    return None


def _time(moment: datetime) -> str:
    utc = moment.astimezone(UTC)
    return f"{utc:%b} {utc.day:2d} {utc:%H:%M:%S %Y} GMT"
