"""Connections and servers for protocols, in the manner of asyncio's event loop."""

import asyncio
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from hybridkex.aio.accept_faults import report_accept_faults
from hybridkex.aio.channel import ReadingHalf
from hybridkex.aio.failures import connection_error
from hybridkex.aio.places import Places
from hybridkex.aio.transport import SecureTransport, time_limits
from hybridkex.errors import LocalStateError
from hybridkex.tls.config import ClientConfig, ServerConfig, check_config

P = TypeVar("P", bound=asyncio.BaseProtocol)


async def create_connection(
    protocol_factory: Callable[[], P],
    host: str | None,
    port: int | None,
    config: ClientConfig,
    *,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    **tcp: Any,
) -> tuple[SecureTransport, P]:
    """Connect, complete the handshake, and return transport and protocol.

    Args:
        protocol_factory: returns the protocol, whose ``connection_made`` gets the secure transport.
        host: host name or address; ``None`` with ``sock=...``.
        port: TCP port; ``None`` with ``sock=...``.
        config: the configuration of the client.
        server_hostname: the name or address that the server's certificate must have; ``host``
            unless given.
        ssl_handshake_timeout: seconds for the handshake; 10 by default.
        ssl_shutdown_timeout: seconds from ``close`` until the peer's close_notify; 30 by default.
        tcp: other arguments of ``loop.create_connection``, such as ``sock`` or ``local_addr``.

    Raises:
        OSError: the connection failed.
        SecureConnectionError: the handshake failed; ``__cause__`` is the reason. What code of the
            configuration has raised is raised as it is.
        ConfigError: ``config`` is not a ``ClientConfig``.
        ValueError: a time limit is not positive.
        TypeError: ``ssl`` is among the arguments.
    """
    check_config(config, ClientConfig)
    _check_plain(tcp)
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    protocol = protocol_factory()
    transport = SecureTransport(
        protocol,
        config,
        server_hostname=host if server_hostname is None else server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
        ready=ready,
    )
    connect: Any = loop.create_connection  # its type wants a host even beside a socket
    try:
        await connect(lambda: transport.receiver, host, port, **tcp)
        await ready
    except BaseException:
        _abandon(transport, ready)
        raise
    return transport, protocol


def _abandon(transport: SecureTransport, ready: "asyncio.Future[None]") -> None:
    ready.cancel()  # nobody awaits it any more
    transport.abort()


def _check_plain(tcp: dict[str, Any]) -> None:
    if tcp.get("ssl") is not None:
        raise TypeError("pass config or ssl, not both: together they would be TLS within TLS")


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: Any = None,
    port: int | None = None,
    config: ServerConfig | None = None,
    *,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    **tcp: Any,
) -> asyncio.Server:
    """Listen. ``connection_made`` of a connection's protocol is called after its handshake.

    A handshake that fails ends only its own connection and is logged to ``hybridkex.aio``.
    A lack of file descriptors or memory for new connections is logged there, too, at most once a
    minute; everything else is reported to the loop's exception handler.

    Args:
        protocol_factory: returns the protocol of a connection.
        host: addresses to listen on, as for ``loop.create_server``.
        port: TCP port; with 0 the system picks one.
        config: the configuration of the server.
        ssl_handshake_timeout: seconds for a handshake; 10 by default.
        ssl_shutdown_timeout: seconds from ``close`` until the peer's close_notify; 30 by default.
        tcp: other arguments of ``loop.create_server``, such as ``sock`` or ``reuse_port``.

    Raises:
        OSError: the server cannot listen there.
        ConfigError: ``config`` is not a ``ServerConfig``.
        ValueError: a time limit is not positive.
        TypeError: ``ssl`` is among the arguments.
    """
    check_config(config, ServerConfig)
    assert isinstance(config, ServerConfig)
    _check_plain(tcp)
    time_limits(ssl_handshake_timeout, ssl_shutdown_timeout)
    # What Python 3.13 closes with the server.
    counted: weakref.WeakSet[asyncio.Transport] | None = None
    if hasattr(asyncio.Server, "close_clients"):
        counted = weakref.WeakSet()
    places = Places(counted)

    def accept() -> asyncio.BaseProtocol:
        return SecureTransport(
            protocol_factory(),
            config,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            places=places,
        ).receiver

    server = await listen(accept, host, port, **tcp)
    if counted is not None and isinstance(server, asyncio.Server):
        # asyncio's own would end the transports below, which is a truncation for the peer.
        for how in ("close", "abort"):
            vars(server)[f"{how}_clients"] = partial(_end, counted, how)
    return server


def _end(transports: Iterable[asyncio.Transport], how: str) -> None:
    for one in tuple(transports):
        getattr(one, how)()


async def listen(
    accept: Callable[[], asyncio.BaseProtocol],
    host: Any,
    port: int | None,
    *,
    start_serving: bool = True,
    **tcp: Any,
) -> asyncio.Server:
    """As ``loop.create_server``; faults of accepting are logged, and a cancellation leaves no
    socket."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(accept, host, port, start_serving=False, **tcp)
    report_accept_faults(server)
    if start_serving:
        try:
            await server.start_serving()
        except BaseException:
            server.close()  # asyncio's create_server, cancelled here, leaves the sockets open
            raise
    return server


async def start_tls(
    transport: asyncio.Transport,
    protocol: asyncio.BaseProtocol,
    config: ClientConfig | ServerConfig,
    *,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> SecureTransport:
    """Secure an open connection, as ``loop.start_tls`` does.

    The old protocol must not hold unprocessed bytes: they came without protection, and anybody on
    the path may have sent them. ``connection_made`` is not called again; ``connection_lost`` is,
    even if the handshake fails.

    Args:
        transport: the plain transport; do not use it afterwards.
        protocol: the protocol for the decrypted data.
        config: the configuration of a client or of a server.
        server_hostname: the name or address that the server's certificate must have (client).
        ssl_handshake_timeout: seconds for the handshake; 10 by default.
        ssl_shutdown_timeout: seconds from ``close`` until the peer's close_notify; 30 by default.

    Raises:
        SecureConnectionError: the transport is closed or secured already, its sending direction is
            closed (``write_eof``), or the handshake failed; ``__cause__`` is the reason. What code
            of the configuration has raised is raised as it is.
        ConfigError: ``config`` is not a configuration, or a server is given a ``server_hostname``.
        TypeError: ``transport`` is no transport.
        ValueError: a time limit is not positive.
    """
    check_plain(transport)
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    secure = SecureTransport(
        protocol,
        config,
        server_hostname=server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
        call_connection_made=False,
        ready=ready,
    )
    # No byte may reach the old protocol, or the new one before it has its transport.
    transport.pause_reading()
    transport.set_protocol(secure.receiver)
    transport.resume_reading()
    try:
        secure.receiver.connection_made(transport)
        await ready
    except BaseException:
        _abandon(secure, ready)
        raise
    return secure


def check_plain(transport: asyncio.Transport) -> None:
    """Check that a transport can be secured.

    Raises:
        SecureConnectionError: it is closed, or secured already.
        TypeError: it is no transport.
    """
    if not hasattr(transport, "set_protocol"):
        kind = type(transport).__name__
        raise TypeError(f"start_tls takes a transport, not a {kind}; upgrade takes streams")
    if transport.is_closing():
        raise connection_error(LocalStateError("the transport is closed or is being closed"))
    if isinstance(transport.get_protocol(), ReadingHalf):
        raise connection_error(LocalStateError("the transport is secured already"))
