"""Compares the asyncio shell with asyncio's own TLS, on asyncio's loop and on uvloop.

Both ends are protocols in one process, in one thread that never idles. ``benchmarks/channel.py``
runs this and prints it.
"""

import asyncio
import os
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from hybridkex import ClientConfig, ServerConfig
from hybridkex.aio import create_connection, create_server

__all__ = ["Kind", "idle_connection", "measures"]

Clock = Callable[[], float]
Kind = tuple[Any, Any]
"""The settings of a client and a server: two configurations, or two SSL contexts."""


class Sink(asyncio.BufferedProtocol):
    """Counts received bytes and signals when there are ``total``."""

    SIZE = 256 * 1024

    def __init__(self) -> None:
        self.received, self.total = 0, -1
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.buffer = memoryview(bytearray(self.SIZE))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes
        if self.received == self.total:
            self.complete.set_result(None)


class Receiver(asyncio.Protocol):
    """Counts in the same way, as a plain protocol."""

    def __init__(self) -> None:
        self.received, self.total = 0, -1
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.received == self.total:
            self.complete.set_result(None)


class Sender(asyncio.Protocol):
    """Writes whenever the transport has room."""

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.room.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.write(data)


class Ping(asyncio.Protocol):
    """Sends a message, waits for its echo, and sends the next."""

    def __init__(self, size: int, count: int) -> None:
        self.data, self.left, self.waiting = os.urandom(size), count, size
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.waiting -= len(data)
        if self.waiting:
            return
        self.left -= 1
        if not self.left:
            self.complete.set_result(None)
            return
        self.waiting = len(self.data)
        self.write(self.data)


@asynccontextmanager
async def connected(kind: Kind, client: Any, server: Any) -> Any:
    """Return the client's protocol and transport and the server's protocol after the handshake."""
    made: list[asyncio.Protocol] = []

    def factory() -> Any:
        made.append(server())
        return made[-1]

    listening, port = await listen(kind, factory)
    transport, protocol = await join(kind, client, port)
    while not made:  # noqa: ASYNC110
        await asyncio.sleep(0)
    try:
        yield protocol, transport, made[0]
    finally:
        transport.abort()
        listening.close()
        await listening.wait_closed()
        await asyncio.sleep(0.01)


async def listen(kind: Kind, factory: Any) -> tuple[asyncio.Server, int]:
    loop = asyncio.get_running_loop()
    if isinstance(kind[1], ServerConfig):
        server = await create_server(factory, "127.0.0.1", 0, kind[1])
    else:
        server = await loop.create_server(factory, "127.0.0.1", 0, ssl=kind[1])
    return server, server.sockets[0].getsockname()[1]


async def join(kind: Kind, factory: Any, port: int) -> Any:
    if isinstance(kind[0], ClientConfig):
        return await create_connection(
            factory, "127.0.0.1", port, kind[0], server_hostname="localhost"
        )
    return await asyncio.get_running_loop().create_connection(
        factory, "127.0.0.1", port, ssl=kind[0], server_hostname="localhost"
    )


async def bulk(kind: Kind, now: Clock, size: int) -> float:
    """Measure bytes per second in one direction, to a plain protocol."""
    total, data = 48 << 20, os.urandom(size)
    async with connected(kind, Sender, Receiver) as (sender, transport, receiver):
        receiver.total = total
        started = now()
        for _ in range(total // size):
            transport.write(data)
            await sender.room.wait()
            await asyncio.sleep(0)
        await receiver.complete
        return total / (now() - started)


async def ping_pong(kind: Kind, now: Clock, size: int) -> float:
    """Measure round trips per second."""
    count = 1500
    async with connected(kind, lambda: Ping(size, count), Echo) as (ping, transport, _):
        started = now()
        transport.write(ping.data)
        await ping.complete
        return count / (now() - started)


async def handshakes(kind: Kind, now: Clock) -> float:
    """Measure connections with a full handshake per second."""
    count = 50
    listening, port = await listen(kind, asyncio.Protocol)
    started = now()
    for _ in range(count):
        transport, _ = await join(kind, asyncio.Protocol, port)
        transport.abort()
    elapsed = now() - started
    listening.close()
    await listening.wait_closed()
    await asyncio.sleep(0.05)
    return count / elapsed


async def idle_connection(kind: Kind) -> float:
    """Measure the bytes that Python allocates for one end of a connection after its handshake."""
    count = 50
    listening, port = await listen(kind, asyncio.Protocol)
    (await join(kind, asyncio.Protocol, port))[0].abort()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    open_ones = [(await join(kind, asyncio.Protocol, port))[0] for _ in range(count)]
    await asyncio.sleep(0.05)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for transport in open_ones:
        transport.abort()
    listening.close()
    await listening.wait_closed()
    await asyncio.sleep(0.05)
    return (after - before) / count / 2


Measure = tuple[str, str, float, Callable[[Kind, Clock], Awaitable[float]]]

measures: list[Measure] = [
    ("bulk, write of 1 MiB", "MB/s", 1e6, lambda kind, now: bulk(kind, now, 1 << 20)),
    ("bulk, write of 64 KiB", "MB/s", 1e6, lambda kind, now: bulk(kind, now, 1 << 16)),
    ("ping-pong, 100 bytes", "1/s", 1, lambda kind, now: ping_pong(kind, now, 100)),
    ("full handshakes over TCP", "1/s", 1, handshakes),
]
