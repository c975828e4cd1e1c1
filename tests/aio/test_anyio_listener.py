"""An anyio server goes on, whatever its peers do and however many they are."""

import contextlib
import logging
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest
from aio_glue import Crowd, hello_of

import hybridkex.anyio
import hybridkex.net.pending
from hybridkex import (
    X25519,
    ClientConfig,
    DevCa,
    Policy,
    QkdPskSource,
    Requirement,
    ServerConfig,
    Session,
    TrustStore,
)
from hybridkex.anyio import SecureByteStream, SecureConnectable, SecureListener
from hybridkex.errors import ConfigError
from hybridkex.net.log import BoundedLog
from hybridkex.net.pending import PendingConnections
from hybridkex.qkd.in_process import in_process_pair

CA = DevCa.create(algorithm="ed25519")
POLICY = Policy(post_quantum=Requirement.PREFER)
SERVER = ServerConfig(
    identities=(CA.issue("localhost", algorithm="ed25519"),), groups=(X25519,), policy=POLICY
)
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)), groups=(X25519,), policy=POLICY)
BACKENDS = ("asyncio", "trio")
T = TypeVar("T")


async def one_port() -> "anyio.abc.Listener[anyio.abc.SocketStream]":
    return await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)


def port_of(listener: SecureListener) -> int:
    port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
    return port


async def connect(port: int) -> SecureByteStream:
    tcp = anyio.TCPConnectable("127.0.0.1", port)
    return await SecureConnectable(tcp, CLIENT, server_hostname="localhost").connect()


async def echoed(port: int) -> bytes:
    async with await connect(port) as stream:
        await stream.send(b"are you there?")
        return await stream.receive()


async def naive(stream: SecureByteStream) -> None:
    """As a program would be written that does not expect bad peers."""
    async with stream:
        while True:
            await stream.send(await stream.receive())


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("few_descriptors")
def test_a_lack_of_descriptors_is_waited_for(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with (
            SecureListener(await one_port(), SERVER, handshake_timeout=1) as listener,
            anyio.create_task_group() as group,
        ):
            group.start_soon(listener.serve, naive)
            port = port_of(listener)
            living = await connect(port)
            with ExitStack() as held:
                # Both ends have a descriptor in this process: fill it up from our end.
                try:
                    while True:
                        one = held.enter_context(socket.socket())
                        one.setblocking(False)
                        one.connect_ex(("127.0.0.1", port))
                except OSError:
                    pass
                await anyio.sleep(0.5)
            await living.send(b"x")
            assert await living.receive() == b"x"  # it has outlived the fault
            await living.aclose()
            with anyio.fail_after(10):
                assert await echoed(port) == b"are you there?"
            group.cancel_scope.cancel()

    with caplog.at_level(logging.ERROR, "hybridkex.anyio"):
        anyio.run(main, backend=backend)
    lines = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert len(lines) == 1
    assert "cannot accept connections now: Too many open files" in lines[0]


async def reset(port: int) -> None:
    stream = await connect(port)
    await stream.send(b"x")
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await anyio.aclose_forcefully(stream.transport_stream)


async def leave(port: int) -> None:
    """An orderly end, which the handler meets as ``anyio.EndOfStream``."""
    await (await connect(port)).aclose()


async def cut(port: int) -> None:
    await anyio.aclose_forcefully((await connect(port)).transport_stream)


async def junk(port: int) -> None:
    stream = await connect(port)
    await stream.transport_stream.send(b"\x17\x03\x03\0\x20" + bytes(32))
    with pytest.raises(anyio.BrokenResourceError):
        await stream.receive()
    await stream.aclose()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [reset, leave, cut, junk], ids=lambda bad: bad.__name__)
def test_a_handler_whose_peer_is_gone(
    backend: str, bad: Callable[[int], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with (
            SecureListener(await one_port(), SERVER) as listener,
            anyio.create_task_group() as group,
        ):
            group.start_soon(listener.serve, naive)
            async with await connect(port_of(listener)) as living:
                await bad(port_of(listener))
                await anyio.sleep(0.1)
                await living.send(b"x")
                assert await living.receive() == b"x"
            assert await echoed(port_of(listener)) == b"are you there?"
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    assert any("a connection ended early: " in one.message for one in caplog.records)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_exceptions_go_to_the_task_group(backend: str) -> None:
    async def buggy(stream: SecureByteStream) -> None:
        await stream.aclose()
        raise KeyError("a bug")

    async def main() -> None:
        async with SecureListener(await one_port(), SERVER) as listener:
            port = port_of(listener)
            async with anyio.create_task_group() as group:
                group.start_soon(listener.serve, buggy)
                async with await connect(port):
                    await anyio.sleep_forever()  # until the group is cancelled

    with pytest.raises(BaseExceptionGroup) as caught:
        anyio.run(main, backend=backend)
    assert caught.group_contains(KeyError)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_listener_ends_serve(backend: str) -> None:
    async def main() -> None:
        listener = SecureListener(await one_port(), SERVER)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, naive)
            await anyio.sleep(0.05)
            await listener.aclose()

    with pytest.raises(BaseExceptionGroup) as caught:
        anyio.run(main, backend=backend)
    assert caught.group_contains((anyio.ClosedResourceError, anyio.BrokenResourceError))


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight, that none has to leave: these tests also run on a machine that is busy with others."""
    monkeypatch.setattr(hybridkex.anyio, "HANDSHAKES", 8)
    monkeypatch.setattr(hybridkex.anyio, "PATIENCE", 60.0)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


def run_beside_a_crowd(
    backend: str, main: Callable[[SecureListener, Crowd], Awaitable[None]]
) -> None:
    async def whole() -> None:
        async with (
            SecureListener(await one_port(), SERVER) as listener,
            anyio.create_task_group() as group,
        ):
            group.start_soon(listener.serve, naive)
            assert await echoed(port_of(listener)) == b"are you there?"
            before = len(os.listdir("/proc/self/fd"))
            crowd = Crowd(port_of(listener))
            try:
                with anyio.fail_after(20):
                    await main(listener, crowd)
            finally:
                crowd.leave()
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            group.cancel_scope.cancel()

    anyio.run(whole, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("says", ["nothing", "a byte", "a ClientHello"])
@pytest.mark.usefixtures("few_places")
def test_a_crowd_of_one_address_has_half_of_the_places(backend: str, says: str) -> None:
    hello = hello_of(CLIENT)
    said = {"nothing": b"", "a byte": hello[:1], "a ClientHello": hello}[says]

    async def main(listener: SecureListener, crowd: Crowd) -> None:
        crowd.grow(60, said)
        assert await echoed(port_of(listener)) == b"are you there?"
        assert crowd.answered() == (4 if says == "a ClientHello" else 0)
        assert crowd.dismissed() == 0

    run_beside_a_crowd(backend, main)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("few_places")
def test_connections_that_keep_us_waiting_make_room(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crowd of eight addresses has all places; two of them, of one address, make room."""
    monkeypatch.setattr(hybridkex.anyio, "PATIENCE", 0.3)

    async def main(listener: SecureListener, crowd: Crowd) -> None:
        crowd.grow(16, hello_of(CLIENT), addresses=8)
        await until(lambda: crowd.answered() == 8)
        assert await echoed(port_of(listener)) == b"are you there?"
        assert crowd.dismissed() >= 1

    run_beside_a_crowd(backend, main)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("few_places")
def test_a_full_room_loses_the_oldest_of_the_largest_crowd(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybridkex.net.pending, "WAITING", 10)

    async def main(listener: SecureListener, crowd: Crowd) -> None:
        crowd.grow(30, hello_of(CLIENT))
        await until(lambda: crowd.dismissed() >= 16)
        assert await echoed(port_of(listener)) == b"are you there?"
        assert crowd.dismissed() <= 20  # ten wait
        assert crowd.answered() <= 4

    run_beside_a_crowd(backend, main)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("few_places")
def test_those_who_wait_begin_when_the_listener_has_ended(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their handlers may outlive it."""
    waiting = list[PendingConnections[object]]()

    class Watched(PendingConnections[T]):
        def __init__(self, held: Callable[[str], int]) -> None:
            super().__init__(held)
            waiting.append(self)

    monkeypatch.setattr(hybridkex.anyio, "PendingConnections", Watched)

    async def main() -> None:
        async with anyio.create_task_group() as handlers:
            listener = SecureListener(await one_port(), SERVER)
            crowd = Crowd(port_of(listener))
            async with anyio.create_task_group() as group:
                group.start_soon(listener.serve, naive, handlers)
                crowd.grow(20, hello_of(CLIENT))  # of one address, which has half of eight places
                await until(lambda: bool(waiting) and len(waiting[0]) == 16)
                group.cancel_scope.cancel()
            await listener.aclose()
            await until(lambda: crowd.answered() == 20)
            crowd.leave()
            await anyio.sleep(0.05)
            handlers.cancel_scope.cancel()

    anyio.run(main, backend=backend)


class Failing:
    """A PSK source with a bug, or with a database that is down."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def offer(self) -> None:
        raise self.error

    async def look_up(self, identities: object) -> None:
        raise self.error

    def authorize(self, session: Session, missing: str | None) -> Session:
        return session


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [ValueError("secret"), OSError("secret"), TimeoutError("secret")])
def test_a_psk_source_that_fails_ends_one_connection(
    backend: str,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hybridkex.anyio, "_LINES", BoundedLog(hybridkex.anyio._log))
    alice, _ = in_process_pair("alice", "bob")
    offers = replace(CLIENT, psk_source=QkdPskSource(alice))
    server = replace(
        SERVER, psk_source=Failing(error), policy=replace(POLICY, psk=Requirement.PREFER)
    )

    async def main() -> None:
        async with (
            SecureListener(await one_port(), server) as listener,
            anyio.create_task_group() as group,
        ):
            group.start_soon(listener.serve, naive)
            tcp = anyio.TCPConnectable("127.0.0.1", port_of(listener))
            with pytest.raises(anyio.BrokenResourceError, match="the peer sent internal_error"):
                await SecureConnectable(tcp, offers, server_hostname="localhost").connect()
            assert await echoed(port_of(listener)) == b"are you there?"
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert line == f"a handshake failed: {type(error).__name__} in a PSK source or verifier"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_that_is_none_leaves_no_connection(backend: str) -> None:
    async def main() -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            tcp = await anyio.connect_tcp("127.0.0.1", port)
            with pytest.raises(ConfigError, match=r"127\.1"):
                await SecureByteStream.wrap(tcp, CLIENT, server_hostname="127.1")
            with pytest.raises(anyio.ClosedResourceError):
                await tcp.send(b"x")

    anyio.run(main, backend=backend)


class Items(anyio.abc.ObjectStream[bytes]):
    """An object stream of bytes, whose items may be longer than any read, or empty."""

    def __init__(self, sends: Any, receives: Any) -> None:
        self._sends, self._receives = sends, receives

    async def receive(self) -> bytes:
        item: bytes = await self._receives.receive()
        return item

    async def send(self, item: bytes) -> None:
        await self._sends.send(b"")
        await self._sends.send(item)

    async def send_eof(self) -> None:
        await self._sends.aclose()

    async def aclose(self) -> None:
        await self._sends.aclose()
        await self._receives.aclose()


class OneOfItems(anyio.abc.ObjectStreamConnectable[bytes]):
    def __init__(self, stream: Items) -> None:
        self._stream = stream

    async def connect(self) -> Items:
        return self._stream


@pytest.mark.parametrize("backend", BACKENDS)
def test_object_streams_of_bytes(backend: str) -> None:
    """anyio's own TLS runs over them, too."""
    data = os.urandom(1_000_000)

    async def main() -> None:
        here = anyio.create_memory_object_stream[bytes](4)
        there = anyio.create_memory_object_stream[bytes](4)
        connectable = OneOfItems(Items(here[0], there[1]))
        listener = SecureListener(One(Items(there[0], here[1])), SERVER)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, naive)
            with anyio.fail_after(20):
                client = await SecureConnectable(
                    connectable, CLIENT, server_hostname="localhost"
                ).connect()
                group.start_soon(client.send, data)
                got = b""
                while len(got) < len(data):
                    got += await client.receive()
                assert got == data
                await client.aclose()
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)


class Mute(anyio.abc.ByteStream):
    """Breaks without a text, as anyio's own streams do."""

    def __init__(self, cause: Exception | None) -> None:
        self._cause = cause

    async def receive(self, max_bytes: int = 65536) -> bytes:
        raise anyio.BrokenResourceError from self._cause

    async def send(self, item: bytes) -> None: ...
    async def send_eof(self) -> None: ...
    async def aclose(self) -> None: ...


class One(anyio.abc.Listener["anyio.abc.AnyByteStream"]):
    """Accepts one connection."""

    def __init__(self, stream: "anyio.abc.AnyByteStream") -> None:
        self._stream = stream

    async def serve(self, handler: object, task_group: object = None) -> None:
        await handler(self._stream)  # type: ignore[operator]

    async def aclose(self) -> None: ...


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cause", [None, TimeoutError(), ValueError("why")], ids=repr)
def test_the_log_says_why_a_handshake_failed(
    backend: str, cause: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with anyio.fail_after(20):
            await SecureListener(One(Mute(cause)), SERVER).serve(
                lambda stream: anyio.lowlevel.checkpoint()
            )

    anyio.run(main, backend=backend)
    [line] = [one.message for one in caplog.records if one.name == "hybridkex.anyio"]
    reason = "BrokenResourceError" if cause is None else str(cause) or type(cause).__name__
    assert line == f"a handshake failed: {reason}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cause", [None, TimeoutError(), ValueError("why")], ids=repr)
def test_the_log_says_why_a_connection_ended_early(
    backend: str, cause: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(stream: SecureByteStream) -> None:
        raise anyio.BrokenResourceError from cause

    async def main() -> None:
        async with (
            SecureListener(await one_port(), SERVER) as listener,
            anyio.create_task_group() as group,
        ):
            group.start_soon(listener.serve, handler)
            with contextlib.suppress(anyio.BrokenResourceError):
                async with await connect(port_of(listener)) as stream:
                    await stream.receive()
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    [line] = [one.message for one in caplog.records if one.name == "hybridkex.anyio"]
    reason = "BrokenResourceError" if cause is None else str(cause) or type(cause).__name__
    assert line == f"a connection ended early: {reason}"
