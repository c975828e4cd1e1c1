"""A transport for ``httpx`` on asyncio and on trio. ALPN selects HTTP/1.1 or HTTP/2::

    async with httpx.AsyncClient(transport=SecureTransport(config)) as client:
        await client.get("https://server.example/")

A program without an event loop uses anyio's blocking portal, which runs one in a thread::

    with anyio.from_thread.start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(client):
            portal.call(client.get, "https://server.example/")

There is no transport for the synchronous ``httpx.Client``: a handshake may wait for QKD keys, and
the key sources need an event loop.
"""

# ruff: noqa: ASYNC109  # the timeouts are httpcore's interface

import math
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from hybridkex.errors import ConfigError
from hybridkex.extras import needs
from hybridkex.text import said
from hybridkex.tls.config import ClientConfig, check_config

with needs("http"):
    import anyio
    import anyio.abc
    import httpcore
    import httpx
    from anyio.streams.tls import TLSAttribute

    from hybridkex.anyio import HybridkexAttribute, SecureByteStream

__all__ = ["SecureBackend", "SecureTransport", "pool_options"]


_SOCKET: Final[dict[str, Any]] = {
    "client_addr": anyio.abc.SocketAttribute.local_address,
    "server_addr": anyio.abc.SocketAttribute.remote_address,
    "socket": anyio.abc.SocketAttribute.raw_socket,
}
"""httpcore's names for anyio's socket attributes."""


class SecureTransport(httpx.AsyncHTTPTransport):
    """A transport for ``httpx.AsyncClient(transport=...)``. A client with ``proxy=`` uses httpx's
    own TLS instead.

    The extension ``network_stream`` of a response answers ``get_extra_info("session")`` with the
    :class:`~hybridkex.Session`.

    Args:
        config: the configuration of every connection; ``alpn=("h2", "http/1.1")`` for HTTP/2.
        limits: limits on the number of connections; the default is that of httpx.

    Raises:
        ConfigError: ``config`` is not a ``ClientConfig``.
    """

    def __init__(self, config: ClientConfig, *, limits: httpx.Limits | None = None) -> None:
        limits = limits or httpx.Limits(
            max_connections=100, max_keepalive_connections=20, keepalive_expiry=5.0
        )
        # httpx offers no argument for the network backend of httpcore's pool.
        self._pool = _Pool(
            **pool_options(config),
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
        )


class _Pool(httpcore.AsyncConnectionPool):
    """httpcore's pool with a fix: httpcore never releases a connection whose request is cancelled
    before it has begun (httpcore issue 1093)."""

    def _assign_requests_to_connections(self) -> list[httpcore.AsyncConnectionInterface]:
        used = [request.connection for request in self._requests]
        lost = [
            one
            for one in self._connections
            if one not in used and not one.is_idle() and not one.is_closed()
        ]
        for one in lost:
            self._connections.remove(one)
        return lost + super()._assign_requests_to_connections()


def pool_options(config: ClientConfig) -> dict[str, Any]:
    """Make the options with which a pool of httpcore, such as one behind a proxy, uses hybridkex::

        httpcore.AsyncHTTPProxy(proxy_url=url, **pool_options(config))

    Args:
        config: the configuration of every connection; ``alpn=("h2", "http/1.1")`` for HTTP/2,
            which httpcore does not speak to a proxy: an HTTPS proxy is offered only HTTP/1.1.

    Raises:
        ConfigError: ``config`` is not a ``ClientConfig``.
    """
    # Without one, httpcore loads all authorities for each connection.
    servers = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return {
        "network_backend": SecureBackend(config, servers=servers),
        "ssl_context": servers,
        "http2": "h2" in config.alpn,
    }


class SecureBackend(httpcore.AsyncNetworkBackend):
    """A network backend for httpcore whose TLS is hybridkex; see :func:`pool_options`.

    Args:
        config: the configuration of every connection, ``alpn`` included.
        servers: the context that httpcore passes for the TLS of servers; for that of a proxy it
            passes another one.

    Raises:
        ConfigError: ``config`` is not a ``ClientConfig``.
    """

    def __init__(self, config: ClientConfig, *, servers: ssl.SSLContext | None = None) -> None:
        check_config(config, ClientConfig)
        self._config = config
        self._servers = servers

    def _config_for(self, ssl_context: object) -> ClientConfig:
        """The configuration of a connection. httpcore speaks only HTTP/1.1 to a proxy."""
        if self._servers in (None, ssl_context) or not self._config.alpn:
            return self._config
        return replace(self._config, alpn=("http/1.1",))

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect over TCP; httpcore then calls ``start_tls`` on the stream.

        Args:
            host: host name or IP address.
            port: TCP port.
            timeout: seconds for the connection; ``None`` for no limit.
            local_address: our own address; ``None`` for any.
            socket_options: arguments of ``setsockopt``.
        """
        connect = partial(anyio.connect_tcp, host, port, local_host=local_address)
        return await self._connect(connect, timeout, socket_options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a Unix socket; httpcore then calls ``start_tls`` on the stream.

        Args:
            path: the path of the socket.
            timeout: seconds for the connection; ``None`` for no limit.
            socket_options: arguments of ``setsockopt``.
        """
        return await self._connect(partial(anyio.connect_unix, path), timeout, socket_options)

    async def _connect(
        self,
        connect: Callable[[], Awaitable[Any]],
        timeout: float | None,
        socket_options: Iterable[Any] | None,
    ) -> httpcore.AsyncNetworkStream:
        with _errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            with anyio.fail_after(timeout):
                stream = await connect()
            try:
                for option in socket_options or ():
                    stream.extra(anyio.abc.SocketAttribute.raw_socket).setsockopt(*option)
            except BaseException:
                await anyio.aclose_forcefully(stream)
                raise
        return _Stream(stream, self)

    async def sleep(self, seconds: float) -> None:
        """Wait this number of seconds before the next attempt to connect."""
        await anyio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(
        self, stream: anyio.abc.SocketStream | SecureByteStream, backend: SecureBackend
    ) -> None:
        self._stream = stream
        self._backend = backend

    async def start_tls(
        self,
        ssl_context: object,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Secure the stream. ``ssl_context`` only tells whether the peer is a proxy or a server."""
        with _errors(httpcore.ConnectTimeout, httpcore.ConnectError), anyio.fail_after(timeout):
            secure = await SecureByteStream.wrap(
                self._stream,
                self._backend._config_for(ssl_context),
                server_hostname=server_hostname,
                handshake_timeout=math.inf,  # httpx's own time limit holds
            )
        return _Stream(secure, self._backend)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _errors(httpcore.ReadTimeout, httpcore.ReadError), anyio.fail_after(timeout):
            try:
                return await self._stream.receive(max_bytes)
            except anyio.EndOfStream:
                return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer == b"":
            return
        with _errors(httpcore.WriteTimeout, httpcore.WriteError), anyio.fail_after(timeout):
            await self._stream.send(buffer)

    async def aclose(self) -> None:
        # HTTP has marked the end of the data, so neither end waits for close_notify.
        await anyio.aclose_forcefully(self._stream)

    def get_extra_info(self, info: str) -> Any:
        """Return ``ssl_object``, which tells httpcore the ALPN protocol, our ``session``, or
        httpcore's ``client_addr``, ``server_addr`` and ``socket``.

        If ``is_readable`` is true, httpcore does not send the next request over this connection:
        the server has closed it or sent a key update, which has not been received yet.
        """
        secure = self._stream
        if isinstance(secure, SecureByteStream):
            if info == "session":
                return secure.session
            if info == "ssl_object":
                return secure.extra(TLSAttribute.ssl_object)
        if info in _SOCKET:
            return secure.extra(_SOCKET[info], None)
        if info == "is_readable":
            raw = secure.extra(anyio.abc.SocketAttribute.raw_socket, None)
            if raw is None or raw.fileno() < 0:
                return True
            return secure.extra(HybridkexAttribute.has_unread, False)
        return None


@contextmanager
def _errors(late: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """Raise the errors of httpcore, which httpx maps to its own."""
    try:
        yield
    except TimeoutError as error:
        raise late("the server did not answer in time") from error
    except (
        OSError,
        anyio.BrokenResourceError,
        anyio.ClosedResourceError,
        ConfigError,  # a URL or a server's redirect has an invalid host name
    ) as error:
        raise broken(said(error.__cause__ or error)) from error
