"""The supervisor of accepted connections: faults stay with their connection, budgets are shared
fairly, and a system without room is waited for."""

import contextlib
import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked
from waiting import trio_until

import hybridkex.net.pending
import hybridkex.net.sockets
from hybridkex.errors import LocalStateError
from hybridkex.net.budget import Budget, Connection, TooManyConnections
from hybridkex.net.log import BoundedLog
from hybridkex.net.reading import read_exactly
from hybridkex.net.supervisor import Supervisor

LOGGER = logging.getLogger("hybridkex.test")
Handler = Callable[[Any, Connection], Awaitable[object]]


class Fake(trio.abc.Listener[trio.abc.Stream]):
    """Hands out what a test puts in: streams, or errors to raise."""

    def __init__(self) -> None:
        self.put, self._get = trio.open_memory_channel[Any](1000)

    async def accept(self) -> trio.abc.Stream:
        item = await self._get.receive()
        if isinstance(item, BaseException):
            raise item
        stream: trio.abc.Stream = item
        return stream

    async def aclose(self) -> None:
        self._get.close()

    def connect(self) -> trio.abc.Stream:
        """The client's end of a new connection."""
        ours, theirs = memory_stream_pair()
        self.put.send_nowait(theirs)
        return ours


@asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[Fake]:
    listener = Fake()
    supervisor: Supervisor[Any] = Supervisor(handler, name="test", logger=LOGGER, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.serve, [listener])
        yield listener
        nursery.cancel_scope.cancel()


async def echo(stream: Any, connection: Connection) -> None:
    async for data in stream:
        await stream.send_all(data)


async def check(listener: Fake) -> None:
    stream = listener.connect()
    async with stream:
        await stream.send_all(b"x")
        with trio.fail_after(5):
            assert await stream.receive_some() == b"x"


def faults() -> list[BaseException]:
    single: list[Exception] = [
        ValueError("a\nb"),
        OverflowError(),
        struct.error("x"),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
        StopAsyncIteration(),
        LookupError(),
        LocalStateError("ours"),
        OSError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError(),
        trio.BrokenResourceError("broken"),
        trio.ClosedResourceError(),
        trio.BusyResourceError(),
        trio.TooSlowError(),
        trio.NeedHandshakeError(),
    ]
    groups: list[BaseException] = [
        ExceptionGroup("one", [ValueError()]),
        ExceptionGroup("deep", [ExceptionGroup("x", [OSError(errno.EPIPE, "p"), KeyError(1)])]),
        BaseExceptionGroup("of base type", [ValueError()]),
    ]
    return [*single, *groups]


@pytest.mark.parametrize("fault", faults(), ids=repr)
async def test_a_fault_ends_its_own_connection(
    fault: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: list[str] = []

    async def handler(stream: Any, connection: Connection) -> None:
        if await stream.receive_some() == b"fault":
            raise fault
        await stream.send_all(b"x")

    async with serving(handler, on_failure=kinds.append) as listener:
        stream = listener.connect()
        await stream.send_all(b"fault")
        with trio.fail_after(5):
            assert await stream.receive_some() == b""  # closed, not left open
        await check(listener)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].exc_info is None
    assert kinds in (["failed"], ["internal"])


async def test_a_fault_beside_a_cancellation() -> None:
    """A group of both: the fault is logged, and the cancellation goes on to where it belongs."""
    began = trio.Event()

    async def handler(stream: Any, connection: Connection) -> None:
        async with trio.open_nursery() as nursery:

            async def fails() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError

            nursery.start_soon(fails)
            began.set()
            await trio.sleep_forever()

    async with serving(handler) as listener:
        listener.connect()
        await began.wait()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_what_ends_a_process_is_let_through(kind: type[BaseException]) -> None:
    async def handler(stream: Any, connection: Connection) -> None:
        raise kind

    with pytest.RaisesGroup(kind, flatten_subgroups=True, allow_unwrapped=True):
        async with serving(handler) as listener:
            listener.connect()
            await trio.sleep(5)


@pytest.mark.parametrize(
    "name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "ECONNABORTED", "EPERM", "EPROTO"]
)
async def test_a_system_without_room_is_waited_for(
    name: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(errno, name)
    async with serving(echo) as listener:
        for _ in range(300):
            listener.put.send_nowait(OSError(number, "no room"))
        await trio.sleep(31)
        await check(listener)
    assert len(caplog.records) == 1
    assert "no room" in caplog.text


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("fault", "rests"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENOBUFS, "No buffer space available"), True),
        (ExceptionGroup("x", [ValueError(), MemoryError()]), True),
        (chained(OSError("all attempts failed"), OSError(errno.ENFILE, "x")), True),
        (chained(trio.TrioInternalError(), MemoryError()), True),
        (OSError(errno.ECONNREFUSED, "Connection refused"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError(), False),
    ],
    ids=repr,
)
async def test_a_process_that_lacks_something_leaves_connections_to_others(
    fault: Exception, rests: bool, autojump_clock: MockClock
) -> None:
    """It fails faster than they serve, so it would take most of them."""
    taken = 0

    async def handler(stream: Any, connection: Connection) -> None:
        nonlocal taken
        taken += 1
        raise fault

    async with serving(handler) as listener:
        for _ in range(20):
            listener.connect()
            await wait_all_tasks_blocked()
        assert taken == (2 if rests else 20)  # one that it was waiting for already
        await trio.sleep(5.5)
        assert taken == (7 if rests else 20)


async def test_silence_is_cut(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    kinds: list[str] = []
    async with serving(echo, handshake_seconds=3, on_failure=kinds.append) as listener:
        stream = listener.connect()
        began = trio.current_time()
        assert await stream.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(3)
    assert kinds == ["timeout"]
    assert "not authenticated within 3 s" in caplog.text


async def test_an_admitted_connection_stays(autojump_clock: MockClock) -> None:
    budget = Budget(4)

    async def handler(stream: Any, connection: Connection) -> None:
        connection.admit(budget)
        await echo(stream, connection)

    async with serving(handler, handshake_seconds=3) as listener:
        stream = listener.connect()
        await trio.sleep(100)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        assert len(budget) == 1
        await stream.aclose()
        await wait_all_tasks_blocked()
        assert len(budget) == 0


async def test_silent_connections_starve_nobody(autojump_clock: MockClock) -> None:
    """Four places and forty silent strangers, again and again: a client waits a little at most."""
    async with serving(echo, handshakes=4, handshake_seconds=10) as listener:
        silent = [listener.connect() for _ in range(40)]
        began = trio.current_time()
        stream = listener.connect()
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        assert trio.current_time() - began <= 11
        assert len(silent) == 40


async def test_a_burst_loses_nobody(autojump_clock: MockClock) -> None:
    """A hundred good clients at once on two places: those that make progress are not evicted."""
    done = 0

    async def handler(stream: Any, connection: Connection) -> None:
        await trio.sleep(0.5)  # a slow handshake
        await echo(stream, connection)

    async with serving(handler, handshakes=2) as listener, trio.open_nursery() as nursery:

        async def client() -> None:
            nonlocal done
            async with listener.connect() as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
            done += 1

        for _ in range(100):
            nursery.start_soon(client)
    assert done == 100


def connection_of(budget: Budget, holder: str) -> Connection:
    connection = Connection(None, BoundedLog(LOGGER))
    connection.admit(budget, holder)
    return connection


async def test_a_budget_is_shared_fairly(mock_clock: MockClock) -> None:
    """Idle connections of the one who has the most make room; busy ones never do."""
    budget = Budget(8, each=6)
    many = [connection_of(budget, "many") for _ in range(6)]
    with pytest.raises(TooManyConnections, match="many has 6 connections open"):
        connection_of(budget, "many")
    few = [connection_of(budget, "few") for _ in range(2)]
    with pytest.raises(TooManyConnections, match="8 connections are open"):
        connection_of(budget, "third")  # all of them are busy
    with contextlib.ExitStack() as waiting:
        for connection in (few[0], many[3], many[1]):
            waiting.enter_context(connection.waiting())
            mock_clock.jump(0.1)
        with pytest.raises(TooManyConnections):
            connection_of(budget, "third")  # they have not waited long
        mock_clock.jump(60)
        connection_of(budget, "third")
        assert many[3].evicted  # of the one who has the most, the one that waited longest
        assert not few[0].evicted
        connection_of(budget, "few")  # the one who has many has five, and pays again
        assert many[1].evicted
        assert not few[0].evicted
        connection_of(budget, "few")  # nobody who has more is idle: one of its own
        assert few[0].evicted
    assert len(budget) == 8


async def test_unused_connections_make_room(mock_clock: MockClock) -> None:
    """Whoever shares an address with strangers who only hold places gets in; those at work stay."""
    budget = Budget(6, even_shares=True)
    used = dict.fromkeys(range(20), False)
    made = []

    def connect(number: int) -> None:
        connection = Connection(None, BoundedLog(LOGGER))
        connection.admit(budget, "all behind one address", is_used=lambda: used[number])
        made.append(connection)
        mock_clock.jump(0.01)

    for number in range(6):
        connect(number)
    with pytest.raises(TooManyConnections):
        connect(6)  # nobody has been idle for long
    used[0] = used[2] = True
    mock_clock.jump(1)
    for number in (7, 8, 9, 10):
        connect(number)  # the idle one that came first makes room, each time
    assert [one.evicted for one in made[:6]] == [False, True, False, True, True, True]
    with pytest.raises(TooManyConnections):
        connect(11)  # the good ones have not had a second to begin
    used |= dict.fromkeys(range(7, 11), True)
    mock_clock.jump(3600)
    with pytest.raises(TooManyConnections):
        connect(12)  # all of them have worked
    assert not any(one.evicted for one in made[6:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux's")
async def test_one_byte_keeps_no_place_for_ever() -> None:
    """Connections that carried data and fell silent make room; those with data in either direction,
    or with data that we have not read, do not; nor do those of a smaller holder."""
    async with contextlib.AsyncExitStack() as stack:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await stack.enter_async_context(listener)
        budget = Budget(5, idle=0.3)

        async def connect(holder: str) -> tuple[Connection, Any, Any]:
            client = await trio.open_tcp_stream(*listener.socket.getsockname())
            server = await listener.accept()
            await stack.enter_async_context(client)
            await stack.enter_async_context(server)
            connection = Connection(server, BoundedLog(LOGGER))
            connection.admit(budget, holder, is_used=lambda: True)
            await client.send_all(b"x")
            assert await server.receive_some() == b"x"
            return connection, client, server

        made = [await connect("many") for _ in range(4)]
        (lone, _, _) = await connect("few")
        with pytest.raises(TooManyConnections):
            await connect("many")  # nobody has been idle for long
        await made[0][1].send_all(b"unread")
        await trio.sleep(0.35)
        await made[1][2].send_all(b"our side alone speaks")
        await made[2][1].send_all(b"y")
        await made[2][2].receive_some()
        await connect("many")
        assert [one.evicted for one, _, _ in made] == [False, False, False, True]
        assert not lone.evicted
        with pytest.raises(TooManyConnections):
            await connect("many")
        assert len(budget) == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux's")
async def test_a_peer_that_sends_and_does_not_read_keeps_no_place_for_ever() -> None:
    """Unread bytes of a peer show that we are late, unless the peer does not read ours."""
    async with contextlib.AsyncExitStack() as stack:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await stack.enter_async_context(listener)
        budget = Budget(2, idle=0.3)

        async def connect() -> tuple[Connection, Any, Any]:
            client = await trio.open_tcp_stream(*listener.socket.getsockname())
            server = await listener.accept()
            await stack.enter_async_context(client)
            await stack.enter_async_context(server)
            connection = Connection(server, BoundedLog(LOGGER))
            connection.admit(budget, "one")
            await client.send_all(b"unread")
            return connection, client, server

        (late, _, _), (deaf, _, to_deaf) = await connect(), await connect()
        with trio.move_on_after(0.1):
            await to_deaf.send_all(bytes(1 << 26))
        await trio.sleep(0.8)  # the kernel fills the peer's window up once more
        await connect()
        assert deaf.evicted
        assert not late.evicted
        with pytest.raises(TooManyConnections):
            await connect()


# --- crowds -----------------------------------------------------------------------------------

HELLO = b"hello"
"""What the handler of a crowd waits for; it answers as soon as it has it."""


async def greeting(stream: trio.SocketStream, connection: Connection) -> None:
    await read_exactly(stream, len(HELLO))
    await stream.send_all(b"answer")
    await stream.receive_some()  # as if the handshake went on


SAID = {"silent": b"", "byte": HELLO[:1], "part": HELLO[:3], "whole": HELLO}


@asynccontextmanager
async def crowded(
    *crowds: tuple[str, int, bytes], handshakes: int = 8, room: int | None = None
) -> AsyncIterator[tuple[Callable[[str], Awaitable[float]], list[str]]]:
    """A server in whose queue crowds (address, number, what each says) wait when it begins.

    Yields a client that is served and returns its delay, and the failures.
    """
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
    port = listeners[0].socket.getsockname()[1]
    failures: list[str] = []
    served: Supervisor[Any] = Supervisor(
        greeting,
        name="test",
        logger=LOGGER,
        handshakes=handshakes,
        patience=0.3,
        on_failure=failures.append,
    )

    def connect(source: str, said: bytes) -> socket.socket:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5, (source, 0)))
        client.sendall(said)
        return client

    async def ask(source: str) -> float:
        began = trio.current_time()
        client = connect(source, HELLO)
        client.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
            assert await stream.receive_some() == b"answer"
        return trio.current_time() - began

    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if room is not None:
            patch.setattr(hybridkex.net.pending, "WAITING", room)
        for source, number, said in crowds:
            for count in range(number):
                connect(source.replace("*", str(count % 250 + 2)), said)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.serve, listeners)
                yield ask, failures
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", sorted(SAID))
@pytest.mark.parametrize("handshakes", [1, 2, 8])
async def test_a_crowd_delays_nobody(said: str, handshakes: int) -> None:
    """Of another address, or of the same: whoever comes next is served after one place at most.
    One after the other, the crowd would take 11 to 90 s."""
    async with crowded(("127.0.0.2", 300, SAID[said]), handshakes=handshakes) as (ask, _):
        assert await ask("127.0.0.1") < 1.5
        assert await ask("127.0.0.2") < 1.5


async def test_crowds_of_several_addresses() -> None:
    async with crowded(("127.0.0.*", 250, SAID["whole"]), ("127.0.1.*", 250, SAID["byte"])) as (
        ask,
        _,
    ):
        assert await ask("127.0.2.1") < 1.5


async def test_a_crowd_that_comes_again_and_again_gets_one_turn_of_two() -> None:
    """An address whose places are free again at once has as many turns as each other address."""
    served: list[str] = []

    async def brief(stream: trio.SocketStream, connection: Connection) -> None:
        served.append(connection.address)

    async with contextlib.AsyncExitStack() as stack:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        where = listener.socket.getsockname()
        for source, number in (("127.0.0.2", 100), ("127.0.0.3", 20), ("127.0.0.4", 10)):
            for _ in range(number):
                client = socket.create_connection(where, 5, (source, 0))
                stack.enter_context(client)
                client.sendall(b"x")
        supervisor: Supervisor[Any] = Supervisor(brief, name="test", logger=LOGGER, handshakes=4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.serve, [listener])
            await trio_until(lambda: len(served) == 130)
            nursery.cancel_scope.cancel()
    # The first turns fall to those who are accepted first.
    assert max(place for place, one in enumerate(served) if one == "127.0.0.4") < 100
    last = max(place for place, one in enumerate(served) if one == "127.0.0.3")
    assert last < 115


async def test_a_room_that_is_full_dismisses_those_of_the_crowd(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not those of others; and of the crowd, the silent ones first."""
    crowds = ("127.0.0.3", 1, HELLO), ("127.0.0.2", 5, HELLO), ("127.0.0.2", 60, b"")
    async with crowded(*crowds, handshakes=2, room=20) as (ask, failures):
        assert await ask("127.0.0.1") < 1.5
        assert failures.count("evicted") >= 40
    dismissed = [one.getMessage() for one in caplog.records if "are waiting" in one.getMessage()]
    assert all("127.0.0.2:" in line for line in dismissed)


async def test_those_who_wait_are_closed_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async with contextlib.AsyncExitStack() as stack:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        clients = []
        supervisor: Supervisor[Any] = Supervisor(
            greeting, name="test", logger=LOGGER, handshakes=2, handshake_seconds=100
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.serve, [listener])
            for said in (b"", b"x", b"", b"x"):
                client = await trio.open_tcp_stream(*listener.socket.getsockname())
                clients.append(await stack.enter_async_context(client))
                await client.send_all(said)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        for client in clients:
            with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
                assert await client.receive_some() == b""


async def test_a_burst_of_one_address_loses_nobody() -> None:
    """Three hundred good clients, who need two turns each, on sixteen places."""
    async with crowded(handshakes=16) as (ask, failures), trio.open_nursery() as nursery:

        async def client() -> None:
            await ask("127.0.0.1")

        for _ in range(300):
            nursery.start_soon(client)
    assert failures == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SO_PEERCRED is Linux's")
async def test_local_programs_share_by_user_and_silence(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs at a Unix socket count for their user; what the system does not say about the
    silence of a connection, its handler does."""
    budget = Budget(4, idle=60.0)
    moved = dict.fromkeys(range(10), -1.0)
    ends = []

    def connect(number: int) -> Connection:
        ours, theirs = socket.socketpair()
        ends.append((ours, theirs))
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        connection = Connection(stream, BoundedLog(LOGGER))
        connection.admit(
            budget,
            is_used=lambda: moved[number] >= 0,
            silence=lambda: trio.current_time() - moved[number],
        )
        return connection

    try:
        made = [connect(number) for number in range(4)]
        assert {one.address for one in made} == {f"uid {os.getuid()}"}
        with pytest.raises(TooManyConnections):
            connect(4)  # nobody has been silent for a second
        mock_clock.jump(2)
        moved[0] = moved[1] = trio.current_time()
        connect(4)
        assert [one.evicted for one in made] == [False, False, True, False]
        moved.update(dict.fromkeys(range(2, 10), trio.current_time()))
        with pytest.raises(TooManyConnections):
            connect(5)
        mock_clock.jump(61)
        moved[0] = moved[3] = moved[4] = trio.current_time()
        connect(5)
        assert made[1].evicted
        # Another user has fewer, and takes the place of one who has been silent.
        moved[5] = trio.current_time()
        mock_clock.jump(61)
        monkeypatch.setattr(hybridkex.net.sockets, "_local_user", lambda _: "uid 4711")
        connect(6)
        assert sum(one.evicted for one in made) == 3
    finally:
        for pair in ends:
            for end in pair:
                end.close()


async def test_a_refused_connection_keeps_its_place_and_its_deadline(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the rest of the time for its handshake to be told, and no more."""
    budget = Budget(1)
    kinds: list[str] = []
    places: list[int] = []

    async def handler(stream: Any, connection: Connection) -> None:
        try:
            connection.admit(budget, "a")
        except TooManyConnections:
            places.append(len(supervisor._handshakes))
            if await stream.receive_some() == b"wait":
                await trio.sleep_forever()
            raise
        await trio.sleep_forever()

    supervisor: Supervisor[Any] = Supervisor(
        handler, name="test", logger=LOGGER, handshake_seconds=5, on_failure=kinds.append
    )
    listener = Fake()
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.serve, [listener])
        first = listener.connect()
        await wait_all_tasks_blocked()
        assert (len(budget), len(supervisor._handshakes)) == (1, 0)
        began = trio.current_time()
        late, told = listener.connect(), listener.connect()
        await late.send_all(b"wait")
        await told.send_all(b"bye")
        assert await told.receive_some() == b""
        assert places[-1] == 2
        assert kinds == ["limit"]
        assert "refused: 1 connections are open" in caplog.text
        assert len(supervisor._handshakes) == 1
        assert await late.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(5)
        assert kinds == ["limit", "timeout"]
        assert (len(budget), len(supervisor._handshakes)) == (1, 0)
        await first.send_all(b"still there")
        nursery.cancel_scope.cancel()


async def test_even_shares() -> None:
    """Busy or not: who has two places more than another lets go of the newest."""
    budget = Budget(8, even_shares=True)
    many = [connection_of(budget, "many") for _ in range(8)]
    with pytest.raises(TooManyConnections):
        connection_of(budget, "many")
    few = [connection_of(budget, "few") for _ in range(4)]
    with pytest.raises(TooManyConnections):
        connection_of(budget, "few")  # four each
    third = [connection_of(budget, "third") for _ in range(2)]
    assert [one.evicted for one in many] == 3 * [False] + 5 * [True]
    assert [one.evicted for one in few] == 3 * [False] + [True]
    with pytest.raises(TooManyConnections):
        connection_of(budget, "third")
    assert not any(one.evicted for one in third)
    assert len(budget) == 8


async def test_a_stranger_does_not_evict_those_who_have_less(mock_clock: MockClock) -> None:
    budget = Budget(4)
    with connection_of(budget, "a").waiting(), connection_of(budget, "b").waiting():
        connection_of(budget, "c")
        connection_of(budget, "c")
        mock_clock.jump(60)
        with pytest.raises(TooManyConnections):
            connection_of(budget, "c")


async def test_lines_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = BoundedLog(LOGGER, rate=1e-6, burst=3)
    for number in range(100):
        log.log(logging.WARNING, "line %d", number)
    log.flush()
    log.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "line 0",
        "line 1",
        "line 2",
        "97 similar log lines were suppressed",
    ]


async def test_strangers_suppress_no_line_of_a_known_peer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor an error of ours; and how many of theirs were suppressed is said, also at the end."""

    async def handler(stream: Any, connection: Connection) -> None:
        said = await stream.receive_some()
        if said == b"known":
            connection.recognize()
        raise ValueError if said == b"bug" else LocalStateError(said.decode())

    async with serving(handler) as listener:
        for said in (*[b"stranger"] * 50, b"known", b"bug"):
            async with listener.connect() as stream:
                await stream.send_all(said)
                assert not await stream.receive_some()
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.endswith(": known") for line in lines) == 1
    assert sum("internal error: ValueError" in line for line in lines) == 1
    told = [int(line.split()[0]) for line in lines if line.endswith("were suppressed")]
    assert sum(line.endswith(": stranger") for line in lines) + sum(told) == 50
    assert told


async def test_resets_at_accept() -> None:
    """Connections that were reset before they are accepted have no address; nothing ends."""

    async def handler(stream: Any, connection: Connection) -> None:
        await echo(stream, connection)

    supervisor: Supervisor[trio.SocketStream] = Supervisor(handler, name="test", logger=LOGGER)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    where = listeners[0].socket.getsockname()
    for _ in range(20):
        client = socket.create_connection(where)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.serve, listeners)
        async with await trio.open_tcp_stream(*where) as stream:
            await stream.send_all(b"x")
            with trio.fail_after(5):
                assert await stream.receive_some() == b"x"
        nursery.cancel_scope.cancel()
