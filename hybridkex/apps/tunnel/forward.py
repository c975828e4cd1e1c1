"""Forwarding the bytes of one connection, in both directions.

A socket that is ready is served without waiting (:mod:`hybridkex.net.readiness`): one receive, one
pass of the engine over the data, one send. No task runs for the data of a connection. Data that the
far socket does not accept waits, and the near one is not read meanwhile: a connection needs one
buffer per direction, and back pressure reaches the sender.

The end of one direction is forwarded: FIN becomes close_notify and vice versa. If a connection
breaks, both sockets are reset, so that neither program mistakes partial data for complete data.
"""

import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio
from trio.abc import HalfCloseableStream

from hybridkex import SecureStream
from hybridkex.errors import HybridkexError
from hybridkex.machine import broken
from hybridkex.net.readiness import BULK, READ, WRITE, Readiness, Watched

Count: TypeAlias = Callable[[int], object]

_NOTHING: Final = memoryview(b"")


class ConnectionCut(HybridkexError):
    """A connection was not closed in both directions; the text says why."""


@dataclass(frozen=True, eq=False)
class Leg:
    """One side of a tunnelled connection: the stream and its socket (the same object if it is
    plain)."""

    what: str
    stream: HalfCloseableStream
    socket: trio.SocketStream


async def forward(
    near: Leg,
    far: Leg,
    *,
    out: Count,
    back: Count,
    idle_timeout: float | None,
    readiness: Readiness,
    activity: "Activity | None" = None,
) -> None:
    """Forward both directions until they end. The legs are left open.

    Args:
        near: the leg that was accepted.
        far: the leg that was opened for it.
        out: called with the number of bytes forwarded from near to far.
        back: called with the number of bytes forwarded from far to near.
        idle_timeout: seconds without data.
        readiness: watches the sockets.
        activity: records when data moves.

    Raises:
        ConnectionCut: one of the legs broke, or the connection was idle for too long.
    """
    forwarding = _Forwarding(readiness, activity or Activity())
    async with AsyncExitStack() as stack:
        one, other = [await _end(leg, forwarding, stack) for leg in (near, far)]
        one.connect(other, out)
        other.connect(one, back)
        await forwarding.run((one, other), idle_timeout)


class Activity:
    """When data last moved, in either direction, by trio's clock."""

    def __init__(self) -> None:
        self.at = trio.current_time()


class _Forwarding:
    """The state that the two directions of a connection share."""

    def __init__(self, readiness: Readiness, activity: Activity) -> None:
        self.readiness: Final = readiness
        self.activity: Final = activity
        self.is_over = False
        self._over = trio.Event()
        self._reason: str | None = None
        self._error: Exception | None = None

    async def run(self, ends: "tuple[_End, _End]", idle_timeout: float | None) -> None:
        try:
            for end in ends:
                end.start()
            await self._wait(idle_timeout)
        finally:
            for end in ends:
                self.readiness.watch(end, 0)
        if self._error is not None:
            raise self._error
        if self._reason is not None:
            raise ConnectionCut(self._reason)

    async def _wait(self, idle_timeout: float | None) -> None:
        if idle_timeout is None:
            await self._over.wait()
            return
        # Checking again is cheaper than a deadline that each piece of data would move.
        while not self.is_over:
            quiet_until = self.activity.at + idle_timeout
            if quiet_until <= trio.current_time():
                self.give_up(f"no data for {idle_timeout:g} s")
            with trio.move_on_at(quiet_until):
                await self._over.wait()

    def end(self) -> None:
        """Both directions have ended, or nothing more is forwarded."""
        self.is_over = True
        self._over.set()

    def give_up(self, reason: str) -> None:
        """End the connection now."""
        self.note(reason)
        self.end()

    def note(self, reason: str) -> None:
        """Record the first failure; later ones are its consequences."""
        if self._reason is None:
            self._reason = reason

    def fail(self, error: Exception) -> None:
        """Handle a fault of this program or machine, which must not end other connections."""
        if self._error is None:
            self._error = error
        self.end()


class _End(Watched):
    """One leg of a connection: its socket, the direction that begins at it, and what waits to be
    sent to it."""

    def __init__(self, leg: Leg, forwarding: _Forwarding) -> None:
        super().__init__(leg.socket.socket.fileno())
        self._leg = leg
        self._forwarding = forwarding
        self._readiness = forwarding.readiness
        self._activity = forwarding.activity
        self.most_read: int | None = None
        """The maximum number of bytes to read at once; ``None`` for the whole buffer."""
        # The direction that begins here.
        self._reading = True
        self._draining = False
        """Whether received bytes are discarded, after close_notify."""
        self._uncounted = 0
        self.input_ended = False
        """Whether all data from here has been received."""
        self.done = False
        """Whether the direction that begins here has ended."""
        # What is sent to here.
        self.unsent = _NOTHING
        self._end_due = False
        self._lost = False

    def connect(self, other: "_End", count: Count) -> None:
        self._other = other
        self._count = count

    def start(self) -> None:
        self._update()

    # --- for a plain and for a secure end -----------------------------------------------------

    def _take(self, data: memoryview) -> None:
        """Pass on what was read; ``data`` is overwritten afterwards."""
        self.pass_on(data)

    def _end_of_socket(self) -> None:
        """Handle the end of the socket's data."""
        self._end_of_input()

    def send(self, data: memoryview | bytes | bytearray) -> None:
        """Send application data, or as much as the socket takes; the rest waits."""
        self._put(data)

    def _send_end(self) -> None:
        try:
            self._leg.socket.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._lose(error)

    @property
    def full(self) -> bool:
        return bool(self.unsent)

    @property
    def _may_read(self) -> bool:
        return True

    # --- reading ------------------------------------------------------------------------------

    def ready(self, events: int) -> None:
        """Serve the socket. No fault of one connection reaches the others."""
        if self._forwarding.is_over:
            return
        try:
            if events & WRITE:
                self._send_rest()
            if events & READ and self.watched_for & READ:
                self._read()
        except Exception as error:
            self._forwarding.fail(error)

    def _read(self) -> None:
        room = self._readiness.buffer[: self.most_read]
        try:
            size = os.readv(self.descriptor, (room,))
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(error)
            return
        self.bulk = size >= BULK
        if self._draining:
            if not size:
                self._gone()
        elif size:
            self._activity.at = self._readiness.time
            self._take(room[:size])
        else:
            self._end_of_socket()

    def _broken(self, error: Exception) -> None:
        if self._draining:
            self._gone()
        else:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._forwarding.give_up(f"{self._leg.what}: {broken(error)}")

    def pass_on(self, data: memoryview | bytes | bytearray) -> None:
        """Send data received here to the other end."""
        other = self._other
        other.send(data)
        if not other.full:
            if not other._lost:
                self._count(len(data))
            return
        self._uncounted += len(data)
        self._update()

    def sent(self) -> None:
        """All data received here has been sent."""
        if self._uncounted:
            count, self._uncounted = self._uncounted, 0
            self._count(count)
        self._update()

    # --- the end of the direction that begins here --------------------------------------------

    def _end_of_input(self) -> None:
        if not self.input_ended and not self.done:
            self.input_ended, self._reading = True, False
            self._update()
            self._other.finish()

    def _gone(self) -> None:
        """Handle the end of the transport after close_notify, which no data follows (RFC 9846
        section 6.1): the peer has left early. Without this check, a connection with a silent target
        would stay forever."""
        self._draining = False
        self._update()
        if not self._other.input_ended:
            self._forwarding.give_up(
                f"{self._leg.what} disconnected before {self._other._leg.what} had finished"
            )

    def over(self) -> None:
        """The direction that begins here is over."""
        self.done, self._reading = True, False
        self._update()
        self._check_end()

    def _check_end(self) -> None:
        if self.done and self._other.done and not self.full and not self._other.full:
            self._forwarding.end()

    # --- sending ------------------------------------------------------------------------------

    def _put(self, data: memoryview | bytes | bytearray) -> None:
        """Send bytes, or as much as the socket takes; the rest waits."""
        if self._lost:
            return
        if self.unsent:
            self.unsent = memoryview(b"".join((self.unsent, data)))
            return
        try:
            size = os.write(self.descriptor, data)
        except BlockingIOError:
            size = 0
        except OSError as error:
            self._lose(error)
            return
        if size < len(data):
            self.unsent = memoryview(bytes(memoryview(data)[size:]))
            self._update()

    def _send_rest(self) -> None:
        try:
            size = os.write(self.descriptor, self.unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        self._activity.at = self._readiness.time
        self.unsent = self.unsent[size:]
        if not self.unsent:
            self.unsent = _NOTHING
            self._emptied()

    def _emptied(self) -> None:
        """All waiting data has been sent."""
        self._update()
        self._other.sent()
        if self._end_due:
            self.finish()
        self._check_end()

    def finish(self) -> None:
        """Signal the end of data once all data has been sent."""
        self._end_due = self.full
        if self._end_due or self._lost:
            return
        self._send_end()
        if not self._lost:
            self._other.passed_end()

    def passed_end(self) -> None:
        """The other end has been told that the data from here has ended."""
        self.over()

    def _lose(self, error: Exception) -> None:
        """Nothing can be sent here any more. Data that came from here before is still forwarded by
        the other direction, which then finds the end or the failure."""
        self._forwarding.note(f"{self._leg.what}: {broken(error)}")
        self._lost, self.unsent = True, _NOTHING
        self._update()
        self._other.over()

    def _update(self) -> None:
        """Watch the socket for the events that can be handled now."""
        reads = self._draining or (self._reading and not self._other.full and self._may_read)
        self._readiness.watch(self, (READ if reads else 0) | (WRITE if self.unsent else 0))


class _SecureEnd(_End):
    """The end with the TLS engine."""

    async def open(self, stack: AsyncExitStack) -> None:
        stream = self._leg.stream
        assert isinstance(stream, SecureStream)
        self._pipe = await stack.enter_async_context(
            stream.piped(
                deliver=self.pass_on,
                put=self._put,
                resume=lambda: self._guard(self._go_on),
                failed=lambda error: self._guard(self._fail, error),
            )
        )
        self._held = b""
        """Data that waits for a one-time pad."""
        self._closing = False
        """Whether close_notify is all that may wait to be sent."""

    def connect(self, other: _End, count: Count) -> None:
        super().connect(other, count)
        other.most_read = self._pipe.most

    def _guard(self, work: Callable[..., object], *arguments: object) -> None:
        """Make a call that another object has triggered, and handle faults as :meth:`ready`
        does."""
        if self._forwarding.is_over:
            return
        try:
            work(*arguments)
        except Exception as error:
            self._forwarding.fail(error)

    def start(self) -> None:
        """Begin to read, after the data that arrived with the handshake."""
        self._guard(self._take_events)
        self._update()

    # --- reading

    def _take(self, data: memoryview) -> None:
        try:
            self._pipe.received(data)
        except HybridkexError as error:
            self._fail(error)
            return
        self._after_events()

    def _take_events(self) -> None:
        try:
            self._pipe.take_events()
        except HybridkexError as error:
            self._fail(error)
            return
        self._after_events()

    def _after_events(self) -> None:
        if self._pipe.ended:
            self._end_of_input()
        elif self._pipe.waits_for_pad:
            self._update()

    def _end_of_socket(self) -> None:
        self._take(_NOTHING)

    def _fail(self, error: HybridkexError) -> None:
        """End the connection, and tell the peer if there is an alert for it."""
        alert = self._pipe.alert()
        if alert and not self.unsent and not self._lost:
            with suppress(OSError):
                os.write(self.descriptor, alert)
        self._give_up(error)

    def passed_end(self) -> None:
        """The program has been told of close_notify: watch whether the peer leaves early."""
        self._draining = not self._other.input_ended
        super().passed_end()

    @property
    def _may_read(self) -> bool:
        return not self._pipe.waits_for_pad

    # --- sending

    def send(self, data: memoryview | bytes | bytearray) -> None:
        """Encrypt and send data; it waits if the one-time pad is too short."""
        if self._lost:
            return
        if not self._pipe.ready(len(data)):
            self._held = bytes(data)
            return
        try:
            records = self._pipe.sealed(data)
        except HybridkexError as error:
            self._lose(error)
        else:
            self._put(records)

    @property
    def full(self) -> bool:
        return bool(self.unsent or self._held)

    def _send_end(self) -> None:
        self._closing = True
        try:
            self._put(self._pipe.closing())
        except HybridkexError as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._held = b""
        if self._closing and self._pipe.ended:
            # A peer that has ended its direction may close at once. All its data has been received,
            # and nothing needs our close_notify (section 6.1).
            self._lost, self.unsent = True, _NOTHING
            self._update()
            self._other.passed_end()
        else:
            super()._lose(error)

    def _emptied(self) -> None:
        held, self._held = self._held, b""
        if held:
            self.send(held)
        if not self.full:
            super()._emptied()

    def _go_on(self) -> None:
        """Continue with data that waited for a one-time pad."""
        if self._held and not self.unsent:
            self._emptied()
        if not self.input_ended:
            self._take_events()
        self._update()


async def _end(leg: Leg, forwarding: _Forwarding, stack: AsyncExitStack) -> _End:
    if leg.stream is leg.socket:
        return _End(leg, forwarding)
    end = _SecureEnd(leg, forwarding)
    await end.open(stack)
    return end
