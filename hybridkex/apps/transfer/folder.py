"""The receiving folder: nothing appears in it under its name before it is complete and verified.

Incomplete files live in one hidden folder beside the others, so on the same file system, under a
name that is made from their path. A file that arrives again goes on there. When it is complete, its
bytes are on the disk first and its name appears second, in one step.

Paths are walked part by part, and a symbolic link is never followed: a link inside the folder leads
nobody out of it.

Everything here waits for the disk and is called in a thread.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hybridkex.apps.transfer.messages import Offer
from hybridkex.apps.transfer.names import PARTIAL, check_path, shown
from hybridkex.errors import ConfigError, HybridkexError

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["Folder", "NotTaken", "PartFile", "Present", "hash_prefix", "why"]

_READ: Final = 1 << 20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotTaken(HybridkexError):
    """A file that cannot or may not be stored; the text is for a person."""


def why(error: OSError, doing: str) -> str:
    """An error of the system, as a person would say it."""
    said = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file is larger than the limit for files here",
        errno.EACCES: "permission denied",
        errno.EPERM: "not permitted",
        errno.EROFS: "the file system is read-only",
        errno.ELOOP: "a symbolic link is in the way",
        errno.ENOTDIR: "something that is not a folder is in the way",
        errno.EISDIR: "a folder is in the way",
    }
    return f"cannot {doing}: {said.get(error.errno or 0, error.strerror or 'unknown error')}"


@dataclass(frozen=True, kw_only=True)
class Present:
    """What is there of an offered file."""

    size: int
    digest: "_Hash"
    """Of those bytes, ready to go on."""
    complete: bool
    stamp: tuple[int, ...] = ()
    """By which it is seen whether those bytes are still the same."""


NOTHING: Final = Present(size=0, digest=hashlib.sha256(), complete=False)


def hash_prefix(file: int, length: int) -> "_Hash":
    """SHA-256 of the first ``length`` bytes; of fewer where the file is shorter."""
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
    """A folder that takes files in.

    Raises ``ConfigError`` when it is made and cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.overwrite: Final = overwrite
        try:
            os.makedirs(path, exist_ok=True)
            self._root = os.open(path, _DIRECTORY & ~os.O_NOFOLLOW)
        except OSError as error:
            raise ConfigError(why(error, f"use the folder {os.fspath(path)}")) from None
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._root):
            os.close(self._root)
            raise ConfigError(f"no permission to write to the folder {os.fspath(path)}")
        self.umask: Final = os.umask(0o077)
        os.umask(self.umask)

    def close(self) -> None:
        """Done; an empty folder for incomplete files goes."""
        with contextlib.suppress(OSError):
            os.rmdir(PARTIAL, dir_fd=self._root)
        os.close(self._root)

    def look(self, offer: Offer) -> Present:
        """What is there of it. Reads as much of the disk as there is, to hash it.

        Raises:
            UnsafeName: the path.
            NotTaken: the name is taken, and not by this file or not to be replaced.
        """
        check_path(offer.path)
        with self._errors(offer.path):
            there = self._stat(offer.path)
            if there is not None and not stat.S_ISREG(there.st_mode):
                raise NotTaken(f"{shown(offer.path)}: something that is not a file is there")
            same_size = there is not None and there.st_size == offer.size
            if there is not None and not same_size and not self.overwrite:
                raise NotTaken(_taken(offer.path))
            part = self._hashed(_partial(offer.path), complete=False, size=offer.size)
            if part is not None and part.size and (self.overwrite or not same_size):
                return part  # Also where it is to replace a file of the same size.
            whole = same_size and self._hashed(offer.path, complete=True, size=offer.size)
            return whole or part or NOTHING

    def make(self, path: tuple[str, ...]) -> bool:
        """Make a folder. False: it was there.

        Raises as :meth:`look`.
        """
        check_path(path)
        with self._errors(path), self._parent(path, make=True) as parent:
            try:
                os.mkdir(path[-1], dir_fd=parent)
            except FileExistsError:
                os.close(os.open(path[-1], _DIRECTORY, dir_fd=parent))
                return False
        return True

    def begin(self, offer: Offer, present: Present, offset: int) -> "PartFile":
        """Open the incomplete file, to be written from ``offset`` on: 0, or what is there.

        Raises:
            NotTaken: no space, no permission, or another transfer has it.
        """
        if present.complete and not self.overwrite:
            raise NotTaken(_taken(offer.path))
        with self._errors(offer.path):
            with self._parent(_partial(offer.path), make=True, mode=0o700) as parent:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                file = os.open(_partial(offer.path)[-1], flags, 0o600, dir_fd=parent)
                try:
                    self._lock(file, parent, offer)
                    self._prepare(file, offer, present, offset)
                except BaseException:
                    os.close(file)
                    raise
            digest = present.digest.copy() if offset else hashlib.sha256()
            return PartFile(self, offer, file, digest, offset)

    def _lock(self, file: int, parent: int, offer: Offer) -> None:
        """Have the incomplete file for ourselves."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.stat(_partial(offer.path)[-1], dir_fd=parent).st_ino
        except BlockingIOError:
            raise NotTaken(f"{shown(offer.path)}: another transfer is writing it") from None
        except FileNotFoundError:
            ours = 0
        # Who had it before may have given it its final name between our opening and locking it.
        if os.fstat(file).st_ino != ours:
            raise NotTaken(f"{shown(offer.path)}: another transfer has just stored it")

    def _prepare(self, file: int, offer: Offer, present: Present, offset: int) -> None:
        # Another transfer of the same name may have written to it since it was hashed.
        if offset and _stamp(file) != present.stamp:
            raise NotTaken(f"{shown(offer.path)}: its beginning has changed meanwhile; try again")
        os.ftruncate(file, offset)
        disk = os.fstatvfs(file)
        free = disk.f_bavail * disk.f_frsize
        if offer.size - offset > free:
            raise NotTaken(
                f"{shown(offer.path)}: the disk is full: {offer.size - offset:,} bytes are still "
                f"to come and {free:,} are free"
            )

    def settle(self, part: "PartFile") -> None:
        """Give a complete file its name. Raises ``NotTaken``."""
        path = part.offer.path
        with (
            self._errors(path),
            self._parent(_partial(path)) as source,
            self._parent(path, make=True) as target,
        ):
            name = _partial(path)[-1]
            if self.overwrite:
                os.rename(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
            else:
                _rename_new(name, source, path, target)
            os.fsync(target)

    def _stat(self, path: tuple[str, ...]) -> os.stat_result | None:
        try:
            with self._parent(path) as parent:
                return os.stat(path[-1], dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _hashed(self, path: tuple[str, ...], *, complete: bool, size: int) -> Present | None:
        """A file of ours, if it is there and not longer than ``size``."""
        try:
            with self._parent(path) as parent:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                file = os.open(path[-1], flags, dir_fd=parent)
        except FileNotFoundError:
            return None
        try:
            stamp = _stamp(file)
            length = os.fstat(file).st_size
            if length > size:
                return None
            digest = hash_prefix(file, length)
            return Present(size=length, digest=digest, complete=complete, stamp=stamp)
        finally:
            os.close(file)

    @contextmanager
    def _parent(
        self, path: tuple[str, ...], *, make: bool = False, mode: int = 0o777
    ) -> Iterator[int]:
        """The folder that holds the last part, walked to without following a link."""
        here = os.dup(self._root)
        try:
            for part in path[:-1]:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, mode, dir_fd=here)
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
        except OSError as error:
            raise NotTaken(why(error, f"write {shown(path)}")) from None


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

    def write(self, pieces: list[memoryview]) -> None:
        """Append. Raises ``NotTaken``: the disk is full, and the like."""
        try:
            for piece in pieces:
                # At its place, wherever the digest of what was there has left the file's position.
                done = 0
                while done < len(piece):
                    done += os.pwrite(self._file, piece[done:], self.size + done)
                self._digest.update(piece)
                self.size += len(piece)
        except OSError as error:
            raise NotTaken(why(error, f"write {shown(self.offer.path)}")) from None

    def complete(self, sha256: str) -> None:
        """Verify, put it on the disk, give it its name. The file is closed in any case.

        Raises:
            NotTaken: the digest is another, or the name was taken meanwhile.
        """
        try:
            if self.size != self.offer.size or self._digest.hexdigest() != sha256:
                # What is there is worth nothing: the next try begins at the beginning.
                self._on_file(lambda file: os.ftruncate(file, 0))
                raise NotTaken(f"{shown(self.offer.path)}: what arrived is not what was sent")
            self._on_file(self._finish)
            self._folder.settle(self)
        finally:
            self.close()

    def _finish(self, file: int) -> None:
        mode = 0o777 if self.offer.executable else 0o666
        os.fchmod(file, mode & ~self._folder.umask)
        os.utime(file, ns=(self.offer.mtime_ns, self.offer.mtime_ns))
        os.fsync(file)

    def _on_file(self, act: Callable[[int], object]) -> None:
        try:
            act(self._file)
        except OSError as error:
            raise NotTaken(why(error, f"write {shown(self.offer.path)}")) from None

    def close(self) -> None:
        """Close it as it is; it stays for the next try."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _stamp(file: int) -> tuple[int, ...]:
    status = os.fstat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _partial(path: tuple[str, ...]) -> tuple[str, ...]:
    # A digest, since a name with something added may be too long.
    text = "/".join(path).encode("utf-8", "surrogateescape")
    return PARTIAL, hashlib.sha256(text).hexdigest()[:32]


def _taken(path: tuple[str, ...]) -> str:
    return f"{shown(path)}: is there already, with other content; 'receive --overwrite' replaces it"


def _rename_new(name: str, source: int, path: tuple[str, ...], target: int) -> None:
    """Rename, but never over a file: link(2) is the one step that refuses a taken name."""
    try:
        os.link(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
    except FileExistsError:
        raise NotTaken(_taken(path)) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        # A file system without hard links (FAT, some network shares): look, then rename. Whoever
        # makes the same name between the two loses its file.
        try:
            os.stat(path[-1], dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
            return
        raise NotTaken(_taken(path)) from None
    os.unlink(name, dir_fd=source)
