"""The keys of a connection leave memory with it, however it ends: no reference cycle waits for the
garbage collector, which is switched off here.

The usual cycle: an error that is kept, its traceback, a frame of it, and what keeps the error.
"""

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from aio_glue import Run, at_server
from tls_glue import Pair
from waiting import asyncio_until

from hybridkex import ClientConfig, HybridkexError, SecureStream, ServerConfig
from hybridkex.aio import create_connection, create_server, open_connection, start_server
from hybridkex.anyio import HybridkexAttribute, SecureByteStream
from hybridkex.crypto.schedule import ExporterSecret, ResumptionSecret, TrafficSecret
from hybridkex.errors import LocalStateError

SECRETS = (TrafficSecret, ExporterSecret, ResumptionSecret)
NAMES = ("hybridkex_session", "peercert", "cipher", "peername", "sockname")
FORGED = b"\x17\x03\x03\x00\x20" + bytes(32)


OTHERS: list[object] = []
"""Secrets of connections that other tests keep, such as those of a peer for all tests."""


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails where traffic secrets are left that only the collector would find."""
    gc.collect()
    gc.disable()
    OTHERS[:] = (one for one in gc.get_objects() if type(one) in SECRETS)
    try:
        yield
        assert not secrets()
    finally:
        OTHERS.clear()
        gc.enable()


def secrets() -> int:
    """How many this test has made and has not released."""
    others = set(map(id, OTHERS))
    return sum(type(one) in SECRETS and id(one) not in others for one in gc.get_objects())


class Recorder(asyncio.Protocol):
    """Keeps nothing but the class of what has ended its connection. (An asyncio stream reader keeps
    the exception, whose traceback leads back to it.)"""

    lost: type[BaseException] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = type(error)
        del self.transport


def cut(transport: Any) -> None:
    transport.abort()


def close(transport: Any) -> None:
    transport.close()


def forge(transport: Any) -> None:
    os.write(transport.get_extra_info("socket").fileno(), FORGED)


def shut(transport: Any) -> None:
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as own:
        own.shutdown(socket.SHUT_WR)  # without close_notify


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("ending", [cut, close, forge, shut])
def test_of_asyncio(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    ending: Callable[[Any], None],
) -> None:
    ends: list[Recorder] = []

    def recorder() -> Recorder:
        ends.append(Recorder())
        return ends[-1]

    async def main() -> None:
        server = await create_server(recorder, "127.0.0.1", 0, server_config)
        port = server.sockets[0].getsockname()[1]
        for _ in range(3):
            await one(port)
        await asyncio_until(lambda: len(ends) == 6 and all(end.lost for end in ends))
        await asyncio_until(lambda: not secrets(), seconds=3)  # before the fixture collects
        server.close()

    async def one(port: int) -> None:
        transport, _ = await create_connection(
            recorder, "127.0.0.1", port, client_config, server_hostname="localhost"
        )
        ending(transport)

    run(main(), debug=False)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("end", [b"", FORGED, FORGED[:5]])
def test_of_the_engine(
    client_config: ClientConfig, server_config: ServerConfig, end: bytes
) -> None:
    def converse() -> None:
        server = Pair.make(client_config, server_config).connect().server
        with contextlib.suppress(HybridkexError):
            server.receive_data(end)
            server.next_event()
            server.receive_data(b"")
        assert server.failed
        with contextlib.suppress(HybridkexError):
            server.send_data(b"more")

    converse()


async def connected(
    client_config: ClientConfig, server_config: ServerConfig
) -> tuple[Any, SecureStream[Any], SecureStream[Any]]:
    """The client's transport, and both ends after the handshake."""
    left, right = trio.testing.memory_stream_pair()
    client = SecureStream(left, client_config, server_hostname="localhost")
    server = SecureStream(right, server_config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return left, client, server


@pytest.mark.usefixtures("nothing_left")
def test_of_trio(client_config: ClientConfig, server_config: ServerConfig) -> None:
    async def main() -> None:
        left, client, server = await connected(client_config, server_config)
        await left.send_all(FORGED)
        for _ in range(2):
            with contextlib.suppress(trio.BrokenResourceError):
                await server.receive_some()
        await server.aclose()
        await client.aclose()

    trio.run(main)


@pytest.mark.usefixtures("nothing_left")
def test_of_anyio(client_config: ClientConfig, server_config: ServerConfig) -> None:
    async def main() -> None:
        async def serve(stream: anyio.abc.SocketStream) -> None:
            secure = await SecureByteStream.wrap(stream, server_config)
            for _ in range(2):
                with contextlib.suppress(anyio.BrokenResourceError):
                    await secure.receive()
            await secure.aclose()

        async with at_server(serve) as stream:
            client = await SecureByteStream.wrap(stream, client_config, server_hostname="localhost")
            await stream.send(FORGED)
            with contextlib.suppress(anyio.BrokenResourceError):
                await client.receive()
            await client.aclose()

    anyio.run(main)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("ending", [cut, close, forge, shut])
def test_of_streams_that_the_program_keeps(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    ending: Callable[[Any], None],
) -> None:
    """A reader that has raised an error is in a reference cycle of asyncio's own, which leads to
    the transport."""
    kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept.append((reader, writer))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def main() -> None:
        server = await start_server(reads, "127.0.0.1", 0, server_config)
        port = server.sockets[0].getsockname()[1]
        streams = await open_connection(
            "127.0.0.1", port, client_config, server_hostname="localhost"
        )
        kept.append(streams)
        transport = streams[1].transport
        known = {name: transport.get_extra_info(name) for name in NAMES}
        await asyncio_until(lambda: len(kept) == 2)
        ending(transport)
        with contextlib.suppress(ConnectionError):
            await streams[0].read()
        await asyncio_until(lambda: all("closed" in repr(end[1].transport) for end in kept))
        await asyncio_until(lambda: not secrets(), seconds=3)
        assert {name: transport.get_extra_info(name) for name in NAMES} == known
        assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        for raises in (
            lambda: transport.export(b"label", b"", 32),
            transport.update_keys,
        ):
            with pytest.raises(LocalStateError, match="closed"):
                raises()
        server.close()

    run(main(), debug=False)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("ending", ["aclose", "abort", "unwrap", "forge", "cut"])
def test_of_trio_streams_that_the_program_keeps(
    client_config: ClientConfig, server_config: ServerConfig, ending: str
) -> None:
    """Whether they were closed, or have only failed."""

    async def main() -> None:
        left, client, server = await connected(client_config, server_config)
        sessions = client.session, server.session
        assert secrets()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_to_the_end, server)
            if ending == "forge":
                await left.send_all(FORGED)
                await read_to_the_end(client)
            elif ending == "cut":
                await left.aclose()
                await client.abort()
            else:
                await getattr(client, ending)()
        if ending in ("aclose", "unwrap"):  # the server has only seen the end
            await server.aclose()
        check_kept(sessions, client, server)

    async def read_to_the_end(stream: SecureStream[Any]) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
            await stream.send_eof()

    trio.run(main)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("ending", ["aclose", "abort", "forge"])
def test_of_anyio_streams_that_the_program_keeps(
    client_config: ClientConfig, server_config: ServerConfig, ending: str
) -> None:
    kept: list[SecureByteStream] = []

    async def main() -> None:
        over = anyio.Event()

        async def serve(stream: anyio.abc.SocketStream) -> None:
            kept.append(await SecureByteStream.wrap(stream, server_config))
            with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                await kept[-1].receive()
            if ending == "aclose":
                await kept[-1].aclose()
            over.set()

        async with at_server(serve) as stream:
            client = await SecureByteStream.wrap(stream, client_config, server_hostname="localhost")
            kept.append(client)
            session = client.session
            assert secrets()
            if ending == "forge":
                await stream.send(FORGED)
                with contextlib.suppress(anyio.BrokenResourceError):
                    await client.receive()
            else:
                await getattr(client, ending)()
            await over.wait()
            check_kept((session, kept[0].session), client, kept[0])
            assert client.extra(HybridkexAttribute.session) == session
            for one in kept:
                await one.aclose()

    anyio.run(main)


def check_kept(sessions: tuple[Any, Any], *streams: Any) -> None:
    """What is known of the session stays."""
    assert not secrets()
    for session, stream in zip(sessions, streams, strict=True):
        assert stream.session == session
        assert stream.pad is None
        with pytest.raises(LocalStateError, match="closed"):
            stream.export(b"label", b"", 32)
