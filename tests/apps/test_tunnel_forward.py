"""The forwarding of one connection: every split, full buffers, faults, and what it costs."""

import hashlib
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from socket import SO_RCVBUF, SO_SNDBUF, SOL_SOCKET, socketpair
from types import FrameType
from typing import Any

import pytest
import trio
from waiting import PATIENCE, trio_until

from hybridkex import ClientConfig, SecureStream, ServerConfig
from hybridkex.apps.tunnel.forward import ConnectionCut, Leg, forward
from hybridkex.net.readiness import BULK_READ, Readiness

Configs = tuple[ClientConfig, ServerConfig]
Streams = tuple[trio.SocketStream, trio.SocketStream]


def pair(buffer: int | None = None) -> Streams:
    """Two connected sockets, with so much room in the kernel."""
    found = socketpair()
    for one in found:
        if buffer is not None:
            one.setsockopt(SOL_SOCKET, SO_SNDBUF, buffer)
            one.setsockopt(SOL_SOCKET, SO_RCVBUF, buffer)
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in found)
    return one, other


class Splitting(trio.abc.HalfCloseableStream):
    """A transport that sends in pieces of random sizes."""

    def __init__(self, stream: trio.SocketStream, seed: int) -> None:
        self._stream = stream
        self._chance = random.Random(seed)

    async def send_all(self, data: Any) -> None:
        start = 0
        while start < len(data):
            size = self._chance.choice((1, 4, 5, 6, 100, 5_000, 40_000))
            await self._stream.send_all(data[start : start + size])
            start += size
            if not self._chance.randrange(4):
                await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        return await self._stream.receive_some(self._chance.choice((1, 7, 3_000, 100_000)))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclass
class Forwarded:
    """A connection that is being forwarded: the program's end, and the peer's."""

    program: trio.SocketStream
    peer: SecureStream[Any]
    wire: trio.SocketStream
    near: Leg
    far: Leg
    counted: Counter[str] = field(default_factory=Counter)
    result: list[BaseException | None] = field(default_factory=list)

    async def run(self, readiness: Readiness) -> None:
        try:
            await forward(
                self.near,
                self.far,
                out=lambda size: self.counted.update(out=size),
                back=lambda size: self.counted.update(back=size),
                idle_timeout=None,
                readiness=readiness,
            )
        except ConnectionCut as cut:
            self.result.append(cut)
        except Exception as error:
            self.result.append(error)
        else:
            self.result.append(None)
            await self.far.stream.aclose()
        finally:
            for leg in (self.near, self.far):
                await trio.aclose_forcefully(leg.stream)


class Place:
    """Where connections are forwarded."""

    def __init__(self, configs: Configs, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
        self._configs = configs
        self._stack = stack
        self._nursery = nursery
        self.readiness = Readiness()

    async def open(self, *, buffer: int | None = None, seed: int | None = None) -> Forwarded:
        (program, plain), (secure, wire) = pair(buffer), pair(buffer)
        client, server = self._configs
        far = SecureStream(secure, client, server_hostname="localhost")
        transport = wire if seed is None else Splitting(wire, seed)
        peer: SecureStream[Any] = SecureStream(transport, server)
        for one in (program, plain, far, peer):
            self._stack.push_async_callback(trio.aclose_forcefully, one)
        async with trio.open_nursery() as both:
            both.start_soon(far.do_handshake)
            both.start_soon(peer.do_handshake)
        legs = Leg("the program", plain, plain), Leg("the channel", far, secure)
        found = Forwarded(program, peer, wire, *legs)
        self._nursery.start_soon(found.run, self.readiness)
        return found


@pytest.fixture
async def place(configs: Configs) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        found = Place(configs, stack, nursery)
        async with found.readiness.running():
            yield found
            nursery.cancel_scope.cancel()


async def sends(stream: Any, data: bytes, chance: random.Random, updates: bool) -> None:
    start = 0
    while start < len(data):
        size = chance.choice((1, 90, 2_048, 2_049, 70_000))
        await stream.send_all(data[start : start + size])
        start += size
        if updates and not chance.randrange(3):
            await stream.update_keys(request_peer=bool(chance.randrange(2)))
    await stream.send_eof()


async def hears(stream: Any, chance: random.Random) -> bytes:
    found = bytearray()
    while data := await stream.receive_some(chance.choice((1, 500, 60_000))):
        found += data
        if not chance.randrange(5):
            await trio.lowlevel.checkpoint()
    return bytes(found)


@pytest.mark.parametrize("seed", range(8))
async def test_every_split(place: Place, seed: int) -> None:
    """Records and messages in any pieces, small buffers, key updates: all of it arrives."""
    chance = random.Random(seed)
    up, down = (chance.randbytes(chance.randrange(1, 400_000)) for _ in range(2))
    heard = {}
    connection = await place.open(buffer=chance.choice((4_096, 30_000, None)), seed=seed)
    program, peer = connection.program, connection.peer

    async def keep(name: str, stream: Any) -> None:
        heard[name] = await hears(stream, chance)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sends, program, up, chance, False)
            nursery.start_soon(sends, peer, down, chance, True)
            nursery.start_soon(keep, "up", peer)
            nursery.start_soon(keep, "down", program)
        assert heard == {"up": up, "down": down}
        await trio_until(lambda: connection.result == [None])
    assert connection.counted == {"out": len(up), "back": len(down)}


@pytest.mark.parametrize("way", ["out", "back"])
async def test_who_does_not_read_stops_the_sender(place: Place, way: str) -> None:
    """What is held is one read and the kernel's buffers; another connection goes on."""
    stuck, other = await place.open(buffer=8_192), await place.open()
    source: Any = stuck.program if way == "out" else stuck.peer
    sink: Any = stuck.peer if way == "out" else stuck.program
    sent = 0
    piece = random.Random(1).randbytes(20_000)
    digest = hashlib.sha256()

    async def send() -> None:
        nonlocal sent
        for _ in range(100):
            digest.update(piece)
            await source.send_all(piece)
            sent += len(piece)
        await source.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        before = -1
        while sent != before:
            before = sent
            await trio.sleep(0.05)
        assert sent < 2 * BULK_READ
        with trio.fail_after(PATIENCE):
            await other.program.send_all(b"meanwhile")
            assert await other.peer.receive_some() == b"meanwhile"
            await other.peer.send_all(b"indeed")
            assert await other.program.receive_some() == b"indeed"
            found = hashlib.sha256()
            while data := await sink.receive_some():
                found.update(data)
    assert found.digest() == digest.digest()


@pytest.mark.parametrize("what", ["damage", "cut", "program", "stuck"])
async def test_what_ends_one_connection_ends_no_other(place: Place, what: str) -> None:
    one, other = await place.open(buffer=8_192), await place.open()
    await one.program.send_all(b"x")
    assert await one.peer.receive_some() == b"x"
    match what:
        case "damage":
            await one.wire.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
            expected = "does not decrypt"
        case "cut":
            one.wire.socket.close()
            expected = "the channel"
        case "program":
            await one.peer.send_all(bytes(1000))  # unread when the socket is closed: a reset
            await trio_until(lambda: one.counted["back"] == 1000)
            one.program.socket.close()
            expected = "the program: the other end cut the connection"
        case "stuck":
            with trio.move_on_after(0.1):
                await one.program.send_all(bytes(1_000_000))
            one.wire.socket.close()
            expected = "the channel"
    await trio_until(lambda: bool(one.result))
    assert isinstance(one.result[0], ConnectionCut)
    assert expected in str(one.result[0])
    if what == "damage":
        with pytest.raises(trio.BrokenResourceError, match="bad_record_mac"):
            await one.peer.receive_some()
    await other.program.send_all(b"goes on")
    with trio.fail_after(PATIENCE):
        assert await other.peer.receive_some() == b"goes on"


async def test_a_fault_of_ours_ends_its_own_connection(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await place.open(), await place.open()

    def fail(size: int) -> None:
        raise MemoryError

    monkeypatch.setattr(one.counted, "update", lambda **_: fail(0))
    await one.program.send_all(b"x")
    await trio_until(lambda: bool(one.result))
    assert isinstance(one.result[0], MemoryError)
    await other.program.send_all(b"goes on")
    with trio.fail_after(PATIENCE):
        assert await other.peer.receive_some() == b"goes on"


# -- what it costs

SYSTEM_CALLS = {"poll", "modify", "register", "unregister", "readv", "write", "recv", "send"}
"""The functions of the standard library that make one each."""


class Calls:
    """Counts the calls of this thread: of the system, and of Python functions."""

    def __init__(self) -> None:
        self.system = 0
        self.python = 0

    def __enter__(self) -> "Calls":
        sys.setprofile(self._saw)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _saw(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.python += 1
        elif event == "c_call" and argument.__name__ in SYSTEM_CALLS:
            module = getattr(argument, "__module__", None) or type(argument.__self__).__module__
            self.system += module in ("posix", "select", "_socket", "socket")


@pytest.mark.parametrize(("clients", "system", "python"), [(1, 21, 260), (16, 11, 100)])
async def test_what_a_round_trip_costs(
    place: Place, configs: Configs, clients: int, system: float, python: float
) -> None:
    """Both ends of the tunnels in this thread, the programs and the targets in another.

    Four times in each round trip: one receive and one send, and, once for all that are ready, a
    wake-up, its registration and a list of them. With a task for each direction it was 20 calls of
    the system and 540 of Python, however many clients there were.
    """
    rounds = 100
    programs, targets = [], []

    def talk(number: int) -> None:
        for _ in range(number):
            for those, others in ((programs, targets), (targets, programs)):
                for one in those:
                    one.sendall(bytes(100))
                for other in others:
                    assert len(other.recv(1000)) == 100

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for _ in range(clients):
            (program, near), (far, target), wire = socketpair(), socketpair(), pair()
            programs.append(stack.enter_context(program))
            targets.append(stack.enter_context(target))
            streams = [
                SecureStream(wire[0], configs[0], server_hostname="localhost"),
                SecureStream(wire[1], configs[1]),
            ]
            async with trio.open_nursery() as both:
                for stream in streams:
                    both.start_soon(stream.do_handshake)
            for plain, stream in zip((near, far), streams, strict=True):
                socket = trio.SocketStream(trio.socket.from_stdlib_socket(plain))
                stack.push_async_callback(trio.aclose_forcefully, socket)
                stack.push_async_callback(trio.aclose_forcefully, stream)
                nursery.start_soon(
                    partial(
                        forward,
                        Leg("plain", socket, socket),
                        Leg("secure", stream, stream.transport_stream),
                        out=lambda _: None,
                        back=lambda _: None,
                        idle_timeout=60.0,
                        readiness=place.readiness,
                    )
                )
        await trio.to_thread.run_sync(talk, 2)
        with Calls() as calls:
            await trio.to_thread.run_sync(talk, rounds)
        nursery.cancel_scope.cancel()
    assert calls.system / rounds / clients < system
    assert calls.python / rounds / clients < python
