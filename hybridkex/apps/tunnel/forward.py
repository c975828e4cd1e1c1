"""Forwarding the bytes of one connection, in both directions.

Each direction is a loop that reads and then writes: a slow reader at the far end stops the reading,
so a connection needs one buffer per direction, and back pressure reaches the sender.

The end of one direction is passed on: FIN becomes close_notify and vice versa. A cut is passed on
as a cut: both sockets are reset, so that neither program mistakes partial data for all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio
from trio.abc import HalfCloseableStream

from hybridkex.apps.tcp import reset
from hybridkex.errors import HybridkexError
from hybridkex.machine import broken

_CHUNK: Final = 256 * 1024

Count: TypeAlias = Callable[[int], object]


class ConnectionCut(HybridkexError):
    """A connection was not closed in both directions; the text says why."""


@dataclass(frozen=True, eq=False)
class Leg:
    """One side of a tunnelled connection: the stream and its socket (the same object if it is
    plain)."""

    what: str
    stream: HalfCloseableStream
    socket: trio.SocketStream

    @property
    def secure(self) -> bool:
        """Whether the stream is not the plain socket."""
        return self.stream is not self.socket

    def cut(self) -> None:
        """Close abruptly, with a reset."""
        reset(self.socket)


async def forward(
    near: Leg, far: Leg, *, out: Count, back: Count, idle_timeout: float | None
) -> None:
    """Forward both directions until they end. The legs are left open.

    Args:
        near: the leg that was accepted.
        far: the leg that was opened for it.
        out: called with the number of bytes forwarded from near to far.
        back: called with the number of bytes forwarded from far to near.
        idle_timeout: seconds without data.

    Raises:
        ConnectionCut: one of the legs broke, or the connection was idle for too long.
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
        # Polling is cheaper than a deadline that each chunk would move.
        while (quiet_until := self._moved + seconds) > trio.current_time():  # noqa: ASYNC110
            await trio.sleep_until(quiet_until)
        self._give_up(f"no data for {seconds:g} s")

    async def _carry(self, source: Leg, sink: Leg, count: Count, watchers: trio.Nursery) -> None:
        while True:
            try:
                data = await source.stream.receive_some(_CHUNK)
            except trio.BrokenResourceError as error:
                self._give_up(f"{source.what}: {broken(error)}")
                return
            if not data:
                break
            self._moved = trio.current_time()
            try:
                await sink.stream.send_all(data)
            except trio.BrokenResourceError as error:
                # The sink is gone; data that it sent before is still forwarded by the other
                # direction, whose loop then sees the end or the failure.
                self._note(f"{sink.what}: {broken(error)}")
                return
            self._moved = trio.current_time()
            count(len(data))
        self._ended.add(source)
        try:
            await sink.stream.send_eof()
        except trio.BrokenResourceError as error:
            self._note(f"{sink.what}: {broken(error)}")
            return
        if source.secure and sink not in self._ended:
            watchers.start_soon(self._watch, source, sink)

    async def _watch(self, gone: Leg, other: Leg) -> None:
        """After close_notify nothing follows (RFC 9846 section 6.1) except the end of the
        transport, if the peer leaves early. Without this check, a connection with a silent target
        would stay forever."""
        try:
            while await gone.socket.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        if other not in self._ended:
            self._give_up(f"{gone.what} disconnected before {other.what} had finished")

    def _give_up(self, reason: str) -> None:
        self._note(reason)
        self._scope.cancel()

    def _note(self, reason: str) -> None:
        """Record the first failure; later ones are its consequences."""
        if self._reason is None:
            self._reason = reason
