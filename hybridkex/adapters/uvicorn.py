"""``uvicorn`` over hybridkex: its own server, workers, reload and all::

    uvicorn.run(app, port=8443, http=secure_http(config))

uvicorn makes one object of its ``http`` class for each connection. Here that object is a secure
transport, which holds uvicorn's own protocol.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hybridkex.aio.transport import DEFAULT_HANDSHAKE_TIMEOUT, SecureTransport
from hybridkex.tls.config import ServerConfig, check_config

__all__ = ["secure_http"]


def secure_http(
    config: ServerConfig,
    *,
    protocol: Callable[..., asyncio.Protocol] = AutoHTTPProtocol,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
) -> Any:
    """What goes into ``uvicorn.run(http=...)`` or ``uvicorn.Config(http=...)``.

    Args:
        config: what the server offers and demands. uvicorn speaks HTTP/1.1: leave ``alpn`` empty,
            or give ``("http/1.1",)``.
        protocol: uvicorn's protocol for what has been decrypted.
        handshake_timeout: seconds for a handshake.

    Raises:
        ConfigError: ``config`` is not a ``ServerConfig``.
    """
    check_config(config, ServerConfig)

    def connection(**arguments: Any) -> asyncio.BaseProtocol:
        return SecureTransport(
            protocol(**arguments), config, handshake_timeout=handshake_timeout
        ).receiver

    return connection
