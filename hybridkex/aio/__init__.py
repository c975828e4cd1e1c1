"""The asyncio shell: the engine as an asyncio transport.

:func:`open_connection` and :func:`start_server` work with streams, :func:`create_connection` and
:func:`create_server` with protocols, and :func:`start_tls` and :func:`upgrade` secure an open
connection. All of them take a :class:`~hybridkex.ClientConfig` or a
:class:`~hybridkex.ServerConfig` where asyncio takes an ``SSLContext``.
"""

from hybridkex.aio.connect import create_connection, create_server, start_tls
from hybridkex.aio.failures import (
    SecureCertificateError,
    SecureConnectionAborted,
    SecureConnectionError,
    SecureConnectionReset,
    SecureConnectionTimeout,
    SecureProtocolError,
)
from hybridkex.aio.streams import open_connection, start_server, upgrade
from hybridkex.aio.transport import SecureTransport

__all__ = [
    "SecureCertificateError",
    "SecureConnectionAborted",
    "SecureConnectionError",
    "SecureConnectionReset",
    "SecureConnectionTimeout",
    "SecureProtocolError",
    "SecureTransport",
    "create_connection",
    "create_server",
    "open_connection",
    "start_server",
    "start_tls",
    "upgrade",
]
