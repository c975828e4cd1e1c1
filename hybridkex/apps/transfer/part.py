"""Files without their final names, incomplete and complete.

A large file is written under a name that is derived from its path, and locked: a later transfer
resumes there, and two transfers of one file do not interfere. It is never readable by more users
than its source, not even while it is incomplete.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from hybridkex.apps.transfer.durable import start_flush
from hybridkex.apps.transfer.errors import NotStored, why
from hybridkex.apps.transfer.messages import Offer
from hybridkex.apps.transfer.names import PARTIAL, shown

if TYPE_CHECKING:
    from hashlib import _Hash

T = TypeVar("T")

OPEN_FILE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, in case a named pipe is there."""
_READ: Final = 1 << 20
_FLUSHED: Final = 8 << 20
"""Bytes after which writing to the disk is started."""
_OTHERS: Final = 0o077
_GRANULARITY: Final = 2 * 10**9
"""Nanoseconds: the coarsest timestamps of a file system in use (FAT)."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first bytes of an incomplete file, which the sender's digest has confirmed."""

    size: int
    digest: "_Hash"
    stamp: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class Ready:
    """A complete, verified file with its mode and date, which does not have its final name yet.

    Args:
        where: its path below the receiving folder.
        file: its descriptor, -1 once it is closed.
        inode: device and inode number, which reveal a replaced file.
        lost: the metadata that could not be kept, as text; empty if there is none.
        replaces: whether it has taken the place of a file under its name.
    """

    offer: Offer
    where: tuple[str, ...]
    file: int
    inode: tuple[int, int]
    lost: str
    replaces: bool = False

    def close(self) -> None:
        if self.file >= 0:
            close_file(self.file)
            self.file = -1


def close_file(file: int) -> None:
    """Close a file. An error of close(2) (FUSE, network shares) is a write error: a flush has
    reported it, or nobody relies on the file."""
    with contextlib.suppress(OSError):
        os.close(file)


def hash_prefix(file: int, length: int) -> "_Hash":
    """SHA-256 of the first ``length`` bytes, or of all bytes if the file is shorter."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ, max(length, 1))))
    position = 0
    while position < length:
        count = os.preadv(file, [buffer[: length - position]], position)
        if not count:
            break
        digest.update(buffer[:count])
        position += count
    return digest


def partial_path(path: tuple[str, ...]) -> tuple[str, ...]:
    # A digest, since a name with a suffix may be too long.
    text = "/".join(path).encode("utf-8", "surrogateescape")
    return PARTIAL, hashlib.sha256(text).hexdigest()[:32]


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """An identifier that changes when a file is changed or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_room(free: int | None, offer: Offer, there: int) -> None:
    """Raise ``NotStored`` if the disk lacks the space that is still needed.

    Args:
        free: bytes that are free; ``None`` if the file system does not count them.
        offer: the file.
        there: bytes of it that are stored.
    """
    if free is not None and offer.size - there > free:
        raise NotStored(
            f"{shown(offer.path)}: the disk is full: {offer.size - there:,} bytes are still "
            f"to come and {free:,} are free"
        )


def limit_mode(file: int, mode: int, offer: Offer) -> os.stat_result:
    """Set the permissions; returns the file's status.

    Raises:
        NotStored: others could read a file that is private at the sender: some file systems have
            one mode for all files.
    """
    status = os.fstat(file)
    if stat.S_IMODE(status.st_mode) != mode:
        with contextlib.suppress(OSError):  # FAT: EPERM; FUSE: ENOSYS. What counts is the result.
            os.fchmod(file, mode)
        status = os.fstat(file)
    wider = status.st_mode & _OTHERS & ~(offer.mode | mode)
    if wider:
        raise NotStored(
            f"{shown(offer.path)}: it is private (mode {offer.mode & 0o777:04o}), and the "
            "receiver's file system would let others read it"
        )
    return status


def set_date(file: int, mtime_ns: int) -> str:
    """Set the modification time of a file; returns what could not be kept, as text."""
    try:
        os.utime(file, ns=(mtime_ns, mtime_ns))
        kept = abs(os.fstat(file).st_mtime_ns - mtime_ns) < _GRANULARITY
    except (OverflowError, OSError):
        kept = False
    return "" if kept else "its date, which the disk cannot keep"


def open_part(parent: int, offer: Offer, prefix: Prefix | None) -> "PartFile":
    """Open the incomplete file in its folder, to append to its verified prefix.

    Raises:
        NotStored: another transfer has it, or something else is there.
        OSError: no space, no permission.
    """
    name = partial_path(offer.path)[-1]
    file = os.open(name, os.O_RDWR | os.O_CREAT | OPEN_FILE, 0o600, dir_fd=parent)
    try:
        _lock(file, name, parent, offer)
        _prepare(file, parent, offer, prefix)
    except BaseException:
        close_file(file)
        raise
    if prefix is None:
        return PartFile(offer, file, hashlib.sha256(), 0)
    return PartFile(offer, file, prefix.digest.copy(), prefix.size)


def _lock(file: int, name: str, parent: int, offer: Offer) -> None:
    """Lock the incomplete file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.stat(name, dir_fd=parent).st_ino
    except BlockingIOError:
        raise NotStored(f"{shown(offer.path)}: another transfer is writing it") from None
    except FileNotFoundError:
        ours = 0
    # The previous holder may have renamed it between our opening and locking it.
    if os.fstat(file).st_ino != ours:
        raise NotStored(f"{shown(offer.path)}: another transfer has just stored it")


def _prepare(file: int, parent: int, offer: Offer, prefix: Prefix | None) -> None:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise NotStored(
            f"{shown(offer.path)}: something that is not a file has the name of the incomplete file"
        )
    # Another transfer of the same name may have written to it since the comparison.
    if prefix is not None and stamp(status) != prefix.stamp:
        raise NotStored(f"{shown(offer.path)}: another transfer has changed it; send it again")
    if status.st_nlink > 1 or status.st_uid != os.fstat(parent).st_uid:
        raise NotStored(
            f"{shown(offer.path)}: the incomplete file {'/'.join(partial_path(offer.path))} at the "
            "receiver is another user's, or has a second name; remove it"
        )
    limit_mode(file, 0o600, offer)
    offset = prefix.size if prefix is not None else 0
    if status.st_size != offset:
        os.ftruncate(file, offset)


class PartFile:
    def __init__(self, offer: Offer, file: int, digest: "_Hash", offset: int) -> None:
        self.offer: Final = offer
        self.size = offset
        self._file = file
        self._digest = digest
        self._flushing = offset
        """The number of bytes that the disk has begun to write."""

    def write(self, pieces: Sequence[memoryview | bytearray]) -> None:
        """Append data. Raises ``NotStored``: the data cannot be written."""
        self._on_file(lambda file: self._append(file, pieces))

    def _append(self, file: int, pieces: Sequence[memoryview | bytearray]) -> None:
        for given in pieces:
            piece = memoryview(given)
            # At its offset: computing the digest has moved the file's position.
            done = 0
            while done < len(piece):
                done += os.pwrite(file, piece[done:], self.size + done)
            self._digest.update(piece)
            self.size += len(piece)
        if self.size - self._flushing >= _FLUSHED:
            start_flush(file, self._flushing, self.size - self._flushing)
            self._flushing = self.size

    def complete(self, sha256: str, umask: int) -> Ready:
        """Verify the file, and set its mode and date. It stays open, and locked, in any case.

        Raises:
            NotStored: the digest differs, or the disk failed.
        """
        if self.size != self.offer.size or self._digest.hexdigest() != sha256:
            # Nothing of it is usable: the next attempt starts from zero.
            self._on_file(lambda file: os.ftruncate(file, 0))
            raise NotStored(
                f"{shown(self.offer.path)}: the received data differ from what was sent"
            )
        return self._on_file(lambda file: self._finish(file, umask))

    def _finish(self, file: int, umask: int) -> Ready:
        status = limit_mode(file, self.offer.mode & 0o777 & ~umask, self.offer)
        ready = Ready(
            offer=self.offer,
            where=partial_path(self.offer.path),
            file=file,
            inode=(status.st_dev, status.st_ino),
            lost=set_date(file, self.offer.mtime_ns),
        )
        self._file = -1
        return ready

    def _on_file(self, act: Callable[[int], T]) -> T:
        try:
            return act(self._file)
        except OSError as error:
            raise NotStored(f"{shown(self.offer.path)}: {why(error, 'write it')}") from None

    def close(self) -> None:
        """Close the incomplete file, which is kept for the next attempt."""
        if self._file >= 0:
            close_file(self._file)
            self._file = -1
