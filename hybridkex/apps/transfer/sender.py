"""The sending side: offers everything, sends what the receiver lacks, resumes after an
interruption.

Two tasks share a connection. One sends offers and what the receiver requests; the other reads, so
that the two sides never wait for each other to read. Up to :data:`WINDOW` offers await their
outcome at once, so small files do not cost a round trip each.
"""

import os
import secrets
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import trio

from hybridkex import HybridkexError, SecureStream
from hybridkex.apps.backoff import Backoff
from hybridkex.apps.tcp import no_connection
from hybridkex.apps.transfer.errors import why
from hybridkex.apps.transfer.folder import hash_prefix
from hybridkex.apps.transfer.frames import Frames, first_failure
from hybridkex.apps.transfer.messages import (
    BEAT,
    CHUNK,
    DATA,
    HEADER,
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
    header,
)
from hybridkex.apps.transfer.names import reason_alone, shown
from hybridkex.apps.transfer.progress import Progress
from hybridkex.apps.transfer.source import Item
from hybridkex.errors import AlertReceived, HandshakeTimeout, PeerError
from hybridkex.machine import broken
from hybridkex.net.event_loop import in_thread
from hybridkex.text import printable

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["Connect", "ConnectionLost", "Outcome", "send_items"]

Connect = Callable[[], Awaitable[SecureStream[Any]]]
"""Opens a connection to the receiver, including the handshake; raises ``OSError`` or
``trio.BrokenResourceError``."""

PATIENCE: Final = 600.0
"""Seconds that a receiver may be alive without progress, by default."""
_HASHED: Final = 4e6
"""Bytes that the slowest disk reads, hashes and flushes in a second."""
_LOOKS: Final = 16
"""Checks for progress within the time that a receiver has to make some."""
_BUFFERS: Final = 4
_SILENCE: Final = 3 * BEAT
"""Seconds after which a silent receiver is considered gone. TCP_USER_TIMEOUT is unsuitable: on
Linux it also ends connections to a live receiver that does not read for a while (tcp(7))."""


class ConnectionLost(HybridkexError):
    """The connection broke and could not be restored."""


class _Changed(HybridkexError):
    """A file that differs from its offer."""


@dataclass
class Outcome:
    """The result of a transfer; failures by name, with the reason for each.

    ``stored`` counts files transferred, ``already`` files that the receiver had; ``incomplete``
    names files stored without some metadata, such as the date, with that metadata as the value.
    """

    stored: int = 0
    already: int = 0
    payload: int = 0
    """Bytes of file data sent, including repetitions."""
    connections: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)


async def send_items(
    items: Iterable[Item],
    connect: Connect,
    progress: Progress,
    *,
    retries: int = 8,
    patience: float = PATIENCE,
    backoff: Backoff | None = None,
) -> Outcome:
    """Send everything; data stored before an interruption is not sent again.

    Args:
        retries: how many connections in a row may end without a file settled or a megabyte sent
            that was not sent before.
        patience: seconds in which a receiver that says that it is alive must settle a file, ask for
            something or take data, and one second more for each 4 MB of the largest file that is
            under way, which it may be reading and hashing.

    Raises:
        ConnectionLost: that many did, or the first did before the receiver sent a message.
        OSError, trio.BrokenResourceError: the first connection could not be made.
        ProtocolError: the other end is not a receiver.
    """
    work = _Transfer(list(items), progress, patience)
    waits = backoff or Backoff()
    stream = await connect()
    while True:
        before = work.furthest // CHUNK, work.settled
        try:
            await work.over(stream)
        except trio.BrokenResourceError as error:
            lost = _worth_a_try(error)
            if not work.heard:
                # A server refuses a client after the client's handshake is done (RFC 9846, section
                # 4.5.1.3), and its alert may be lost with the reset: treat it as no connection.
                raise ConnectionLost(
                    f"{lost}, before the receiver sent anything: it may have refused us, see its "
                    "log"
                ) from None
        else:
            return work.outcome
        if (work.furthest // CHUNK, work.settled) != before:
            waits.reset()
        stream = await _again(connect, lost, waits, retries, progress)


async def _again(
    connect: Connect, lost: str, waits: Backoff, retries: int, progress: Progress
) -> SecureStream[Any]:
    while waits.tries < retries:
        seconds = waits.next()
        progress.note(f"{lost}; trying again in {seconds:.1f} s")
        await trio.sleep(seconds)
        try:
            return await connect()
        except OSError as error:
            lost = f"cannot connect: {no_connection(error)}"
        except trio.BrokenResourceError as error:
            lost = _worth_a_try(error)
    raise ConnectionLost(f"{lost}; gave up after {retries} retries")


def _worth_a_try(error: trio.BrokenResourceError) -> str:
    """Why the connection broke. Raises ``ConnectionLost`` if either side refused the other."""
    reason = broken(error)
    refused = isinstance(error.__cause__, PeerError | AlertReceived)
    if refused and not isinstance(error.__cause__, HandshakeTimeout):
        raise ConnectionLost(reason)
    return reason


class _Transfer:
    """The state that outlives a connection: the outcomes so far."""

    def __init__(self, items: list[Item], progress: Progress, patience: float) -> None:
        self._items: Final = dict(enumerate(items))
        self._patience = patience
        self._reached: dict[int, int] = {}
        self._progress = progress
        self._name: Final = secrets.token_hex(16)
        self.outcome = Outcome()
        self.heard = False
        """Whether the receiver has answered at all."""

    @property
    def settled(self) -> int:
        """The number of items with an outcome."""
        return self.outcome.stored + self.outcome.already + len(self.outcome.failed)

    @property
    def furthest(self) -> int:
        """How many bytes of files were sent, repetitions not counted."""
        return sum(self._reached.values())

    def sent(self, n: int, position: int, count: int) -> None:
        """So many bytes of a file were sent, up to this position."""
        self.outcome.payload += count
        self._reached[n] = max(self._reached.get(n, 0), position)

    def settle(
        self, n: int, *, already: bool = False, failed: str | None = None, lost: str = ""
    ) -> None:
        """Record the outcome of an item, which is not offered again."""
        item = self._items.pop(n)
        if failed is not None:
            failed = reason_alone(failed, item.path)
        if lost:
            self.outcome.incomplete[shown(item.path)] = lost
            self._progress.note(f"{shown(item.path)}: stored without {lost}")
        if failed is not None:
            self.outcome.failed[shown(item.path)] = failed
        elif already:
            self.outcome.already += 1
        else:
            self.outcome.stored += 1
        self._progress.end(shown(item.path), failed)

    async def over(self, stream: SecureStream[Any]) -> None:
        """Offer and send the remaining items over one connection."""
        self.outcome.connections += 1
        try:
            async with stream:
                if stream.session.alpn != PROTOCOL:
                    raise ProtocolError("the other end is not 'hybridkex receive'")
                connection = _Connection(
                    self, dict(self._items), stream, self._progress, self._patience
                )
                await connection.run(self._name)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None


class _Connection:
    """A transfer's state on one connection."""

    def __init__(
        self,
        transfer: _Transfer,
        items: dict[int, Item],
        stream: SecureStream[Any],
        progress: Progress,
        patience: float,
    ) -> None:
        self._patience = patience
        self._moved = trio.current_time()
        """When there was progress."""
        self._transfer = transfer
        self._items = items
        self._frames = Frames(stream)
        self._progress = progress
        self._waiting = deque(items)
        """Not yet offered, in order."""
        self._open: set[int] = set()
        """Offered, and without an outcome."""
        self._dropped: set[int] = set()
        """Abandoned by us."""
        self._requests: deque[Have | Send] = deque()
        """Requests of the receiver."""
        self._compared: set[int] = set()
        """Files whose digest the receiver has requested."""
        self._begun: set[int] = set()
        """Files whose data the receiver has requested."""
        self._proved: set[int] = set()
        """Files that the receiver can store without further data."""
        self._prefixes: dict[int, tuple[int, _Hash]] = {}
        """Sizes and digests sent to the receiver."""
        self._leaving = False
        self._news = trio.Condition()

    async def run(self, name: str) -> None:
        await self._frames.send(Hello(version=VERSION, transfer=name))
        async with trio.open_nursery() as watcher:
            watcher.start_soon(self._watch_progress)
            await self._converse()
            watcher.cancel_scope.cancel()

    async def _watch_progress(self) -> None:
        """End the connection of a receiver that is alive and does nothing."""
        while True:
            largest = max((self._items[n].size for n in self._open), default=0)
            limit = self._patience + largest / _HASHED
            if trio.current_time() >= self._moved + limit:
                raise trio.BrokenResourceError(
                    f"the receiver is alive and has done nothing for {limit:,.0f} s; see its log "
                    "and its disk ('send --patience' waits longer)"
                )
            await trio.sleep(limit / _LOOKS)

    async def _converse(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_answers)
            while self._waiting or self._open:
                await self._until(lambda: self._requests or self._may_offer or not self._open)
                if self._may_offer:
                    await self._offer(self._waiting.popleft())
                elif self._requests:
                    await self._answer(self._requests.popleft())
            self._leaving = True
            await self._frames.send(Bye())

    @property
    def _may_offer(self) -> bool:
        return bool(self._waiting) and len(self._open) < WINDOW

    # -- reading

    async def _read_answers(self) -> None:
        while True:
            with trio.move_on_after(_SILENCE) as limit:
                answer = await self._frames.receive()
            if limit.cancelled_caught:
                raise trio.BrokenResourceError(f"the receiver was silent for {_SILENCE} s")
            self._transfer.heard |= answer is not None
            match answer:
                case Alive():
                    continue
                case Busy():
                    raise trio.BrokenResourceError("the receiver serves no more senders at once")
                case Have(n=n, size=size) as have if n in self._open - self._compared:
                    if size > self._items[n].size:
                        raise ProtocolError("the receiver has more of a file than there is")
                    self._compared.add(n)
                    self._requests.append(have)
                case Send(n=n) as request if n in self._open - self._begun:
                    self._begun.add(n)
                    self._requests.append(request)
                case Stored(n=n, already=already, lost=lost) if n in self._open & self._proved:
                    self._open.remove(n)
                    self._transfer.settle(n, already=already, lost=_one_line(lost))
                case Failed(n=n, reason=reason) if n in self._open:
                    self._open.remove(n)
                    self._transfer.settle(n, failed=_one_line(reason))
                case Failed(n=n) if n in self._dropped:
                    continue  # both sides abandoned it at once
                case Bye() if self._leaving:
                    return
                case None:
                    raise trio.BrokenResourceError("the receiver ended the connection")
                case memoryview():
                    raise ProtocolError("the receiver sends data of a file")
                case other:
                    raise ProtocolError(f"the receiver says {type(other).__name__} out of turn")
            self._moved = trio.current_time()
            async with self._news:
                self._news.notify_all()

    async def _until(self, condition: Callable[[], object]) -> None:
        async with self._news:
            while not condition():
                await self._news.wait()

    # -- sending

    async def _offer(self, n: int) -> None:
        item = self._items[n]
        self._open.add(n)
        if item.folder:
            self._proved.add(n)
        await self._frames.send(
            Offer(
                n=n,
                path=item.path,
                folder=item.folder,
                size=item.size,
                mtime_ns=item.mtime_ns,
                mode=item.mode,
            )
        )

    async def _answer(self, request: Have | Send) -> None:
        n = request.n
        if n not in self._open:  # it has failed meanwhile
            return
        item = self._items[n]
        try:
            with _opened(item) as file:
                if isinstance(request, Have):
                    await self._send_digest(n, item, file, request.size)
                else:
                    await self._send_file(n, item, file, request.offset)
        except OSError as error:
            await self._drop(n, why(error, "read it"))
        except _Changed as error:
            await self._drop(n, str(error))

    async def _send_digest(self, n: int, item: Item, file: int, size: int) -> None:
        digest = await in_thread(hash_prefix, file, size)
        _check(file, item)
        self._prefixes[n] = size, digest
        if size == item.size:
            self._proved.add(n)
        await self._frames.send(Digest(n=n, sha256=digest.hexdigest()))

    async def _drop(self, n: int, reason: str) -> None:
        if n in self._open:
            self._open.remove(n)
            self._dropped.add(n)
            self._transfer.settle(n, failed=reason)
            await self._frames.send(Drop(n=n, reason=reason))

    async def _send_file(self, n: int, item: Item, file: int, offset: int) -> None:
        size, whole = self._prefixes.pop(n, (0, sha256()))
        if not offset:
            whole = sha256()
        elif offset != size:
            raise ProtocolError("the receiver asks for a part that it has not compared")
        self._progress.begin(shown(item.path), item.size, offset)
        await self._frames.send(Start(n=n))
        await self._send_data(n, item, file, whole, offset)
        _check(file, item)
        if n in self._open:
            self._proved.add(n)
            await self._frames.send(End(n=n, sha256=whole.hexdigest()))
        else:  # the receiver has abandoned it
            await self._frames.send(Drop(n=n, reason=""))

    async def _send_data(self, n: int, item: Item, file: int, digest: "_Hash", offset: int) -> None:
        """Read and hash each chunk in a thread while the previous one is being sent."""
        put, full = trio.open_memory_channel[bytearray](_BUFFERS)
        give_back, take = trio.open_memory_channel[bytearray](_BUFFERS)
        for _ in range(_BUFFERS):
            give_back.send_nowait(bytearray(HEADER + min(CHUNK, item.size - offset)))
        failure: list[Exception] = []

        async def read() -> None:
            position = offset
            with put:
                while position < item.size and n in self._open:
                    frame = await take.receive()
                    del frame[HEADER + item.size - position :]  # the last one may be shorter
                    try:
                        await in_thread(_read_frame, file, position, frame, digest)
                    except (OSError, _Changed) as error:
                        failure.append(error)
                        return
                    position += len(frame) - HEADER
                    await put.send(frame)

        sent = offset
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with full:
                async for frame in full:
                    await self._frames.send_frame(frame)
                    count = len(frame) - HEADER
                    sent += count
                    self._moved = trio.current_time()
                    self._transfer.sent(n, sent, count)
                    self._progress.advance(shown(item.path), count)
                    give_back.send_nowait(frame)
        if failure:
            raise failure[0]


@contextmanager
def _opened(item: Item) -> Iterator[int]:
    # Non-blocking, in case it has become a named pipe.
    file = os.open(item.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check(file, item)
        yield file
    finally:
        os.close(file)


def _check(file: int, item: Item) -> None:
    """Raise ``_Changed`` if the file differs from its offer.

    Reads one byte past the end, too: files in /proc report a size of 0.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise _Changed("it is no longer a file")
    if os.pread(file, 1, item.size):
        raise _Changed(
            f"it has more than the {item.size:,} bytes of its reported size: it is being written, "
            "or the system generates it when it is read; copy it first"
        )
    found = (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns
    if found != (item.inode, item.size, item.mtime_ns):
        raise _Changed("it changed while it was being sent")


def _read_frame(file: int, position: int, frame: bytearray, digest: "_Hash") -> None:
    """Fill a frame with as many bytes of the file as fit."""
    with memoryview(frame) as view:
        body = view[HEADER:]
        view[:HEADER] = header(DATA, len(body))
        done = 0
        while done < len(body):
            count = os.preadv(file, [body[done:]], position + done)
            if not count:
                raise _Changed(
                    f"it has only {position + done:,} bytes, fewer than its reported size"
                )
            done += count
        digest.update(body)
        body.release()


def _one_line(text: str) -> str:
    """The other end's text, as one line for a terminal."""
    return printable(text, most=500)
