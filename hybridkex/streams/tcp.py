"""Secure TCP connections and servers in one call each, like ``trio.open_ssl_over_tcp_stream``,
``trio.open_ssl_over_tcp_listeners`` and ``trio.serve_ssl_over_tcp``."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from hybridkex.net.budget import Budget, Connection
from hybridkex.net.listening import open_tcp_listeners
from hybridkex.net.supervisor import Supervisor
from hybridkex.shell.secure_duplex import DEFAULT_HANDSHAKE_TIMEOUT, check_options
from hybridkex.streams.listener import SecureListener
from hybridkex.streams.stream import SecureStream
from hybridkex.text import get_logger
from hybridkex.tls.config import ClientConfig, ServerConfig, check_config

_log = get_logger("hybridkex.streams")

MAX_CONNECTIONS: Final = 10_000
"""The default maximum of simultaneous connections of :func:`serve_secure_tcp`."""


async def open_secure_tcp_stream(
    host: str,
    port: int,
    config: ClientConfig,
    *,
    server_hostname: str | None = None,
    https_compatible: bool = False,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    happy_eyeballs_delay: float | None = 0.25,
) -> SecureStream[trio.SocketStream]:
    """Connect over TCP; the handshake runs at the first send or receive, or by ``do_handshake``.

    Args:
        host: host name or IP address.
        port: TCP port.
        config: verifier, PSKs and policy.
        server_hostname: the name that the server's certificate must be valid for; ``host`` by
            default.
        https_compatible: see :class:`SecureStream`.
        handshake_timeout: seconds for the handshake; ``math.inf`` for no limit.
        happy_eyeballs_delay: seconds before the next address of the host is tried too; ``None`` for
            0.25.

    Raises:
        OSError: the connection failed.
        ConfigError: an argument has the wrong type or is out of range, or ``host`` is not a host
            name.
    """
    check_config(config, ClientConfig)
    name = host if server_hostname is None else server_hostname
    tcp = await trio.open_tcp_stream(host, port, happy_eyeballs_delay=happy_eyeballs_delay)
    try:
        return SecureStream(
            tcp,
            config,
            server_hostname=name,
            https_compatible=https_compatible,
            handshake_timeout=handshake_timeout,
        )
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise


async def open_secure_tcp_listeners(
    port: int,
    config: ServerConfig,
    *,
    host: str | bytes | None = None,
    https_compatible: bool = False,
    backlog: int | None = None,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
) -> list[SecureListener[trio.SocketStream]]:
    """Listen for connections; their handshakes have not run yet when they are accepted.

    Args:
        port: TCP port; 0 picks a free one.
        config: identities, verifier and policy.
        host: address to listen on; ``None`` for all interfaces.
        https_compatible: see :class:`SecureStream`.
        backlog: length of the kernel's accept queue; ``None`` for the longest.
        handshake_timeout: seconds for the handshake; ``math.inf`` for no limit.

    Raises:
        OSError: cannot listen there.
        ConfigError: ``config`` is not a ``ServerConfig``, or an option has another type.
    """
    check_config(config, ServerConfig)
    check_options(handshake_timeout, https_compatible=https_compatible)
    listeners = await open_tcp_listeners(port, host=host, backlog=backlog)
    return [
        SecureListener(
            listener,
            config,
            https_compatible=https_compatible,
            handshake_timeout=handshake_timeout,
        )
        for listener in listeners
    ]


async def serve_secure_tcp(  # noqa: PLR0913  # those of trio.serve_ssl_over_tcp, and our limits
    handler: Callable[[SecureStream[trio.SocketStream]], Awaitable[object]],
    port: int,
    config: ServerConfig,
    *,
    host: str | bytes | None = None,
    https_compatible: bool = False,
    backlog: int | None = None,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    max_connections: int = MAX_CONNECTIONS,
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[Sequence[SecureListener[trio.SocketStream]]] = (
        trio.TASK_STATUS_IGNORED
    ),
) -> None:
    """Serve every connection with ``handler``, in a task of its own, after its handshake.

    No connection ends another: unlike with ``trio.serve_ssl_over_tcp``, an exception that leaves
    ``handler``, or a handshake that fails, ends its own connection and becomes one line of the log
    ``hybridkex.streams``, at a bounded rate. The stream is closed when ``handler`` returns.

    Args:
        handler: serves one connection; its handshake is complete.
        port: TCP port; 0 picks a free one.
        config: identities, verifier and policy.
        host: address to listen on; ``None`` for all interfaces.
        https_compatible: see :class:`SecureStream`.
        backlog: length of the kernel's accept queue.
        handshake_timeout: time limit for a handshake in seconds.
        max_connections: the maximum number of simultaneous connections after their handshakes. If
            it is reached, a new connection replaces one of the address with the most connections:
            the oldest that has carried no data for a second or, if the new connection's address has
            at least two fewer, the newest. Otherwise the new connection is closed.
        handler_nursery: the nursery for handlers that must outlive this call.
        task_status: given the listeners when they accept connections.

    Raises:
        OSError: cannot listen there.
        ConfigError: ``config`` is not a ``ServerConfig``, or an option has another type.
    """
    budget = Budget(max_connections, even_shares=True)

    async def handle(stream: SecureStream[trio.SocketStream], connection: Connection) -> None:
        await stream.do_handshake()
        connection.admit(budget, is_used=lambda: stream.has_carried_data)
        await handler(stream)

    listeners = await open_secure_tcp_listeners(
        port,
        config,
        host=host,
        https_compatible=https_compatible,
        backlog=backlog,
        handshake_timeout=handshake_timeout,
    )
    where = listeners[0].transport_listener
    assert isinstance(where, trio.SocketListener)
    supervisor = Supervisor(
        handle,
        name=f"port {where.socket.getsockname()[1]}",
        logger=_log,
        # The stream's own time limit, which sends the peer an alert, is shorter.
        handshake_seconds=handshake_timeout + 1,
    )
    await supervisor.serve(listeners, connections=handler_nursery, task_status=task_status)
