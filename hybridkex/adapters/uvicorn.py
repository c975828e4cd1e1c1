"""``uvicorn`` over hybridkex; uvicorn's server, workers and reload work as usual::

    uvicorn.run(app, port=8443, http=secure_http(config))

uvicorn makes one object of its ``http`` class for each connection. With :func:`secure_http` that
object is the receiver of a secure transport, which passes the decrypted data to uvicorn's protocol.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hybridkex.aio.transport import SecureTransport, time_limits
from hybridkex.tls.config import ServerConfig, check_config

__all__ = ["secure_http"]


def secure_http(
    config: ServerConfig,
    *,
    protocol: Callable[..., asyncio.Protocol] = AutoHTTPProtocol,
    ssl_handshake_timeout: float | None = None,
) -> Any:
    """Make the value for ``uvicorn.run(http=...)`` or ``uvicorn.Config(http=...)``.

    Args:
        config: the configuration of the server. uvicorn speaks HTTP/1.1: leave ``alpn`` empty or
            set it to ``("http/1.1",)``.
        protocol: uvicorn's protocol class for the decrypted data.
        ssl_handshake_timeout: seconds for a handshake; ``None`` for 10.

    Raises:
        ConfigError: ``config`` is not a ``ServerConfig``.
        ValueError: the time limit is not positive.
    """
    check_config(config, ServerConfig)
    time_limits(ssl_handshake_timeout, None)

    def connection(**arguments: Any) -> asyncio.BaseProtocol:
        return SecureTransport(
            protocol(**arguments), config, ssl_handshake_timeout=ssl_handshake_timeout
        ).receiver

    return connection
