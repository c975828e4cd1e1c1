"""The sending side: offers everything, sends what the receiver lacks, resumes after an
interruption.

Two tasks share a connection. One sends offers and what the receiver requests; the other reads, so
that the two sides never wait for each other to read. Up to :data:`WINDOW` offers await their
outcome at once, so small files do not cost a round trip each. Files are listed when they are
offered, and small ones are read many at a time in a worker thread and sent at once.
"""

import os
import secrets
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import trio

from hybridkex import HybridkexError, SecureStream
from hybridkex.apps.backoff import Backoff
from hybridkex.apps.tcp import no_connection
from hybridkex.apps.transfer import messages as wire
from hybridkex.apps.transfer.errors import why
from hybridkex.apps.transfer.frames import Frames, Received, first_failure
from hybridkex.apps.transfer.names import reason_alone, shown
from hybridkex.apps.transfer.part import hash_prefix
from hybridkex.apps.transfer.progress import Progress
from hybridkex.apps.transfer.source import Item
from hybridkex.errors import AlertReceived, HandshakeTimeout, PeerError
from hybridkex.machine import broken
from hybridkex.net.event_loop import in_thread
from hybridkex.text import printable

if TYPE_CHECKING:
    from hashlib import _Hash

Connect = Callable[[], Awaitable[SecureStream[Any]]]
"""Opens a connection to the receiver, including the handshake; raises ``OSError`` or
``trio.BrokenResourceError``."""

PATIENCE: Final = 600.0
"""Seconds that a receiver may be alive without progress, by default."""
_HASHED: Final = 4e6
"""Bytes per second that even a slow receiver reads, hashes and flushes."""
_LOOKS: Final = 16
"""Checks for progress in the time that a receiver has for it."""
_BUFFERS: Final = 4
_BATCH: Final = 1 << 19
"""Bytes of small files that are read before they are sent."""
_SILENCE: Final = 3 * wire.BEAT
"""Seconds after which a silent receiver is considered gone. TCP_USER_TIMEOUT is unsuitable: on
Linux it also ends connections to a live receiver that does not read for a while (tcp(7))."""


class ConnectionLost(HybridkexError):
    """The connection broke and could not be restored."""


class _Changed(HybridkexError):
    """A file has changed since it was offered."""


@dataclass
class Outcome:
    """The result of a transfer; failures by path at the receiver, with the reason for each.

    ``stored`` counts files transferred, ``already`` files that the receiver had, of which
    ``unchanged`` were compared by size and date alone; ``incomplete`` names files stored without
    some metadata, such as the date, with that metadata as the value.
    """

    stored: int = 0
    already: int = 0
    unchanged: int = 0
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
    checksum: bool = False,
    backoff: Backoff | None = None,
) -> Outcome:
    """Send everything; data stored before an interruption is not sent again.

    Args:
        items: files and folders, each folder before its content. They are read in a worker thread
            when they are offered, and not stored.
        retries: how many consecutive connections may end without a file completed or a new megabyte
            sent.
        patience: seconds within which a receiver that reports that it is alive must complete a
            file, request something or accept data, plus one second for each 4 MB of the largest
            file in transfer, which it may be reading and hashing.
        checksum: compare the content of a file that the receiver has, even if it has the size and
            the date of the file to send.

    Raises:
        ConnectionLost: the retries are used up, or the first connection broke before the receiver
            sent a message. OSError, trio.BrokenResourceError: the first connection could not be
            made.
        ProtocolError: the other end is not a receiver.
    """
    work = _Transfer(items, progress, patience, checksum=checksum)
    waits = backoff or Backoff()
    stream = await connect()
    while True:
        before = work.furthest // wire.CHUNK, work.settled
        try:
            await work.over(stream)
        except trio.BrokenResourceError as error:
            lost = _worth_a_try(error)
            if not work.heard:
                # A server refuses a client after the client's handshake is done (RFC 9846, section
                # 4.5.1.3), and its alert may be lost with the reset: treat it as no connection.
                raise ConnectionLost(
                    f"{lost}, before the receiver sent anything: it may have refused this "
                    "sender; see its log"
                ) from None
        else:
            return work.outcome
        if (work.furthest // wire.CHUNK, work.settled) != before:
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
    """The state across connections: the items left to offer, and the outcomes so far."""

    def __init__(
        self, items: Iterable[Item], progress: Progress, patience: float, *, checksum: bool
    ) -> None:
        self._left = enumerate(items)
        self.exhausted = False
        """Whether everything has been offered once."""
        self._unsettled: dict[int, Item] = {}
        self.checksum: Final = checksum
        self._patience = patience
        self._reached: dict[int, int] = {}
        self._progress = progress
        self._name: Final = secrets.token_hex(16)
        self.outcome = Outcome()
        self.furthest = 0
        """The number of bytes of large files that were sent, without repetitions."""
        self.heard = False
        """Whether the receiver has answered at all."""

    @property
    def settled(self) -> int:
        return self.outcome.stored + self.outcome.already + len(self.outcome.failed)

    async def take(self) -> dict[int, Item]:
        """The next items to offer; none at the end."""
        items = dict(await in_thread(lambda: list(islice(self._left, wire.MOST_FILES))))
        self.exhausted = not items
        self._unsettled.update(items)
        return items

    def sent(self, n: int, position: int, count: int) -> None:
        """Record that bytes of a large file were sent, up to this position."""
        self.outcome.payload += count
        reached = self._reached.get(n, 0)
        if position > reached:
            self._reached[n] = position
            self.furthest += position - reached

    def fail(self, n: int, reason: str) -> None:
        """Record that an item is not stored; it is not offered again."""
        item = self._settle(n)
        self.outcome.failed["/".join(item.path)] = reason = reason_alone(reason, item.path)
        self._progress.end(item, reason)

    def store(self, files: Iterable[int], how: wire.How, lost: str) -> None:
        """Record that items are at the receiver; they are not offered again."""
        small: list[Item] = []
        for n in files:
            item = self._settle(n)
            if lost:
                self.outcome.incomplete["/".join(item.path)] = lost
                self._progress.note(f"{shown(item.path)}: stored without {lost}")
            if item.size > wire.WHOLE:
                self._progress.end(item, None)
            if how is wire.How.NEW:
                self.outcome.stored += 1
                if not item.folder and item.size <= wire.WHOLE:
                    small.append(item)
            else:
                self.outcome.already += 1
                self.outcome.unchanged += how is wire.How.UNCHANGED
        if small:
            self._progress.stored(small)

    def _settle(self, n: int) -> Item:
        self._reached.pop(n, None)
        return self._unsettled.pop(n)

    async def over(self, stream: SecureStream[Any]) -> None:
        """Offer and send the remaining items over one connection."""
        self.outcome.connections += 1
        try:
            async with stream:
                if stream.session.alpn != wire.PROTOCOL:
                    raise wire.ProtocolError("the other end is not 'hybridkex receive'")
                connection = _Connection(
                    self, dict(self._unsettled), stream, self._progress, self._patience
                )
                await connection.run(self._name)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None


class _Connection:
    def __init__(
        self,
        transfer: _Transfer,
        again: dict[int, Item],
        stream: SecureStream[Any],
        progress: Progress,
        patience: float,
    ) -> None:
        self._transfer = transfer
        self._progress = progress
        self._patience = patience
        self._moved = trio.current_time()
        """When the receiver last accepted data, requested something or completed a file."""
        self._frames = Frames(stream)
        self._again = again
        """Items that an earlier connection has offered."""
        self._open: dict[int, Item] = {}
        """Offers without an outcome yet."""
        self._dropped: set[int] = set()
        """Offers that were withdrawn here."""
        self._requests: deque[tuple[int, wire.Have | int]] = deque()
        """Numbers of files, each with what the receiver requests: a digest, or the data from an
        offset."""
        self._compared: set[int] = set()
        """Files whose digest the receiver has requested."""
        self._begun: set[int] = set()
        """Files whose data the receiver has requested."""
        self._proved: set[int] = set()
        """Files that the receiver can store without further data."""
        self._prefixes: dict[int, tuple[int, _Hash]] = {}
        """Sizes and digests sent to the receiver."""
        self._leaving = False
        self._news = trio.Event()

    async def run(self, name: str) -> None:
        await self._frames.send(wire.Hello(version=wire.VERSION, transfer=name))
        async with trio.open_nursery() as watcher:
            watcher.start_soon(self._watch_progress)
            await self._converse()
            watcher.cancel_scope.cancel()

    async def _watch_progress(self) -> None:
        """End the connection of a receiver that is alive and makes no progress."""
        while True:
            largest = max((item.size for item in self._open.values()), default=0)
            limit = self._patience + largest / _HASHED
            if trio.current_time() >= self._moved + limit:
                raise trio.BrokenResourceError(
                    f"the receiver is alive and has made no progress for {limit:,.0f} s; see its "
                    "log and its disk ('send --patience' waits longer)"
                )
            await trio.sleep(limit / _LOOKS)

    async def _converse(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_answers)
            while True:
                if self._may_offer:
                    await self._offer()
                elif self._requests:
                    await self._answer()
                elif self._open:
                    self._news = trio.Event()
                    await self._news.wait()
                else:
                    break
            self._leaving = True
            await self._frames.send(wire.Bye())

    @property
    def _may_offer(self) -> bool:
        left = bool(self._again) or not self._transfer.exhausted
        return left and len(self._open) <= wire.WINDOW - wire.MOST_FILES

    # -- reading

    async def _read_answers(self) -> None:
        while True:
            with trio.move_on_after(_SILENCE) as limit:
                answers = await self._frames.receive_all()
            if limit.cancelled_caught:
                raise trio.BrokenResourceError(f"the receiver was silent for {_SILENCE} s")
            self._transfer.heard |= bool(answers)
            if not answers:
                raise trio.BrokenResourceError("the receiver ended the connection")
            for answer in answers:
                if isinstance(answer, wire.Alive):
                    continue
                if isinstance(answer, wire.Bye) and self._leaving:
                    return
                self._take(answer)
                if not isinstance(answer, wire.Send | wire.Stored) or answer.files:
                    self._moved = trio.current_time()
                self._news.set()

    def _take(self, answer: Received) -> None:
        """Handle an answer. Raises ``ProtocolError`` if it is not allowed now."""
        match answer:
            case wire.Busy():
                raise trio.BrokenResourceError(
                    "the receiver has reached its limit of simultaneous senders"
                )
            case wire.Have(n=n, size=size) as have if n in self._open and n not in self._compared:
                if size > self._open[n].size:
                    raise wire.ProtocolError(
                        "the receiver reports more bytes of a file than the file has"
                    )
                self._compared.add(n)
                self._requests.append((n, have))
            case wire.Send(files=files):
                for n, offset in files:
                    if n not in self._open or n in self._begun:
                        raise wire.ProtocolError(
                            "the receiver requests a file that was not offered"
                        )
                    self._begun.add(n)
                    self._requests.append((n, offset))
            case wire.Stored(files=files, how=how, lost=lost):
                for n in files:
                    self._close_stored(n, how)
                self._transfer.store(files, how, _one_line(lost))
            case wire.Failed(n=n, reason=reason) if n in self._open:
                self._close(n)
                self._transfer.fail(n, _one_line(reason))
            case wire.Failed(n=n) if n in self._dropped:
                self._dropped.discard(n)  # both sides abandoned it at once
            case memoryview():
                raise wire.ProtocolError("the receiver sent file data")
            case other:
                raise wire.ProtocolError(f"the receiver sent an unexpected {type(other).__name__}")

    def _close_stored(self, n: int, how: wire.How) -> None:
        item = self._open.get(n)
        by_date = how is wire.How.UNCHANGED and not self._transfer.checksum
        if item is None or not (n in self._proved or (by_date and not item.folder)):
            raise wire.ProtocolError(
                "the receiver claims to have stored a file that it cannot have"
            )
        self._close(n)

    def _close(self, n: int) -> Item:
        """Forget an offer that has its outcome."""
        for numbers in (self._compared, self._begun, self._proved):
            numbers.discard(n)
        self._prefixes.pop(n, None)
        return self._open.pop(n)

    # -- sending

    async def _offer(self) -> None:
        if self._again:
            some = dict(islice(self._again.items(), wire.MOST_FILES))
            for n in some:
                del self._again[n]
        else:
            some = await self._transfer.take()
            self._moved = trio.current_time()  # the receiver waited for us
        self._open.update(some)
        self._proved.update(n for n, item in some.items() if item.folder)
        given = (
            wire.Offer(n, item.path, item.folder, item.size, item.mtime_ns, item.mode, checksum)
            for checksum in (self._transfer.checksum,)
            for n, item in some.items()
        )
        if some:
            await self._frames.send(*wire.offers(given))

    async def _answer(self) -> None:
        """Send what the receiver has requested: many small files, or a large one."""
        few: list[tuple[int, Item, wire.Have | int]] = []
        size = 0
        while self._requests and size < _BATCH and len(few) < wire.MOST_FILES:
            n, request = self._requests[0]
            item = self._open.get(n)
            if item is not None and item.size > wire.WHOLE:
                break
            self._requests.popleft()
            if item is not None:  # otherwise it has failed meanwhile
                few.append((n, item, request))
                size += item.size
        if few:
            await self._send_small(few)
        elif self._requests:
            await self._send_large(*self._requests.popleft())

    async def _send_small(self, few: list[tuple[int, Item, wire.Have | int]]) -> None:
        frames, failures = await in_thread(_small_frames, few)
        for n, item, request in few:
            if n in failures or n not in self._open:
                continue
            if not isinstance(request, wire.Have):
                self._transfer.outcome.payload += item.size
                self._proved.add(n)
            elif request.size == item.size:
                self._proved.add(n)
        if frames:
            await self._frames.send_frames(frames)
        self._moved = trio.current_time()
        for n, reason in failures.items():
            await self._drop(n, reason)

    async def _send_large(self, n: int, request: wire.Have | int) -> None:
        item = self._open.get(n)
        if item is None:  # it has failed meanwhile
            return
        try:
            with _opened(item) as file:
                if isinstance(request, wire.Have):
                    await self._send_digest(n, item, file, request.size)
                else:
                    await self._send_file(n, item, file, request)
        except OSError as error:
            await self._drop(n, why(error, "read it"))
        except _Changed as error:
            await self._drop(n, str(error))

    async def _send_digest(self, n: int, item: Item, file: int, size: int) -> None:
        digest = await in_thread(hash_prefix, file, size)
        await _check_read(file, item, digest, size)
        self._prefixes[n] = size, digest
        if size == item.size:
            self._proved.add(n)
        await self._frames.send(wire.Digest(n=n, sha256=digest.hexdigest()))

    async def _drop(self, n: int, reason: str) -> None:
        if n in self._open:
            self._close(n)
            self._dropped.add(n)
            self._transfer.fail(n, reason)
        # Also for one that the receiver has abandoned meanwhile: it waits for the end of the data.
        await self._frames.send(wire.Drop(n=n, reason=reason))

    async def _send_file(self, n: int, item: Item, file: int, offset: int) -> None:
        size, whole = self._prefixes.pop(n, (0, sha256()))
        if not offset:
            whole = sha256()
        elif offset != size:
            raise wire.ProtocolError("the receiver requests a part that it has not compared")
        self._progress.begin(item, offset)
        await self._frames.send(wire.Start(n=n))
        await self._send_data(n, item, file, whole, offset)
        if n in self._open:
            await _check_read(file, item, whole, item.size)
        if n in self._open:
            self._proved.add(n)
            await self._frames.send(wire.End(n=n, sha256=whole.hexdigest()))
        else:  # the receiver has abandoned it
            await self._frames.send(wire.Drop(n=n, reason=""))

    async def _send_data(self, n: int, item: Item, file: int, digest: "_Hash", offset: int) -> None:
        """Read and hash each chunk in a thread while the previous one is being sent."""
        put, full = trio.open_memory_channel[bytearray](_BUFFERS)
        give_back, take = trio.open_memory_channel[bytearray](_BUFFERS)
        for _ in range(_BUFFERS):
            give_back.send_nowait(bytearray(wire.HEADER + min(wire.CHUNK, item.size - offset)))
        failure: list[Exception] = []

        async def read() -> None:
            position = offset
            with put:
                while position < item.size and n in self._open:
                    frame = await take.receive()
                    del frame[wire.HEADER + item.size - position :]  # the last one may be shorter
                    try:
                        await in_thread(_read_frame, file, position, frame, digest)
                    except (OSError, _Changed) as error:
                        failure.append(error)
                        return
                    position += len(frame) - wire.HEADER
                    await put.send(frame)

        sent = offset
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with full:
                async for frame in full:
                    await self._frames.send_frames(frame)
                    count = len(frame) - wire.HEADER
                    sent += count
                    self._moved = trio.current_time()
                    self._transfer.sent(n, sent, count)
                    self._progress.advance(item, count)
                    give_back.send_nowait(frame)
        if failure:
            raise failure[0]


def _open(item: Item) -> int:
    # Non-blocking, in case it has become a named pipe.
    return os.open(item.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


@contextmanager
def _opened(item: Item) -> Iterator[int]:
    file = _open(item)
    try:
        _check(file, item)
        yield file
    finally:
        os.close(file)


async def _check_read(file: int, item: Item, digest: "_Hash", size: int) -> None:
    """Raise ``_Changed`` if the file differs from its offer, or from what was read of it."""
    if (
        _check(file, item)
        and (await in_thread(hash_prefix, file, size)).digest() != digest.digest()
    ):
        raise _Changed(_OTHER)


def _check(file: int, item: Item) -> bool:
    """Raise ``_Changed`` if the file differs from its offer; returns as :func:`_check_status`.

    Reads one byte past the end, too: files in /proc report a size of 0.
    """
    _check_status(file, item)
    if os.pread(file, 1, item.size):
        raise _Changed(_LONGER.format(item.size))
    return _check_status(file, item)


_LONGER: Final = (
    "it has more than the {:,} bytes of its reported size: it is being written, or the system "
    "generates it when it is read; copy it first"
)
_OTHER: Final = "it changed while it was being sent"
_SHORTER: Final = "it has only {:,} bytes, fewer than its reported size"


def _check_status(file: int, item: Item) -> bool:
    """Raise ``_Changed`` if the status of the file shows that it is not the offered one.

    Returns whether it has been touched since, so that its content is in doubt: a program may have
    written to it and put its date back.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise _Changed("it is no longer a file")
    found = (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns
    if found != (item.inode, item.size, item.mtime_ns):
        raise _Changed(_OTHER)
    return status.st_ctime_ns != item.ctime_ns


def _small_frames(
    few: list[tuple[int, Item, wire.Have | int]],
) -> tuple[bytearray, dict[int, str]]:
    """Read small files: the frames with their contents or digests, and why others failed."""
    frames = bytearray()
    failures: dict[int, str] = {}
    for n, item, request in few:
        try:
            content = _read_whole(item)
        except OSError as error:
            failures[n] = why(error, "read it")
        except _Changed as error:
            failures[n] = str(error)
        else:
            if isinstance(request, wire.Have):
                digest = sha256(memoryview(content)[: request.size])
                frames += wire.encode(wire.Digest(n=n, sha256=digest.hexdigest()))
            else:
                frames += wire.whole_header(n, sha256(content).digest(), len(content))
                frames += content
    return frames, failures


def _read_whole(item: Item) -> bytes:
    """The content of a small file.

    Raises:
        _Changed: it differs from its offer.
        OSError: it cannot be read.
    """
    file = _open(item)
    try:
        _check_status(file, item)
        content = os.pread(file, item.size + 1, 0)
        while 0 < len(content) < item.size and (more := os.pread(file, item.size, len(content))):
            content += more
        if len(content) > item.size:
            raise _Changed(_LONGER.format(item.size))
        if len(content) < item.size:
            raise _Changed(_SHORTER.format(len(content)))
        touched = _check_status(file, item)
        if touched and hash_prefix(file, item.size).digest() != sha256(content).digest():
            raise _Changed(_OTHER)
    finally:
        os.close(file)
    return content


def _read_frame(file: int, position: int, frame: bytearray, digest: "_Hash") -> None:
    """Fill a frame with as many bytes of the file as fit."""
    with memoryview(frame) as view:
        body = view[wire.HEADER :]
        view[: wire.HEADER] = wire.header(wire.DATA, len(body))
        done = 0
        while done < len(body):
            count = os.preadv(file, [body[done:]], position + done)
            if not count:
                raise _Changed(_SHORTER.format(position + done))
            done += count
        digest.update(body)
        body.release()


def _one_line(text: str) -> str:
    """The other end's text, as one line for a terminal."""
    return printable(text, most=500)
