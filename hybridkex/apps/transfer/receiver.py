"""The receiving side: one task per connection reads, stores and answers in order."""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from hybridkex import HybridkexError, SecureStream
from hybridkex.apps.transfer.errors import NotStored
from hybridkex.apps.transfer.folder import Folder, PartFile, Prefix, Present
from hybridkex.apps.transfer.frames import Frames, first_failure
from hybridkex.apps.transfer.messages import (
    BEAT,
    CHUNK,
    PROTOCOL,
    VERSION,
    WINDOW,
    Alive,
    Busy,
    Bye,
    Digest,
    Drop,
    End,
    Failed,
    Have,
    Hello,
    Offer,
    ProtocolError,
    Send,
    Start,
    Stored,
)
from hybridkex.apps.transfer.names import UnsafeName, reason_alone, shown
from hybridkex.apps.transfer.progress import NullProgress, Progress
from hybridkex.machine import broken
from hybridkex.net.event_loop import in_thread
from hybridkex.net.log import BoundedLog
from hybridkex.text import get_logger

__all__ = ["Receiver"]

_log = get_logger("hybridkex.apps.transfer")

_HELLO_WITHIN: Final = 30.0
_COPIED: Final = 1 << 14
"""Bytes; a piece of fewer is copied."""


class Receiver:
    """Receives files from any number of senders into one folder."""

    def __init__(self, folder: Folder, progress: Progress | None = None) -> None:
        self._folder = folder
        self._progress = progress or NullProgress()
        # Rate-limited, because any sender can cause these lines.
        self._lines = BoundedLog(_log)
        self._live: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

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
                await frames.send(Busy())

    async def _greeted(self, stream: SecureStream[Any]) -> tuple[Frames, Hello]:
        if stream.session.alpn != PROTOCOL:
            raise ProtocolError("the other end is not 'hybridkex send'")
        frames = Frames(stream)
        hello = None
        with trio.move_on_after(_HELLO_WITHIN):
            hello = await frames.receive()
        if not isinstance(hello, Hello) or hello.version != VERSION:
            raise ProtocolError(f"the sender does not speak version {VERSION} of the protocol")
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
            reception = _Reception(self._folder, frames, self._progress, self._lines)
            try:
                await self._converse(reception)
            finally:
                reception.close()
                del self._live[hello.transfer]
                ended.set()
        if scope.cancelled_caught:
            await stream.abort()
        return not scope.cancelled_caught

    async def _converse(self, reception: "_Reception") -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reception.say_that_we_are_there)
                await reception.run()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_failure(group) from None


@dataclass
class _Offered:
    """A file that has been offered and not begun."""

    offer: Offer
    present: Present
    compared: bool = False
    """Whether the sender may begin."""
    prefix: Prefix | None = None
    """The prefix that need not be sent."""


@dataclass
class _Current:
    """The file whose data are arriving."""

    n: int
    part: PartFile | None
    """``None``: abandoned; the rest of its data is discarded."""
    pieces: list[memoryview | bytearray] = field(default_factory=list)
    gathered: int = 0

    def gather(self, piece: memoryview) -> None:
        """Keep a piece until it is written. A small one is copied: a view costs more than a few
        bytes, and keeps the whole read buffer alive."""
        if len(piece) >= _COPIED:
            self.pieces.append(piece)
            return
        last = self.pieces[-1] if self.pieces else None
        if not isinstance(last, bytearray):
            last = bytearray()
            self.pieces.append(last)
        last += piece


class _Reception:
    """One connection's files."""

    def __init__(
        self, folder: Folder, frames: Frames, progress: Progress, lines: BoundedLog
    ) -> None:
        self._folder = folder
        self._frames = frames
        self._progress = progress
        self._lines = lines
        self._offers: dict[int, _Offered] = {}
        self._current: _Current | None = None

    def close(self) -> None:
        """Close open files; what has been written is kept."""
        if self._current is not None and self._current.part is not None:
            self._progress.end(shown(self._current.part.offer.path), "the connection broke")
            self._current.part.close()

    async def run(self) -> None:
        while True:
            message = await self._frames.receive()
            match message:
                case memoryview():
                    await self._data(message)
                case Offer():
                    await self._offered(message)
                case Digest():
                    await self._compare(message)
                case Start(n=n):
                    await self._start(n)
                case End():
                    await self._end(message)
                case Drop(n=n):
                    await self._drop(n)
                case Bye():
                    await self._frames.send(Bye())
                    return
                case None:
                    raise ProtocolError(
                        "the sender closed the connection before the transfer was finished"
                    )
                case _:
                    raise ProtocolError(f"the sender says {type(message).__name__}")

    async def say_that_we_are_there(self) -> None:
        """Send a periodic message, so that a slow disk does not look like a vanished receiver."""
        while True:
            await trio.sleep(BEAT)
            await self._frames.send(Alive())

    async def _fail(self, n: int, error: HybridkexError) -> None:
        self._lines.log(logging.WARNING, "not stored: %s", error)
        await self._frames.send(Failed(n=n, reason=str(error)))

    async def _offered(self, offer: Offer) -> None:
        if len(self._offers) >= WINDOW or offer.n in self._offers:
            raise ProtocolError("too many offers, or one number for two")
        try:
            if offer.folder:
                made = await in_thread(self._folder.make, offer)
                await self._frames.send(Stored(n=offer.n, already=not made, lost=""))
                return
            present = await in_thread(self._folder.look, offer)
        except (NotStored, UnsafeName) as error:
            await self._fail(offer.n, error)
            return
        nothing = not present.size and not present.complete
        self._offers[offer.n] = _Offered(offer, present, compared=nothing)
        await self._frames.send(
            Send(n=offer.n, offset=0) if nothing else Have(n=offer.n, size=present.size)
        )

    async def _compare(self, digest: Digest) -> None:
        """Compare the one digest of each offer, over as many bytes as we have: a sender that could
        choose the length could learn another sender's file byte by byte."""
        offered = self._offers.get(digest.n)
        if offered is None or offered.compared:
            raise ProtocolError("a digest that was not requested")
        try:
            offered.prefix = await in_thread(
                self._folder.compare, offered.offer, offered.present, digest.sha256
            )
        except NotStored as error:
            del self._offers[digest.n]
            await self._fail(digest.n, error)
            return
        if offered.prefix is not None and offered.present.complete:
            del self._offers[digest.n]
            await self._frames.send(Stored(n=digest.n, already=True, lost=""))
            return
        offered.compared = True
        offset = offered.prefix.size if offered.prefix is not None else 0
        await self._frames.send(Send(n=digest.n, offset=offset))

    async def _start(self, n: int) -> None:
        if self._current is not None:
            raise ProtocolError("one file begins before another has ended")
        offered = self._offers.pop(n, None)
        if offered is None or not offered.compared:
            raise ProtocolError(f"file {n} begins, which was not requested")
        self._current = _Current(n, None)
        try:
            part = await in_thread(self._folder.begin, offered.offer, offered.prefix)
        except NotStored as error:
            await self._fail(n, error)
        else:
            self._current.part = part
            self._progress.begin(shown(offered.offer.path), offered.offer.size, part.size)

    async def _data(self, piece: memoryview) -> None:
        current = self._current
        if current is None:
            raise ProtocolError("data outside a file")
        if current.part is None:
            return
        current.gather(piece)
        current.gathered += len(piece)
        if current.part.size + current.gathered > current.part.offer.size:
            raise ProtocolError("more data than the file has")
        if current.gathered >= CHUNK:
            await self._write(current, current.part)

    async def _write(self, current: _Current, part: PartFile) -> None:
        pieces, count = current.pieces, current.gathered
        current.pieces, current.gathered = [], 0
        try:
            await in_thread(part.write, pieces)
            self._progress.advance(shown(part.offer.path), count)
        except NotStored as error:
            await self._give_up(current, part, error)

    async def _give_up(self, current: _Current, part: PartFile, error: HybridkexError) -> None:
        current.part = None
        part.close()
        path = part.offer.path
        self._progress.end(shown(path), reason_alone(str(error), path))
        await self._fail(current.n, error)

    async def _end(self, end: End) -> None:
        current = self._current
        if current is None or current.n != end.n:
            raise ProtocolError("the end of a file that was not begun")
        if current.part is not None and current.pieces:
            await self._write(current, current.part)
        self._current = None
        part = current.part
        if part is None:
            return
        try:
            lost = await in_thread(part.complete, end.sha256)
        except NotStored as error:
            await self._give_up(current, part, error)
            return
        self._progress.end(shown(part.offer.path), None)
        await self._frames.send(Stored(n=end.n, already=False, lost=lost))

    async def _drop(self, n: int) -> None:
        self._offers.pop(n, None)
        current = self._current
        if current is None or current.n != n:
            return
        if current.part is not None and current.pieces:
            await self._write(current, current.part)  # kept for the next attempt
        self._current = None
        if current.part is not None:
            self._progress.end(shown(current.part.offer.path), "the sender abandoned it")
            current.part.close()
