"""The receiving side of a connection: one task reads, another one passes the data to a worker
thread and sends the answers, so that network and disk work at the same time."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio

from hybridkex import HybridkexError, SecureStream
from hybridkex.apps.transfer import messages as wire
from hybridkex.apps.transfer.folder import Folder
from hybridkex.apps.transfer.frames import Frames, Received, first_failure
from hybridkex.apps.transfer.progress import Progress
from hybridkex.apps.transfer.reception import Answers, Reception
from hybridkex.machine import broken
from hybridkex.net.descriptors import share
from hybridkex.net.event_loop import in_thread
from hybridkex.net.log import BoundedLog
from hybridkex.text import get_logger

_log = get_logger("hybridkex.apps.transfer")

T = TypeVar("T")

_HELLO_WITHIN: Final = 30.0
_AHEAD: Final = 2 << 20
"""Bytes to read ahead of the disk."""
_STEPS: Final = 40
"""The maximum number of connections whose disk work runs in parallel."""
_FEWEST_STEPS: Final = 4
"""The minimum of that number, under a low limit of open files."""
_STEP: Final = 16
"""Folders that each of these connections has open."""
_MESSAGE: Final = 1 << 10
"""Bytes counted for a message, in addition to its content."""


class Receiver:
    """Receives files from any number of senders into one folder."""

    def __init__(self, folder: Folder, progress: Progress | None = None) -> None:
        self._folder = folder
        self._progress = progress or Progress()
        # Rate-limited, because any sender can cause these lines.
        self._lines = BoundedLog(_log)
        self._live: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._steps = trio.CapacityLimiter(max(_FEWEST_STEPS, share(_STEPS * _STEP) // _STEP))

    async def serve(self, stream: SecureStream[Any]) -> bool:
        """Serve one connection, after its handshake, and close its stream.

        Returns whether the sender has finished; False if the connection broke.
        """
        try:
            async with stream:
                return await self._serve(stream)
        except (trio.BrokenResourceError, HybridkexError) as error:
            self._lines.log(logging.WARNING, "a transfer was cut short: %s", broken(error))
            return False

    async def turn_away(self, stream: SecureStream[Any]) -> None:
        """Tell a sender, after its handshake, to try again later, and close its stream."""
        with contextlib.suppress(trio.BrokenResourceError, HybridkexError):
            async with stream:
                frames, _ = await self._greeted(stream)
                await frames.send(wire.Busy())

    async def _greeted(self, stream: SecureStream[Any]) -> tuple[Frames, wire.Hello]:
        if stream.session.alpn != wire.PROTOCOL:
            raise wire.ProtocolError("the other end is not 'hybridkex send'")
        frames = Frames(stream)
        hello = None
        with trio.move_on_after(_HELLO_WITHIN):
            hello = await frames.receive()
        if not isinstance(hello, wire.Hello) or hello.version != wire.VERSION:
            raise wire.ProtocolError(
                f"the sender does not speak version {wire.VERSION} of the protocol"
            )
        return frames, hello

    async def _serve(self, stream: SecureStream[Any]) -> bool:
        frames, hello = await self._greeted(stream)
        # A sender may reconnect before we notice the broken connection, so the newest connection of
        # a transfer counts. Only the sender knows the transfer's identifier.
        while (older := self._live.get(hello.transfer)) is not None:
            older[0].cancel()
            await older[1].wait()
        with trio.CancelScope() as scope:
            ended = trio.Event()
            self._live[hello.transfer] = scope, ended
            conversation = _Conversation(
                frames, Reception(self._folder, self._progress), self._lines, self._steps
            )
            try:
                await conversation.run()
            finally:
                conversation.close()
                del self._live[hello.transfer]
                ended.set()
        if scope.cancelled_caught:
            await stream.abort()
        return not scope.cancelled_caught


class _Conversation:
    """One connection, after its greeting."""

    def __init__(
        self,
        frames: Frames,
        reception: Reception,
        lines: BoundedLog,
        steps: trio.CapacityLimiter,
    ) -> None:
        self._frames = frames
        self._reception = reception
        self._lines = lines
        self._steps = steps
        self._unread: list[Received] = []
        self._ahead = 0
        self._ending: Exception | None = None
        """Why nothing more can be read; reported after the data read so far."""
        self._news = trio.Event()
        self._room = trio.Event()

    def close(self) -> None:
        """Close open files; what has been written is kept."""
        self._reception.close()

    async def run(self) -> None:
        """Answer until the sender sends ``Bye``.

        Raises:
            ProtocolError: the sender violates the protocol, or leaves before it has finished.
            trio.BrokenResourceError: the connection broke.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_alive)
                nursery.start_soon(self._read)
                await self._work()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_failure(group) from None

    async def _send_alive(self) -> None:
        """Send a periodic message, so that a slow disk does not look like a vanished receiver."""
        while True:
            await trio.sleep(wire.BEAT)
            await self._frames.send(wire.Alive())

    async def _read(self) -> None:
        """Read ahead of the disk."""
        while self._ending is None:
            try:
                received = await self._frames.receive_all()
            except (trio.BrokenResourceError, HybridkexError) as error:
                self._ending = error
            else:
                if not received:
                    self._ending = wire.ProtocolError(
                        "the sender closed the connection before the transfer was finished"
                    )
                self._unread += received
                self._ahead += sum(map(_weight, received))
            self._news.set()
            while self._ahead > _AHEAD:
                self._room = trio.Event()
                await self._room.wait()

    async def _work(self) -> None:
        finished = False
        while not finished:
            if self._unread:
                received, self._unread, self._ahead = self._unread, [], 0
                self._room.set()
                finished = await self._tell(await self._step(self._reception.process, received))
            if not self._reception.is_settled and (
                finished or not self._unread or self._reception.must_settle
            ):
                await self._tell(await self._step(self._reception.settle))
            elif self._reception.can_hash and not self._unread and not finished:
                await self._step(self._reception.hash_ahead, lambda: bool(self._unread))
            elif not self._unread and not finished:
                if self._ending is not None:
                    raise self._ending
                self._news = trio.Event()
                await self._news.wait()
        await self._frames.send(wire.Bye())

    async def _step(self, act: Callable[..., T], *arguments: Any) -> T:
        async with self._steps:
            return await in_thread(act, *arguments)

    async def _tell(self, answers: Answers) -> bool:
        """Send the answers; returns whether the sender has finished."""
        for line in answers.failures:
            self._lines.log(logging.WARNING, "not stored: %s", line)
        for report in answers.reports:
            report()
        if answers.messages:
            await self._frames.send(*answers.messages)
        return answers.finished


def _weight(received: Received) -> int:
    match received:
        case memoryview():
            return len(received)
        case wire.Whole():
            return _MESSAGE + len(received.content)
    return _MESSAGE
