"""What a program that was written for asyncio's own TLS catches, it catches of this library.

Each fault is met twice, by asyncio's TLS and by ours, and of the classes in :data:`CAUGHT` ours has
to be an instance of each that asyncio's is one of.
"""

import asyncio
import contextlib
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from aio_glue import Run, Streams, at_server, closed
from anyio.streams.tls import TLSStream

from hybridkex import ClientConfig, DevCa, ServerConfig, TrustStore
from hybridkex.aio import open_connection, start_server
from hybridkex.anyio import SecureByteStream
from hybridkex.auth.dev_ca import write_identity

CAUGHT: Final = (
    anyio.BrokenResourceError,
    OSError,
    ConnectionError,
    ConnectionResetError,
    ConnectionAbortedError,
    ssl.SSLError,
    ssl.SSLCertVerificationError,
    TimeoutError,
    ValueError,
)
"""What programs name after ``except``."""


class Relay:
    """A TCP relay to a server, which does something else at a given point of time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.client: asyncio.StreamWriter | None = None
        self.server: asyncio.StreamWriter | None = None
        self.fault: Callable[[asyncio.StreamWriter], None] | None = None
        """What the client finds instead of an answer to its ClientHello."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.client = writer
        if self.fault is not None:
            await reader.read(1 << 16)
            self.fault(writer)
            await reader.read()
            return
        upstream, self.server = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(
            self._pass_on(reader, self.server), self._pass_on(upstream, self.client)
        )

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)


def reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    raw.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
    writer.transport.abort()


def end(writer: asyncio.StreamWriter) -> None:
    writer.close()


def rubbish(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def forged(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x17\x03\x03\x00\x20" + bytes(32))


def alert(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x15\x03\x03\x00\x02\x02\x28")  # handshake_failure


def silence(writer: asyncio.StreamWriter) -> None:
    pass


FAULTS: Final = (reset, end, rubbish, forged, alert, silence)


class Stack:
    """One TLS: its configurations, and the two calls of a program."""

    def __init__(self, client: Any, server: Any) -> None:
        self.client, self.server = client, server

    async def open(self, port: int, name: str = "localhost") -> Streams:
        options: Any = {"server_hostname": name, "ssl_handshake_timeout": 0.3}
        if isinstance(self.client, ClientConfig):
            return await open_connection("127.0.0.1", port, self.client, **options)
        return await asyncio.open_connection("127.0.0.1", port, ssl=self.client, **options)

    async def serve(self, handler: Any) -> asyncio.Server:
        if isinstance(self.server, ServerConfig):
            return await start_server(handler, "127.0.0.1", 0, self.server)
        return await asyncio.start_server(handler, "127.0.0.1", 0, ssl=self.server)


@pytest.fixture(scope="module")
def stacks(ca: DevCa, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Stack]:
    folder = tmp_path_factory.mktemp("keys")
    identity = ca.issue("localhost")
    write_identity(folder, ca, identity)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return (
        Stack(ssl.create_default_context(cafile=str(folder / "ca.pem")), server),
        Stack(
            ClientConfig(verifier=TrustStore((ca.certificate,))),
            ServerConfig(identities=(identity,)),
        ),
    )


async def caught_of(work: Callable[[], Awaitable[Any]]) -> BaseException | None:
    try:
        async with asyncio.timeout(5):
            await work()
    except Exception as error:
        return error
    return None


def compare(run: Run, stacks: tuple[Stack, Stack], scene: Callable[[Stack], Any]) -> None:
    check(*(run(scene(stack), debug=False) for stack in stacks))


def check(theirs: BaseException | None, ours: BaseException | None) -> None:
    names = {kind.__name__ for kind in CAUGHT if isinstance(theirs, kind)}
    assert names <= {kind.__name__ for kind in CAUGHT if isinstance(ours, kind)}, (theirs, ours)
    if isinstance(ours, ssl.SSLError):
        assert (ours.library, bool(ours.reason), bool(ours.strerror)) == ("SSL", True, True)


async def relayed(stack: Stack, scene: Callable[[int, Relay], Awaitable[Any]]) -> Any:
    """Run a scene with a server behind a relay; the server answers a line with a line."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                writer.write(line)
        with contextlib.suppress(OSError):
            await closed(writer)

    server = await stack.serve(handler)
    relay = Relay(server.sockets[0].getsockname()[1])
    front = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        return await scene(front.sockets[0].getsockname()[1], relay)
    finally:
        for writer in (relay.client, relay.server):
            if writer is not None:
                writer.transport.abort()
        front.close()
        server.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_in_the_handshake(
    run: Run, stacks: tuple[Stack, Stack], fault: Callable[[asyncio.StreamWriter], None]
) -> None:
    async def scene(stack: Stack) -> BaseException | None:
        async def meet(port: int, relay: Relay) -> BaseException | None:
            relay.fault = fault
            return await caught_of(lambda: stack.open(port))

        result: BaseException | None = await relayed(stack, meet)
        assert result is not None
        return result

    compare(run, stacks, scene)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault is not silence])
@pytest.mark.parametrize("side", ["client", "server"])
def test_of_an_open_connection(
    run: Run,
    stacks: tuple[Stack, Stack],
    fault: Callable[[asyncio.StreamWriter], None],
    side: str,
) -> None:
    """Reading, a write after that, and the wait for the end."""

    async def scene(stack: Stack) -> BaseException | None:
        met: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

        async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            met.set_result(await caught_of(reader.read))
            writer.transport.abort()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"hello\n")
            await (use(reader, writer) if side == "server" else caught_of(reader.read))
            writer.transport.abort()

        server = await stack.serve(handler)
        relay = Relay(server.sockets[0].getsockname()[1])
        front = await asyncio.start_server(relay, "127.0.0.1", 0)
        reader, writer = await stack.open(front.sockets[0].getsockname()[1])
        writer.write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        cut = relay.client if side == "client" else relay.server
        assert cut is not None
        fault(cut)
        result = await asyncio.gather(met, use(reader, writer)) if side == "client" else [await met]
        for each in (relay.client, relay.server, writer):
            assert each is not None
            each.transport.abort()
        front.close()
        server.close()
        return result[0]

    compare(run, stacks, scene)


def test_of_a_certificate(run: Run, stacks: tuple[Stack, Stack], tmp_path: Path) -> None:
    """A name that is not the server's, and an authority that is not trusted."""
    stranger = DevCa.create()
    write_identity(tmp_path, stranger, stranger.issue("localhost"))
    others = (
        Stack(ssl.create_default_context(cafile=str(tmp_path / "ca.pem")), stacks[0].server),
        Stack(ClientConfig(verifier=TrustStore((stranger.certificate,))), stacks[1].server),
    )

    async def scene(stack: Stack, name: str) -> Any:
        return await relayed(stack, lambda port, _: caught_of(lambda: stack.open(port, name)))

    compare(run, stacks, lambda stack: scene(stack, "elsewhere.example"))
    compare(run, others, lambda stack: scene(stack, "localhost"))


FIRST_WORDS: Final = {
    "rubbish": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "forged": b"\x17\x03\x03\x00\x20" + bytes(32),
    "alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "end": b"",
}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("fault", [*FIRST_WORDS, "name"])
def test_on_anyio(stacks: tuple[Stack, Stack], backend: str, fault: str) -> None:
    """anyio's TLS stream and ours, in the handshake of a client."""

    async def wrap(stack: Stack, stream: Any, name: str | None) -> Any:
        if isinstance(stack.client, ClientConfig):
            config = stack.server if name is None else stack.client
            return await SecureByteStream.wrap(stream, config, server_hostname=name)
        context = stack.server if name is None else stack.client
        server_side = name is None
        return await TLSStream.wrap(
            stream, hostname=name, ssl_context=context, server_side=server_side
        )

    async def scene(stack: Stack) -> BaseException | None:
        async def serve(stream: anyio.abc.SocketStream) -> None:
            with contextlib.suppress(anyio.BrokenResourceError, ssl.SSLError):
                async with stream:
                    if fault == "name":
                        await wrap(stack, stream, None)
                        return
                    await stream.receive()
                    if FIRST_WORDS[fault]:
                        await stream.send(FIRST_WORDS[fault])
                        await anyio.sleep(0.05)

        met: BaseException | None = None
        async with at_server(serve) as stream:
            try:
                await wrap(stack, stream, "elsewhere" if fault == "name" else "localhost")
            except Exception as error:
                met = error
        assert met is not None
        return met

    check(*(anyio.run(scene, stack, backend=backend) for stack in stacks))
