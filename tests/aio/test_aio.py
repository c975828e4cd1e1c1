"""The asyncio shell: streams, protocols, upgrades, on asyncio's loop and on uvloop."""

import asyncio
import contextlib
import os
import random
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aio_glue import Losing, Run, closed, connect, echo, plain_server, serving
from waiting import asyncio_until

from hybridkex import X25519, ClientConfig, DevCa, Policy, Requirement, ServerConfig, TrustStore
from hybridkex.aio import (
    SecureConnectionError,
    SecureTransport,
    create_connection,
    create_server,
    start_server,
    upgrade,
)
from hybridkex.auth.dev_ca import write_identity
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    HandshakeTimeout,
    LocalStateError,
    TruncationError,
)
from hybridkex.shell.ssl_facade import serial_number


def test_echo(run: Run, client_config: ClientConfig, server_config: ServerConfig) -> None:
    async def main() -> None:
        async with serving(server_config) as port:
            reader, writer = await connect(port, client_config)
            for size in (1, 100, 1 << 14, (1 << 14) + 1, 1 << 20):
                data = os.urandom(size)
                writer.write(data)
                assert await reader.readexactly(size) == data
            session = writer.get_extra_info("hybridkex_session")
            assert session.group == "X25519MLKEM768"
            await closed(writer)

    run(main())


def test_what_is_known_of_a_connection(
    run: Run, ca: DevCa, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    server_config = replace(server_config, alpn=("h2", "http/1.1"))
    client_config = replace(client_config, alpn=("http/1.1",))

    async def main() -> None:
        async with serving(server_config) as port:
            _, writer = await connect(port, client_config)
            known = writer.get_extra_info
            assert known("peername") == ("127.0.0.1", port)
            assert known("sockname")[0] == "127.0.0.1"
            assert known("socket").fileno() >= 0
            assert known("sslcontext") is client_config
            assert known("cipher") == known("ssl_object").cipher()
            assert known("cipher")[1] == "TLSv1.3"
            assert known("ssl_object").version() == "TLSv1.3"
            assert known("ssl_object").selected_alpn_protocol() == "http/1.1"
            assert known("peercert")["subjectAltName"] == (("DNS", "localhost"),)
            assert known("no such thing", 5) == 5
            await closed(writer)

    run(main())


def test_peercert_is_what_the_ssl_module_gives(
    run: Run, tmp_path: Path, ca: DevCa, client_config: ClientConfig
) -> None:
    identity = ca.issue("localhost", "127.0.0.1")
    write_identity(tmp_path, ca, identity)
    theirs = ssl._ssl._test_decode_cert(str(tmp_path / "cert.pem"))  # type: ignore[attr-defined]

    async def main() -> Any:
        async with serving(ServerConfig(identities=(identity,))) as port:
            _, writer = await connect(port, client_config)
            found = writer.get_extra_info("peercert")
            await closed(writer)
            return found

    found = run(main())
    assert {"subject", "issuer", "subjectAltName", "notAfter"} <= found.keys()
    assert found == {name: theirs[name] for name in found}


def test_serial_numbers_are_whole_bytes() -> None:
    numbers = {0x5: "05", 0x56A: "056A", 0x1000: "1000", 0xFF: "FF", 1 << 158: "40" + "00" * 19}
    assert {number: serial_number(number) for number in numbers} == numbers


def test_half_close_in_both_directions(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        await closed(writer)

    async def main() -> None:
        async with serving(server_config, upper) as port:
            reader, writer = await connect(port, client_config)
            writer.write(b"half")
            assert writer.can_write_eof()
            writer.write_eof()
            with pytest.raises(RuntimeError):
                writer.write(b"more")
            assert await reader.read() == b"HALF"
            await closed(writer)

    run(main())


def test_a_reader_that_never_reads_holds_little(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """The peer's writes stop; what this side holds is bounded by one read and the limit."""
    total = 16 << 20

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < total:
                writer.write(bytes(1 << 16))
                sent += 1 << 16
                await writer.drain()
                assert writer.transport.get_write_buffer_size() < 1 << 20
        writer.close()

    async def main() -> None:
        async with serving(server_config, flood) as port:
            reader, writer = await connect(port, client_config)
            await asyncio.sleep(0.3)
            held = sum(map(len, writer.transport.receiver._held)) + len(reader._buffer)  # type: ignore[attr-defined]
            assert held <= (1 << 18) + 2 * (1 << 16)
            assert len(await reader.readexactly(total)) == total
            assert await reader.read() == b""
            await closed(writer)

    run(main())


def test_writes_are_joined(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def main() -> None:
        async with serving(server_config) as port:
            reader, writer = await connect(port, client_config)
            sent: list[int] = []
            raw = writer.transport._life.raw  # type: ignore[attr-defined]
            write = raw.write
            raw_write = lambda data: (sent.append(len(data)), write(data))[1]  # noqa: E731
            try:
                raw.write = raw_write
            except AttributeError:
                raw_write = None  # uvloop's transports are closed to that
            for piece in (b"a", b"b", b"c"):
                writer.write(piece)
            assert await reader.readexactly(3) == b"abc"
            if raw_write is not None:
                assert len(sent) == 1
            await closed(writer)

    run(main())


@pytest.mark.parametrize("cut", [0, 1, 5, 400])
def test_a_peer_that_goes_away(run: Run, client_config: ClientConfig, cut: int) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(cut or 1)
        writer.close()

    async def main() -> None:
        async with plain_server(leave) as port:
            with pytest.raises(SecureConnectionError) as caught:
                await connect(port, client_config)
            assert isinstance(caught.value.__cause__, TruncationError)

    run(main())


def test_a_peer_that_is_silent(run: Run, client_config: ClientConfig) -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            gone.set()

        async with plain_server(wait) as port:
            with pytest.raises(SecureConnectionError) as caught:
                await connect(port, client_config, ssl_handshake_timeout=0.2)
            assert isinstance(caught.value.__cause__, HandshakeTimeout)
            await gone.wait()

    run(main())


def test_a_server_that_is_not_trusted(run: Run, server_config: ServerConfig) -> None:
    other = ClientConfig(verifier=TrustStore((DevCa.create().certificate,)))

    async def main() -> None:
        async with serving(server_config) as port:
            with pytest.raises(SecureConnectionError) as caught:
                await connect(port, other)
            assert isinstance(caught.value.__cause__, CertificateRejected)

    run(main())


def test_truncation_is_an_error(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"half of it")
        await writer.drain()
        writer.transport._life.raw.close()  # type: ignore[attr-defined]
        assert writer.is_closing()

    async def main() -> None:
        async with serving(server_config, cut) as port:
            reader, writer = await connect(port, client_config)
            with pytest.raises(SecureConnectionError) as caught:
                await reader.read()
            assert isinstance(caught.value.__cause__, TruncationError)
            writer.close()

    run(main())


def test_rubbish_after_the_handshake(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def rubbish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport._life.raw.write(b"\x17\x03\x03\x00\x20" + bytes(32))  # type: ignore[attr-defined]
        with pytest.raises(SecureConnectionError, match="bad_record_mac"):
            await reader.read()
        writer.close()

    async def main() -> None:
        async with serving(server_config, rubbish) as port:
            reader, writer = await connect(port, client_config)
            with pytest.raises(SecureConnectionError):
                await reader.read()
            writer.close()

    run(main())


def test_abort_in_each_state(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def main() -> None:
        async with serving(server_config) as port:
            for prepare, after in (
                (lambda _: None, contextlib.nullcontext()),
                (lambda one: one.write(bytes(1 << 22)), contextlib.nullcontext()),
                (lambda one: one.pause_reading(), contextlib.nullcontext()),
                (lambda one: one.write_eof(), pytest.raises(RuntimeError, match="write_eof")),
                (lambda one: one.close(), contextlib.nullcontext()),
                (lambda one: one.abort(), contextlib.nullcontext()),
            ):
                transport, protocol = await create_connection(
                    Losing, "127.0.0.1", port, client_config, server_hostname="localhost"
                )
                prepare(transport)
                transport.abort()
                transport.abort()
                await asyncio_until(lambda: bool(protocol.lost))  # noqa: B023
                await asyncio.sleep(0.02)
                assert protocol.lost == [None]
                assert transport.is_closing()
                with after:
                    transport.write(b"into the void")

    run(main())


@pytest.mark.parametrize("early", [False, True])
def test_an_upgrade_in_the_middle(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, early: bool
) -> None:
    """As STARTTLS; plain bytes that an attacker puts ahead of the handshake are refused."""

    async def server_side(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\ninjected" if early else b"go\n")
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            await echo(*await upgrade(reader, writer, server_config))

    async def main() -> None:
        async with plain_server(server_side) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"go\n"
            if early:
                with pytest.raises(LocalStateError):
                    await upgrade(reader, writer, client_config, server_hostname="localhost")
            else:
                plain = writer
                reader, writer = await upgrade(
                    reader, plain, client_config, server_hostname="localhost"
                )
                writer.write(b"secret")
                assert await reader.readexactly(6) == b"secret"
                await closed(writer)
                await plain.wait_closed()

    run(main())


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_close_after_an_upgrade(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, first: str
) -> None:
    """Whoever ends its direction first still hears the other."""
    heard: dict[str, bytes] = {}

    async def converse(
        name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if name != first:
            heard[name] = await reader.read()
            await asyncio.sleep(0.05)
        writer.write(name.encode())
        writer.write_eof()
        if name == first:
            heard[name] = await reader.read()
        await closed(writer)

    async def server_side(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await converse("server", *await upgrade(reader, writer, server_config))

    async def main() -> None:
        async with plain_server(server_side) as port:
            plain = await asyncio.open_connection("127.0.0.1", port)
            streams = await upgrade(*plain, client_config, server_hostname="localhost")
            await converse("client", *streams)
            await asyncio_until(lambda: len(heard) == 2)
        assert heard == {"client": b"server", "server": b"client"}

    run(main())


def test_a_buffered_protocol(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    class Small(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer, self.got = bytearray(7), bytearray()

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.buffer[:nbytes]

    async def main() -> None:
        async with serving(server_config) as port:
            transport, protocol = await create_connection(
                Small, "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            data = os.urandom(100_000)
            transport.write(data)
            await asyncio_until(lambda: len(protocol.got) == len(data))
            assert protocol.got == data
            transport.close()
            await asyncio_until(lambda: transport._life.state.name == "CLOSED")

    run(main())


def test_random_pauses_and_sizes(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """Every byte arrives once and in order, however the application pauses."""
    chance = random.Random(20261126)

    class Picky(asyncio.Protocol):
        transport: SecureTransport

        def __init__(self) -> None:
            self.got = bytearray()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, SecureTransport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.got += data
            if chance.random() < 0.5:
                self.transport.pause_reading()
                asyncio.get_running_loop().call_later(
                    chance.random() / 500, self.transport.resume_reading
                )

    async def main() -> None:
        async with serving(server_config) as port:
            transport, protocol = await create_connection(
                Picky, "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            sent = bytearray()
            while len(sent) < 1 << 20:
                piece = os.urandom(chance.choice((1, 10, 1000, 20_000, 100_000)))
                sent += piece
                transport.write(piece)
                await asyncio.sleep(0)
            transport.write_eof()
            await asyncio_until(lambda: transport._life.state.name == "CLOSED")
            assert protocol.got == sent

    run(main())


def test_a_stock_client(run: Run, tmp_path: Path, ca: DevCa, server_config: ServerConfig) -> None:
    """The ssl module as the client, which has no ML-KEM before OpenSSL 3.5."""
    write_identity(tmp_path, ca, ca.issue("localhost"))
    config = replace(
        server_config, groups=(X25519,), policy=Policy(post_quantum=Requirement.PREFER)
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))

    async def main() -> None:
        async with serving(config) as port:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname="localhost"
            )
            writer.write(b"hello" * 1000)
            assert await reader.readexactly(5000) == b"hello" * 1000
            await closed(writer)

    run(main())


def test_a_stock_server(run: Run, tmp_path: Path, ca: DevCa, client_config: ClientConfig) -> None:
    write_identity(tmp_path, ca, ca.issue("localhost"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    config = replace(
        client_config, groups=(X25519,), policy=Policy(post_quantum=Requirement.PREFER)
    )

    async def main() -> None:
        async with plain_server(echo, ssl=context) as port:
            reader, writer = await connect(port, config)
            writer.write(b"hello" * 1000)
            assert await reader.readexactly(5000) == b"hello" * 1000
            await closed(writer)

    run(main())


def test_strangers_do_not_end_a_server(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def main() -> None:
        async with serving(server_config, ssl_handshake_timeout=0.3) as port:
            for rubbish in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x05\x01", bytes(99)):
                for _ in range(25):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(rubbish)
                    if random.random() < 0.5:
                        writer.transport.abort()
                    else:
                        await closed(writer)
            reader, writer = await connect(port, client_config)
            writer.write(b"still here")
            assert await reader.readexactly(10) == b"still here"
            await closed(writer)

    run(main())


def test_servers_take_a_server_config(run: Run, client_config: ClientConfig) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="ServerConfig"):
            await create_server(asyncio.Protocol, "127.0.0.1", 0, client_config)  # type: ignore[arg-type]

    run(main())


def test_closing_right_after_a_pause(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """The peer's close_notify is read even if reading was about to be resumed."""

    async def main() -> None:
        async with serving(server_config) as port:
            reader, writer = await connect(port, client_config, ssl_shutdown_timeout=20)
            for _ in range(10):
                writer.write(bytes(1 << 20))
                await reader.readexactly(1 << 20)
            async with asyncio.timeout(10):
                await closed(writer)

    run(main())


@pytest.mark.skipif(
    not hasattr(asyncio.Server, "close_clients"),
    reason="Server.close_clients is new in Python 3.13: run the tests there",
)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_server_ends_its_connections(
    client_config: ClientConfig, server_config: ServerConfig, how: str
) -> None:
    """``close_clients`` loses nothing that was written and sends close_notify."""
    sent = os.urandom(5_000_000)
    ended: list[Exception | None] = []

    async def main() -> None:
        begun = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(sent)
            begun.set()
            try:
                await writer.wait_closed()
                ended.append(None)
            except Exception as error:
                ended.append(error)

        server = await start_server(handler, "127.0.0.1", 0, server_config)
        reader, writer = await connect(server.sockets[0].getsockname()[1], client_config)
        await begun.wait()
        getattr(server, f"{how}_clients")()
        if how == "close":
            assert await reader.read() == sent
        else:
            with pytest.raises(SecureConnectionError):
                await reader.read()
        writer.close()
        with contextlib.suppress(SecureConnectionError):
            await writer.wait_closed()
        server.close()
        await server.wait_closed()

    asyncio.run(main(), debug=True)
    assert ended == [None]
