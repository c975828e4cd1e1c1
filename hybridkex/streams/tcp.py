"""TCP in one call, beside ``trio.open_ssl_over_tcp_stream`` and its two fellows."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import trio

from hybridkex.streams.listener import SecureListener
from hybridkex.streams.stream import DEFAULT_HANDSHAKE_TIMEOUT, SecureStream
from hybridkex.tls.config import ClientConfig, ServerConfig

__all__ = ["open_secure_tcp_listeners", "open_secure_tcp_stream", "serve_secure_tcp"]

_log = logging.getLogger("hybridkex.streams")


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
    """Connect to ``host``; the handshake runs at the first use, or with ``do_handshake``.

    Raises:
        OSError: no connection.
    """
    name = host if server_hostname is None else server_hostname
    tcp = await trio.open_tcp_stream(host, port, happy_eyeballs_delay=happy_eyeballs_delay)
    return SecureStream(
        tcp,
        config,
        server_hostname=name,
        https_compatible=https_compatible,
        handshake_timeout=handshake_timeout,
    )


async def open_secure_tcp_listeners(
    port: int,
    config: ServerConfig,
    *,
    host: str | bytes | None = None,
    https_compatible: bool = False,
    backlog: int | None = None,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
) -> list[SecureListener[trio.SocketStream]]:
    """Listen on ``port`` (0 picks one) of ``host``, or of all interfaces."""
    return [
        SecureListener(
            listener,
            config,
            https_compatible=https_compatible,
            handshake_timeout=handshake_timeout,
        )
        for listener in await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    ]


async def serve_secure_tcp(
    handler: Callable[[SecureStream[trio.SocketStream]], Awaitable[object]],
    port: int,
    config: ServerConfig,
    *,
    host: str | bytes | None = None,
    https_compatible: bool = False,
    backlog: int | None = None,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[list[SecureListener[trio.SocketStream]]] = (
        trio.TASK_STATUS_IGNORED
    ),
) -> NoReturn:
    """Serve every connection with ``handler``, in a task of its own, after its handshake.

    A handshake that fails is logged and takes nothing else down; an exception of ``handler``'s is
    the caller's own, as with ``trio.serve_ssl_over_tcp``.
    """

    async def handle(stream: SecureStream[trio.SocketStream]) -> None:
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            _log.info("a handshake failed: %s", error)
            await trio.aclose_forcefully(stream)
            return
        await handler(stream)

    listeners: Any = await open_secure_tcp_listeners(
        port,
        config,
        host=host,
        https_compatible=https_compatible,
        backlog=backlog,
        handshake_timeout=handshake_timeout,
    )
    await trio.serve_listeners(
        handle, listeners, handler_nursery=handler_nursery, task_status=task_status
    )
