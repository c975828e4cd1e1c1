"""The asyncio shell beside the loop's own TLS, on asyncio's loop and on uvloop.

Both ends are protocols in one process, in one thread that never idles.
"""

import asyncio
import os
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.processes import has
from benchmarks.results import OURS, Options, Row, in_turns
from hybridkex import X25519MLKEM768, ClientConfig, ServerConfig
from hybridkex.aio import create_connection, create_server
from hybridkex.crypto.kex_oqs import via_oqs
from hybridkex.errors import ProviderMissing

__all__ = ["Kind", "run"]

now = time.process_time
Kind = tuple[Any, Any]
"""The settings of a client and a server: two configurations, or two SSL contexts."""


class Receiver(asyncio.Protocol):
    """Counts received bytes and signals when there are ``total``."""

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


async def bulk(kind: Kind, *, size: int, total: int) -> float:
    """Measure megabytes per second in one direction, to a plain protocol."""
    data = os.urandom(size)
    async with connected(kind, Sender, Receiver) as (sender, transport, receiver):
        receiver.total = total
        started = now()
        for _ in range(total // size):
            transport.write(data)
            await sender.room.wait()
            await asyncio.sleep(0)
        await receiver.complete
        return total / (now() - started) / 1e6


async def ping_pong(kind: Kind, *, size: int, count: int) -> float:
    """Measure round trips per second."""
    async with connected(kind, lambda: Ping(size, count), Echo) as (ping, transport, _):
        started = now()
        transport.write(ping.data)
        await ping.complete
        return count / (now() - started)


async def handshakes(kind: Kind, *, count: int) -> float:
    """Measure connections with a full handshake per second."""
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


async def idle_connection(kind: Kind, *, count: int) -> float:
    """Measure the bytes that Python allocates for one end of a connection after its handshake."""
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


def on_loop(loop: str, work: Callable[[Kind], Awaitable[float]], kind: Kind) -> float:
    factory = None
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work(kind))  # type: ignore[arg-type]


def with_liboqs(kind: Kind) -> Iterator[Kind]:
    """The same settings with the ML-KEM of liboqs, or nothing where that is not installed."""
    try:
        groups = (via_oqs(X25519MLKEM768),)
    except ProviderMissing as missing:
        print(f"liboqs is missing, and its figures are left out: {missing}", file=sys.stderr)
    else:
        yield replace(kind[0], groups=groups), replace(kind[1], groups=groups)


def run(options: Options, ours: Kind, theirs: Kind) -> Iterator[Row]:
    """Measure with our settings and with those of the loop's own TLS."""
    total, few = options.size(48 << 20, 1 << 20), options.size(50, 3)
    trips = partial(ping_pong, size=100, count=options.size(1500, 20))
    works: list[tuple[str, str, Any, dict[str, float]]] = [
        (
            "bulk, write of 1 MiB",
            "MB/s",
            partial(bulk, size=1 << 20, total=total),
            {"asyncio": 2.0, "uvloop": 1.6},
        ),
        ("bulk, write of 64 KiB", "MB/s", partial(bulk, size=1 << 16, total=total), {}),
        ("round trips of 100 B", "1/s", trips, {"asyncio": 1.1, "uvloop": 0.8}),
        (
            "full handshakes over TCP",
            "1/s",
            partial(handshakes, count=few),
            {"asyncio": 0.9, "uvloop": 0.8},
        ),
        ("idle connection", "bytes", partial(idle_connection, count=few), {}),
    ]
    kinds = [(*work, ours) for work in works]
    kinds += [
        (f"{name}, ML-KEM of liboqs", unit, work, goals, kind)
        for kind in with_liboqs(ours)
        for name, unit, work, goals in works
        if work.func is handshakes
    ]
    for loop in ("asyncio", "uvloop"):
        if loop == "uvloop" and not has(loop):
            continue
        for name, unit, work, goals, kind in kinds:
            pair = {OURS: kind, f"{loop}'s TLS": theirs}
            tools = {tool: partial(on_loop, loop, work, kind) for tool, kind in pair.items()}
            rounds = 1 if unit == "bytes" else options.rounds
            yield Row(f"{loop}: {name}", unit, in_turns(rounds, tools), goals.get(loop))
