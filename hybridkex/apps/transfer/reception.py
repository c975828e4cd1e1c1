"""The disk work that a receiver does for the messages of one sender, without any network I/O.

Messages go in, in order and many at once; answers and reports come out. All calls block on the disk
and run in a worker thread, one at a time: one hand-over for a batch, however many files are in it.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from hybridkex.apps.transfer import messages as wire
from hybridkex.apps.transfer.arrivals import Arrivals
from hybridkex.apps.transfer.errors import NotStored
from hybridkex.apps.transfer.folder import NOTHING, Folder, Present
from hybridkex.apps.transfer.frames import Received
from hybridkex.apps.transfer.names import UnsafeName, reason_alone
from hybridkex.apps.transfer.part import PartFile, Prefix
from hybridkex.apps.transfer.progress import Progress

if TYPE_CHECKING:
    from hashlib import _Hash

    from hybridkex.apps.transfer.handles import Handles

_COPIED: Final = 1 << 14
"""A piece with fewer bytes is copied."""


@dataclass
class Answers:
    """The result of one step.

    Args:
        messages: for the sender.
        failures: one line for each file that is not stored.
        reports: calls of the progress display, to be made by the event loop.
        finished: the sender has sent ``Bye``.
    """

    messages: list[wire.Message] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    reports: list[Callable[[], None]] = field(default_factory=list)
    finished: bool = False


@dataclass(slots=True)
class _Offered:
    """A file that was offered and has not begun."""

    offer: wire.Offer
    present: Present
    compared: bool = False
    """Whether the sender may begin."""
    prefix: Prefix | None = None
    """The prefix that need not be sent."""
    digest: "_Hash | None" = None
    hashed: bool = False
    """Whether ``digest`` is that of what is present."""


@dataclass
class _Current:
    n: int
    part: PartFile | None
    """``None``: abandoned; the rest of its data is discarded."""
    pieces: list[memoryview | bytearray] = field(default_factory=list)
    gathered: int = 0

    def gather(self, piece: memoryview) -> None:
        """Keep a piece until it is written. A small one is copied: a view costs more than a few
        bytes, and keeps the whole read buffer alive."""
        self.gathered += len(piece)
        if len(piece) >= _COPIED:
            self.pieces.append(piece)
            return
        last = self.pieces[-1] if self.pieces else None
        if not isinstance(last, bytearray):
            last = bytearray()
            self.pieces.append(last)
        last += piece


class Reception:
    """The files of one connection."""

    def __init__(self, folder: Folder, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._offers: dict[int, _Offered] = {}
        self._to_hash: dict[int, None] = {}
        self._current: _Current | None = None
        self._arrivals = Arrivals(folder)
        self._large: set[int] = set()
        """Files in it that had a progress report of their own."""
        self._answers = Answers()
        self._send: list[tuple[int, int]] = []
        self._stored: dict[tuple[wire.How, str], list[int]] = {}

    def close(self) -> None:
        """Close open files. What has been written of a large file is kept."""
        begun = [offer for offer in self._arrivals.close() if offer.n in self._large]
        if self._current is not None and self._current.part is not None:
            begun.append(self._current.part.offer)
            self._current.part.close()
        for offer in begun:
            self._progress.end(offer, "the connection broke")

    @property
    def is_settled(self) -> bool:
        """Whether nothing is waiting for :meth:`settle`."""
        return not len(self._arrivals)

    @property
    def must_settle(self) -> bool:
        """Whether the limit of waiting files is reached."""
        return self._arrivals.is_full

    @property
    def can_hash(self) -> bool:
        return bool(self._to_hash)

    def process(self, received: Iterable[Received]) -> Answers:
        """Handle messages and data in order.

        Raises:
            ProtocolError: the sender violates the protocol.
        """
        with self._folder.open() as handles:
            for message in handles.each(received):
                self._handle(message, handles)
                if self._answers.finished:
                    break
            if self._current is not None:
                self._write(self._current)
            self._arrivals.add_touched(handles.made)
        return self._take_answers()

    def settle(self) -> Answers:
        """Flush all complete files and give them their names."""
        self._settle()
        return self._take_answers()

    def _settle(self) -> None:
        small: list[wire.Offer] = []
        for offer, how, lost, error in self._arrivals.settle():
            large = offer.n in self._large
            self._large.discard(offer.n)
            if error is not None:
                self._fail(offer.n, error)
                self._report(self._progress.end, offer, _alone(error, offer))
                continue
            new = how is wire.How.NEW
            self._store(offer.n, how, lost if new else "")
            if large:
                self._report(self._progress.end, offer, None)
            elif new and not offer.folder:
                small.append(offer)
        if small:
            self._report(self._progress.stored, small)

    def hash_ahead(self, interrupted: Callable[[], object]) -> None:
        """Hash existing files while the sender hashes its own, until interrupted."""
        with self._folder.open() as handles:
            for n in handles.each(list(self._to_hash)):
                if interrupted():
                    break
                self._to_hash.pop(n)
                if (offered := self._offers.get(n)) is not None:
                    with contextlib.suppress(NotStored):  # the sender is told after its digest
                        self._hash(offered, handles)

    def _take_answers(self) -> Answers:
        answers, self._answers = self._answers, Answers()
        send, self._send = self._send, []
        for start in range(0, len(send), wire.MOST_FILES):
            answers.messages.append(wire.Send(files=tuple(send[start : start + wire.MOST_FILES])))
        stored, self._stored = self._stored, {}
        for (how, lost), files in stored.items():
            for start in range(0, len(files), wire.MOST_FILES):
                some = tuple(files[start : start + wire.MOST_FILES])
                answers.messages.append(wire.Stored(files=some, how=how, lost=lost))
        return answers

    def _report(self, report: Callable[..., None], *arguments: object) -> None:
        self._answers.reports.append(partial(report, *arguments))

    def _fail(self, n: int, error: NotStored | UnsafeName) -> None:
        self._answers.failures.append(str(error))
        self._answers.messages.append(wire.Failed(n=n, reason=str(error)))

    def _store(self, n: int, how: wire.How, lost: str = "") -> None:
        self._stored.setdefault((how, lost), []).append(n)

    def _forget(self, n: int) -> _Offered | None:
        self._to_hash.pop(n, None)
        return self._offers.pop(n, None)

    # -- messages

    def _handle(self, message: Received, handles: "Handles") -> None:
        match message:
            case memoryview():
                self._data(message)
            case wire.Whole():
                self._whole(message, handles)
            case wire.Offers():
                self._offered(message, handles)
            case wire.Digest():
                self._compare(message, handles)
            case wire.Start(n=n):
                self._start(n, handles)
            case wire.End():
                self._end(message, handles)
            case wire.Drop(n=n):
                self._drop(n)
            case wire.Bye():
                self._answers.finished = True
            case _:
                raise wire.ProtocolError(f"the sender sent an unexpected {type(message).__name__}")

    def _offered(self, offers: wire.Offers, handles: "Handles") -> None:
        if len(self._offers) + len(self._arrivals) + len(offers.entries) > wire.WINDOW:
            raise wire.ProtocolError("the sender made too many offers")
        for offer in handles.each(offers.each()):
            if offer.n in self._offers:
                raise wire.ProtocolError("the sender made two offers with the same number")
            try:
                self._look(offer, handles)
            except (NotStored, UnsafeName) as error:
                self._fail(offer.n, error)

    def _look(self, offer: wire.Offer, handles: "Handles") -> None:
        if offer.folder:
            if self._folder.make(offer, handles, self._arrivals):
                self._arrivals.add_folder(offer)
            else:
                self._store(offer.n, wire.How.SAME)
            return
        present = self._folder.look(offer, handles)
        if present.unchanged:
            self._store(offer.n, wire.How.UNCHANGED)
            return
        nothing = present is NOTHING
        self._offers[offer.n] = _Offered(offer, present, compared=nothing)
        if nothing:
            self._send.append((offer.n, 0))
        else:
            self._to_hash[offer.n] = None
            self._answers.messages.append(wire.Have(n=offer.n, size=present.size))

    def _hash(self, offered: _Offered, handles: "Handles") -> None:
        if not offered.hashed:
            offered.digest = self._folder.hash(offered.offer, offered.present, handles)
            offered.hashed = True

    def _compare(self, digest: wire.Digest, handles: "Handles") -> None:
        """Compare digests. An offer has one digest, over as many bytes as we have: a sender that
        could choose the length could learn another sender's file byte by byte."""
        n = digest.n
        offered = self._offers.get(n)
        if offered is None or offered.compared:
            raise wire.ProtocolError("the sender sent a digest that was not requested")
        self._to_hash.pop(n, None)
        try:
            self._hash(offered, handles)
            offered.prefix = self._folder.compare(
                offered.offer, offered.present, offered.digest, digest.sha256
            )
        except NotStored as error:
            self._forget(n)
            self._fail(n, error)
            return
        offered.digest = None
        if offered.prefix is not None and offered.present.complete:
            self._forget(n)
            self._store(n, wire.How.SAME)
            return
        offered.compared = True
        self._send.append((n, offered.prefix.size if offered.prefix is not None else 0))

    def _take_begun(self, n: int) -> _Offered:
        """The offer of a file that begins."""
        if self._current is not None:
            raise wire.ProtocolError("the sender began a file before the end of the previous one")
        offered = self._forget(n)
        if offered is None or not offered.compared:
            raise wire.ProtocolError(f"the sender began file {n}, which was not requested")
        return offered

    def _whole(self, whole: wire.Whole, handles: "Handles") -> None:
        offer = self._take_begun(whole.n).offer
        if len(whole.content) != offer.size:
            raise wire.ProtocolError("the sender sent a file of another size than it had offered")
        try:
            self._arrivals.write(offer, whole, handles)
        except NotStored as error:
            self._report(self._progress.end, offer, _alone(error, offer))
            self._fail(whole.n, error)

    def _start(self, n: int, handles: "Handles") -> None:
        offered = self._take_begun(n)
        self._current = _Current(n, None)
        try:
            part = self._folder.begin(offered.offer, offered.prefix, handles)
        except NotStored as error:
            self._fail(n, error)
        else:
            self._current.part = part
            self._report(self._progress.begin, part.offer, part.size)

    def _data(self, piece: memoryview) -> None:
        current = self._current
        if current is None:
            raise wire.ProtocolError("the sender sent data outside a file")
        if current.part is None:
            return
        current.gather(piece)
        if current.part.size + current.gathered > current.part.offer.size:
            raise wire.ProtocolError("the sender sent more data than the file has")
        if current.gathered >= wire.CHUNK:
            self._write(current)

    def _write(self, current: _Current) -> None:
        pieces, count = current.pieces, current.gathered
        current.pieces, current.gathered = [], 0
        if current.part is None or not pieces:
            return
        try:
            current.part.write(pieces)
        except NotStored as error:
            self._give_up(current, current.part, error)
        else:
            self._report(self._progress.advance, current.part.offer, count)

    def _give_up(self, current: _Current, part: PartFile, error: NotStored) -> None:
        current.part = None
        part.close()
        self._report(self._progress.end, part.offer, _alone(error, part.offer))
        self._fail(current.n, error)

    def _end(self, end: wire.End, handles: "Handles") -> None:
        current = self._current
        if current is None or current.n != end.n:
            raise wire.ProtocolError("the sender ended a file that had not begun")
        self._write(current)
        if (part := current.part) is not None:
            try:
                self._arrivals.add(part.complete(end.sha256, self._folder.umask))
                self._large.add(end.n)
            except NotStored as error:
                self._give_up(current, part, error)
        self._current = None
        if self._arrivals.is_full:  # of open files, of which there are few
            self._arrivals.add_touched(handles.made)
            self._settle()

    def _drop(self, n: int) -> None:
        self._forget(n)
        current = self._current
        if current is None or current.n != n:
            return
        self._write(current)  # kept for the next attempt
        self._current = None
        if current.part is not None:
            self._report(self._progress.end, current.part.offer, "the sender cancelled it")
            current.part.close()


def _alone(error: NotStored, offer: wire.Offer) -> str:
    return reason_alone(str(error), offer.path)
