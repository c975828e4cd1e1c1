"""Random programs, and what they observe.

A program is a list of steps of an application and of its peer, made from a seed. After each step
everything settles, and the state of the connection is noted. The same program runs over
:mod:`hybridkex.aio`, over asyncio's own TLS and over plain TCP:

- A program of the family ``tls`` has no half-close. Each of its observations must be the same as
  over asyncio's own TLS.
- A program of the family ``half`` has it, as TLS 1.3 does and asyncio's TLS does not. Its
  observations must be the same as over plain TCP, where FIN takes the place of close_notify.

The last functions here name the differences that are intended.
"""

import asyncio
import contextlib
import random
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Final

from interop.shells.peer import Peer
from interop.shells.stacks import Hybridkex, Plain, Stack, Stock, contexts

__all__ = ["Program", "loops", "program", "verdict"]

_QUIET_TURNS: Final = 12
"""Turns of the loop without any movement after which everything has settled."""
_BUFFER: Final = 1 << 17
"""Bytes of each socket's buffers, so that a long write fills them."""
_LONG: Final = 3_000_000
"""Bytes of a write that no buffer takes at once."""

_CLOSED: Final = {"close", "abort", "end"}

_CALLS: Final = {
    *("write", "write long", "writelines", "close", "abort", "pause", "resume", "limits"),
    *("write_eof", "become"),
}
"""Steps that a protocol may take within a callback, too."""
_CALLBACKS: Final = ("data", "data", "data", "data", "full", "empty", "eof", "lost")

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """The steps of an application and of its peer."""

    seed: int
    family: str
    role: str
    style: str
    upgrades: bool
    half_open: bool
    steps: tuple[Step, ...]


def program(seed: int) -> Program:
    """The program of a seed."""
    chance = random.Random(seed)
    family = chance.choice(("tls", "tls", "half"))
    style = chance.choice(("protocol", "buffered", "streams"))
    return Program(
        seed,
        family,
        chance.choice(("client", "server")),
        style,
        chance.random() < 0.3,
        family == "half" and chance.random() < 0.7,
        _steps(chance, family, style),
    )


def _steps(chance: random.Random, family: str, style: str) -> tuple[Step, ...]:
    steps: list[Step] = []
    for _ in range(chance.randrange(4, 16)):
        step = _step(chance, family, style)
        # After close(), TLS waits for the peer, and plain TCP has closed: these would differ.
        waits = step[0].startswith(("peer resets", "read", "cancel", "write long"))
        if not (waits and family == "half" and ("close",) in steps):
            steps.append(step)
    return tuple(steps)


def _step(chance: random.Random, family: str, style: str) -> Step:
    half, streams = family == "half", style == "streams"
    if not streams and chance.random() < 0.25:
        inner = _step(chance, family, style)
        while inner[0] not in _CALLS:
            inner = _step(chance, family, style)
        return ("within", chance.choice(_CALLBACKS), *inner)
    size = chance.choice((0, 1, 5, 100, 2000))
    # With a mark of 0, asyncio's TLS calls pause_writing and never resume_writing.
    limits = ((0, 0) if half else (20, 10), (10, 5), (100_000, 10), (4_000_000, 10))
    kinds: dict[str, tuple[float, Callable[[], Step]]] = {
        "write": (3, lambda: (size,)),
        "write long": (1, tuple),
        "writelines": (1, lambda: tuple(chance.choice((0, 1, 50)) for _ in range(3))),
        "close": (0.5, tuple),
        "abort": (0.2, tuple),
        "pause": (0 if streams else 1, tuple),
        "resume": (0 if streams else 1.5, tuple),
        "become": (0 if streams else 0.3, tuple),
        "limits": (0.7, lambda: chance.choice(limits)),
        "wrong limits": (0.1, lambda: chance.choice(((1, 2), (-1,)))),
        "wrong write": (0.2, lambda: (chance.choice(("text", None, 3)),)),
        "write_eof": (0.7 if half else 0, tuple),
        "read": (2 if streams else 0, lambda: (chance.choice((1, 10, 3000, 1 << 20, -1)),)),
        "readexactly": (1 if streams else 0, lambda: (chance.choice((0, 1, 10, 3000)),)),
        "readline": (1 if streams else 0, tuple),
        "readuntil": (1 if streams else 0, lambda: (chance.choice((b"\n", b"zz", b"ab")),)),
        "drain": (1 if streams else 0, tuple),
        "wait_closed": (0.3 if streams else 0, tuple),
        "cancel": (0.7 if streams else 0, lambda: (chance.randrange(3),)),
        "peer sends": (4, lambda: (chance.choice((1, 5, 100, 4000)), chance.choice((1, 1, 3, 60)))),
        "peer stops reading": (0.4, tuple),
        "peer reads": (0.8, tuple),
        # asyncio's streams over TLS close the connection by themselves.
        "peer ends": (0.5 if half or not streams else 0, tuple),
        "peer cuts": (0 if half else 0.2, tuple),
        "peer resets": (0.15, tuple),
    }
    kind = chance.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
    return (kind, *kinds[kind][1]())


@dataclass
class _Seen:
    """What an application has observed so far."""

    events: list[str] = field(default_factory=list)
    received: int = 0
    checksum: int = 0
    full: bool = False
    paused: bool = False
    plans: dict[str, list[Step]] = field(default_factory=dict)
    act: Callable[..., None] = lambda *_: None
    taken: list[tuple[str, str]] = field(default_factory=list)
    """The steps that were taken within callbacks."""

    def within(self, callback: str) -> None:
        """Take the steps that are planned for a callback."""
        for step in self.plans.pop(callback, ()):
            self.taken.append((callback, step[0]))
            self.act(*step)

    def data(self, data: bytes) -> None:
        self.received += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        if not self.events or self.events[-1] != "data":
            self.events.append("data")


class _Application(asyncio.Protocol):
    """An application that notes its callbacks."""

    def __init__(self, seen: _Seen, *, half_open: bool) -> None:
        self.seen, self._half_open = seen, half_open
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.seen.events.append("made")

    def data_received(self, data: bytes) -> None:
        self.seen.data(data)
        self.seen.within("data")

    def eof_received(self) -> bool | None:
        self.seen.events.append("eof")
        self.seen.within("eof")
        return self._half_open or None

    def pause_writing(self) -> None:
        self.seen.full = True
        self.seen.within("full")

    def resume_writing(self) -> None:
        self.seen.full = False
        self.seen.within("empty")

    def connection_lost(self, exc: Exception | None) -> None:
        self.seen.events.append(f"lost: {_kind(exc)}")
        self.seen.within("lost")


class _BufferedApplication(_Application, asyncio.BufferedProtocol):
    """The same with a buffer of its own."""

    def __init__(self, seen: _Seen, *, half_open: bool) -> None:
        super().__init__(seen, half_open=half_open)
        # asyncio's TLS loses data that it reads into a part of a bytearray, which is a copy of it.
        self._buffer = memoryview(bytearray(700))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.seen.data(bytes(self._buffer[:nbytes]))
        self.seen.within("data")


def _waits(transport: Any) -> bool:
    try:
        return bool(transport.get_write_buffer_size())
    except AttributeError:  # asyncio's TLS after its end
        return False


def _kind(error: BaseException | None) -> str:
    """An error's kind: connections break with several types of OSError and SSLError."""
    if error is None:
        return "None"
    return "OSError" if isinstance(error, OSError) else type(error).__name__


@dataclass(frozen=True)
class Row:
    """What was observed after a step."""

    step: Step
    events: tuple[str, ...]
    data: tuple[int, int]
    results: tuple[str, ...]
    closing: bool
    full: bool
    waits: bool
    peer: tuple[Any, ...] = ()
    taken: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """The steps that were taken within callbacks, as callback and kind."""
    paused: bool = field(default=False, compare=False)

    @property
    def lost(self) -> str:
        """The event of ``connection_lost``, or the result of an operation that says the same."""
        broken = any(one.endswith("OSError") for one in self.results)
        events = [one for one in self.events if one.startswith("lost")]
        return events[0] if events else "lost: OSError" if broken else ""


class _Run:
    """A program that runs over a stack."""

    def __init__(self, made: Program, stack: Stack, pause: float) -> None:
        self._program, self._stack, self._pause = made, stack, pause
        self._seen = _Seen()
        self._application: _Application | None = None
        self._streams: Any = None
        self._pending: list[tuple[int, asyncio.Task[Any]]] = []
        self._results: list[str] = []
        self._text = random.Random(made.seed ^ 0x5EED)
        self._words = random.Random(made.seed ^ 0x9EE2)
        self._number = 0
        self.reports: list[str] = []

    async def run(self) -> list[Row]:
        """The observations: one after each step, and that of the end."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.reports.append(context["message"]))
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        made = self._program
        stack = Plain() if made.upgrades else self._stack
        server: asyncio.Server | None = None
        if made.role == "client":
            own = socket.socket()
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            own.connect(listening.getsockname())
            self._peer = Peer(listening.accept()[0])
            listening.close()
            own.setblocking(False)
            self._peer_begins(stack)
            await self._until(self._connect(stack, own))
        else:
            server = await self._accept(stack, listening)
            peer = socket.socket()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            peer.connect(listening.getsockname())
            self._peer = Peer(peer)
            self._peer_begins(stack)
        async with asyncio.timeout(10):
            while not (self._peer.ready and (self._streams or self._seen.events)):
                self._peer.move()
                await asyncio.sleep(0)
        observations = []
        for step in (("begin",), *(("upgrade",),) * made.upgrades, *made.steps):
            self._number += 1
            await self._do(*step)
            await self._settle()
            observations.append(self._observe(step))
        await self._end()
        peer = self._peer.received, self._peer.checksum, self._peer.end
        observations.append(replace(self._observe(("end",)), peer=peer))
        if server is not None:
            server.close()
        with contextlib.suppress(AttributeError):
            self._transport.abort()  # asyncio's TLS does not close a connection that is paused
        self._peer.close()
        for _, task in self._pending:
            task.cancel()
        await asyncio.sleep(0)
        return observations

    # -- begin and end

    def _peer_begins(self, stack: Stack) -> None:
        if stack.tls:
            client, server = contexts()
            if self._program.role == "client":
                self._peer.start_tls(server, server_side=True)
            else:
                self._peer.start_tls(client, server_side=False)
                self._peer.begin()

    def _factory(self) -> _Application:
        kind = _BufferedApplication if self._program.style == "buffered" else _Application
        self._application = kind(self._seen, half_open=self._program.half_open)
        return self._application

    async def _connect(self, stack: Stack, own: socket.socket) -> None:
        if self._program.style == "streams":
            self._streams = await stack.open(own)
        else:
            await stack.connect(self._factory, own)

    async def _accept(self, stack: Stack, listening: socket.socket) -> asyncio.Server:
        if self._program.style != "streams":
            return await stack.listen(self._factory, listening)

        def connected(*streams: Any) -> None:
            self._streams = streams

        return await stack.serve(connected, listening)

    async def _upgrade(self) -> None:
        server_side = self._program.role == "server"
        if self._program.style == "streams":
            self._streams = await self._stack.upgrade_streams(
                self._streams, server_side=server_side
            )
        else:
            assert self._application is not None
            self._application.transport = await self._stack.upgrade(
                self._transport, self._application, server_side=server_side
            )

    async def _until(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        async with asyncio.timeout(10):
            while not task.done():
                await asyncio.sleep(0)  # the application goes first
                self._peer.move()
        await task

    async def _settle(self) -> None:
        quiet = 0
        while quiet < _QUIET_TURNS:
            before = self._seen.received, len(self._seen.events), len(self._results)
            moved = self._peer.move()
            await asyncio.sleep(self._pause if quiet else 0)
            self._collect()
            after = self._seen.received, len(self._seen.events), len(self._results)
            quiet = 0 if moved or before != after else quiet + 1

    async def _end(self) -> None:
        """The peer takes everything; the application closes, and then the peer."""
        self._peer.reading = True
        await self._settle()
        with contextlib.suppress(Exception):
            self._transport.close()
        await self._settle()
        self._peer.finish()
        await self._settle()

    # -- steps

    @property
    def _transport(self) -> Any:
        if self._program.style == "streams":
            return self._streams[1].transport
        assert self._application is not None
        return self._application.transport

    async def _do(self, kind: str, *arguments: Any) -> None:
        if kind == "begin":
            return
        if kind == "upgrade":
            self._peer_begins(self._stack)
            await self._until(self._upgrade())
        elif kind == "within":
            self._seen.act = self._try
            self._seen.plans.setdefault(arguments[0], []).append(arguments[1:])
        elif kind.startswith("peer "):
            self._peer_does(kind, *arguments)
        elif kind == "cancel":
            for _, task in self._pending[arguments[0] : arguments[0] + 1]:
                task.cancel()
        elif kind in ("read", "readexactly", "readline", "readuntil", "drain", "wait_closed"):
            side = self._streams[kind in ("drain", "wait_closed")]
            task = asyncio.ensure_future(getattr(side, kind)(*arguments))
            self._pending.append((self._number, task))
        else:
            self._try(kind, *arguments)

    def _try(self, kind: str, *arguments: Any) -> None:
        try:
            self._call(kind, *arguments)
        except Exception as error:
            self._results.append(f"{self._number} {kind}: {_kind(error)}")

    def _call(self, kind: str, *arguments: Any) -> None:
        writes = self._streams[1] if self._program.style == "streams" else self._transport
        transport = self._transport
        if kind == "write":
            writes.write(self._text.randbytes(arguments[0]))
        elif kind == "write long":
            writes.write(bytes(_LONG))
        elif kind == "wrong write":
            writes.write(arguments[0])
        elif kind == "writelines":
            writes.writelines([self._text.randbytes(size) for size in arguments])
        elif kind in ("limits", "wrong limits"):
            transport.set_write_buffer_limits(*arguments)
        elif kind == "become":
            kind = type(self._application)
            after = kind(self._seen, half_open=self._program.half_open)
            after.transport = transport
            transport.set_protocol(after)
            self._application = after
        elif kind in ("pause", "resume"):
            getattr(transport, f"{kind}_reading")()
            self._seen.paused = kind == "pause"
        else:
            getattr(writes if hasattr(writes, kind) else transport, kind)()

    def _peer_does(self, kind: str, *arguments: Any) -> None:
        peer = self._peer
        if kind == "peer sends":
            size, segments = arguments
            text = self._words.choices(b"abz\n", k=size)
            peer.send(bytes(text), segments if self._stack.tls else 1)
        elif kind in ("peer reads", "peer stops reading"):
            peer.reading = kind == "peer reads"
        elif kind == "peer ends":
            peer.finish()
        elif kind == "peer cuts":
            peer.cut()
        else:
            peer.reset()

    def _collect(self) -> None:
        for number, task in [one for one in self._pending if one[1].done()]:
            self._pending.remove((number, task))
            if task.cancelled():
                result = "cancelled"
            elif (error := task.exception()) is not None:
                result = _kind(error)
                if isinstance(error, asyncio.IncompleteReadError):
                    result += f" {len(error.partial)}"
            else:
                value = task.result()
                result = "done"
                if isinstance(value, bytes):
                    self._seen.data(value)
                    result = f"{len(value)} bytes"
            self._results.append(f"{number}: {result}")

    # -- observations

    def _observe(self, step: Step) -> Row:
        transport, seen = self._transport, self._seen
        events = [one for one in seen.events if one != "data" or self._program.style != "streams"]
        return Row(
            step,
            tuple(events),
            (seen.received, seen.checksum),
            tuple(sorted(self._results)),
            transport.is_closing(),
            seen.full,
            _waits(transport),
            taken=tuple(seen.taken),
            paused=seen.paused,
        )


def loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loops: asyncio's, and uvloop's where it is installed."""
    found: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    with contextlib.suppress(ImportError):
        found["uvloop"] = import_module("uvloop").new_event_loop
    return found


def verdict(made: Program, factory: Callable[[], asyncio.AbstractEventLoop]) -> str:
    """Run a program and compare; what differs without a reason must do so on a busy machine, too.

    Returns an empty text, the reason of a difference that is intended, or a text that begins with
    ``FAULT``.
    """
    found = ""
    for pause in (0.0, 0.01):
        found = _compare(made, *_observe(made, factory, pause))
        if not found.startswith("FAULT"):
            break
    return found


def _observe(
    made: Program, factory: Callable[[], asyncio.AbstractEventLoop], pause: float
) -> tuple[list[Row], list[Row]]:
    """Run a program over hybridkex and over what it is compared with; returns the observations."""

    def run(stack: Stack, factory: Callable[[], asyncio.AbstractEventLoop]) -> list[Row]:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(_Run(made, stack, pause).run())

    if made.family == "tls":
        return run(Hybridkex(), factory), run(Stock(), factory)
    # uvloop's own plain transports raise after the end, and report it twice.
    return run(Hybridkex(), factory), run(Plain(), asyncio.new_event_loop)


def _compare(made: Program, ours: list[Row], theirs: list[Row]) -> str:
    rows = ours
    if made.family == "half":  # FIN closes plain TCP at once, and TLS waits for the peer's.
        ours, theirs = ours[-1:], theirs[-1:]
    first = len(rows) - len(ours) + 1
    for at, (mine, raw) in enumerate(zip(ours, theirs, strict=True), first):
        done = [row.step[0] for row in rows[:at]]
        done += [kind for _, kind in mine.taken]
        other = _like(made, done, mine, raw)
        if mine == other:
            continue
        return _reason(made, done, mine, other) or f"FAULT: {mine}\n  {other}"
    return ""


def _like(made: Program, done: list[str], mine: Row, other: Row) -> Row:
    """The other row without what asyncio's own does as an oversight."""
    # After its end, each method of asyncio's TLS raises AttributeError, and writelines of plain
    # TCP raises TypeError. drain() of asyncio's TLS leaves out what waits in the transport below,
    # as pause_writing and get_write_buffer_size do.
    broken = ("AttributeError", "writelines: TypeError")
    odd = {one.split(":")[0] for one in other.results if one.endswith(broken)}
    if made.family == "tls" and mine.waits:
        odd |= {one.split(":")[0] for one in set(other.results) - set(mine.results)}
    results = [one for one in other.results if one.split(":")[0] not in odd]
    results += [one for one in mine.results if one.split(":")[0] in odd]
    waits, full = other.waits, other.full
    if made.family == "tls":
        waits, full = mine.waits, mine.full and (mine.waits or mine.closing)
    peer = other.peer
    if {"abort", "peer resets"} & set(done):
        peer = mine.peer
    elif made.family == "half" and peer and {peer[2], mine.peer[2]} == {"clean", "cut"}:
        # A plain socket that is closed with data unread is reset.
        peer = mine.peer
    # asyncio without TLS reports the peer's end again whenever reading is resumed.
    events = tuple(dict.fromkeys(other.events)) if made.family == "half" else other.events
    if _CLOSED & set(done) and "eof" not in mine.events:
        # asyncio's TLS reports the peer's end to an application that has closed the connection.
        events = tuple(one for one in events if one != "eof")
    return replace(
        other, events=events, results=tuple(sorted(results)), waits=waits, full=full, peer=peer
    )


def _reason(made: Program, done: list[str], mine: Row, other: Row) -> str:
    """Why two rows differ, if it is intended: what is in docs/from-asyncio.md, or what asyncio's
    own TLS does against its own documentation."""
    closed = _CLOSED & set(done)
    lost = "lost: OSError"
    if "peer cuts" in done and mine.lost == lost:
        return "a truncated connection is an error"
    if closed and other.lost == lost != mine.lost:
        return "data that comes after close() is no error"
    if mine.peer and mine.peer[2] == "clean" and other.peer[2] != "clean":
        return "what was written before the end arrives, and the end too"
    stops = {("data", kind) for kind in ("close", "abort", "pause")}
    if mine.data[0] < other.data[0] and stops & set(mine.taken):
        return "the rest of a record is not delivered after close(), abort() or pause_reading()"
    if any(callback in ("full", "empty") for callback, _ in mine.taken + other.taken):
        return "pause_writing() and resume_writing() are called at other times"
    if mine.data[0] > other.data[0]:
        return "what the peer sent before its end is delivered"
    if "peer ends" in done and mine.waits and (mine.closing, other.closing) == (True, False):
        return "the application's protocol has closed the connection"
    if "peer ends" in done and mine.waits and mine.closing and other.lost and not mine.lost:
        return "what was written before the end is not given up"
    if made.family == "half" and mine.lost == lost and "peer resets" in done and closed:
        return "close() waits for the peer's close_notify"
    if other == replace(mine, full=other.full) and mine.lost:
        return "after the end, it does not matter whether writing was paused"
    if made.family == "half" and mine.peer[0] < other.peer[0] and mine.lost == other.lost:
        return "what is written after close() is discarded"
    if made.family == "half" and "write_eof: OSError" in "".join(other.results):
        return "write_eof() does not raise for a peer that has reset the connection"
    if mine.paused and mine.lost and not other.lost and closed:
        return "a connection whose reading is paused can be closed"
    if not closed and mine.paused and other.lost and not mine.lost:
        return "a connection whose reading is paused is not read, as over plain TCP"
    return ""
