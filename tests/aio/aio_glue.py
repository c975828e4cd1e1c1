"""What the tests of the asyncio shell share: event loops, servers, an echo."""

import asyncio
import contextlib
import socket
import struct
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import anyio
import anyio.abc
import pytest

from hybridkex import ClientConfig, ClientConnection, ServerConfig
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


@contextlib.contextmanager
def without_stacks() -> Iterator[None]:
    """In debug mode, asyncio and uvloop keep the stack in which each future and each callback was
    made, for their messages: a quarter of the time of a test."""
    frame = traceback.FrameSummary("", 0, "")

    def extract(*_: object, **__: object) -> traceback.StackSummary:
        return traceback.StackSummary([frame])

    with mock.patch.object(traceback.StackSummary, "extract", extract):
        yield


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


@asynccontextmanager
async def at_server(
    handler: Callable[[anyio.abc.SocketStream], Awaitable[None]],
) -> AsyncIterator[anyio.abc.SocketStream]:
    """A TCP connection of anyio to a server that has this handler."""
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as group,
    ):
        group.start_soon(listener.serve, handler)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            yield stream
        group.cancel_scope.cancel()


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


def hello_of(config: ClientConfig) -> bytes:
    client = ClientConnection(config, "localhost")
    client.start()
    return bytes(client.data_to_send())


class Crowd:
    """Connections that stay, each from one of some addresses."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.members: list[socket.socket] = []
        self._answered, self._dismissed = set[socket.socket](), set[socket.socket]()

    def grow(self, number: int, says: bytes, addresses: int = 1) -> None:
        for one in range(number):
            member = socket.socket()
            self.members.append(member)
            member.bind((f"127.0.0.{2 + one % addresses}", 0))
            member.connect(("127.0.0.1", self._port))
            member.sendall(says)
            member.setblocking(False)

    def answered(self) -> int:
        self._look()
        return len(self._answered)

    def dismissed(self) -> int:
        self._look()
        return len(self._dismissed)

    def _look(self) -> None:
        for one in self.members:
            with contextlib.suppress(BlockingIOError):
                try:
                    while one not in self._dismissed:
                        (self._answered if one.recv(65536) else self._dismissed).add(one)
                except ConnectionError:
                    self._dismissed.add(one)

    def leave(self, *, reset: bool = False) -> None:
        for member in self.members:
            if reset:
                linger = struct.pack("ii", 1, 0)
                member.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            member.close()
