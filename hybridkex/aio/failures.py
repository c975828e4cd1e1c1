"""The exceptions of a connection that failed: what programs written for asyncio's TLS catch."""

import errno
import ssl
from typing import Final

from hybridkex.errors import (
    CertificateRejected,
    HandshakeTimeout,
    HybridkexError,
    LocalStateError,
    TruncationError,
)
from hybridkex.shell.ssl_facade import describe


class SecureConnectionError(ConnectionError):
    """The connection failed. ``__cause__`` is the reason, an error of :mod:`hybridkex.errors`.

    It is raised as one of the subclasses, which are also instances of the class that asyncio's own
    TLS raises: code such as ``except ConnectionResetError`` or ``except ssl.SSLError`` keeps its
    meaning.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class SecureConnectionReset(SecureConnectionError, ConnectionResetError):
    """The peer ended the connection without close_notify."""


class SecureConnectionAborted(SecureConnectionError, ConnectionAbortedError):
    """This side ended the connection: it was aborted, or closed to make room for another."""


class SecureConnectionTimeout(SecureConnectionAborted, TimeoutError):
    """This side ended the connection because the peer had not completed the handshake, or not
    taken all data, within the time limit."""


class SecureProtocolError(SecureConnectionError, ssl.SSLError):
    """The handshake failed, or a record was not authentic. ``reason`` is the name of the alert that
    was sent or received, in capitals."""


class SecureCertificateError(SecureProtocolError, ssl.SSLCertVerificationError):
    """The peer's certificate was not accepted. ``verify_message`` says why."""


_ENDED: Final[tuple[tuple[type[HybridkexError], type[SecureConnectionError], int], ...]] = (
    (TruncationError, SecureConnectionReset, errno.ECONNRESET),
    (LocalStateError, SecureConnectionAborted, errno.ECONNABORTED),
    (HandshakeTimeout, SecureConnectionTimeout, errno.ECONNABORTED),
)
"""The class of errors that have no counterpart in the ``ssl`` module."""


def connection_error(cause: HybridkexError) -> SecureConnectionError:
    """The :exc:`SecureConnectionError` for an error of the engine.

    The traceback of ``cause`` is removed: it leads to frames of the engine, so that the keys in
    them would live as long as the error, and tools that report errors with local variables would
    report them.
    """
    error: SecureConnectionError
    message = str(cause)
    for kind, raised, number in _ENDED:
        if isinstance(cause, kind):
            error = raised(message)
            error.errno, error.strerror = number, message
            break
    else:
        refused = isinstance(cause, CertificateRejected)
        error = (SecureCertificateError if refused else SecureProtocolError)(message)
        describe(error, cause)
    error.__cause__ = cause.with_traceback(None)
    return error
