"""``hypercorn`` over hybridkex on asyncio. ALPN selects HTTP/1.1 or HTTP/2; WebSocket works::

    asyncio.run(serve(app, 8443, config))

hypercorn offers no argument for another TLS implementation, so this function takes the place of its
worker. ``examples/asgi_server.py`` does the same on trio.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from hypercorn.asyncio.lifespan import Lifespan
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework
from hypercorn.utils import wrap_app

from hybridkex.aio import start_server
from hybridkex.tls.config import ServerConfig, check_config

__all__ = ["serve"]

LOST_SECONDS = 0.1
"""The time that a connection has to end once its transport is gone, before its tasks are
cancelled."""


async def serve(
    app: ASGIFramework,
    port: int,
    config: ServerConfig,
    *,
    host: str | None = None,
    settings: Config | None = None,
    started: Callable[[int], object] = lambda _: None,
) -> None:
    """Serve an ASGI application until cancelled.

    Args:
        app: the application.
        port: TCP port; with 0 the system picks one.
        config: the configuration of the server; ``alpn=("h2", "http/1.1")`` for HTTP/2.
        host: address to listen on; ``None`` for all interfaces.
        settings: hypercorn's configuration. Its settings of sockets and TLS have no effect, except
            ``ssl_handshake_timeout``.
        started: called with the port when the server listens.

    Raises:
        OSError: the server cannot listen there.
        ConfigError: ``config`` is not a ``ServerConfig``.
    """
    check_config(config, ServerConfig)
    settings, state = settings or Config(), dict[str, Any]()
    loop, wrapped = asyncio.get_running_loop(), wrap_app(app, settings.wsgi_max_body_size, None)
    context, connections = WorkerContext(None), dict[asyncio.Task[None], asyncio.StreamWriter]()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections[task] = writer
        task.add_done_callback(connections.pop)
        # asyncio would report them: we cancel, below, and hypercorn does not catch the ssl.SSLError
        # of a connection that ended with a record that is not authentic.
        with suppress(asyncio.CancelledError, ConnectionError):
            try:
                # asyncio releases the transport with its connection, whatever this task does.
                await TCPServer(wrapped, loop, settings, context, state, reader, writer)
            except ExceptionGroup as group:
                # hypercorn starts a task in a group that is cancelled (its pull request 374).
                if not context.terminated.is_set() or group.split(RuntimeError)[1] is not None:
                    raise

    async with _lifespan(Lifespan(wrapped, settings, loop, state)):
        server = await start_server(
            connection,
            host,
            port,
            config,
            ssl_handshake_timeout=settings.ssl_handshake_timeout,
        )
        try:
            started(server.sockets[0].getsockname()[1])
            await loop.create_future()  # until cancelled
        finally:
            server.close()
            await context.terminated.set()
            if connections:
                _, late = await asyncio.wait(connections, timeout=settings.graceful_timeout)
                if late:
                    for task in late:
                        connections[task].transport.abort()
                    # Under HTTP/2, an application that is cancelled before hypercorn has told it
                    # that the connection is lost waits for ever to send its last event.
                    _, late = await asyncio.wait(late, timeout=LOST_SECONDS)
                for task in late:
                    task.cancel()
                if late:
                    await asyncio.wait(late, timeout=settings.graceful_timeout)


@asynccontextmanager
async def _lifespan(lifespan: Lifespan) -> AsyncIterator[None]:
    """Run the start and the end of the application around the block; its task ends in any case."""
    task = asyncio.create_task(lifespan.handle_lifespan())
    try:
        await lifespan.wait_for_startup()
        if task.done():
            task.result()
        try:
            yield
        finally:
            await lifespan.wait_for_shutdown()
    finally:
        task.cancel()
        await asyncio.wait((task,))
