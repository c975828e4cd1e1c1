"""What the tests of the asyncio shell share: event loops, servers, an echo."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hybridkex import ClientConfig, ServerConfig
from hybridkex.aio import open_connection, start_server

Run = Callable[..., Any]
"""``run(coroutine, seconds=60, debug=True)``; see ``conftest.py``."""


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed: pip install uvloop")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def serving(
    config: ServerConfig, handler: Handler = echo, **options: Any
) -> AsyncIterator[int]:
    server = await start_server(handler, "127.0.0.1", 0, config, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def connect(port: int, config: ClientConfig, **options: Any) -> Streams:
    return await open_connection("127.0.0.1", port, config, server_hostname="localhost", **options)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


@asynccontextmanager
async def plain_server(handler: Handler = echo, **options: Any) -> AsyncIterator[int]:
    """A server of asyncio's own, with no TLS unless ``ssl`` is given."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


class Losing(asyncio.Protocol):
    """Keeps what ``connection_lost`` is given."""

    def __init__(self) -> None:
        self.lost: list[Exception | None] = []

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
