"""``uvicorn`` over hybridkex, with uvicorn's own server::

    uvicorn.run(app, port=8443, http=secure_http(config))

With ``workers`` or ``reload``, uvicorn runs the application in other processes, which import it by
name. Private keys are not passed between processes, so give ``http`` by name, too. With
``http = secure_http(config)`` in the module ``service``::

    uvicorn.run("service:app", port=8443, http="service:http", workers=4)

uvicorn makes one object of its ``http`` class for each connection. With :func:`secure_http` that
object is the receiver of a secure transport, which passes the decrypted data to uvicorn's protocol.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, NoReturn

from hybridkex.aio.places import Places
from hybridkex.aio.transport import SecureTransport, time_limits
from hybridkex.errors import ConfigError
from hybridkex.extras import needs
from hybridkex.tls.config import ServerConfig, check_config

with needs("http"):
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["secure_http"]


def secure_http(
    config: ServerConfig,
    *,
    protocol: Callable[..., asyncio.Protocol] = AutoHTTPProtocol,
    ssl_handshake_timeout: float | None = None,
) -> Any:
    """Make the value for ``uvicorn.run(http=...)`` or ``uvicorn.Config(http=...)``.

    Args:
        config: the configuration of the server. Its ``alpn`` is empty or names the protocols of
            ``protocol``: ``("http/1.1",)``.
        protocol: uvicorn's protocol class for the decrypted data.
        ssl_handshake_timeout: seconds for a handshake; ``None`` for 10.

    Raises:
        ConfigError: ``config`` is not a ``ServerConfig``, or its ``alpn`` names a protocol that
            uvicorn's does not speak.
        ValueError: the time limit is not positive.
    """
    check_config(config, ServerConfig)
    spoken = getattr(protocol, "alpn_protocols", ("http/1.1",))  # uvicorn 0.54 or newer
    if other := [one for one in config.alpn if one not in spoken]:
        raise ConfigError(
            f"uvicorn's protocol does not speak {', '.join(other)}: remove it from alpn"
        )
    time_limits(ssl_handshake_timeout, None)
    return _SecureHttp(config, protocol, ssl_handshake_timeout)


class _SecureHttp:
    """The protocol factory that uvicorn calls for each connection."""

    def __init__(
        self,
        config: ServerConfig,
        protocol: Callable[..., asyncio.Protocol],
        ssl_handshake_timeout: float | None,
    ) -> None:
        self._config: Final = config
        self._protocol: Final = protocol
        self._ssl_handshake_timeout: Final = ssl_handshake_timeout
        self._places: Places | None = None

    def __call__(self, **arguments: Any) -> asyncio.BaseProtocol:
        if arguments["config"].ssl is not None:
            raise ConfigError(
                "uvicorn has ssl options of its own: remove them, or its TLS would carry ours"
            )
        if self._places is None or self._places.loop is not asyncio.get_running_loop():
            self._places = Places()
        return SecureTransport(
            self._protocol(**arguments),
            self._config,
            ssl_handshake_timeout=self._ssl_handshake_timeout,
            places=self._places,
        ).receiver

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a private key is not passed to another process: with workers or reload, uvicorn needs "
            'the name of what secure_http returned, such as http="service:http"'
        )
