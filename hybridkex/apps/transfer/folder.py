"""The receiving folder: a file appears under its name once it is complete and verified.

Incomplete files are in one hidden folder on the same file system, under a name derived from their
path; a repeated transfer resumes there. A complete file is first flushed to disk and then renamed
atomically.

Paths are opened component by component, and symbolic links are never followed: a link inside the
folder cannot lead out of it.

Permissions: a file gets the lower nine bits of the offered mode, minus our umask. It is never
    readable by more users than its source, not even while incomplete; set-user-ID, set-group-ID and
    sticky bits are dropped. A new folder gets its bits in the same way, and its owner may always
    enter and change it.

All calls block on the disk; call them in a thread.
"""

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar
from unicodedata import normalize

from hybridkex.apps.transfer.errors import NotStored, why
from hybridkex.apps.transfer.messages import Offer
from hybridkex.apps.transfer.names import PARTIAL, check_path, shown
from hybridkex.errors import ConfigError

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["NOTHING", "Folder", "PartFile", "Prefix", "Present", "hash_prefix"]

T = TypeVar("T")

_READ: Final = 1 << 20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, in case a named pipe is there."""
_OTHERS: Final = 0o077
_LACKING: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
"""What file systems answer to fsync(2) that do not have it, above all for folders: FUSE, shares."""
_GRANULARITY: Final = 2 * 10**9
"""Nanoseconds: the coarsest timestamps of a file system in use (FAT)."""


@dataclass(frozen=True, kw_only=True)
class Present:
    """The part of an offered file that is present: its bytes, under its name or incomplete."""

    size: int
    complete: bool
    stamp: tuple[int, ...] = ()
    """Identifies the file, to detect changes."""


NOTHING: Final = Present(size=0, complete=False)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first bytes of an incomplete file, which the sender's digest has confirmed."""

    size: int
    digest: "_Hash"
    stamp: tuple[int, ...]


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


class Folder:
    """A folder that receives files.

    The constructor raises ``ConfigError`` if the folder cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.overwrite: Final = overwrite
        self._path = os.path.abspath(path)
        try:
            os.makedirs(path, exist_ok=True)
            os.close(self._open())
        except OSError as error:
            raise ConfigError(why(error, f"use the folder {os.fspath(path)}")) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"no permission to write to the folder {os.fspath(path)}")
        self.umask: Final = os.umask(0o077)
        os.umask(self.umask)

    def close(self) -> None:
        """Remove the folder for incomplete files if it is empty."""
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(self._path, PARTIAL))

    def _open(self) -> int:
        """Open the folder anew: others may have moved it, or mounted another disk there."""
        return os.open(self._path, _DIRECTORY & ~os.O_NOFOLLOW)

    def look(self, offer: Offer) -> Present:
        """Report which part of a file is present.

        Raises:
            UnsafeName: the path is not allowed.
            NotStored: the name is taken by something else, or may not be replaced.
        """
        check_path(offer.path)
        with self._errors(offer.path):
            there = self._stat(offer.path)
            if there is not None and not stat.S_ISREG(there.st_mode):
                raise NotStored(f"{shown(offer.path)}: something that is not a file is there")
            same_size = there is not None and there.st_size == offer.size
            if there is not None and not same_size and not self.overwrite:
                raise NotStored(_taken(offer.path))
            part = self._stat(_partial(offer.path))
            usable = part is not None and stat.S_ISREG(part.st_mode) and part.st_size <= offer.size
            if part is not None and usable and part.st_size and (self.overwrite or not same_size):
                # Even if it is to replace a file of the same size.
                self._check_room(offer, part.st_size)
                return Present(size=part.st_size, complete=False, stamp=_stamp(part))
            if there is not None and same_size:
                return Present(size=there.st_size, complete=True, stamp=_stamp(there))
            self._check_room(offer, 0)
            return NOTHING

    def _check_room(self, offer: Offer, there: int) -> None:
        with self._parent(offer.path[:1]) as root:
            _check_room(root, offer, there)

    def compare(self, offer: Offer, present: Present, sha256: str) -> Prefix | None:
        """Compare what is present with the digest of the same number of bytes at the sender.

        Returns ``None`` if it differs, or is no longer what :meth:`look` found.

        Raises ``NotStored``: a complete file that differs and is not to be replaced, or that
        cannot be read.
        """
        path = offer.path if present.complete else _partial(offer.path)
        with self._errors(offer.path):
            digest = self._hashed(path, present)
        if digest is not None and hmac.compare_digest(
            digest.hexdigest().encode(), sha256.encode("utf-8", "surrogatepass")
        ):
            return Prefix(size=present.size, digest=digest, stamp=present.stamp)
        if present.complete and not self.overwrite:
            raise NotStored(_taken(offer.path))
        return None

    def make(self, offer: Offer) -> bool:
        """Create a folder. False: it existed, and is unchanged.

        Raises as :meth:`look`.
        """
        path = offer.path
        check_path(path)
        with self._errors(path), self._parent(path, make=True) as parent:
            try:
                os.mkdir(path[-1], offer.mode & 0o777 | stat.S_IRWXU, dir_fd=parent)
            except FileExistsError:
                os.close(os.open(path[-1], _DIRECTORY, dir_fd=parent))
                return False
        return True

    def begin(self, offer: Offer, prefix: Prefix | None = None) -> "PartFile":
        """Open the incomplete file, to append to its verified prefix.

        Raises:
            NotStored: no space, no permission, or another transfer has it.
        """
        with self._errors(offer.path):
            with self._parent(_partial(offer.path), make=True) as parent:
                flags = os.O_RDWR | os.O_CREAT | _FILE
                file = os.open(_partial(offer.path)[-1], flags, 0o600, dir_fd=parent)
                try:
                    self._lock(file, parent, offer)
                    self._prepare(file, offer, prefix)
                except BaseException:
                    os.close(file)
                    raise
            if prefix is None:
                return PartFile(self, offer, file, hashlib.sha256(), 0)
            return PartFile(self, offer, file, prefix.digest.copy(), prefix.size)

    def _lock(self, file: int, parent: int, offer: Offer) -> None:
        """Lock the incomplete file."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.stat(_partial(offer.path)[-1], dir_fd=parent).st_ino
        except BlockingIOError:
            raise NotStored(f"{shown(offer.path)}: another transfer is writing it") from None
        except FileNotFoundError:
            ours = 0
        # The previous holder may have renamed it between our opening and locking it.
        if os.fstat(file).st_ino != ours:
            raise NotStored(f"{shown(offer.path)}: another transfer has just stored it")

    def _prepare(self, file: int, offer: Offer, prefix: Prefix | None) -> None:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise NotStored(f"{shown(offer.path)}: something that is not a file is in the way")
        # Another transfer of the same name may have written to it since the comparison.
        if prefix is not None and _stamp(status) != prefix.stamp:
            raise NotStored(f"{shown(offer.path)}: another transfer has changed it; send it again")
        _limit_mode(file, 0o600, offer)
        offset = prefix.size if prefix is not None else 0
        if status.st_size != offset:
            os.ftruncate(file, offset)
        _check_room(file, offer, offset)

    def settle(self, part: "PartFile") -> None:
        """Give a complete file its name. Raises ``NotStored``."""
        path = part.offer.path
        with self._errors(path):
            self._check_in_place(part)
        with (
            self._errors(path),
            self._parent(_partial(path)) as source,
            self._parent(path, make=True) as target,
        ):
            name = _partial(path)[-1]
            if self.overwrite:
                _refuse_alias(path, target)
                os.rename(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
            else:
                _rename_new(name, source, path, target)
            _flush(target)

    def _check_in_place(self, part: "PartFile") -> None:
        """Raise ``NotStored`` unless the incomplete file still has its name.

        A name is what gets moved: it must be that of the file that was verified, not of one that
        somebody else, such as a second transfer, has put in its place.
        """
        found = self._stat(_partial(part.offer.path))
        if found is None or not part.is_file(found):
            raise NotStored(
                f"{shown(part.offer.path)}: the receiver's incomplete file was removed or replaced "
                "while it arrived; send it again"
            )

    def _stat(self, path: tuple[str, ...]) -> os.stat_result | None:
        try:
            with self._parent(path) as parent:
                return os.stat(path[-1], dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _hashed(self, path: tuple[str, ...], present: Present) -> "_Hash | None":
        try:
            with self._parent(path) as parent:
                file = os.open(path[-1], os.O_RDONLY | _FILE, dir_fd=parent)
        except FileNotFoundError:
            return None
        try:
            if _stamp(os.fstat(file)) != present.stamp:
                return None
            return hash_prefix(file, present.size)
        finally:
            os.close(file)

    @contextmanager
    def _parent(self, path: tuple[str, ...], *, make: bool = False) -> Iterator[int]:
        """Open the folder that holds the last component, without following a link.

        ``make``: create folders that were not offered, private to our user.
        """
        try:
            here = self._open()
        except FileNotFoundError:
            raise _FolderGone from None
        try:
            for part in path[:-1]:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, stat.S_IRWXU, dir_fd=here)
                below = os.open(part, _DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)

    @contextmanager
    def _errors(self, path: tuple[str, ...]) -> Iterator[None]:
        try:
            yield
        except _FolderGone:
            raise NotStored(
                f"{shown(path)}: the receiver's folder was removed or moved; it is used again once "
                "it is back"
            ) from None
        except OSError as error:
            raise NotStored(f"{shown(path)}: {why(error, 'write it')}") from None


class _FolderGone(Exception):
    """The receiving folder is not there; :meth:`Folder._errors` adds the offered path."""


class PartFile:
    """An incomplete file that is being written."""

    def __init__(
        self, folder: Folder, offer: Offer, file: int, digest: "_Hash", offset: int
    ) -> None:
        self.offer: Final = offer
        self.size = offset
        self._folder = folder
        self._file = file
        self._digest = digest

    def write(self, pieces: Sequence[memoryview | bytearray]) -> None:
        """Append. Raises ``NotStored``: the disk is full, and the like."""
        try:
            for given in pieces:
                piece = memoryview(given)
                # At its offset: computing the digest has moved the file's position.
                done = 0
                while done < len(piece):
                    done += os.pwrite(self._file, piece[done:], self.size + done)
                self._digest.update(piece)
                self.size += len(piece)
        except OSError as error:
            raise NotStored(f"{shown(self.offer.path)}: {why(error, 'write it')}") from None

    def is_file(self, status: os.stat_result) -> bool:
        """Whether this is the status of the file that is being written."""
        return os.path.samestat(os.fstat(self._file), status)

    def complete(self, sha256: str) -> str:
        """Verify the file, flush it to disk, rename it. It is closed in any case.

        Returns the metadata that could not be kept, as text; empty if there is none.

        Raises:
            NotStored: the digest differs, or the name was taken meanwhile.
        """
        try:
            if self.size != self.offer.size or self._digest.hexdigest() != sha256:
                # Nothing of it is usable: the next attempt starts from zero.
                self._on_file(lambda file: os.ftruncate(file, 0))
                raise NotStored(
                    f"{shown(self.offer.path)}: the received data differ from what was sent"
                )
            lost = self._on_file(self._finish)
            self._folder.settle(self)
        finally:
            self.close()
        return lost

    def _finish(self, file: int) -> str:
        _limit_mode(file, self.offer.mode & 0o777 & ~self._folder.umask, self.offer)
        lost = "" if _date(file, self.offer.mtime_ns) else "its date, which the disk cannot keep"
        _flush(file)
        return lost

    def _on_file(self, act: Callable[[int], T]) -> T:
        try:
            return act(self._file)
        except OSError as error:
            raise NotStored(f"{shown(self.offer.path)}: {why(error, 'write it')}") from None

    def close(self) -> None:
        """Close it incomplete; it is kept for the next attempt."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_room(file: int, offer: Offer, there: int) -> None:
    """Raise ``NotStored`` if the disk lacks the space that is still needed."""
    disk = os.fstatvfs(file)
    if not disk.f_blocks:
        return  # A FUSE file system that does not count its blocks.
    free = disk.f_bavail * disk.f_frsize
    if offer.size - there > free:
        raise NotStored(
            f"{shown(offer.path)}: the disk is full: {offer.size - there:,} bytes are still "
            f"to come and {free:,} are free"
        )


def _limit_mode(file: int, mode: int, offer: Offer) -> None:
    """Set the permissions. Raises ``NotStored`` if others could read a file that is private at the
    sender: some file systems have one mode for all files."""
    with contextlib.suppress(OSError):  # FAT: EPERM; FUSE: ENOSYS. What counts is the result.
        os.fchmod(file, mode)
    wider = os.fstat(file).st_mode & _OTHERS & ~(offer.mode | mode)
    if wider:
        raise NotStored(
            f"{shown(offer.path)}: it is private (mode {offer.mode & 0o777:04o}), and the "
            "receiver's file system would let others read it"
        )


def _flush(file: int) -> None:
    """Flush a file or a folder to disk, if the file system can."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _LACKING:
            raise


def _date(file: int, mtime_ns: int) -> bool:
    """Set the modification time of a file; returns whether it was kept."""
    try:
        os.utime(file, ns=(mtime_ns, mtime_ns))
    except (OverflowError, OSError):
        return False
    return abs(os.fstat(file).st_mtime_ns - mtime_ns) < _GRANULARITY


def _refuse_alias(path: tuple[str, ...], folder: int) -> None:
    """Raise ``NotStored`` if the file system treats this name as that of another file.

    File systems that ignore case or Unicode normalisation do so: the file to be replaced could be
    another one of this transfer.
    """
    name = path[-1]
    there = _inode(name, folder)
    if there is None:
        return
    variants = {name.swapcase(), name.lower(), name.upper(), name.rstrip(". ")}
    variants |= {normalize(form, name) for form in ("NFC", "NFD")}
    # The list may be long, so it is read only on such a file system.
    folds = any(_inode(one, folder) == there for one in variants - {name, ""})
    if folds and name not in os.listdir(folder):
        raise NotStored(
            f"{shown(path)}: the receiver's file system treats this name as that of another file"
        )


def _inode(name: str, folder: int) -> tuple[int, int] | None:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except (OSError, UnicodeError):
        return None
    return status.st_dev, status.st_ino


def _partial(path: tuple[str, ...]) -> tuple[str, ...]:
    # A digest, since a name with a suffix may be too long.
    text = "/".join(path).encode("utf-8", "surrogateescape")
    return PARTIAL, hashlib.sha256(text).hexdigest()[:32]


def _taken(path: tuple[str, ...]) -> str:
    return f"{shown(path)}: exists already, with other content; 'receive --overwrite' replaces it"


def _rename_new(name: str, source: int, path: tuple[str, ...], target: int) -> None:
    """Rename without replacing a file: link(2) refuses an existing name atomically."""
    try:
        os.link(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
    except FileExistsError:
        raise NotStored(_taken(path)) from None
    except OSError:
        # A file system without hard links (FAT, FUSE, some network shares), whatever it calls that:
        # check, then rename, which fails for every other reason too. A file created under the name
        # in between is replaced.
        try:
            os.stat(path[-1], dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
            return
        raise NotStored(_taken(path)) from None
    os.unlink(name, dir_fd=source)
