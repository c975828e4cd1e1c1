"""``hypercorn`` over hybridkex on asyncio. ALPN selects HTTP/1.1 or HTTP/2; WebSocket works::

    asyncio.run(serve(app, 8443, config))

hypercorn offers no argument for another TLS implementation, so this function takes the place of its
worker. ``examples/asgi_server.py`` does the same on trio.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

from hybridkex.aio.connect import listen
from hybridkex.aio.places import Places
from hybridkex.aio.streams import stream_protocol
from hybridkex.aio.transport import SecureTransport, time_limits
from hybridkex.extras import needs
from hybridkex.net.event_loop import begun, shielded
from hybridkex.tls.config import ServerConfig, check_config

with needs("http"):
    from hypercorn.asyncio.lifespan import Lifespan
    from hypercorn.asyncio.tcp_server import TCPServer
    from hypercorn.asyncio.worker_context import WorkerContext
    from hypercorn.config import Config
    from hypercorn.typing import ASGIFramework
    from hypercorn.utils import wrap_app

__all__ = ["serve"]

_Tasks = Collection["asyncio.Task[Any]"]

_LOST_SECONDS: Final = 0.1
"""Seconds from the loss of a connection's transport to the cancellation of its tasks, and between
two cancellations."""
_CANCEL_SECONDS: Final = 3.0
"""Seconds for which tasks are cancelled repeatedly: an application may catch a cancellation."""
_SERVING: Final = dict[asyncio.Event, asyncio.AbstractEventLoop]()
"""The events that end the servers of this process at SIGTERM, with the loop of each."""
_ACCEPT_TURNS: Final = 3
"""Iterations of the loop after which an accepted connection has a transport."""


async def serve(
    app: ASGIFramework,
    port: int,
    config: ServerConfig,
    *,
    host: str | None = None,
    settings: Config | None = None,
    started: Callable[[int], object] = lambda _: None,
) -> None:
    """Serve an ASGI application until cancelled, or until SIGTERM.

    Args:
        app: the application.
        port: TCP port; with 0 the system picks one.
        config: the configuration of the server; ``alpn=("h2", "http/1.1")`` for HTTP/2.
        host: address to listen on; ``None`` for all interfaces.
        settings: hypercorn's configuration. Its settings of sockets and TLS have no effect, except
            ``ssl_handshake_timeout``.
        started: called with the port when the server listens.

    When this is cancelled, connections have ``settings.graceful_timeout`` to end; a second
    cancellation ends them at once. Then the application gets ``lifespan.shutdown``. SIGTERM does
    the same, and this returns, if it runs in the main thread of a program without a handler for
    that signal.

    Raises:
        OSError: the server cannot listen there.
        ConfigError: ``config`` is not a ``ServerConfig``.
        ValueError: ``ssl_handshake_timeout`` is not positive.
    """
    check_config(config, ServerConfig)
    settings, state = settings or Config(), dict[str, Any]()
    time_limits(settings.ssl_handshake_timeout, None)
    loop, wrapped = asyncio.get_running_loop(), wrap_app(app, settings.wsgi_max_body_size, None)
    context, transports = WorkerContext(None), set[asyncio.Transport]()
    places = Places(transports)
    served, tasks = set[asyncio.BaseTransport](), set[asyncio.Task[Any]]()

    def accept() -> asyncio.BaseProtocol:
        _, protocol = stream_protocol(connected)
        limit = settings.ssl_handshake_timeout
        transport = SecureTransport(protocol, config, ssl_handshake_timeout=limit, places=places)
        return transport.receiver

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport

        def ended(task: "asyncio.Task[None]") -> None:
            tasks.discard(task)
            served.discard(transport)
            transport.close()  # if hypercorn has not
            if not task.cancelled() and (error := task.exception()) is not None:
                loop.call_exception_handler(
                    {"message": "a connection failed", "exception": error, "transport": transport}
                )

        if context.terminated.is_set():
            transport.abort()
            return
        served.add(transport)
        task = loop.create_task(connection(reader, writer))
        tasks.add(task)
        task.add_done_callback(ended)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Otherwise the loop would report them: hypercorn does not catch the ssl.SSLError of a
        # connection that ended with a forged record.
        with suppress(ConnectionError):
            try:
                await TCPServer(application, loop, settings, context, state, reader, writer)
            except ExceptionGroup as group:
                # hypercorn starts a task in a group that is cancelled (its pull request 374).
                if not context.terminated.is_set() or group.split(RuntimeError)[1] is not None:
                    raise

    async def application(
        scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)  # hypercorn's task group would cancel it only once
        task.add_done_callback(tasks.discard)
        await wrapped(scope, receive, send, sync_spawn, call_soon)

    with _sigterm() as terminated:
        async with _lifespan(Lifespan(wrapped, settings, loop, state)):
            server = await listen(accept, host, port)
            try:
                started(server.sockets[0].getsockname()[1])
                await terminated.wait()
            finally:
                server.close()
                await context.terminated.set()
                await _end(transports, served, tasks, settings.graceful_timeout)


@contextmanager
def _sigterm() -> Iterator[asyncio.Event]:
    """Yield an event that SIGTERM sets. The program's own handlers, earlier and later, stay."""
    event = asyncio.Event()
    main = threading.current_thread() is threading.main_thread()  # only it handles signals
    if not main or signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, _terminate):
        yield event
        return
    _SERVING[event] = asyncio.get_running_loop()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield event
    finally:
        del _SERVING[event]
        if not _SERVING and signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> None:
    for event, loop in _SERVING.items():
        with suppress(RuntimeError):  # a loop that was closed under its server
            loop.call_soon_threadsafe(event.set)


async def _end(
    transports: set[asyncio.Transport],
    served: "set[asyncio.BaseTransport]",
    tasks: "set[asyncio.Task[Any]]",
    seconds: float,
) -> None:
    """End all connections: those being served after ``seconds``, or when this is cancelled."""
    for _ in range(_ACCEPT_TURNS):
        seconds = seconds if await _wait((), 0) else 0
    for transport in transports - served:  # in a handshake
        transport.abort()
    await _wait(tasks, seconds)
    for transport in set(transports):
        transport.abort()
    # Under HTTP/2, an application that is cancelled before hypercorn has told it that the
    # connection is lost waits forever to send its last event.
    await _wait(tasks, _LOST_SECONDS)
    await _cancel(tasks)
    while transports:
        await _wait((), 0)


async def _wait(tasks: _Tasks, seconds: float) -> bool:
    """Wait at most ``seconds`` for the end of these tasks; without tasks, one loop iteration.

    Returns false if a cancellation ended the wait.
    """
    try:
        await (asyncio.wait(tasks, timeout=seconds) if tasks else asyncio.sleep(0))
    except asyncio.CancelledError:
        return False
    return True


async def _cancel(tasks: _Tasks) -> None:
    """Cancel these tasks until they have ended, for at most :data:`_CANCEL_SECONDS`."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _CANCEL_SECONDS
    while (left := {one for one in tasks if not one.done()}) and loop.time() < until:
        for task in left:
            task.cancel()
        await _wait(left, _LOST_SECONDS)


@asynccontextmanager
async def _lifespan(lifespan: Lifespan) -> AsyncIterator[None]:
    """Run the start and the end of the application around the block; its task ends in any case."""
    task = asyncio.create_task(begun(lifespan.handle_lifespan))
    try:
        await lifespan.wait_for_startup()
        if task.done():
            task.result()
        try:
            yield
        finally:
            await shielded(lifespan.wait_for_shutdown)
    finally:
        await _cancel((task,))
        if task.done() and not task.cancelled():
            task.result()
