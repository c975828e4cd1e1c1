"""The asyncio shell where something goes wrong: callbacks that raise, tasks that are cancelled,
peers that send rubbish, connections within connections."""

import asyncio
import contextlib
import errno
import functools
import gc
import inspect
import os
import random
import resource
import socket
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aio_glue import Losing, Run, closed, connect, echo, hello_of, plain_server, serving
from waiting import asyncio_until

from hybridkex import (
    ClientConfig,
    FreshKeys,
    OneTimePad,
    Policy,
    QkdPskSource,
    Requirement,
    ServerConfig,
    ServerConnection,
)
from hybridkex.aio import (
    SecureConnectionAborted,
    SecureConnectionError,
    SecureTransport,
    create_connection,
    create_server,
    start_server,
    start_tls,
    upgrade,
)
from hybridkex.errors import (
    ConfigError,
    InternalError,
    KeySourceExhausted,
    LocalStateError,
    PadExhausted,
    TruncationError,
)
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.shell import pad_filler
from hybridkex.shell.ticket_file import FileTicketStore
from hybridkex.tls.session import Session

CALLBACKS = ("connection_made", "data_received", "eof_received", "get_buffer", "buffer_updated")


class Boom(Exception):
    """What the application's callbacks raise here."""


def failing(callback: str, lost: list[Exception | None]) -> type[asyncio.BaseProtocol]:
    """A protocol whose ``callback`` raises."""
    base: Any = asyncio.BufferedProtocol if "buffer" in callback else asyncio.Protocol

    class Failing(base):  # type: ignore[misc]
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray(10)

        def buffer_updated(self, nbytes: int) -> None: ...

        def connection_lost(self, exc: Exception | None) -> None:
            lost.append(exc)

    def fail(*_: object) -> None:
        raise Boom(callback)

    setattr(Failing, callback, fail)
    return Failing


async def say_and_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        await reader.read()
    await asyncio.sleep(0)
    writer.close()


@contextlib.contextmanager
def reported() -> Any:
    """What the loop's exception handler is told meanwhile."""
    loop, told = asyncio.get_running_loop(), list[dict[str, Any]]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:
        yield told
    finally:
        loop.set_exception_handler(before)


@pytest.mark.parametrize("qkd", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_callback_raises(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, callback: str, qkd: bool
) -> None:
    """The connection ends, the peer is told, the exception is reported and nobody hangs."""
    if qkd:
        alice, bob = in_process_pair("alice", "bob")
        client_config = replace(client_config, psk_source=QkdPskSource(alice))
        server_config = replace(server_config, psk_source=QkdPskSource(bob))
    ends: list[Exception | None] = []

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.write_eof()
        try:
            await reader.read()
        except ConnectionError as error:
            ends.append(error)
        else:
            ends.append(None)
        writer.close()

    async def main() -> None:
        lost: list[Exception | None] = []
        async with asyncio.timeout(5), serving(server_config, watch) as port:
            with reported() as told:
                made = create_connection(
                    failing(callback, lost),
                    "127.0.0.1",
                    port,
                    client_config,
                    server_hostname="localhost",
                )
                with contextlib.suppress(Boom):
                    await made
                await asyncio_until(lambda: bool(lost) and bool(ends))
            assert [type(context["exception"]) for context in told] == [Boom]
            assert [type(error) for error in lost] == [Boom]
            assert isinstance(ends[0], SecureConnectionError)
            assert "internal_error" in str(ends[0])

    run(main())


def test_a_callback_raises_when_reading_is_resumed(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    lost: list[Exception | None] = []

    class Late(failing("data_received", lost)):  # type: ignore[misc]
        def connection_made(self, transport: SecureTransport) -> None:
            transport.pause_reading()
            asyncio.get_running_loop().call_later(0.1, transport.resume_reading)

    async def main() -> None:
        async with serving(server_config, say_and_end) as port:
            with reported() as told:
                await create_connection(
                    Late, "127.0.0.1", port, client_config, server_hostname="localhost"
                )
                await asyncio_until(lambda: bool(lost))
            assert len(told) == 1
            assert isinstance(lost[0], Boom)

    run(main())


@pytest.mark.parametrize("end", ["close", "write_eof"])
@pytest.mark.parametrize("extended", [True, False])
def test_no_key_update_after_the_end(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, extended: bool, end: str
) -> None:
    """Also while data waits, and with Extended Key Update."""
    if extended:
        fresh, policy = FreshKeys(every=3600), Policy(fresh_keys=Requirement.REQUIRE)
        client_config = replace(client_config, fresh_keys=fresh, policy=policy)
        server_config = replace(server_config, fresh_keys=fresh, policy=policy, tickets=None)

    async def main() -> None:
        far = Losing()
        server = await create_server(lambda: far, "127.0.0.1", 0, server_config)
        port = server.sockets[0].getsockname()[1]
        transport, _ = await create_connection(
            Losing, "127.0.0.1", port, client_config, server_hostname="localhost"
        )
        transport.write(bytes(20_000_000))
        getattr(transport, end)()
        with pytest.raises(LocalStateError):
            transport.update_keys()
        transport.abort()
        await asyncio_until(lambda: bool(far.lost))
        server.close()
        await server.wait_closed()

    run(main())


@pytest.mark.parametrize("end", ["abort", "close"])
def test_nothing_is_delivered_after_the_end(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, end: str
) -> None:
    """Data, a KeyUpdate and more data in one read: the first piece makes the application end."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(5):
            writer.write(b"x" * 20_000)
            writer.transport.update_keys()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    class Ending(asyncio.Protocol):
        transport: SecureTransport
        after = 0
        ended = lost = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, SecureTransport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.after += self.ended
            self.ended = True
            getattr(self.transport, end)()
            assert self.transport.is_closing()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost = True
            assert exc is None

    async def main() -> None:
        async with serving(server_config, talk) as port:
            _, protocol = await create_connection(
                Ending, "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            await asyncio_until(lambda: protocol.lost)
            assert protocol.after == 0

    run(main())


def test_the_end_is_not_delivered_while_reading_is_paused(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    class Paused(asyncio.Protocol):
        ends = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, SecureTransport)
            self.transport = transport
            transport.pause_reading()

        def eof_received(self) -> None:
            self.ends += 1

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await closed(writer)

    async def main() -> None:
        async with serving(server_config, end) as port:
            transport, protocol = await create_connection(
                Paused, "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            await asyncio.sleep(0.1)
            assert protocol.ends == 0
            transport.resume_reading()
            await asyncio_until(lambda: protocol.ends == 1)

    run(main())


@pytest.mark.parametrize("kind", ["secure in secure", "ours in theirs", "theirs in ours"])
def test_a_connection_within_a_connection(
    run: Run,
    ca: Any,
    tmp_path: Any,
    client_config: Any,
    server_config: Any,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """As through an HTTPS proxy: TLS to the proxy, and TLS through it."""
    import ssl

    from hybridkex.auth.dev_ca import write_identity

    write_identity(tmp_path, ca, ca.issue("localhost"))
    stock = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    stock.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))

    async def inside(reader: Any, writer: Any) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(b"ready\n")
            if kind == "theirs in ours":
                await writer.start_tls(stock)
            else:
                reader, writer = await upgrade(reader, writer, server_config)
            await echo(reader, writer)

    async def main() -> None:
        if kind == "theirs in ours" and "uvloop" in type(asyncio.get_running_loop()).__module__:
            pytest.skip("uvloop's start_tls takes no transport but its own")
        if kind == "ours in theirs":
            server = await asyncio.start_server(inside, "127.0.0.1", 0, ssl=stock)
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=trusting, server_hostname="localhost"
            )
        else:
            from hybridkex.aio import start_server

            server = await start_server(inside, "127.0.0.1", 0, server_config)
            port = server.sockets[0].getsockname()[1]
            reader, writer = await connect(port, client_config)
        # What comes with the outer handshake's end is data of the outer connection.
        assert await reader.readline() == b"ready\n"
        if kind == "theirs in ours":
            await writer.start_tls(trusting, server_hostname="localhost")
        else:
            reader, writer = await upgrade(
                reader, writer, client_config, server_hostname="localhost"
            )
        data = os.urandom(700_000)
        for _ in range(3):
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            if kind == "secure in secure":
                # A record that is no data lies behind data in the outer's read buffer.
                outer = writer.transport._life.raw
                outer.update_keys()
                writer.transport.update_keys()
        writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(main())
    assert "eof_received" not in caplog.text  # a warning of asyncio's


def test_a_writer_whose_upgrade_fails_is_closed(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"500 no TLS here\n" * 10)
        await reader.read(1)
        await closed(writer)

    async def main() -> None:
        async with plain_server(refuse) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0)  # nothing has come yet
            with pytest.raises((SecureConnectionError, LocalStateError)):
                await upgrade(reader, writer, client_config, server_hostname="localhost")
            async with asyncio.timeout(5):
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    run(main())


@pytest.mark.parametrize("cancelled", [True, False])
def test_an_upgrade_twice(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, cancelled: bool
) -> None:
    """The second one is refused, and the first one works. One that was cancelled before it began is
    no obstacle."""
    begun = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = asyncio.ensure_future(upgrade(reader, writer, server_config))
        if cancelled:
            first.cancel()
            await asyncio.wait((first,))
            first = asyncio.ensure_future(upgrade(reader, writer, server_config))
        await asyncio.sleep(0)  # it begins
        begun.set()
        secure = await first
        with pytest.raises(SecureConnectionError, match="secured already"):
            await upgrade(reader, writer, server_config)
        await echo(*secure)

    async def main() -> None:
        async with plain_server(serve) as port:
            plain = await asyncio.open_connection("127.0.0.1", port)
            await begun.wait()
            reader, writer = await upgrade(*plain, client_config, server_hostname="localhost")
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            await closed(writer)

    run(main())


@pytest.mark.parametrize("size", [6, 16_384, 2_000_000])
@pytest.mark.parametrize("where", ["a task", "a callback", "a task, then close"])
def test_a_key_update_follows_the_data_that_was_written_before_it(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    where: str,
) -> None:
    """And precedes what is written behind it."""
    sealed, updates = [0], list[int]()
    seal, send = ServerConnection.seal_record, ServerConnection.send_data
    update = ServerConnection.update_keys

    def seal_record(self: ServerConnection, data: bytes) -> Any:
        record = seal(self, data)
        sealed[0] += len(data) if record is not None else 0
        return record

    def send_data(self: ServerConnection, data: Any) -> None:
        sealed[0] += len(data)
        send(self, data)

    def update_keys(self: ServerConnection, **options: Any) -> None:
        update(self, **options)
        updates.append(sealed[0])

    monkeypatch.setattr(ServerConnection, "seal_record", seal_record)
    monkeypatch.setattr(ServerConnection, "send_data", send_data)
    monkeypatch.setattr(ServerConnection, "update_keys", update_keys)

    class Answers(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            if where != "a callback":
                asyncio.get_running_loop().call_soon(self.answer)

        def data_received(self, data: bytes) -> None:
            if where == "a callback":
                self.answer()

        def answer(self) -> None:
            self.transport.writelines((b"first", bytes(size - 5)))
            self.transport.update_keys()
            self.transport.write(bytes(size))
            self.transport.update_keys(request_peer=True)
            self.transport.update_keys()
            self.transport.write(b"end")
            if "close" in where:
                self.transport.close()
                with pytest.raises(LocalStateError, match="before the connection is closed"):
                    self.transport.update_keys()

    async def main() -> None:
        server = await create_server(Answers, "127.0.0.1", 0, server_config)
        reader, writer = await connect(server.sockets[0].getsockname()[1], client_config)
        writer.write(b"?")
        assert (await reader.readexactly(2 * size + 3)).endswith(b"end")
        await closed(writer)
        server.close()

    run(main())
    assert updates == [size, 2 * size, 2 * size]


def test_a_key_update_behind_each_message(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """More of them than a peer accepts in a row."""

    async def main() -> None:
        async with serving(server_config) as port:
            reader, writer = await connect(port, client_config)
            for _ in range(100):
                writer.write(b"message")
                await writer.drain()
                writer.transport.update_keys()  # type: ignore[attr-defined]
            assert await reader.readexactly(700) == b"message" * 100
            await closed(writer)

    run(main())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "no configuration": ({"config": None}, ConfigError),
    "no name": ({"server_hostname": ""}, ConfigError),
    "an impossible name": ({"server_hostname": "a..b"}, ConfigError),
    "a handshake timeout": ({"ssl_handshake_timeout": -1}, ValueError),
    "a shutdown timeout": ({"ssl_shutdown_timeout": 0}, ValueError),
    "an unknown option": ({"host": "localhost"}, TypeError),
    "a limit": ({"limit": 0}, ValueError),
    "a task that reads": ({}, RuntimeError),
}


@pytest.mark.parametrize("how", [*REFUSED, "nothing: start_tls"])
def test_a_plain_connection_whose_upgrade_is_refused_goes_on(
    run: Run, client_config: ClientConfig, how: str
) -> None:
    """Its arguments are checked before the transport is touched."""
    change, error = REFUSED.get(how, ({"config": None}, ConfigError))
    arguments = {"config": client_config, "server_hostname": "localhost", **change}

    async def main() -> None:
        async with plain_server() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            line = asyncio.ensure_future(reader.readline())
            if "task" in how:
                await asyncio.sleep(0)
            else:
                line.cancel()
            streams: Any = (reader, writer)
            if "start_tls" in how:
                streams = (writer.transport, asyncio.Protocol())
            with pytest.raises(error):
                await (start_tls if "start_tls" in how else upgrade)(*streams, **arguments)
            plain: Any = writer.transport
            assert plain.is_reading()
            writer.write(b"in the clear\n")
            assert await (line if "task" in how else reader.readline()) == b"in the clear\n"
            await closed(writer)

    run(main())


def test_an_upgrade_of_a_closed_connection(run: Run, client_config: ClientConfig) -> None:
    async def main() -> None:
        async with plain_server(echo) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            await closed(writer)
            with pytest.raises(SecureConnectionError, match="closed"):
                await start_tls(
                    writer.transport, asyncio.Protocol(), client_config, server_hostname="localhost"
                )

    run(main())


@pytest.mark.parametrize("role", ["client", "client with a ticket file", "server"])
def test_an_upgrade_of_a_connection_whose_sending_direction_is_closed(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    role: str,
    tmp_path: Path,
) -> None:
    """Where the transport takes no data, at once or later, the caller and the protocol learn it."""
    lost, name = Losing(), {"server_hostname": "localhost"}
    config: Any = client_config
    if role == "server":
        config, name = server_config, {}
    elif "file" in role:
        config = replace(client_config, ticket_store=FileTicketStore(tmp_path / "tickets"))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        if role == "server":
            writer.write(hello_of(client_config))
        await reader.read()
        await closed(writer)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with plain_server(talk) as port:
            plain, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
            plain.write_eof()
            with pytest.raises(SecureConnectionAborted, match=r"write_eof\(\)") as caught:
                await start_tls(plain, lost, config, **name)
            assert isinstance(caught.value.__cause__, LocalStateError)
            await asyncio_until(lambda: bool(lost.lost))
            assert lost.lost == [caught.value]

    run(main())


@pytest.mark.parametrize("family", ["TCP", "Unix"])
@pytest.mark.parametrize("end", ["abort", "close", "reset"])
def test_names_after_the_end(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    family: str,
    end: str,
    tmp_path: Path,
) -> None:
    """``get_extra_info`` answers as before, also where nobody has asked before."""
    names = ("peername", "sockname", "socket", "cipher", "hybridkex_session", "pipe", "none")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        if family == "TCP":
            with socket.create_server(("127.0.0.1", 0)) as listening:
                one = socket.create_connection(listening.getsockname())
                other, _ = listening.accept()
        else:
            one, other = socket.socketpair()
        for each in (one, other):
            each.setblocking(False)
        expected = [(each.getpeername(), each.getsockname()) for each in (one, other)]
        inner = SecureTransport(asyncio.Protocol(), server_config)
        await loop.connect_accepted_socket(lambda: inner.receiver, other)
        outer, _ = await create_connection(
            asyncio.Protocol, None, None, client_config, server_hostname="localhost", sock=one
        )
        both = (outer, inner)
        await asyncio_until(lambda: inner._life.session is not None)
        if end == "reset" and family == "TCP":
            linger = struct.pack("ii", 1, 0)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        outer.close() if end == "close" else outer.abort()

        await asyncio_until(lambda: all(each._life.state.name == "CLOSED" for each in both))
        found = [[each.get_extra_info(name) for name in names] for each in both]
        assert [(peer, own) for peer, own, *_ in found] == expected
        assert all(None not in answers[:5] for answers in found)
        assert all(answers[5:] == [None, None] for answers in found)
        assert all(each.get_extra_info("none", 5) == 5 for each in both)
        for each in (one, other):
            each.close()

    run(main())


def test_an_upgrade_of_a_connection_that_is_full(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """pause_writing and resume_writing come in pairs."""
    calls: list[str] = []

    class Watch(asyncio.Protocol):
        def pause_writing(self) -> None:
            calls.append("pause")

        def resume_writing(self) -> None:
            calls.append("resume")

    size = 8 << 20

    async def slow(listening: socket.socket) -> None:
        """Reads what comes in the clear, late, and not a byte of what follows."""
        loop = asyncio.get_running_loop()
        accepted, _ = await loop.sock_accept(listening)
        accepted.setblocking(False)
        await asyncio.sleep(0.1)
        left = size
        while left:
            left -= len(await loop.sock_recv(accepted, min(left, 1 << 16)))
        inner = SecureTransport(asyncio.Protocol(), server_config)
        await loop.connect_accepted_socket(lambda: inner.receiver, accepted)
        await asyncio_until(lambda: inner._life.state.name == "CLOSED")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            serving = asyncio.ensure_future(slow(listening))
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(bytes(size))
            secure = await start_tls(
                writer.transport, Watch(), client_config, server_hostname="localhost"
            )
            secure.write(bytes(size))
            await asyncio_until(lambda: secure.get_write_buffer_size() == 0)
            secure.abort()
            await serving
        assert calls[::2] == ["pause"] * len(calls[::2])
        assert calls[1::2] == ["resume"] * len(calls[1::2])
        assert calls
        await asyncio.sleep(0.05)

    run(main())


def test_a_peer_that_does_not_read_until_the_end(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """Data that was written and never taken is no clean end."""
    done = asyncio.Event()

    async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.transport.abort()

    async def main() -> None:
        async with serving(server_config, idle) as port:
            transport, protocol = await create_connection(
                Losing,
                "127.0.0.1",
                port,
                client_config,
                server_hostname="localhost",
                ssl_shutdown_timeout=0.2,
            )
            transport.write(bytes(32 << 20))
            transport.close()
            await asyncio_until(lambda: bool(protocol.lost))
            done.set()
            assert isinstance(protocol.lost[0], SecureConnectionError)
            assert isinstance(protocol.lost[0].__cause__, TruncationError)
            await asyncio.sleep(0.05)

    run(main())


def test_a_connection_that_is_closed_below_is_no_clean_end(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def main() -> None:
        async with serving(server_config) as port:
            reader, writer = await connect(port, client_config)
            writer.transport._life.raw.close()  # type: ignore[attr-defined]
            with pytest.raises(SecureConnectionError):
                await reader.read()
            writer.close()

    run(main())


def test_a_wait_for_a_key_that_is_cancelled(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """Somebody cancels every task of the loop: the connection fails, and does not hang."""

    asked: list[bool] = []

    class Never:
        def authorize(self, session: Any, missing: str | None) -> Any:
            return session

        async def offer(self) -> Any:
            asked.append(True)
            await asyncio.sleep(3600)

        async def look_up(self, identities: tuple[bytes, ...]) -> Any:
            raise AssertionError

    config = replace(client_config, psk_source=Never())

    async def main() -> None:
        async with serving(server_config) as port:
            before = asyncio.all_tasks()
            made = asyncio.ensure_future(connect(port, config))
            await asyncio_until(lambda: bool(asked))
            for task in asyncio.all_tasks() - before - {made}:
                task.cancel()
            with pytest.raises(SecureConnectionError) as caught:
                await made
            assert isinstance(caught.value.__cause__, InternalError)

    run(main())


@pytest.mark.parametrize("psk", [False, True], ids=["", "with QKD keys"])
@pytest.mark.parametrize("role", ["client", "server"])
def test_all_tasks_are_cancelled_when_a_connection_is_made(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, role: str, psk: bool
) -> None:
    """The task that renews the keys has had no step yet; what the policy requires holds."""
    options: dict[str, Any] = {
        "policy": Policy(fresh_keys=Requirement.REQUIRE),
        "fresh_keys": FreshKeys(every=3600),
    }
    client = replace(client_config, **options)
    server = replace(server_config, tickets=None, **options)
    if psk:
        alice, bob = map(QkdPskSource, in_process_pair("alice", "bob"))
        client, server = replace(client, psk_source=alice), replace(server, psk_source=bob)
    spared: set[Any] = set()

    class Cancelling(Losing):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            for task in asyncio.all_tasks() - spared:
                task.cancel()

    async def main() -> None:
        spared.add(asyncio.current_task())
        here, there = Cancelling(), Losing()
        ours, theirs = (here, there) if role == "client" else (there, here)
        listening = await create_server(lambda: theirs, "127.0.0.1", 0, server)
        port = listening.sockets[0].getsockname()[1]
        await create_connection(
            lambda: ours, "127.0.0.1", port, client, server_hostname="localhost"
        )
        await asyncio_until(lambda: bool(here.lost and there.lost))
        said = {str(one.lost[0]).split(":")[0] for one in (here, there)}
        assert "the renewal of the keys was cancelled" in said  # at one end, or at both
        assert said <= {"the renewal of the keys was cancelled", "the peer sent internal_error"}
        listening.close()

    run(main())


class LosingSource:
    """A PSK source that fails in the turn in which the connection is lost.

    A class of its own for each test would stay: some versions of Python 3.12 keep each class whose
    protocol is checked, with all that its functions refer to (gh-118013).
    """

    transport: asyncio.Transport

    def __init__(self, failure: Exception) -> None:
        self._failure = failure

    def authorize(self, session: Any, missing: str | None) -> Any:
        raise AssertionError

    async def offer(self) -> Any:
        await asyncio.sleep(0)
        self.transport.abort()  # asyncio calls connection_lost before the task's callbacks
        raise self._failure

    async def look_up(self, identities: tuple[bytes, ...]) -> Any:
        raise AssertionError


@pytest.mark.parametrize("kind", [KeySourceExhausted, Boom])
def test_a_psk_source_fails_in_the_turn_in_which_the_connection_is_lost(
    run: Run, client_config: ClientConfig, kind: type[Exception]
) -> None:
    """The failure is the reason; one that the source did not expect is raised as it is."""
    lost, failure = Losing(), kind("in the source")

    source = LosingSource(failure)
    config = replace(client_config, psk_source=source, policy=Policy(psk=Requirement.REQUIRE))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with plain_server() as port:
            source.transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
            with reported() as told, pytest.raises((SecureConnectionError, Boom)) as caught:
                await start_tls(source.transport, lost, config, server_hostname="localhost")
            assert failure in (caught.value, caught.value.__cause__)
            assert told == []
            await asyncio_until(lambda: bool(lost.lost))
            assert lost.lost == [caught.value]

    run(main())


def test_a_pad_ends_in_the_turn_in_which_the_connection_is_lost(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No key has come in time. That is the reason, although its report comes a turn later."""
    shared: dict[str, Any] = {
        "one_time_pad": OneTimePad(deadline=3600),
        "policy": Policy(psk=Requirement.PREFER),
    }
    ours, theirs = map(QkdPskSource, in_process_pair("alice", "bob"))
    client = replace(client_config, psk_source=ours, **shared)
    server = replace(server_config, psk_source=theirs, tickets=None, **shared)
    lost = Losing()

    async def main() -> None:
        async with serving(server) as port:
            transport, _ = await create_connection(
                lambda: lost, "127.0.0.1", port, client, server_hostname="localhost"
            )

            def late() -> float:
                """An hour later, the connection has just been cut."""
                transport._life.raw.abort()  # type: ignore[union-attr]
                return time.monotonic() + 7200

            async def no_key(session: Session) -> Any:
                monkeypatch.setattr(pad_filler, "current_time", late)
                raise KeySourceExhausted("no key is left")

            monkeypatch.setattr(ours, "draw_for_pad", no_key)
            transport.write(b"data")
            await asyncio_until(lambda: bool(lost.lost))
            assert isinstance(lost.lost[0], SecureConnectionError)
            assert isinstance(lost.lost[0].__cause__, PadExhausted)

    run(main())


@pytest.mark.parametrize("wrong", ["ssl", "role", "context"])
def test_what_is_not_a_configuration(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, wrong: str
) -> None:
    async def main() -> None:
        if wrong == "ssl":
            with pytest.raises(TypeError, match="TLS within TLS"):
                await connect(1, client_config, ssl=True)
            with pytest.raises(TypeError, match="TLS within TLS"):
                await create_server(asyncio.Protocol, None, 0, server_config, ssl=object())
            return
        config: Any = server_config if wrong == "role" else object()
        with pytest.raises(ConfigError, match="ClientConfig"):
            await connect(1, config)

    run(main())


@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
@pytest.mark.parametrize("seconds", [0, -1])
def test_time_limits_have_the_names_and_the_checks_of_asyncio(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, name: str, seconds: float
) -> None:
    def parameters(function: Callable[..., Any]) -> dict[str, Any]:
        return {one.name: one.default for one in inspect.signature(function).parameters.values()}

    loop = asyncio.AbstractEventLoop
    for ours, theirs in (
        (create_connection, loop.create_connection),
        (create_server, loop.create_server),
        (start_tls, loop.start_tls),
    ):
        assert parameters(ours)[name] is parameters(theirs)[name] is None

    async def main() -> None:
        async with serving(server_config, **{name: None}) as port:
            with pytest.raises(ValueError, match=f"{name} should be a positive number"):
                await connect(port, client_config, **{name: seconds})
        with pytest.raises(ValueError, match=f"{name} should be a positive number"):
            await create_server(asyncio.Protocol, None, 0, server_config, **{name: seconds})

    run(main())


def closing_pairs() -> list[tuple[str, Callable[[SecureTransport], None]]]:
    return [
        ("close", SecureTransport.close),
        ("write_eof", SecureTransport.write_eof),
        ("write_eof and close", lambda one: (one.write_eof(), one.close())[0]),
    ]


@pytest.mark.parametrize(("how", "end"), closing_pairs())
@pytest.mark.parametrize("size", [100, 1 << 16, 8 << 20])
@pytest.mark.parametrize("pieces", [1, 7])
def test_what_was_written_before_the_end_arrives(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    how: str,
    end: Callable[[SecureTransport], None],
    size: int,
    pieces: int,
) -> None:
    """The end goes behind all the data that waits to be encrypted."""
    data = random.Random(17).randbytes(size)
    found: list[bytes] = []

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        found.append(await reader.read())
        await closed(writer)

    async def main() -> None:
        async with serving(server_config, slow) as port:
            reader, writer = await connect(port, client_config)
            transport = writer.transport
            assert isinstance(transport, SecureTransport)
            step = -(-size // pieces)
            transport.writelines([data[at : at + step] for at in range(0, size, step)])
            end(transport)
            if how == "write_eof":
                assert await reader.read() == b""
                writer.close()
            await writer.wait_closed()
        assert found == [data]

    run(main())


def test_data_that_waits_is_sent_to_a_peer_that_has_ended_its_direction(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """The peer ends TLS and TCP in its direction while most of our data waits to be encrypted."""
    size = 16 << 20
    found: list[int] = []

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        await writer.drain()
        writer.transport._life.raw.write_eof()  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        found.append(len(await reader.read()))
        writer.close()

    async def main() -> None:
        async with serving(server_config, deaf) as port:
            _, writer = await connect(port, client_config)
            writer.write(bytes(size))
            await closed(writer)
            await asyncio_until(lambda: bool(found))
        assert found == [size]

    run(main())


@pytest.mark.parametrize("ends", ["abort", "close", "the peer has closed"])
def test_a_transport_that_ends_when_its_buffer_is_empty(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, ends: str
) -> None:
    """asyncio calls ``resume_writing`` in the middle of a write, where a close is made twice."""

    class Ends(asyncio.Protocol):
        transport: SecureTransport
        lost = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, SecureTransport)
            self.transport = transport

        def resume_writing(self) -> None:
            if hasattr(self.transport, ends):
                getattr(self.transport, ends)()

        def eof_received(self) -> bool:
            return True

        def connection_lost(self, error: Exception | None) -> None:
            self.lost += 1

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        writer.close()

    async def main() -> None:
        async with serving(server_config, sink) as port:
            transport, protocol = await create_connection(
                Ends, "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            transport._life.raw.set_write_buffer_limits(high=0)  # type: ignore[attr-defined]
            below = transport.get_extra_info("socket")
            below.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            await asyncio_until(lambda: transport._life.engine.close_received)
            transport.write(bytes(100_000))
            if not hasattr(transport, ends):
                transport.close()
            await asyncio_until(lambda: protocol.lost)
            await asyncio.sleep(0.01)
            assert protocol.lost == 1

    run(main())


def test_the_marks_of_the_write_buffer(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """``pause_writing`` above the high mark, ``resume_writing`` at the low one, in turns."""
    calls: list[tuple[str, int]] = []

    class Watch(asyncio.Protocol):
        transport: SecureTransport

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, SecureTransport)
            self.transport = transport

        def pause_writing(self) -> None:
            calls.append(("pause", self.transport.get_write_buffer_size()))

        def resume_writing(self) -> None:
            calls.append(("resume", self.transport.get_write_buffer_size()))

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def main() -> None:
        async with serving(server_config, sink) as port:
            transport, _ = await create_connection(
                Watch, "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            assert transport.get_write_buffer_limits() == (1 << 14, 1 << 16)
            for marks in ((None, None), (1 << 20, 1 << 18), (100_000, None)):
                transport.set_write_buffer_limits(*marks)
                low, high = transport.get_write_buffer_limits()
                calls.clear()
                transport.write(bytes(4 << 20))
                assert calls
                assert calls[0][0] == "pause"
                assert calls[0][1] > high
                await asyncio_until(lambda: transport.get_write_buffer_size() == 0)
                await asyncio.sleep(0)
                assert [one for one, _ in calls] == ["pause", "resume"] * (len(calls) // 2)
                # The queue is at its low mark, and the transport below is not full.
                assert all(size <= low + high for one, size in calls if one == "resume")
            with pytest.raises(ValueError, match="high"):
                transport.set_write_buffer_limits(1, 2)
            transport.close()
            await asyncio_until(lambda: transport._life.state.name == "CLOSED")

    run(main())


def test_a_long_write_leaves_turns_to_others(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """A call of ``write`` encrypts one batch; the rest waits as it was written, without a copy."""

    async def main() -> None:
        async with serving(server_config, echo) as port:
            _, writer = await connect(port, client_config)
            tracemalloc.start()
            data = bytes(64 << 20)
            before = tracemalloc.get_traced_memory()[0]
            writer.write(data)
            held = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert held < 2 << 20
            writer.transport.abort()
            await asyncio.sleep(0.05)

    run(main())


def test_no_ring_of_references_remains(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """A closed transport goes without the garbage collector, and its keys with it."""

    async def main() -> None:
        async with serving(server_config) as port:
            await closed((await connect(port, client_config))[1])
            await asyncio.sleep(0.05)
            gc.collect()
            gc.disable()
            try:
                _, writer = await connect(port, client_config)
                await closed(writer)
                await asyncio.sleep(0.05)
                del writer, _
                left = [one for one in gc.get_objects() if isinstance(one, SecureTransport)]
                assert len(left) == 0
            finally:
                gc.enable()

    run(main())


def mangled(chance: random.Random, flight: bytes) -> bytes:
    """Rubbish of several kinds."""
    kind = chance.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return chance.randbytes(chance.randrange(1, 600))
    if kind == 2:
        return flight[: chance.randrange(len(flight))]
    if kind == 3:
        where = chance.randrange(len(flight))
        return (
            flight[:where]
            + bytes((flight[where] ^ 1 << chance.randrange(8),))
            + flight[where + 1 :]
        )
    if kind == 4:
        return b"\x16\x03\x01\xff\xff" + chance.randbytes(20)
    return flight + chance.randbytes(30)


def flight_of(config: ClientConfig) -> bytes:
    from hybridkex import ClientConnection

    client = ClientConnection(config, "localhost")
    client.start()
    return bytes(client.data_to_send())


async def strangers(port: int, config: ClientConfig, number: int) -> None:
    """That many connections of rubbish, 50 at a time. Some reset, some half-close, some close."""
    loop, chance, flight = asyncio.get_running_loop(), random.Random(17), flight_of(config)
    for _ in range(0, number, 50):
        reading: list[socket.socket] = []
        for _ in range(50):
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.send(mangled(chance, flight))
            end = chance.randrange(3)
            if end == 1:
                stranger.shutdown(socket.SHUT_WR)
                stranger.setblocking(False)
                reading.append(stranger)
                continue
            if end == 0:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stranger.close()
        for stranger in reading:
            with contextlib.suppress(ConnectionError):
                while await loop.sock_recv(stranger, 1 << 16):
                    pass
            stranger.close()


def forget_messages() -> None:
    """Empty what the engine keeps of a bounded number of messages: it fills up, and is no leak."""
    modules = [one for name, one in sys.modules.items() if name.startswith("hybridkex.")]
    classes = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    for kept in (one for place in (*modules, *classes) for one in vars(place).values()):
        function = getattr(kept, "__func__", kept)
        if (
            isinstance(function, functools._lru_cache_wrapper)
            and function.cache_parameters()["maxsize"]
        ):
            function.cache_clear()


async def survive(client_config: ClientConfig, server_config: ServerConfig, number: int) -> None:
    """Strangers leave no memory, no transport and no descriptor behind, and the server serves."""

    async def left() -> tuple[int, int]:
        await asyncio.sleep(0.6)  # longer than any handshake may take
        forget_messages()
        gc.collect()
        transports = sum(isinstance(one, SecureTransport) for one in gc.get_objects())
        assert transports == 0
        return sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))

    async with serving(server_config, ssl_handshake_timeout=0.5) as port:
        await strangers(port, client_config, 100)
        blocks, descriptors = await left()
        await strangers(port, client_config, number)
        blocks_now, descriptors_now = await left()
        assert blocks_now - blocks < 200 + number * 0.08  # 150 without a leak, whatever the number
        assert descriptors_now == descriptors
        reader, writer = await connect(port, client_config)
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        await closed(writer)


def test_strangers(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, no_log: None
) -> None:
    run(survive(client_config, server_config, 300))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "sample"), [("asyncio", 10_000), ("uvloop", 2_000)], indirect=["run"]
)
def test_ten_thousand_strangers(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    no_log: None,
    sample: int,
    thorough: bool,
) -> None:
    """On uvloop, a fifth of them without ``--thorough``."""
    run(survive(client_config, server_config, 10_000 if thorough else sample), debug=False)


Step = Callable[[], None]


@pytest.mark.parametrize("seed", range(6))
def test_random_conversations(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, seed: int
) -> None:
    """Two applications write, pause, resume, change keys and half-close as a seed says: each gets
    all that the other wrote, in order, and one clean end."""
    chance = random.Random(seed)

    class Talker(asyncio.Protocol):
        transport: SecureTransport

        def __init__(self, total: int) -> None:
            self.left, self.sent, self.got = total, bytearray(), bytearray()
            self.ended, self.full, self.paused = False, False, False
            self.lost: list[Exception | None] = []

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, SecureTransport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            assert not self.paused
            self.got += data
            if chance.random() < 0.3:
                self.pause()
            if chance.random() < 0.3:
                self.speak()

        def eof_received(self) -> bool:
            assert not self.ended
            assert not self.paused
            self.ended = True
            return True

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.append(exc)

        def pause_writing(self) -> None:
            assert not self.full
            self.full = True

        def resume_writing(self) -> None:
            assert self.full
            self.full = False

        def pause(self) -> None:
            self.paused = True
            self.transport.pause_reading()

        def resume(self) -> None:
            self.paused = False
            self.transport.resume_reading()

        def speak(self) -> None:
            if not self.left:
                return
            if chance.random() < 0.1:
                self.transport.update_keys(request_peer=chance.random() < 0.5)
            piece = chance.randbytes(min(self.left, chance.choice((1, 9, 500, 16_384, 70_000))))
            self.left -= len(piece)
            self.sent += piece
            self.transport.write(piece)
            if not self.left:
                self.transport.write_eof()

    server_side: list[Talker] = []

    def factory() -> Talker:
        server_side.append(Talker(chance.randrange(1, 400_000)))
        return server_side[-1]

    async def main() -> None:
        server = await create_server(factory, "127.0.0.1", 0, server_config)
        port = server.sockets[0].getsockname()[1]
        _, here = await create_connection(
            lambda: Talker(chance.randrange(1, 400_000)),
            "127.0.0.1",
            port,
            client_config,
            server_hostname="localhost",
        )
        await asyncio_until(lambda: bool(server_side) and hasattr(server_side[0], "transport"))
        both = [here, server_side[0]]
        while not all(one.ended and not one.left for one in both):
            one = chance.choice(both)
            if one.paused:
                one.resume()
            elif not one.full:
                one.speak()
            await asyncio.sleep(0 if chance.random() < 0.8 else 0.001)
        assert here.got == both[1].sent
        assert here.sent == both[1].got
        for one in both:
            one.transport.close()
        await asyncio_until(lambda: all(one.lost for one in both))
        assert [one.lost for one in both] == [[None], [None]]
        server.close()
        await server.wait_closed()

    run(main())


@contextlib.contextmanager
def few_descriptors(spare: int) -> Any:
    """This process may open only so many files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, before[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_server_without_descriptors_recovers(
    run: Run,
    server_config: ServerConfig,
    client_config: ClientConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """accept(2) fails with EMFILE: a line, no traceback; others' faults reach their handler."""
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.1)

    async def main() -> None:
        with reported() as told:
            async with serving(server_config) as port, serving(server_config):
                before = len(os.listdir("/proc/self/fd"))
                with contextlib.ExitStack() as held:
                    clients = [held.enter_context(socket.socket()) for _ in range(40)]
                    with few_descriptors(3):
                        for client in clients:
                            client.connect(("127.0.0.1", port))
                        await asyncio.sleep(0.25)  # it tries more than once
                reader, writer = await connect(port, client_config)
                writer.write(b"again")
                assert await reader.readexactly(5) == b"again"
                await closed(writer)
                await asyncio_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            asyncio.get_running_loop().call_exception_handler({"message": "another"})
            assert told == [{"message": "another"}]

    run(main())
    lines = [one.getMessage() for one in caplog.records if "cannot accept" in one.getMessage()]
    assert len(lines) <= 1
    assert not [one for one in caplog.records if one.exc_info]


def test_the_descriptor_of_a_closed_server_is_another_ones(
    run: Run, server_config: ServerConfig
) -> None:
    """The faults of accept(2) there are the application's."""

    async def main() -> None:
        with reported() as told:
            server = await start_server(echo, "127.0.0.1", 0, server_config)
            number = server.sockets[0].fileno()
            context = {
                "message": "socket.accept() out of system resource",
                "exception": OSError(errno.EMFILE, "Too many open files"),
                "socket": SimpleNamespace(fileno=lambda: number),
            }
            loop = asyncio.get_running_loop()
            loop.call_exception_handler(context)
            assert told == []
            server.close()
            await server.wait_closed()
            loop.call_exception_handler(context)
            assert told == [context]

    run(main())
