"""The supervisor of accepted connections: every socket that this project listens on has one.

It accepts, runs a handler for each connection in a task of its own, and keeps three promises:

- **No connection ends another.** Whatever exception leaves a handler, alone or in a group, ends
  its own connection and becomes one log line. Only cancellation and ``KeyboardInterrupt`` pass.
- **Number and time are bounded.** A connection begins in the budget of those that have not yet
  authenticated, with a deadline; the handler calls :meth:`Connection.admit` when it knows the peer,
  and the connection moves to the budget of its kind. A budget is shared fairly among its holders
  (see :class:`Budget`), so that idle strangers cannot lock others out. Nor can those who fill the
  kernel's queue: while more connections wait there than may be open, one of an address that has
  most places is closed as soon as it is accepted if it is silent, and after a tenth of the usual
  patience if it has begun a message and stopped.
- **A temporary fault has no lasting effect.** While the system has no descriptors or no memory
  for another connection (accept(2): EMFILE, ENFILE, ENOBUFS, ENOMEM) the accept loop waits and
  retries, and logs it at a bounded rate.
"""

import contextlib
import fcntl
import logging
import math
import select
import socket
import struct
import sys
import termios
import traceback
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, Final, Generic, TypeVar

import trio
from trio.abc import AsyncResource, Listener

from hybridkex.errors import HybridkexError
from hybridkex.machine import refusal
from hybridkex.net.descriptors import bounded
from hybridkex.net.log import BoundedLog

__all__ = ["Budget", "Connection", "Supervisor", "TooManyConnections", "peer_name"]

HANDSHAKES: Final = 128
"""Default number of connections that have not yet authenticated."""
HANDSHAKE_SECONDS: Final = 10.0
"""Default time until a connection has authenticated."""
PATIENCE: Final = 1.0
"""Seconds that a connection must have waited for its peer before a newcomer may replace it."""
HURRY: Final = 0.1
"""The part of that time which is left to a connection that has begun its first message and stopped,
of an address that has most places, while the kernel's queue is longer than there are places."""
IDLE_SECONDS: Final = 60.0
"""Seconds without data in either direction before a newcomer may replace a connection that has
carried data."""
RETRY_SECONDS: Final = 0.1
"""Seconds between two attempts to accept while the system lacks resources."""
FLUSH_SECONDS: Final = 30.0
"""Seconds between two reports of suppressed log lines."""

T = TypeVar("T", bound=AsyncResource)


class TooManyConnections(HybridkexError):
    """A connection was refused because a budget of connections is used up."""


class Connection:
    """An accepted connection under supervision.

    Attributes:
        peer: the peer's address and port, or ``a local program``.
        address: where the peer is, which holds a place until the peer has authenticated: an IPv4
            address, the /64 prefix of an IPv6 address, the user ID of a local program, or empty.
        log: for log lines that the peer can cause.
        evicted: whether it was closed to make room for another connection.
    """

    def __init__(self, transport: trio.SocketStream | None, log: BoundedLog) -> None:
        self.log: Final = log
        self.peer: Final = peer_name(transport)
        self.address: Final = _network(transport)
        self._transport = transport
        self._scope = trio.CancelScope()
        self._budget: Budget | None = None
        self._holder: Hashable = None
        self._waiting_since: float | None = None
        self._unread = False
        self._admitted = 0.0
        self._is_used: Callable[[], bool] = lambda: True
        self._silence: Callable[[], float] = lambda: -1.0
        self.evicted = False

    def admit(
        self,
        budget: "Budget",
        holder: Hashable = None,
        *,
        is_used: Callable[[], bool] = lambda: True,
        silence: Callable[[], float] = lambda: -1.0,
    ) -> None:
        """Mark the peer as authenticated: move to ``budget``, counted for ``holder``; ends the
        deadline.

        Args:
            budget: of the connections of its kind.
            holder: who the peer is; :attr:`address` if that is ``None``.
            is_used: whether the connection has carried any data of the application. As long as it
                has not, a newcomer may take its place, as in :meth:`waiting`; afterwards it keeps
                its place while data flows (see :class:`Budget`). So strangers who share the address
                of good clients keep none of them out.
            silence: seconds since data of the application last crossed the connection. It is asked
                where the system does not say, as for a Unix socket; negative: not known.

        Raises:
            TooManyConnections: the budget is used up. Deadline and place stay as they were, so that
                the handler has the rest of its time to tell the peer.
        """
        before, place = self._budget, self._holder
        budget._take(self, self.address if holder is None else holder)
        if before is not None:
            before._give_back(self, place)
        self._waiting_since = None
        self._admitted, self._is_used, self._silence = trio.current_time(), is_used, silence
        self._scope.deadline = math.inf

    @contextlib.contextmanager
    def waiting(self, *, unread: bool = False) -> Iterator[None]:
        """In this context we wait for the peer, and a newcomer may replace this connection: closing
        it now loses nothing.

        Args:
            unread: also while bytes of the peer wait to be read; what it owes us is that it reads.
        """
        self._waiting_since, self._unread = trio.current_time(), unread
        try:
            yield
        finally:
            self._waiting_since = None

    def _age(self, now: float) -> float:
        """Seconds that the peer has kept us waiting; negative if the delay is ours."""
        since = self._waiting_since
        if since is None and not self._is_used():
            since = self._admitted
        if since is None or self.evicted:
            return -1.0
        if not self._unread and _has_unread(self._transport):
            return -1.0
        return now - since

    def _unanswered(self, now: float) -> float:
        """Like :meth:`_age`, of one whose words have not yet been enough for an answer."""
        return -1.0 if _has_answers(self._transport) else self._age(now)

    def _idle(self, now: float) -> float:
        """Seconds since data last crossed the connection; negative where that is not known, or if
        the delay is ours: bytes of the peer wait to be read, and the peer itself reads."""
        transport = self._transport
        if self.evicted or (_has_unread(transport) and not _has_unsent(transport)):
            return -1.0
        silence = _silence(transport)
        return silence if silence >= 0 else self._silence()

    def _evict(self) -> None:
        self.evicted = True
        self._release()
        self._scope.cancel()

    def _release(self) -> None:
        if self._budget is not None:
            self._budget._give_back(self, self._holder)
            self._budget = None


class Budget:
    """A number of connections that may be open at once, shared fairly among those who hold them.

    When it is used up, a newcomer replaces one connection, of the first kind that there is:

    1. one that has waited ``patience`` seconds for its peer (:meth:`Connection.waiting`), or has
       been admitted for as long and never carried data;
    2. one that has carried data, but none for ``idle`` seconds: who sends one byte does not keep
       a place for ever;
    3. with ``even_shares``, for holders who need not keep their peers waiting to occupy places: the
       newest connection of the holder who has the most, if that leaves that holder no fewer than
       the newcomer then has. It was opened when there was little room left.

    Of the first two kinds it is the one that has been silent longest among those of the holder with
    the most connections, but never one of a holder who has fewer than the newcomer. If there is
    no such connection, the newcomer is refused. Where the newcomer's holder has used up its own
    share (``each``), one of its own connections of the first two kinds makes room.

    Args:
        total: connections at once.
        each: connections at once of one holder; ``None`` for no limit but ``total``.
        what: the name of the budget in messages: *connections*, *peer connections*.
        patience: seconds that a connection must have waited before a newcomer may take its place.
        idle: seconds without data in either direction, likewise, of one that has carried data
            (known on Linux or from ``silence``; otherwise such a connection keeps its place).
        even_shares: whether connections that do not wait make room, too.
        descriptors: file descriptors of one connection; there are fewer connections where the
            process may not open enough (:mod:`hybridkex.net.descriptors`).
    """

    def __init__(
        self,
        total: int,
        *,
        each: int | None = None,
        what: str = "connections",
        descriptors: int = 1,
        patience: float = PATIENCE,
        idle: float = IDLE_SECONDS,
        even_shares: bool = False,
    ) -> None:
        self._what = what
        self._descriptors = descriptors
        self.total = total
        self.each = each
        self._patience = patience
        self._idle = idle
        self._even_shares = even_shares
        self._count = 0
        self._held: dict[Hashable, dict[Connection, None]] = {}
        self._changed = trio.Event()

    @property
    def total(self) -> int:
        """Connections at once, as far as the process has descriptors for them."""
        return self._total

    @total.setter
    def total(self, connections: int) -> None:
        self._total = bounded(connections, self._what, each=self._descriptors)

    def __len__(self) -> int:
        return self._count

    def _take(self, connection: Connection, holder: Hashable) -> None:
        own = len(self._held.get(holder, ()))
        if self.each is not None and own >= self.each:
            victim = self._silent(holder, only=True)
            if victim is None:
                raise TooManyConnections(f"{holder} has {own} {self._what} open")
            victim._evict()
        elif self._count >= self.total:
            victim = self._silent(holder) or self._surplus(own)
            if victim is None:
                raise TooManyConnections(f"{self._count} {self._what} are open")
            victim._evict()
        self._add(connection, holder)

    def _silent(self, newcomer: Hashable, *, only: bool = False) -> Connection | None:
        """A connection that has kept us waiting, or has been idle, for so long that a newcomer may
        replace it; ``only`` one of the newcomer's own holder."""
        victim, age = self._victim(newcomer, only=only)
        if victim is not None and age >= self._patience:
            return victim
        victim, age = self._victim(newcomer, only=only, of=Connection._idle)
        return victim if victim is not None and age >= self._idle else None

    def _surplus(self, own: int) -> Connection | None:
        """The newest connection of the holder who has the most, where a newcomer who has ``own``
        may take it."""
        if not self._even_shares:
            return None
        most = max(self._held.values(), key=len, default={})
        return next(reversed(most)) if len(most) >= own + 2 else None

    async def _wait_and_take(
        self, connection: Connection, holder: Hashable, queued: Callable[[], int]
    ) -> None:
        """Like :meth:`_take`, but wait for a free slot: newcomers stay in the kernel's queue, so
        that a burst of good connections loses none. ``queued`` says how many are there."""
        while self._count >= self.total:
            hurried = queued() > self.total
            if hurried and self._evict_unanswered():
                break
            victim, age = self._victim(holder)
            if victim is not None and age >= self._patience:
                victim._evict()
                break
            if self._changed.is_set():
                self._changed = trio.Event()
            wait = self._patience - max(age, 0.0) if victim is not None else RETRY_SECONDS
            with trio.move_on_after(min(wait, HURRY * PATIENCE) if hurried else wait):
                await self._changed.wait()
        self._add(connection, holder)

    def _victim(
        self,
        newcomer: Hashable,
        *,
        only: bool = False,
        of: Callable[[Connection, float], float] = Connection._age,
    ) -> tuple[Connection | None, float]:
        """The connection that is first to make room, and its age."""
        now = trio.current_time()
        own = len(self._held.get(newcomer, ()))
        best: Connection | None = None
        rank = (0, 0.0)
        for holder, connections in self._held.items():
            if holder != newcomer and (only or len(connections) <= own):
                continue
            for connection in connections:
                age = of(connection, now)
                if age >= 0 and (len(connections), age) > rank:
                    best, rank = connection, (len(connections), age)
        return best, rank[1]

    def _crowds(self, newcomer: Connection) -> bool:
        """Whether a newcomer has sent nothing, and its holder has most of the places in use."""
        return self._has_most(newcomer.address) and not _has_unread(newcomer._transport)

    def _has_most(self, holder: Hashable) -> bool:
        return 2 * len(self._held.get(holder, ())) > self.total

    def _evict_unanswered(self) -> bool:
        """Close the connections that have begun a message and stopped, of the holder who has most
        places; all at once, since each look at a connection takes time."""
        most = max(self._held, key=lambda one: len(self._held[one]), default=None)
        if not self._has_most(most):
            return False
        now, patience = trio.current_time(), HURRY * self._patience
        late = [one for one in self._held[most] if one._unanswered(now) >= patience]
        for one in late:
            one._evict()
        return bool(late)

    def _evict_one(self) -> bool:
        """Free the descriptor of a connection that has waited too long, if there is one."""
        victim, age = self._victim(object())
        if victim is None or age < self._patience:
            return False
        victim._evict()
        return True

    def _add(self, connection: Connection, holder: Hashable) -> None:
        connection._budget, connection._holder = self, holder
        self._held.setdefault(holder, {})[connection] = None
        self._count += 1

    def _give_back(self, connection: Connection, holder: Hashable) -> None:
        connections = self._held[holder]
        del connections[connection]
        if not connections:
            del self._held[holder]
        self._count -= 1
        self._changed.set()


class Supervisor(Generic[T]):
    """Accepts connections and runs a handler for each.

    Args:
        handler: ``await handler(stream, connection)`` serves a connection. The stream is closed
            when it returns. It calls ``connection.admit`` once it knows the peer.
        name: the beginning of each log line.
        logger: where failures are logged, at a bounded rate.
        handshakes: simultaneous connections that have not been admitted.
        handshake_seconds: time until a connection must have been admitted.
        patience: seconds that one of them must have been silent before a newcomer takes its place.
        on_failure: called with the kind of each failure, for a counter: ``limit``, ``timeout``,
            ``evicted``, ``failed`` or ``internal``.
    """

    def __init__(
        self,
        handler: Callable[[T, Connection], Awaitable[object]],
        *,
        name: str,
        logger: logging.Logger,
        handshakes: int = HANDSHAKES,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        patience: float = PATIENCE,
        on_failure: Callable[[str], object] | None = None,
    ) -> None:
        self._handler = handler
        self._name = name
        self.log: Final = BoundedLog(logger)
        self._logger = logger
        self._handshakes = Budget(handshakes, what="new connections", patience=patience)
        self._handshake_seconds = handshake_seconds
        self._on_failure = on_failure or (lambda _: None)

    async def serve(
        self,
        listeners: Sequence[Listener[T]],
        *,
        connections: trio.Nursery | None = None,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until cancelled. The listeners are closed at the end.

        Args:
            listeners: where connections come in.
            connections: the nursery of the handlers, if they are to outlive this call.
            task_status: given ``listeners`` when the first connection may come.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush_log)
            for listener in listeners:
                nursery.start_soon(self._accept, listener, connections or nursery)
            task_status.started(listeners)

    async def _flush_log(self) -> None:
        while True:
            await trio.sleep(FLUSH_SECONDS)
            self.log.flush()

    async def _accept(self, listener: Listener[T], connections: trio.Nursery) -> None:
        full = BoundedLog(self._logger, rate=1 / 60, burst=1)
        async with listener:
            while True:
                try:
                    await self._accept_one(listener, connections)
                except (OSError, MemoryError) as error:
                    full.log(
                        logging.ERROR,
                        "%s: cannot accept connections now: %s; new ones wait in the queue",
                        self._name,
                        _reason(error),
                    )
                    self._handshakes._evict_one()
                    await trio.sleep(RETRY_SECONDS)

    async def _accept_one(self, listener: Listener[T], connections: trio.Nursery) -> None:
        stream = await listener.accept()
        connection: Connection | None = None
        try:
            connection = Connection(_transport(stream), self.log)
            queued = partial(_queued, listener)
            if self._handshakes._crowds(connection) and queued() > self._handshakes.total:
                self._on_failure("evicted")
                self._say(connection, "closed: it says nothing, and its address has most places")
                await trio.aclose_forcefully(stream)
                return
            await self._handshakes._wait_and_take(connection, connection.address, queued)
            connection._waiting_since = trio.current_time()
            connections.start_soon(self._run, stream, connection)
        except BaseException:
            if connection is not None:
                connection._release()
            await trio.aclose_forcefully(stream)
            raise

    async def _run(self, stream: T, connection: Connection) -> None:
        scope = connection._scope
        scope.deadline = trio.current_time() + self._handshake_seconds
        try:
            with scope:
                await self._handler(stream, connection)
            if scope.cancelled_caught:
                self._cut(connection)
        except Exception as error:
            self._failed(connection, error)
        except BaseExceptionGroup as group:
            # A fault of this connection's, and a cancellation of all: each goes its way.
            faults, others = group.split(Exception)
            if faults is not None:
                self._failed(connection, faults)
            if others is not None:
                raise others from None
        finally:
            connection._release()
            with contextlib.suppress(Exception):
                await trio.aclose_forcefully(stream)

    def _cut(self, connection: Connection) -> None:
        if connection.evicted:
            self._on_failure("evicted")
            self._say(connection, "closed to make room for another connection")
        else:
            self._on_failure("timeout")
            self._say(connection, f"not authenticated within {self._handshake_seconds:g} s")

    def _failed(self, connection: Connection, error: BaseException) -> None:
        cause = _innermost(error)
        if isinstance(cause, TooManyConnections):
            self._on_failure("limit")
            self._say(connection, f"refused: {cause}")
        elif isinstance(cause, _EXPECTED):
            self._on_failure("failed")
            self._say(connection, _reason(cause))
        elif (refused := refusal(cause)) is not None:  # no memory, no thread
            self._on_failure("failed")
            self._say(connection, refused)
        else:
            # A bug on our side. Its text may quote anything, so only its type and location are
            # logged.
            self._on_failure("internal")
            self.log.log(
                logging.ERROR,
                "%s: %s: internal error: %s in %s; please report it",
                self._name,
                connection.peer,
                type(cause).__name__,
                _place(cause),
            )
            self._logger.debug("%s: the internal error", self._name, exc_info=cause)

    def _say(self, connection: Connection, text: str) -> None:
        self.log.log(logging.WARNING, "%s: %s: %s", self._name, connection.peer, text)


_EXPECTED: Final = (
    HybridkexError,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)
"""Errors that a peer, a network or a full disk can cause."""


def _innermost(error: BaseException) -> BaseException:
    """The first error of nested groups; an unexpected one before those that a peer can cause."""
    found: list[BaseException] = [error]
    flat: list[BaseException] = []
    while found:
        one = found.pop(0)
        if isinstance(one, BaseExceptionGroup):
            found[:0] = one.exceptions
        else:
            flat.append(one)
    return next((one for one in flat if not isinstance(one, _EXPECTED)), flat[0])


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if isinstance(cause, MemoryError):
        return "out of memory"
    return str(cause) or type(cause).__name__


def _place(error: BaseException) -> str:
    """File and line of the innermost frame of this library."""
    frames = [
        (PurePath(frame.f_code.co_filename), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    ours = [(path, line) for path, line in frames if "hybridkex" in path.parts[-4:]]
    if not frames:
        return "an unknown place"
    path, line = (ours or frames)[-1]
    return f"{path.parent.name}/{path.name}, line {line}"


def _transport(stream: object) -> trio.SocketStream | None:
    """The socket underneath a stream, if there is one."""
    while not isinstance(stream, trio.SocketStream):
        below = getattr(stream, "transport_stream", None)
        if below is None:
            return None
        stream = below
    return stream


def _queued(listener: object) -> int:
    """Connections in the kernel's queue of a TCP listener (Linux: tcpi_unacked of a listening
    socket); 0 where the system does not say."""
    while not isinstance(listener, trio.SocketListener):
        listener = getattr(listener, "transport_listener", None)
        if listener is None:
            return 0
    if not sys.platform.startswith("linux"):
        return 0
    try:
        info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE.size)
    except OSError:  # a Unix socket
        return 0
    waiting: int = _QUEUE.unpack(info)[0]
    return waiting


_QUEUE: Final = struct.Struct("=24xI")
"""tcpi_unacked of struct tcp_info."""


def _has_unread(transport: trio.SocketStream | None) -> bool:
    """Whether unread bytes of the peer are waiting: then the delay is ours."""
    if transport is None or transport.socket.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(transport.socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _has_unsent(transport: trio.SocketStream | None) -> bool:
    """Whether bytes of ours wait for the peer to read (tcp(7) and unix(7), SIOCOUTQ)."""
    if transport is None or transport.socket.fileno() < 0:
        return False
    count = bytearray(4)
    try:
        fcntl.ioctl(transport.socket.fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return False
    return any(count)


def _silence(transport: trio.SocketStream | None) -> float:
    """Seconds since data last went over a TCP connection in either direction, as Linux knows it
    (tcp(7), TCP_INFO); negative where the system does not say."""
    if transport is None or not sys.platform.startswith("linux"):
        return -1.0
    try:
        info = transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA.size)
        sent, received = _LAST_DATA.unpack(info)
    except (OSError, struct.error):  # a Unix socket, or closed
        return -1.0
    return float(min(sent, received)) / 1000


def _has_answers(transport: trio.SocketStream | None) -> bool:
    """Whether data was ever sent over a TCP connection, as Linux knows it (tcp(7), TCP_INFO); true
    where the system does not say."""
    if transport is None or not sys.platform.startswith("linux"):
        return True
    try:
        info = transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT.size)
        return bool(_SENT.unpack(info)[0])
    except (OSError, struct.error):  # a Unix socket, or closed, or an older Linux
        return True


_SENT: Final = struct.Struct("=156xI")
"""tcpi_data_segs_out of struct tcp_info."""

_LAST_DATA: Final = struct.Struct("=44xI4xI")
"""tcpi_last_data_sent and tcpi_last_data_recv of struct tcp_info, in milliseconds."""


def peer_name(transport: trio.SocketStream | None) -> str:
    """The address of the other end for a log line."""
    try:
        where = transport.socket.getpeername() if transport is not None else ""
    except OSError:
        return "a peer that is gone"
    if not isinstance(where, tuple):
        return "a local program"
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _network(transport: trio.SocketStream | None) -> str:
    try:
        where = transport.socket.getpeername() if transport is not None else ""
    except OSError:
        return ""
    if not isinstance(where, tuple):
        return _local_user(transport)
    host = str(where[0])
    if ":" not in host:
        return host
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return packed[:8].hex() if packed[:12] != _MAPPED else packed[12:].hex()


def _local_user(transport: trio.SocketStream | None) -> str:
    """The user whose program is at the other end of a Unix socket (unix(7), SO_PEERCRED)."""
    if transport is None or not hasattr(socket, "SO_PEERCRED"):
        return ""
    try:
        found = transport.socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
    except OSError:
        return ""
    return f"uid {_CREDENTIALS.unpack(found)[1]}"


_CREDENTIALS: Final = struct.Struct("=3i")
"""struct ucred: process, user and group."""

_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4 address in an IPv6 socket (RFC 4291 section 2.5.5.2)."""
