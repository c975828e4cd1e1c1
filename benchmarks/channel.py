"""Streams beside each event loop's own TLS, in one process, over loopback TCP.

On trio that is SecureStream beside ``trio.SSLStream``; on asyncio and uvloop, transports beside the
loop's own (:mod:`benchmarks.channel_asyncio`). The peer is the standard library's ``ssl`` with
X25519; ours has X25519MLKEM768.

For bulk there is a third: bare sockets with the AEAD and nothing else, no protocol, no checks; what
is left of the time is the cipher's, the kernel's and trio's.

Both ends run in one thread that never idles, so that the process's CPU time (the kernel's part
included) is what an otherwise idle machine's clock would show.
"""

import os
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks import channel_asyncio
from benchmarks.handshake import CA, CLIENT, IDENTITY, SERVER
from benchmarks.results import OURS, Options, Row, in_turns
from hybridkex import SecureStream
from hybridkex.auth.dev_ca import write_identity

__all__ = ["run"]

Pair = tuple[Any, Any]
Wrap = Callable[[trio.abc.Stream, trio.abc.Stream], Pair]
now = time.process_time


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Settings of the peer: a client and a server."""
    with tempfile.TemporaryDirectory() as folder:
        write_identity(Path(folder), CA, IDENTITY)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
        return ssl.create_default_context(cafile=f"{folder}/ca.pem"), server


SSL_CLIENT, SSL_SERVER = contexts()


def ours(client: trio.abc.Stream, server: trio.abc.Stream) -> Pair:
    return SecureStream(client, CLIENT, server_hostname="localhost"), SecureStream(server, SERVER)


def theirs(client: trio.abc.Stream, server: trio.abc.Stream) -> Pair:
    return (
        trio.SSLStream(client, SSL_CLIENT, server_hostname="localhost"),
        trio.SSLStream(server, SSL_SERVER, server_side=True),
    )


class Bare:
    """AES-256-GCM on a stream, 16 KiB at a time: an upper bound for any channel in Python."""

    PIECE, BATCH, HEADER, TAG = 16384, 16, b"\x17\3\3\x40\x11", 17

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self.aead, self.sent, self.received = AESGCM(bytes(32)), 0, 0
        self.record = len(self.HEADER) + self.PIECE + self.TAG
        self.inner = memoryview(bytearray(self.PIECE + 1))
        self.out = memoryview(bytearray(self.BATCH * self.record))
        self.left = b""

    async def do_handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_all(self, data: bytes) -> None:
        view, inner, out = memoryview(data), self.inner, self.out
        for start in range(0, len(view), self.BATCH * self.PIECE):
            end = 0
            for at in range(start, min(start + self.BATCH * self.PIECE, len(view)), self.PIECE):
                inner[: self.PIECE] = view[at : at + self.PIECE]
                begin, end = end + 5, end + self.record
                out[begin - 5 : begin] = self.HEADER
                nonce = self.sent.to_bytes(12, "big")
                self.aead.encrypt_into(nonce, inner, self.HEADER, out[begin:end])
                self.sent += 1
            await self.transport.send_all(out[:end])

    async def receive_some(self) -> bytearray:
        data = b""
        while len(data) < self.record:
            data = self.left + await self.transport.receive_some(1 << 18)
            self.left = data
        count = len(data) // self.record
        view, plain = memoryview(data), bytearray(count * self.PIECE + 1)
        inner = memoryview(plain)
        for number in range(count):
            begin, at = number * self.record + 5, number * self.PIECE
            nonce = self.received.to_bytes(12, "big")
            record = view[begin : begin + self.record - 5]
            self.aead.decrypt_into(nonce, record, self.HEADER, inner[at : at + self.PIECE + 1])
            self.received += 1
        self.left = data[count * self.record :]
        inner.release()
        del plain[-1]
        return plain

    async def aclose(self) -> None:
        await self.transport.aclose()


def bare(client: trio.abc.Stream, server: trio.abc.Stream) -> Pair:
    return Bare(client), Bare(server)


async def connect(wrap: Wrap, listener: trio.SocketListener) -> Pair:
    port = listener.socket.getsockname()[1]
    client = await trio.open_tcp_stream("127.0.0.1", port)
    pair = wrap(client, await listener.accept())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair[0].do_handshake)
        nursery.start_soon(pair[1].do_handshake)
    return pair


async def close(pair: Pair) -> None:
    for stream in pair:
        await trio.aclose_forcefully(stream)


async def bulk(wrap: Wrap, listener: trio.SocketListener, size: int, total: int) -> float:
    """Measure megabytes per second in one direction."""
    pair = await connect(wrap, listener)
    data = os.urandom(size)

    async def send() -> None:
        for _ in range(total // size):
            await pair[0].send_all(data)

    started = now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = 0
        while received < total:
            received += len(await pair[1].receive_some())
    elapsed = now() - started
    await close(pair)
    return total / elapsed / 1e6


async def handshakes(wrap: Wrap, listener: trio.SocketListener, count: int) -> float:
    """Measure connections with a full handshake per second."""
    started = now()
    for _ in range(count):
        await close(await connect(wrap, listener))
    return count / (now() - started)


async def ping_pong(wrap: Wrap, listener: trio.SocketListener, size: int, count: int) -> float:
    """Measure round trips per second."""
    pair = await connect(wrap, listener)
    data = os.urandom(size)

    async def echo() -> None:
        for _ in range(count):
            await pair[1].send_all(await pair[1].receive_some())

    started = now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        for _ in range(count):
            await pair[0].send_all(data)
            await pair[0].receive_some()
    elapsed = now() - started
    await close(pair)
    return count / elapsed


def on_trio(work: Callable[[Wrap, trio.SocketListener], Awaitable[float]], wrap: Wrap) -> float:
    async def main() -> float:
        async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listener:
            return await work(wrap, listener)

    return trio.run(main)


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    total, count = options.size(128 << 20, 1 << 20), options.size(1000, 20)
    ways: dict[str, Wrap] = {OURS: ours, "trio.SSLStream": theirs}
    works: list[tuple[str, str, Any, dict[str, Wrap], float | None]] = [
        (
            f"trio: bulk, send_all of {name}",
            "MB/s",
            partial(bulk, size=size, total=total),
            {**ways, "AES-256-GCM alone": bare},
            goal,
        )
        for name, size, goal in (("1 MiB", 1 << 20, 3), ("64 KiB", 1 << 16, 2))
    ]
    works += [
        (
            f"trio: round trips of {size} B",
            "1/s",
            partial(ping_pong, size=size, count=count),
            ways,
            1,
        )
        for size in (1, 100, 1000)
    ]
    connections = partial(handshakes, count=options.size(100, 3))
    works.append(("trio: full handshakes over TCP", "1/s", connections, ways, 1.5))
    for name, unit, work, taken, goal in works:
        tools = {tool: partial(on_trio, work, wrap) for tool, wrap in taken.items()}
        yield Row(name, unit, in_turns(options.rounds, tools), goal)
    yield from channel_asyncio.run(options, (CLIENT, SERVER), (SSL_CLIENT, SSL_SERVER))
