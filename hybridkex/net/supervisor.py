"""The supervisor of accepted connections: every socket that this project listens on has one.

It accepts, runs a handler for each connection in a task of its own, and keeps three promises:

- **No connection ends another.** Whatever exception leaves a handler, alone or in a group, ends
  its own connection and becomes one log line. Only cancellation and ``KeyboardInterrupt`` pass.
- **Number, time and delay are bounded.** A connection is accepted at once and waits for a handshake
  slot (:mod:`hybridkex.net.pending`). Slots are assigned to the addresses round-robin, so that an
  address that opens thousands of connections delays the others by at most one slot. A connection
  must authenticate before a deadline; then it moves to the budget of its kind
  (:mod:`hybridkex.net.budget`).
- **A temporary fault has no lasting effect.** While the system has no descriptors or no memory
  for another connection (accept(2): EMFILE, ENFILE, ENOBUFS, ENOMEM) the accept loop waits and
  retries, and logs it at a bounded rate. It also pauses when a handler has failed for such a
  reason: failing is faster than serving, so a process without memory would otherwise accept most
  connections of a listening socket that it shares with other processes.
"""

import contextlib
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, Final, Generic, TypeVar

import trio
from trio.abc import AsyncResource, Listener

from hybridkex.errors import HybridkexError
from hybridkex.machine import is_scarce, reason, refusal
from hybridkex.net.budget import PATIENCE, Budget, Connection, TooManyConnections
from hybridkex.net.descriptors import listening
from hybridkex.net.log import SERVED_BURST, SERVED_RATE, BoundedLog
from hybridkex.net.pending import (
    ACCEPTED_BETWEEN,
    HANDSHAKES,
    RETRY_SECONDS,
    PendingConnections,
)

HANDSHAKE_SECONDS: Final = 10.0
"""Default time limit in seconds for authentication, from the time that a connection has a slot."""
REST_SECONDS: Final = 1.0
"""Seconds without accepting after a handler has failed for lack of memory or descriptors."""
FLUSH_SECONDS: Final = 30.0
"""Seconds between two reports of suppressed log lines."""

T = TypeVar("T", bound=AsyncResource)


class Supervisor(Generic[T]):
    """Accepts connections and runs a handler for each.

    Args:
        handler: ``await handler(stream, connection)`` serves a connection. The stream is closed
            when it returns. It calls ``connection.admit`` once it knows the peer.
        name: the beginning of each log line.
        logger: where failures are logged, at a bounded rate.
        handshakes: slots for connections that have not been admitted. No address has more than
            half of them; more connections wait.
        handshake_seconds: time limit in seconds from getting a slot to being admitted.
        patience: seconds that a connection must have been silent before a new one takes its slot.
        on_failure: called with the kind of each failure, for a counter: ``limit``, ``timeout``,
            ``evicted``, ``failed`` or ``internal``.

    Raises:
        OSError: the system has no descriptor for watching pending connections.
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
        self._known = BoundedLog(logger)
        self._served = BoundedLog(logger, rate=SERVED_RATE, burst=SERVED_BURST)
        self._logger = logger
        self._handshakes = Budget(
            handshakes, what="new connections", patience=patience, freed=self._wake
        )
        self._handshake_seconds = handshake_seconds
        self._on_failure = on_failure or (lambda _: None)
        self._accepted = 0
        self._rest_until = -math.inf
        self._accepting = trio.CancelScope()
        self._news = trio.Event()
        self._pending = PendingConnections[T](self._handshakes.held)

    async def aclose(self) -> None:
        """Close a supervisor that was not used: :meth:`serve` closes itself."""
        await self._clear()

    async def _clear(self) -> None:
        for stream in self._pending.close():
            await _discard(stream)

    async def serve(
        self,
        listeners: Sequence[Listener[T]],
        *,
        connections: trio.Nursery | None = None,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until cancelled, once. The listeners are closed at the end.

        Args:
            listeners: where connections come in.
            connections: the nursery of the handlers, if they are to outlive this call.
            task_status: given ``listeners`` when connections are accepted.
        """
        pending = self._pending
        try:
            with listening():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._flush_log)
                    nursery.start_soon(self._listen, pending)
                    nursery.start_soon(self._give_places, pending, connections or nursery)
                    with self._accepting:
                        async with trio.open_nursery() as accepting:
                            for listener in listeners:
                                accepting.start_soon(self._accept, listener, pending)
                            task_status.started(listeners)
                            await trio.sleep_forever()
                    while len(pending):  # noqa: ASYNC110  # they were accepted
                        await trio.sleep(RETRY_SECONDS)
                    nursery.cancel_scope.cancel()
        finally:
            self._flush()
            await self._clear()

    def stop_accepting(self) -> None:
        """Close the listeners; :meth:`serve` returns when all accepted connections have had a slot.
        Use this only with handlers in another nursery: the others are cancelled then."""
        self._accepting.cancel()

    async def _flush_log(self) -> None:
        while True:
            await trio.sleep(FLUSH_SECONDS)
            self._flush()

    def _flush(self) -> None:
        for log in (self.log, self._known, self._served):
            log.flush()

    # -- accepting

    async def _accept(self, listener: Listener[T], pending: PendingConnections[T]) -> None:
        full = BoundedLog(self._logger, rate=1 / 60, burst=1)
        async with listener:
            while True:
                if trio.current_time() < self._rest_until:
                    await trio.sleep_until(self._rest_until)
                try:
                    await self._accept_one(listener, pending)
                    if trio.current_time() < self._rest_until + REST_SECONDS:
                        await trio.sleep(RETRY_SECONDS)  # its handler may fail as well
                except (OSError, MemoryError) as error:
                    full.log(
                        logging.ERROR,
                        "%s: cannot accept connections now: %s; new ones wait in the queue",
                        self._name,
                        reason(error.__cause__ or error),
                    )
                    if not await self._dismiss(pending.remove()):
                        self._handshakes.evict()
                    await trio.sleep(RETRY_SECONDS)

    async def _accept_one(self, listener: Listener[T], pending: PendingConnections[T]) -> None:
        stream = await listener.accept()
        self._accepted += 1
        try:
            logs = self.log, self._served, self._known
            pending.add(Connection(_transport_of(stream), *logs), stream)
        except BaseException:
            await _discard(stream)
            raise
        self._wake()
        while await self._dismiss(pending.crowded_out()):  # several, if the limit has decreased
            pass

    async def _dismiss(self, leaving: tuple[Connection, T] | None) -> bool:
        if leaving is None:
            return False
        connection, stream = leaving
        self._on_failure("evicted")
        self._log_end(connection, "closed: too many connections of its address are waiting")
        await _discard(stream)
        return True

    async def _listen(self, pending: PendingConnections[T]) -> None:
        while True:
            await trio.lowlevel.wait_readable(pending.fileno())
            pending.listen()
            self._wake()

    # -- from pending to a handshake slot

    def _wake(self) -> None:
        self._news.set()

    async def _give_places(self, pending: PendingConnections[T], connections: trio.Nursery) -> None:
        while True:
            self._news = trio.Event()
            found = pending.next(self._handshakes)
            if found is None:
                with trio.move_on_after(RETRY_SECONDS if len(pending) else math.inf):
                    await self._news.wait()
                continue
            connection, stream = found
            scope = trio.CancelScope()
            connection.begin(
                self._handshakes,
                cut=scope.cancel,
                may_stay=partial(setattr, scope, "deadline", math.inf),
            )
            connections.start_soon(self._run, stream, connection, scope)
            await self._let_accept()

    async def _let_accept(self) -> None:
        """Let the accept loops go first."""
        for _ in range(ACCEPTED_BETWEEN):
            before = self._accepted
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()  # each task has run since the first checkpoint
            if self._accepted == before:
                return

    # -- one connection

    async def _run(self, stream: T, connection: Connection, scope: trio.CancelScope) -> None:
        scope.deadline = trio.current_time() + self._handshake_seconds
        try:
            with scope:
                await self._handler(stream, connection)
            if scope.cancelled_caught:
                self._cut(connection)
        except Exception as error:
            self._failed(connection, error)
        except BaseExceptionGroup as group:
            # A group may hold a fault of this connection and a cancellation of all connections.
            faults, others = group.split(Exception)
            if faults is not None:
                self._failed(connection, faults)
            if others is not None:
                raise others from None
        finally:
            connection.release()
            with contextlib.suppress(Exception):
                await trio.aclose_forcefully(stream)

    def _cut(self, connection: Connection) -> None:
        if connection.evicted:
            self._on_failure("evicted")
            self._log_end(connection, "closed to make room for another connection")
        else:
            self._on_failure("timeout")
            self._log_end(connection, f"not authenticated within {self._handshake_seconds:g} s")

    def _failed(self, connection: Connection, error: BaseException) -> None:
        cause = _innermost(error)
        if is_scarce(error):
            self._rest_until = trio.current_time() + REST_SECONDS
        if isinstance(cause, TooManyConnections):
            self._on_failure("limit")
            self._log_end(connection, f"refused: {cause}")
        elif isinstance(cause, _EXPECTED):
            self._on_failure("failed")
            self._log_end(connection, reason(cause.__cause__ or cause))
        elif (refused := refusal(cause)) is not None:  # no memory, no thread
            self._on_failure("failed")
            self._log_end(connection, refused)
        else:
            # This is a bug on our side. Its text may quote secrets, so only its type and location
            # are logged.
            self._on_failure("internal")
            connection.log.log(
                logging.ERROR,
                "%s: %s: internal error: %s in %s; please report it",
                self._name,
                connection.peer,
                type(cause).__name__,
                _place(cause),
            )
            self._logger.debug("%s: the internal error", self._name, exc_info=cause)

    def _log_end(self, connection: Connection, text: str) -> None:
        connection.log.log(logging.WARNING, "%s: %s: %s", self._name, connection.peer, text)


def _transport_of(stream: object) -> trio.SocketStream | None:
    """The socket underneath a stream, if there is one."""
    while not isinstance(stream, trio.SocketStream):
        below = getattr(stream, "transport_stream", None)
        if below is None:
            return None
        stream = below
    return stream


async def _discard(stream: AsyncResource) -> None:
    """Close a connection that has not been used: at once, without an alert to the peer."""
    transport = _transport_of(stream)
    if transport is None:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
    else:
        transport.socket.close()


_EXPECTED: Final = (
    HybridkexError,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)
"""Errors that a peer, a network or a full disk can cause."""


def _innermost(error: BaseException) -> BaseException:
    """The first error in nested groups, or the first one that a peer cannot cause."""
    found: list[BaseException] = [error]
    flat: list[BaseException] = []
    while found:
        one = found.pop(0)
        if isinstance(one, BaseExceptionGroup):
            found[:0] = one.exceptions
        else:
            flat.append(one)
    return next((one for one in flat if not isinstance(one, _EXPECTED)), flat[0])


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
