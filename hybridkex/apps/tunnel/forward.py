"""The bytes of one connection, both ways.

Each direction is a loop that reads and then writes what it read: while the reader at the far end is
slow nothing more is read, so a connection costs one buffer each way, and the sender feels it.

An end is an end of one direction, and is passed on: FIN becomes close_notify and the reverse. A cut
is passed on as a cut: both sockets are reset, so that nobody takes what came for all there was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio
from trio.abc import HalfCloseableStream

from hybridkex.apps.tcp import reset
from hybridkex.errors import HybridkexError

__all__ = ["ConnectionCut", "Leg", "forward"]

_CHUNK: Final = 256 * 1024

Count: TypeAlias = Callable[[int], object]


class ConnectionCut(HybridkexError):
    """A connection did not come to its end in both directions; the text says why."""


@dataclass(frozen=True, eq=False)
class Leg:
    """One half of the way: the stream, and the socket below it (the same, if it is plain)."""

    what: str
    stream: HalfCloseableStream
    socket: trio.SocketStream

    @property
    def secure(self) -> bool:
        """Whether there is something between the stream and the socket."""
        return self.stream is not self.socket

    def cut(self) -> None:
        """Close without saying goodbye."""
        reset(self.socket)


async def forward(
    near: Leg, far: Leg, *, out: Count, back: Count, idle_timeout: float | None
) -> None:
    """Carry both directions to their ends. The legs are left open.

    Args:
        near: the leg that was accepted.
        far: the leg that was opened for it.
        out: told the bytes that went from near to far.
        back: told the bytes that went from far to near.
        idle_timeout: seconds without a byte.

    Raises:
        ConnectionCut: one of the legs broke, or nothing moved for too long.
    """
    await _Forwarding().run(near, far, out, back, idle_timeout)


class _Forwarding:
    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._moved = trio.current_time()
        self._ended: set[Leg] = set()
        self._reason: str | None = None

    async def run(
        self, near: Leg, far: Leg, out: Count, back: Count, idle_timeout: float | None
    ) -> None:
        with self._scope:
            async with trio.open_nursery() as watchers:
                if idle_timeout is not None:
                    watchers.start_soon(self._limit_idleness, idle_timeout)
                async with trio.open_nursery() as directions:
                    directions.start_soon(self._carry, near, far, out, watchers)
                    directions.start_soon(self._carry, far, near, back, watchers)
                watchers.cancel_scope.cancel()
        if self._reason is not None:
            raise ConnectionCut(self._reason)

    async def _limit_idleness(self, seconds: float) -> None:
        # Not a deadline that each chunk moves: that would cost each of them more than looking.
        while (quiet_until := self._moved + seconds) > trio.current_time():  # noqa: ASYNC110
            await trio.sleep_until(quiet_until)
        self._give_up(f"nothing moved for {seconds:g} s")

    async def _carry(self, source: Leg, sink: Leg, count: Count, watchers: trio.Nursery) -> None:
        while True:
            try:
                data = await source.stream.receive_some(_CHUNK)
            except trio.BrokenResourceError as error:
                self._give_up(f"{source.what}: {error.__cause__ or error}")
                return
            if not data:
                break
            self._moved = trio.current_time()
            try:
                await sink.stream.send_all(data)
            except trio.BrokenResourceError as error:
                # The sink is gone; what it said before it went is still carried the other way,
                # whose loop then meets the end or the break.
                self._note(f"{sink.what}: {error.__cause__ or error}")
                return
            self._moved = trio.current_time()
            count(len(data))
        self._ended.add(source)
        try:
            await sink.stream.send_eof()
        except trio.BrokenResourceError as error:
            self._note(f"{sink.what}: {error.__cause__ or error}")
            return
        if source.secure and sink not in self._ended:
            watchers.start_soon(self._watch, source, sink)

    async def _watch(self, gone: Leg, other: Leg) -> None:
        """Behind close_notify comes nothing (RFC 9846 section 6.1) but, if it leaves early, the end
        of the transport. Without this, a connection whose target is silent would stay for ever."""
        try:
            while await gone.socket.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        if other not in self._ended:
            self._give_up(f"{gone.what} left before {other.what} had ended")

    def _give_up(self, reason: str) -> None:
        self._note(reason)
        self._scope.cancel()

    def _note(self, reason: str) -> None:
        """The first thing that went wrong is what is told; the rest follows from it."""
        if self._reason is None:
            self._reason = reason
