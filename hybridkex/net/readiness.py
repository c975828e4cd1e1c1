"""Callbacks for ready sockets: one task watches all of them.

A task for each direction of each connection costs several times as much as the kernel's work for a
short message. Here a socket is registered once, and one wake-up of the task serves every socket
that is ready then.

No connection delays another by more than one read: after each read of a socket with bulk data, the
other sockets are checked again, and sockets with bulk data are served round-robin.
"""

import selectors
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Final

import trio

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

BULK_READ: Final = 256 * 1024
"""Maximum bytes of one read while all ready sockets carry bulk data."""
SHORT_READ: Final = 32 * 1024
"""Maximum bytes of one read while other sockets are active."""
BULK: Final = 16 * 1024
"""A socket counts as one with bulk data if its last read had at least this many bytes."""
CALM_SECONDS: Final = 0.02
"""Seconds for which reads stay short after a socket without bulk data was ready."""
SLICE: Final = 0.001
"""Seconds of work with bulk data after which other tasks run."""


class Watched:
    """A socket that is watched; a subclass defines :meth:`ready`.

    Args:
        descriptor: the descriptor of the socket, which must stay open while it is watched.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor: Final = descriptor
        self.watched_for = 0
        """:data:`READ`, :data:`WRITE`, both or 0; set by :meth:`Readiness.watch`."""
        self.bulk = False
        """Whether the last read returned :data:`BULK` bytes or more."""
        self.turn = 0

    def ready(self, events: int) -> None:
        """Read or write, without waiting. Raises nothing.

        Args:
            events: :data:`READ`, :data:`WRITE` or both.
        """
        raise NotImplementedError


class Readiness:
    """Watches sockets and calls those that are ready.

    Raises:
        OSError: the system has no descriptor for the selector.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._turn = 0
        self._calm_until = 0.0
        self._long = memoryview(bytearray(BULK_READ))
        self._short = self._long[:SHORT_READ]
        self.buffer = self._long
        """The buffer that a socket may read into, until its :meth:`Watched.ready` returns."""
        self.time = 0.0
        """The time at which the current sockets were ready, by trio's clock."""

    def watch(self, socket: Watched, events: int) -> None:
        """Call ``socket.ready`` for these events from now on; 0 for none.

        Raises:
            OSError: the system refuses.
        """
        before = socket.watched_for
        if events == before:
            return
        if not events:
            # Not a mask of 0, with which the kernel still reports the end of a connection.
            self._selector.unregister(socket.descriptor)
        elif not before:
            self._selector.register(socket.descriptor, events, socket)
        else:
            self._selector.modify(socket.descriptor, events, socket)
        socket.watched_for = events

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context manager in which the sockets are watched."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._selector.close()

    async def _run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._selector.fileno())
            self.time = trio.current_time()
            self._serve()

    def _serve(self) -> None:
        until = 0.0
        while True:
            bulk: list[tuple[Watched, int]] = []
            calm = False
            for key, events in self._selector.select(0):
                socket: Watched = key.data
                if socket.bulk:
                    bulk.append((socket, events))
                elif now := events & socket.watched_for:  # another one may have changed it
                    calm = calm or now & READ != 0
                    socket.ready(now)
            if not bulk:
                return
            time = perf_counter()
            if calm:
                self._calm_until = time + CALM_SECONDS
            self.buffer = self._short if time < self._calm_until else self._long
            until = until or time + SLICE
            socket, events = min(bulk, key=_turn)
            self._turn += 1
            socket.turn = self._turn
            if now := events & socket.watched_for:
                socket.ready(now)
            if time >= until:
                return


def _turn(one: tuple[Watched, int]) -> int:
    return one[0].turn
