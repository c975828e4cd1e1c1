"""The exceptions of a connection that failed: what programs written for asyncio's TLS catch."""

import errno
import ssl
from typing import Final

from hybridkex.errors import (
    AlertReceived,
    CertificateRejected,
    HandshakeTimeout,
    HybridkexError,
    LocalStateError,
    PeerError,
    TruncationError,
)


class SecureConnectionError(ConnectionError):
    """The connection failed. ``__cause__`` is the reason, an error of :mod:`hybridkex.errors`.

    It is raised as one of the subclasses, which are also instances of the class that asyncio's own
    TLS raises: code such as ``except ConnectionResetError`` or ``except ssl.SSLError`` keeps its
    meaning.
    """

    _errno: int

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = self._errno
        self.strerror = message

    def __str__(self) -> str:
        return str(self.args[0])


class SecureConnectionReset(SecureConnectionError, ConnectionResetError):
    """The peer ended the connection without close_notify."""

    _errno = errno.ECONNRESET


class SecureConnectionAborted(SecureConnectionError, ConnectionAbortedError):
    """This side ended the connection: it was aborted, or closed to make room for another."""

    _errno = errno.ECONNABORTED


class SecureConnectionTimeout(SecureConnectionAborted, TimeoutError):
    """This side ended the connection because the peer had not completed the handshake, or not
    taken all data, within the time limit."""


class SecureProtocolError(SecureConnectionError, ssl.SSLError):
    """The handshake failed, or a record was not authentic. ``reason`` is the name of the alert that
    was sent or received, in capitals."""

    _errno = ssl.SSL_ERROR_SSL
    library = "SSL"
    reason = "INTERNAL_ERROR"


class SecureCertificateError(SecureProtocolError, ssl.SSLCertVerificationError):
    """The peer's certificate was not accepted. ``verify_message`` says why."""

    reason = "CERTIFICATE_VERIFY_FAILED"
    verify_code = 1  # X509_V_ERR_UNSPECIFIED: OpenSSL's numbers do not fit

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.verify_message = message


_CLASSES: Final[tuple[tuple[type[HybridkexError], type[SecureConnectionError]], ...]] = (
    (TruncationError, SecureConnectionReset),
    (LocalStateError, SecureConnectionAborted),
    (HandshakeTimeout, SecureConnectionTimeout),
    (CertificateRejected, SecureCertificateError),
    (HybridkexError, SecureProtocolError),
)
"""What an error of the engine is raised as; the first that fits."""


def connection_error(
    cause: HybridkexError, kind: type[SecureConnectionError] | None = None
) -> SecureConnectionError:
    """The :exc:`SecureConnectionError` for an error of the engine; its class follows from ``cause``
    unless ``kind`` is given."""
    if kind is None:
        kind = next(kind for type_, kind in _CLASSES if isinstance(cause, type_))
    error = kind(str(cause))
    error.__cause__ = cause
    if type(error) is SecureProtocolError:
        if isinstance(cause, PeerError):
            error.reason = cause.alert.name
        elif isinstance(cause, AlertReceived):
            error.reason = cause.name.upper()
    return error
