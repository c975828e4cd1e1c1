"""One interface to the secure streams of every shell, and a run of each."""

import asyncio
import contextlib
import selectors
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from socket import SHUT_RDWR, socketpair
from typing import Any
from unittest import mock

import anyio
import anyio.abc
import pytest
import trio
import trio.testing
from aio_glue import without_stacks

from hybridkex import ClientConfig, SecureStream, ServerConfig, Session
from hybridkex.aio import open_connection, start_server
from hybridkex.anyio import HybridkexAttribute, SecureByteStream, SecureConnectable, SecureListener
from hybridkex.apps.tunnel.forward import ConnectionCut, Leg, forward
from hybridkex.net.event_loop import time_limit
from hybridkex.net.readiness import Readiness


class Broken(Exception):
    """The connection failed; ``__cause__`` is the shell's own error."""


class End(ABC):
    """One end of a connection."""

    ERRORS: tuple[type[Exception], ...]
    send_waits = True
    """Whether :meth:`send` waits for what the engine needs, and learns of its errors."""

    @property
    @abstractmethod
    def session(self) -> Session: ...

    async def send(self, data: bytes) -> None:
        with self._errors():
            await self._send(data)

    async def receive(self) -> bytes:
        """``b""`` at the end."""
        with self._errors():
            return await self._receive()

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except self.ERRORS as error:
            raise Broken(str(error)) from error

    async def receive_all(self) -> bytes:
        found = bytearray()
        while data := await self.receive():
            found += data
        return bytes(found)

    async def receive_exactly(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            data = await self.receive()
            assert data
            found += data
        assert len(found) == size
        return bytes(found)

    @abstractmethod
    async def _send(self, data: bytes) -> None: ...
    @abstractmethod
    async def _receive(self) -> bytes: ...
    @abstractmethod
    async def send_eof(self) -> None: ...
    @abstractmethod
    async def update_keys(self) -> None: ...
    @abstractmethod
    async def close(self) -> None: ...
    @abstractmethod
    async def cut(self) -> None:
        """Close the transport without close_notify."""


class TrioEnd(End):
    ERRORS = (trio.BrokenResourceError,)

    def __init__(self, stream: SecureStream[Any]) -> None:
        self.stream = stream

    @property
    def session(self) -> Session:
        return self.stream.session

    async def _send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def _receive(self) -> bytes:
        return await self.stream.receive_some()

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def update_keys(self) -> None:
        await self.stream.update_keys(request_peer=True)

    async def close(self) -> None:
        await self.stream.aclose()

    async def cut(self) -> None:
        await self.stream.transport_stream.aclose()


class PipedEnd(TrioEnd):
    """A program's socket, whose data a tunnel forwards through a secure stream."""

    send_waits = False

    def __init__(self, stream: SecureStream[Any], nursery: trio.Nursery) -> None:
        super().__init__(stream)
        self._nursery = nursery
        ours, theirs = socketpair()
        self.program, self.socket = (
            trio.SocketStream(trio.socket.from_stdlib_socket(one)) for one in (ours, theirs)
        )
        self.cause: Exception | None = None
        self.forwarded = {"out": 0, "back": 0}

    async def forward(self, readiness: Readiness) -> None:
        """As the tunnel does."""

        def counted(way: str, amount: int) -> None:
            self.forwarded[way] += amount

        try:
            await forward(
                Leg("the program", self.socket, self.socket),
                Leg("the channel", self.stream, self.stream.transport_stream),
                out=partial(counted, "out"),
                back=partial(counted, "back"),
                idle_timeout=None,
                readiness=readiness,
            )
            await self.stream.aclose()
        except ConnectionCut:
            # The tunnel resets its sockets, which a pair of Unix sockets cannot do.
            self.cause = self.stream._failure
            self.program.socket.close()
        finally:
            self.socket.socket.close()
            await trio.aclose_forcefully(self.stream)

    async def _send(self, data: bytes) -> None:
        with self._cut():
            await self.program.send_all(data)

    async def _receive(self) -> bytes:
        with self._cut():
            return await self.program.receive_some()

    @contextlib.contextmanager
    def _cut(self) -> Any:
        try:
            yield
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise trio.BrokenResourceError("cut") from self.cause

    async def send_eof(self) -> None:
        await self.program.send_eof()

    async def update_keys(self) -> None:
        renewer, pipe = self.stream._renewer, self.stream._pipe
        assert pipe is not None
        if renewer is not None and renewer.extended:
            renewer.update()
        else:
            self.stream._connection.update_keys(request_peer=True)
            pipe.flush()

    async def close(self) -> None:
        """A program that left with bytes unread would reset its socket."""
        self._nursery.start_soon(self._leave)

    async def _leave(self) -> None:
        gone = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)
        with contextlib.suppress(*gone):
            await self.program.send_eof()
            while await self.program.receive_some():
                pass

    async def cut(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.transport_stream.socket.shutdown(SHUT_RDWR)


class AsyncioEnd(End):
    send_waits = False
    ERRORS = (ConnectionError,)

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @property
    def session(self) -> Session:
        session: Session = self.writer.get_extra_info("hybridkex_session")
        return session

    async def _send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def _receive(self) -> bytes:
        return await self.reader.read(1 << 16)

    async def send_eof(self) -> None:
        self.writer.write_eof()

    async def update_keys(self) -> None:
        self.writer.transport.update_keys(request_peer=True)  # type: ignore[attr-defined]

    async def close(self) -> None:
        self.writer.close()

    async def cut(self) -> None:
        self.writer.transport._life.raw.close()  # type: ignore[attr-defined]


class AnyioEnd(End):
    ERRORS = (anyio.BrokenResourceError,)

    def __init__(self, stream: SecureByteStream) -> None:
        self.stream = stream

    @property
    def session(self) -> Session:
        return self.stream.extra(HybridkexAttribute.session)

    async def _send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def _receive(self) -> bytes:
        try:
            return await self.stream.receive()
        except anyio.EndOfStream:
            return b""

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def update_keys(self) -> None:
        await self.stream.update_keys(request_peer=True)

    async def close(self) -> None:
        await self.stream.aclose()

    async def cut(self) -> None:
        await self.stream.transport_stream.aclose()


Pair = tuple[End, End]


@asynccontextmanager
async def trio_pair(client: ClientConfig, server: ServerConfig) -> AsyncIterator[Pair]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        tcp = await trio.open_tcp_stream(*listener.socket.getsockname())
        there = SecureStream(await listener.accept(), server)
        here = SecureStream(tcp, client, server_hostname="localhost")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.do_handshake)
                nursery.start_soon(there.do_handshake)
            yield TrioEnd(here), TrioEnd(there)
        finally:
            for stream in (here, there):
                await trio.aclose_forcefully(stream)


@asynccontextmanager
async def piped_pair(client: ClientConfig, server: ServerConfig) -> AsyncIterator[Pair]:
    readiness = Readiness()
    async with (
        trio_pair(client, server) as pair,
        readiness.running(),
        trio.open_nursery() as nursery,
    ):
        one, other = (PipedEnd(end.stream, nursery) for end in pair if isinstance(end, TrioEnd))
        for end in (one, other):
            nursery.start_soon(end.forward, readiness)
        await trio.testing.wait_all_tasks_blocked()
        try:
            yield one, other
        finally:
            nursery.cancel_scope.cancel()
            for end in (one, other):
                end.program.socket.close()


@asynccontextmanager
async def asyncio_pair(client: ClientConfig, server: ServerConfig) -> AsyncIterator[Pair]:
    accepted: asyncio.Queue[AsyncioEnd] = asyncio.Queue()
    listening = await start_server(
        lambda *streams: accepted.put_nowait(AsyncioEnd(*streams)), "127.0.0.1", 0, server
    )
    port = listening.sockets[0].getsockname()[1]
    ends: list[AsyncioEnd] = []
    try:
        streams = await open_connection("127.0.0.1", port, client, server_hostname="localhost")
        ends.append(AsyncioEnd(*streams))
        ends.append(await accepted.get())
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.writer.transport.abort()
        listening.close()
        await listening.wait_closed()
        await asyncio.sleep(0.02)


@asynccontextmanager
async def anyio_pair(client: ClientConfig, server: ServerConfig) -> AsyncIterator[Pair]:
    accepted: list[SecureByteStream] = []
    arrived, over = anyio.Event(), anyio.Event()

    async def keep(stream: SecureByteStream) -> None:
        accepted.append(stream)
        arrived.set()
        await over.wait()

    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = plain.extra(anyio.abc.SocketAttribute.local_port)
    async with SecureListener(plain, server) as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, keep)
        connectable = anyio.TCPConnectable("127.0.0.1", port)
        here = await SecureConnectable(connectable, client, server_hostname="localhost").connect()
        await arrived.wait()
        there = accepted[0]
        yield AnyioEnd(here), AnyioEnd(there)
        over.set()
        for stream in (here, there):
            await anyio.aclose_forcefully(stream)
        group.cancel_scope.cancel()


@dataclass(frozen=True)
class Shell:
    """A way to run a test, and to make its pair of streams."""

    name: str
    run: Callable[[Callable[[], Awaitable[None]]], None]
    pair: Callable[[ClientConfig, ServerConfig], AbstractAsyncContextManager[Pair]]


IDLE, STEP = 0.002, 0.1
"""Seconds. All that talks is in one thread: a loop that has had no event for ``IDLE`` waits for its
clock alone, which then moves on to the next timer, by ``STEP`` at most."""


def on_trio(function: Callable[[], Awaitable[None]]) -> None:
    clock = trio.testing.MockClock(rate=1, autojump_threshold=IDLE)
    jump = clock.jump
    clock.jump = lambda seconds: jump(min(seconds, STEP))  # type: ignore[method-assign]
    trio.run(function, clock=clock)


class HastySelector(selectors.DefaultSelector):
    """The same for asyncio, whose clock is ``skipped`` seconds ahead."""

    skipped = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= IDLE:
            return super().select(timeout)
        ready = super().select(IDLE)
        if not ready:
            self.skipped += min(timeout - IDLE, STEP)
        return ready


def on_asyncio(function: Callable[[], Awaitable[None]], *, uvloop: bool = False) -> None:
    """On uvloop, whose timers are not Python's, nothing is skipped."""
    selector, clock = HastySelector(), time.monotonic

    def ahead() -> float:
        return clock() + selector.skipped

    factory: Any = partial(asyncio.SelectorEventLoop, selector)
    if uvloop:
        factory = pytest.importorskip("uvloop", reason="pip install uvloop").new_event_loop
    with (
        warnings.catch_warnings(),
        without_stacks(),
        mock.patch("time.monotonic", ahead),
        asyncio.Runner(loop_factory=factory, debug=True) as runner,
    ):
        warnings.simplefilter("error")
        runner.run(function())  # type: ignore[arg-type]


SHELLS = (
    Shell("trio", on_trio, trio_pair),
    Shell("piped", on_trio, piped_pair),
    Shell("asyncio", on_asyncio, asyncio_pair),
    Shell("uvloop", partial(on_asyncio, uvloop=True), asyncio_pair),
    Shell("anyio-trio", on_trio, anyio_pair),
    Shell("anyio-asyncio", on_asyncio, anyio_pair),
)


@pytest.fixture(params=SHELLS, ids=lambda shell: shell.name)
def shell(request: pytest.FixtureRequest) -> Shell:
    found: Shell = request.param
    return found


@pytest.fixture
def run(shell: Shell) -> Callable[[Any, Callable[[Any, Any], Awaitable[None]]], None]:
    """Runs a conversation between two ends, ``sites.client`` and ``sites.server`` their
    configurations, in 20 seconds at most."""

    def run(sites: Any, conversation: Callable[[Any, Any], Awaitable[None]]) -> None:
        async def main() -> None:
            async with time_limit(20), shell.pair(sites.client, sites.server) as (client, server):
                await conversation(client, server)

        shell.run(main)

    return run
