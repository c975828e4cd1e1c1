"""Places for the handshakes of a server; client addresses take turns.

All servers of this project choose the next connection in the same way
(:mod:`hybridkex.net.pending`, :mod:`hybridkex.net.budget`). The loop has accepted the connection
before that. Its handshake begins at once if there is a place for it and no other connection has
just arrived; otherwise it waits, and nothing is read from it. When many connections arrive, the
loop accepts them all before it spends time on a handshake.
"""

import asyncio
import resource
from collections.abc import MutableSet
from typing import Any, Final, Protocol

from hybridkex.net.budget import PATIENCE, Budget, Connection
from hybridkex.net.descriptors import share
from hybridkex.net.log import BoundedLog
from hybridkex.net.pending import (
    ACCEPTED_BETWEEN,
    HANDSHAKES,
    RETRY_SECONDS,
    WAITING,
    PendingConnections,
)


class PendingHandshake(Protocol):
    """A connection that wants to begin its handshake."""

    def wait(self) -> None:
        """Read nothing until :meth:`start`."""

    def start(self) -> None:
        """Begin the handshake."""

    def dismiss(self, reason: str) -> None:
        """Close the connection to make room for another."""


class Places:
    """The places of one server. It is made in the server's event loop.

    Args:
        register: holds the transport of each connection of the server, from its beginning to
            ``connection_lost``.
    """

    def __init__(self, register: MutableSet[asyncio.Transport] | None = None) -> None:
        self.register: Final = register
        self._loop: Final = asyncio.get_running_loop()
        self._budget: Final = Budget(
            share(HANDSHAKES), what="handshakes", patience=PATIENCE, freed=self._freed
        )
        # It exists while connections are pending: an asyncio.Server does not report its end.
        self._pending: PendingConnections[PendingHandshake] | None = None
        self._due = False
        self._entered = self._seen = self._at_start = 0
        """Connections so far: all, those at the last turn of the loop, those at the last start."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop."""
        return self._loop

    def enter(
        self, handshake: PendingHandshake, raw: asyncio.Transport, log: BoundedLog
    ) -> Connection:
        """Start a connection's handshake, now or when it is its turn; the caller has to
        :meth:`leave` when the handshake or the connection has ended.

        Args:
            handshake: the connection; its :meth:`~PendingHandshake.wait` is called if it has to
                wait.
            raw: its transport.
            log: for log lines that the peer can cause.
        """
        connection = Connection(_Carrier(raw), log)
        alone = self._entered == self._at_start and self._pending is None
        self._entered += 1
        self._soon()
        if alone and self._budget.makes_place(connection.address, evict=False):
            self._start(connection, handshake)
            return connection
        if self._pending is None:
            try:
                self._pending = PendingConnections(self._budget.held, _space())
            except OSError:  # there is no descriptor for it
                self._start(connection, handshake)
                return connection
            self._loop.add_reader(self._pending.fileno(), self._listen)
        handshake.wait()
        self._pending.add(connection, handshake)
        while (leaving := self._pending.crowded_out()) is not None:
            leaving[1].dismiss("closed: too many connections of its address are waiting")
        return connection

    def heard(self, connection: Connection) -> None:
        """Note that a connection that waits has sent something, which has been read."""
        if self._pending is not None:
            self._pending.heard(connection)
            self._soon()

    def leave(self, connection: Connection) -> None:
        """Release the place of a connection, or its claim to one."""
        if self._pending is not None:
            self._pending.leave(connection)
            self._soon()
        connection.release()

    def _start(self, connection: Connection, handshake: PendingHandshake) -> None:
        connection.begin(
            self._budget,
            cut=lambda: handshake.dismiss("closed to make room for another connection"),
        )
        handshake.start()

    def _listen(self) -> None:
        assert self._pending is not None
        self._pending.listen()
        self._soon()

    def _freed(self) -> None:
        if self._pending is not None:
            self._soon()

    def _soon(self) -> None:
        """Look again in the next iteration of the loop."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Start one handshake, after the loop has accepted all connections that have arrived."""
        self._due = False
        if self._seen != self._entered and self._entered - self._at_start < ACCEPTED_BETWEEN:
            self._seen = self._entered
            self._soon()
            return
        self._seen = self._at_start = self._entered
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending = self._pending
        if pending is None:
            return
        found = pending.next(self._budget)
        if found is not None:
            self._start(*found)
        if not len(pending):
            self._loop.remove_reader(pending.fileno())
            pending.close()
            self._pending = None
        elif found is not None:
            self._soon()
        else:
            self._timer = self._loop.call_later(RETRY_SECONDS, self._turn)


class _Carrier:
    """The socket of a transport."""

    def __init__(self, raw: asyncio.Transport) -> None:
        self._socket: Final[Any] = raw.get_extra_info("socket")
        self._peer: Final = raw.get_extra_info("peername")

    @property
    def socket(self) -> "_Carrier":
        return self

    def fileno(self) -> int:
        number: int = self._socket.fileno()
        return number

    def getpeername(self) -> Any:
        return self._peer  # uvloop's socket would make a descriptor to ask

    def getsockopt(self, *arguments: int) -> Any:
        return self._socket.getsockopt(*arguments)


def _space() -> int:
    """Connections that may wait: without this limit, asyncio would hold them as well."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WAITING if soft == resource.RLIM_INFINITY else min(WAITING, soft // 2)
