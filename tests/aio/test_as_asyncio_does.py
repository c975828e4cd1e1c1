"""Habits of programs that asyncio's own TLS transport allows, on that transport and on ours."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aio_glue import Run, echo, loop_factory, plain_server, serving
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from waiting import asyncio_until

from hybridkex import ClientConfig, DevCa, ServerConfig
from hybridkex.aio import (
    SecureConnectionError,
    SecureProtocolError,
    create_connection,
    open_connection,
    start_tls,
)
from hybridkex.aio import create_server as create_secure_server
from hybridkex.aio.channel import _SCRATCH

Factory = Callable[[], asyncio.BaseProtocol]


class Tls:
    """The calls of :mod:`hybridkex.aio` for one pair of configurations."""

    def __init__(self, client: ClientConfig, server: ServerConfig) -> None:
        self._client, self._server = client, server

    async def listen(self, factory: Factory) -> asyncio.Server:
        return await create_secure_server(factory, "127.0.0.1", 0, self._server)

    async def connect(self, factory: Factory, port: int) -> Any:
        transport, _ = await create_connection(
            factory, "127.0.0.1", port, self._client, server_hostname="localhost"
        )
        return transport

    async def upgrade(self, transport: Any, protocol: asyncio.BaseProtocol) -> Any:
        return await start_tls(transport, protocol, self._client, server_hostname="localhost")


class AsyncioTls:
    """The same calls of asyncio's own TLS."""

    def __init__(self, client: ssl.SSLContext, server: ssl.SSLContext) -> None:
        self._client, self._server = client, server

    async def listen(self, factory: Factory) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(factory, "127.0.0.1", 0, ssl=self._server)

    async def connect(self, factory: Factory, port: int) -> Any:
        transport, _ = await asyncio.get_running_loop().create_connection(
            factory, "127.0.0.1", port, ssl=self._client, server_hostname="localhost"
        )
        return transport

    async def upgrade(self, transport: Any, protocol: asyncio.BaseProtocol) -> Any:
        return await asyncio.get_running_loop().start_tls(
            transport, protocol, self._client, server_hostname="localhost"
        )


@pytest.fixture(scope="module")
def contexts(
    ca: DevCa, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder: Path = tmp_path_factory.mktemp("contexts")
    identity = ca.issue("localhost")
    (folder / "cert.pem").write_bytes(
        b"".join(
            x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
            for der in identity.chain
        )
    )
    (folder / "key.pem").write_bytes(
        identity.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return ssl.create_default_context(cadata=ca.pem.decode()), server


@pytest.fixture(params=["hybridkex", "asyncio"])
def tls(
    request: pytest.FixtureRequest,
    client_config: ClientConfig,
    server_config: ServerConfig,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> Tls | AsyncioTls:
    if request.param == "asyncio":
        return AsyncioTls(*contexts)
    return Tls(client_config, server_config)


class Says(asyncio.Protocol):
    """Sends a text at once and keeps what it receives."""

    def __init__(self, text: bytes = b"") -> None:
        self.text = text
        self.received = bytearray()
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.text)

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Small(asyncio.BufferedProtocol):
    """Reads into 1000 bytes and does something at each read."""

    def __init__(self, action: Callable[[Any], object]) -> None:
        self.buffer, self.action = bytearray(1000), action
        self.received = bytearray()
        self.while_paused = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, _: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]
        self.while_paused += not self.transport.is_reading()
        self.action(self.transport)


TEXT = bytes(range(250)) * 40


async def ended(transport: Any, server: asyncio.Server) -> None:
    transport.abort()
    server.close()
    await asyncio.sleep(0.05)


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


def test_reading_is_paused_within_a_record(run: Run, tls: Any) -> None:
    """A buffered protocol that pauses after each of its reads gets one read at a time."""

    async def main() -> None:
        server = await tls.listen(lambda: Says(TEXT))
        protocol = Small(lambda transport: transport.pause_reading())
        transport = await tls.connect(lambda: protocol, port_of(server))
        async with asyncio.timeout(10):
            while len(protocol.received) < len(TEXT):
                before = len(protocol.received)
                transport.resume_reading()
                await asyncio_until(lambda: len(protocol.received) > before)  # noqa: B023
                await asyncio.sleep(0)
                assert len(protocol.received) - before <= 1000
        assert bytes(protocol.received) == TEXT
        assert protocol.while_paused == 0
        await ended(transport, server)

    run(main())


@pytest.mark.parametrize("buffered", [False, True], ids=["protocol", "buffered protocol"])
@pytest.mark.parametrize("paused", [False, True], ids=["reading", "paused"])
def test_a_protocol_is_replaced_within_a_record(
    run: Run, tls: Any, buffered: bool, paused: bool
) -> None:
    """The new protocol gets the rest of the record."""

    async def main() -> None:
        server = await tls.listen(lambda: Says(TEXT))
        new: Any = Small(lambda _: None) if buffered else Says()

        def replace(transport: Any) -> None:
            new.transport = transport
            transport.set_protocol(new)
            if paused:
                transport.pause_reading()

        old = Small(replace)
        transport = await tls.connect(lambda: old, port_of(server))
        await asyncio_until(lambda: old.received)
        if paused:
            await asyncio.sleep(0.05)
            assert not new.received
            transport.resume_reading()
        await asyncio_until(lambda: len(old.received) + len(new.received) == len(TEXT))
        assert len(old.received) == 1000
        assert bytes(old.received + new.received) == TEXT
        await ended(transport, server)

    run(main())


@pytest.mark.parametrize("way", ["close", "abort"])
def test_a_connection_is_closed_within_a_record(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, way: str
) -> None:
    """asyncio's own may deliver one more read after ``close``; ours delivers none."""
    tls = Tls(client_config, server_config)

    async def main() -> None:
        server = await tls.listen(lambda: Says(TEXT))
        protocol = Small(lambda transport: getattr(transport, way)())
        transport = await tls.connect(lambda: protocol, port_of(server))
        await asyncio.sleep(0.1)
        assert bytes(protocol.received) == TEXT[:1000]
        await ended(transport, server)

    run(main())


@pytest.mark.parametrize("way", ["pause_reading", "close", "abort", "set_protocol"])
def test_get_buffer_may_stop_the_reading(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, way: str
) -> None:
    """The protocol whose ``get_buffer`` has paused, closed or replaced it gets no data."""
    tls = Tls(client_config, server_config)

    class Stops(Small):
        def get_buffer(self, sizehint: int) -> bytearray:
            arguments = (Says(),) if way == "set_protocol" else ()
            getattr(self.transport, way)(*arguments)
            return super().get_buffer(sizehint)

    async def main() -> None:
        server = await tls.listen(lambda: Says(TEXT))
        protocol = Stops(lambda _: None)
        transport = await tls.connect(lambda: protocol, port_of(server))
        await asyncio.sleep(0.05)
        assert not protocol.received
        if way == "pause_reading":
            transport.set_protocol(Says())
            transport.resume_reading()
        if way in ("pause_reading", "set_protocol"):
            after = transport.get_protocol()
            await asyncio_until(lambda: bytes(after.received) == TEXT)
        await ended(transport, server)

    run(main())


def test_connection_lost_follows_an_upgrade_that_fails(run: Run, tls: Any) -> None:
    """The protocol had its ``connection_made`` from the plain transport."""

    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"this is not TLS, and long enough for a record")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def main() -> None:
        async with plain_server(no_tls) as port:
            protocol = Says()
            plain, _ = await asyncio.get_running_loop().create_connection(
                lambda: protocol, "127.0.0.1", port
            )
            with pytest.raises((SecureConnectionError, ssl.SSLError)):
                await tls.upgrade(plain, protocol)
            await asyncio_until(lambda: protocol.lost)
            assert len(protocol.lost) == 1
            assert isinstance(protocol.lost[0], SecureConnectionError | ssl.SSLError)

    run(main())


def test_a_file_is_sent(run: Run, tls: Any, tmp_path: Path) -> None:
    """``loop.sendfile``, with which aiohttp serves files; uvloop has none."""
    content = TEXT * 30
    (tmp_path / "file").write_bytes(content)

    async def main() -> None:
        loop, peers = asyncio.get_running_loop(), list[Says]()
        server = await tls.listen(lambda: peers.append(Says()) or peers[-1])  # type: ignore[func-returns-value]
        transport = await tls.connect(Says, port_of(server))
        transport.write(b"before ")
        try:
            with (tmp_path / "file").open("rb") as file:
                sent = await loop.sendfile(transport, file)
        except NotImplementedError:
            assert type(loop).__module__.startswith("uvloop")
        else:
            assert sent == len(content)
            transport.write(b" after")
            whole = b"before " + content + b" after"
            await asyncio_until(lambda: len(peers[0].received) == len(whole))
            assert bytes(peers[0].received) == whole
        await ended(transport, server)

    run(main(), debug=False)  # asyncio itself holds the loop for longer than its debug mode allows


@pytest.mark.parametrize("limits", [(), (0,), (None, 5), (20, 10), (10, 20), (-1,)])
def test_limits_of_the_write_buffer(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, limits: tuple[Any, ...]
) -> None:
    """They may be set at any time, also after the end."""
    tls = Tls(client_config, server_config)
    wrong = limits in ((10, 20), (-1,))

    async def main() -> None:
        server = await tls.listen(Says)
        protocol = Says()
        transport = await tls.connect(lambda: protocol, port_of(server))

        def try_them() -> None:
            with pytest.raises(ValueError) if wrong else contextlib.nullcontext():
                transport.set_write_buffer_limits(*limits)

        try_them()
        transport.abort()
        try_them()
        await asyncio_until(lambda: protocol.lost)
        try_them()
        await ended(transport, server)

    run(main())


@pytest.mark.parametrize("callback", ["pause_writing", "resume_writing"])
def test_flow_control_that_raises_does_not_raise_in_write(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, callback: str
) -> None:
    """The connection ends, as with each other callback, and the writer goes on."""
    tls = Tls(client_config, server_config)

    class Fails(Says):
        def pause_writing(self) -> None:
            if callback == "pause_writing":
                raise KeyError(callback)

        def resume_writing(self) -> None:
            raise KeyError(callback)

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), list[dict[str, Any]]()
        before = loop.get_exception_handler()
        loop.set_exception_handler(lambda _, context: told.append(context))
        server = await tls.listen(Says)
        protocol = Fails()
        transport = await tls.connect(lambda: protocol, port_of(server))
        transport.write(bytes(1 << 20))
        await asyncio_until(lambda: protocol.lost)
        loop.set_exception_handler(before)
        assert [type(context["exception"]) for context in told] == [KeyError]
        assert [type(error) for error in protocol.lost] == [KeyError]
        await ended(transport, server)

    run(main())


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after a pause"])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received"])
def test_a_callback_that_is_cancelled_ends_its_connection_alone(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, callback: str, late: bool
) -> None:
    """A cancelled future's ``result()`` raises CancelledError, which nobody else may get."""
    tls = Tls(client_config, server_config)

    class Cancelled(Says):
        def connection_made(self, transport: Any) -> None:
            if late:
                transport.pause_reading()
                asyncio.get_running_loop().call_later(0.05, transport.resume_reading)

    def raise_it(*_: object) -> None:
        raise asyncio.CancelledError

    setattr(Cancelled, callback, raise_it)

    class Ends(Says):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.close()

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), list[dict[str, Any]]()
        before = loop.get_exception_handler()
        loop.set_exception_handler(lambda _, context: told.append(context))
        server = await tls.listen(lambda: Ends(b"hello"))
        protocol = Cancelled()
        try:
            await tls.connect(lambda: protocol, port_of(server))
        except SecureConnectionError:
            assert callback == "connection_made"
        await asyncio_until(lambda: protocol.lost)
        loop.set_exception_handler(before)
        assert [type(context["exception"]) for context in told] == [asyncio.CancelledError]
        assert [type(error) for error in protocol.lost] == [SecureProtocolError]
        server.close()

    run(main())


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_loops_that_go_on_in_other_threads(
    name: str, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """Connections are made in this thread, and each loop then runs in a thread of its own."""
    factory = loop_factory(name)

    async def begin() -> Any:
        context = serving(server_config, echo)
        port = await context.__aenter__()
        streams = [
            await open_connection("127.0.0.1", port, client_config, server_hostname="localhost")
            for _ in range(4)
        ]
        return context, streams

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for size in range(1000, 60_000, 600):
            text = bytes((size & 255,)) * size
            writer.write(text)
            async with asyncio.timeout(20):
                assert await reader.readexactly(size) == text
        writer.close()
        await writer.wait_closed()

    async def go_on(context: Any, streams: Any) -> None:
        await asyncio.gather(*(talk(*one) for one in streams))
        await context.__aexit__(None, None, None)

    def work(loop: asyncio.AbstractEventLoop, task: Awaitable[None]) -> None:
        try:
            loop.run_until_complete(task)
        except Exception as error:
            failures.append(error)

    failures: list[Exception] = []
    loops = [factory() for _ in range(2)]
    tasks = [go_on(*loop.run_until_complete(begin())) for loop in loops]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(loops, tasks, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loop in loops:
        loop.close()
    assert failures == []


@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
def test_a_time_limit_is_a_number(run: Run, client_config: ClientConfig, name: str) -> None:
    async def main() -> None:
        async with plain_server() as port:
            with pytest.raises(ValueError, match="positive"):
                await open_connection("127.0.0.1", port, client_config, **{name: float("nan")})  # type: ignore[arg-type]

    run(main())


def test_start_tls_is_given_a_writer(run: Run, client_config: ClientConfig) -> None:
    async def main() -> None:
        async with plain_server() as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(TypeError, match="StreamWriter; upgrade takes streams"):
                await start_tls(writer, asyncio.Protocol(), client_config)  # type: ignore[arg-type]
            writer.close()
            await writer.wait_closed()

    run(main())


@pytest.mark.parametrize("end", ["close", "abort", "nothing"])
def test_a_write_after_write_eof_is_refused_until_the_end(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, end: str
) -> None:
    """As over TCP without TLS: it is a mistake of the program in any state of the connection."""
    tls = Tls(client_config, server_config)

    async def main() -> None:
        server = await tls.listen(Says)
        transport = await tls.connect(Says, port_of(server))
        transport.write_eof()
        if end != "nothing":
            getattr(transport, end)()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"write\(\) after write_eof\(\)"):
                transport.write(b"more")
            await asyncio.sleep(0.02)
        await ended(transport, server)

    run(main())


def test_a_callback_runs_the_loop(
    run: Run, server_config: ServerConfig, client_config: ClientConfig
) -> None:
    """With nest_asyncio a callback can: other connections then read into the shared buffer."""
    piece = 16_384

    class Updating(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            for number in range(4):  # what is behind a key update is delivered by itself
                transport.write(bytes([number]) * piece)
                transport.update_keys()

    class Overwritten(asyncio.Protocol):
        def __init__(self) -> None:
            self.received = bytearray()
            self.lost: Exception | None = None

        def data_received(self, data: bytes) -> None:
            self.received += data
            _SCRATCH.view[:] = bytes(len(_SCRATCH.view))

        def connection_lost(self, error: Exception | None) -> None:
            self.lost = error

    async def main() -> None:
        server = await create_secure_server(Updating, "127.0.0.1", 0, server_config)
        protocol = Overwritten()
        transport, _ = await create_connection(
            lambda: protocol,
            "127.0.0.1",
            port_of(server),
            client_config,
            server_hostname="localhost",
        )
        await asyncio_until(lambda: len(protocol.received) == 4 * piece or protocol.lost)
        assert protocol.lost is None
        assert protocol.received == b"".join(bytes([number]) * piece for number in range(4))
        await ended(transport, server)

    run(main())
