"""The receiving folder: its content, and the place of an arriving file.

A file appears under its name once it is complete, verified and on disk
(:mod:`~hybridkex.apps.transfer.arrivals`). Until then it is in one hidden folder on the same file
system.

Permissions: a file gets the lower nine bits of the offered mode, minus our umask. It is never
    readable by more users than its source, not even while incomplete; set-user-ID, set-group-ID and
    sticky bits are dropped. A new folder gets its bits in the same way, and its owner may always
    enter and change it.

All calls block on the disk; call them in a thread.
"""

import contextlib
import errno
import fcntl
import hmac
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from hybridkex.apps.transfer.durable import drop_cached, flush, flush_all
from hybridkex.apps.transfer.errors import NotStored, why
from hybridkex.apps.transfer.handles import FolderGone, Handles, open_folder
from hybridkex.apps.transfer.messages import WHOLE, Offer
from hybridkex.apps.transfer.names import PARTIAL, WORK, check_path, shown
from hybridkex.apps.transfer.part import (
    OPEN_FILE,
    PartFile,
    Prefix,
    check_room,
    hash_prefix,
    open_part,
    partial_path,
    stamp,
)
from hybridkex.errors import ConfigError
from hybridkex.net.descriptors import share

if TYPE_CHECKING:
    from hashlib import _Hash

_OPEN_FILES: Final = 2048
"""The maximum number of complete large files, of all connections together, that wait open for their
names."""


@dataclass(frozen=True, kw_only=True)
class Present:
    """The part of an offered file that is present: its bytes, under its name or incomplete."""

    size: int
    complete: bool
    unchanged: bool = False
    """Whether it has the size and the date of the offered file, which counts as unchanged."""
    stamp: tuple[int, ...] = ()
    """Identifies the file, to detect changes."""


NOTHING: Final = Present(size=0, complete=False)


def not_stored(error: OSError | FolderGone, path: tuple[str, ...]) -> NotStored:
    """An error of the operating system as the reason why a file is not stored."""
    if isinstance(error, FolderGone):
        return NotStored(
            f"{shown(path)}: the receiver's folder was removed or moved; it is used again once "
            "it is back"
        )
    return NotStored(f"{shown(path)}: {why(error, 'write it')}")


@contextmanager
def errors_of(path: tuple[str, ...]) -> Iterator[None]:
    """Turn errors of the operating system into ``NotStored`` with the path."""
    try:
        yield
    except (OSError, FolderGone) as error:
        raise not_stored(error, path) from None


def taken(path: tuple[str, ...]) -> str:
    """The message for a name that must not be replaced."""
    return f"{shown(path)}: exists already, with other content; 'receive --overwrite' replaces it"


class UnsettledNames:
    """Names of files and folders, of all connections, that may not be on disk yet.

    An entry with such a name does not count as stored: its group may still fail and remove the
    file. In that case the name stays here until another group has stored something under it.
    """

    def __init__(self) -> None:
        self.lock: Final = threading.Lock()
        """Held while a name is given or removed."""
        self._groups: dict[tuple[str, ...], object] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, path: tuple[str, ...]) -> bool:
        return path in self._groups

    def give(self, group: object, path: tuple[str, ...], rename: Callable[[], bool | None]) -> bool:
        """Rename a file to its final name, on behalf of a group. ``rename`` returns False, or
        raises, if it did not rename the file.

        Returns whether it was renamed.
        """
        with self.lock:
            before = self._groups.get(path)
            self._groups[path] = group
            given = False
            try:
                given = rename() is not False
            finally:
                if not given and before is not None:
                    self._groups[path] = before
                elif not given:
                    del self._groups[path]
        return given

    def take_over(self, group: object, path: tuple[str, ...]) -> bool:
        """Let this group settle a name, too. Returns False if the name is on disk."""
        with self.lock:
            if path not in self._groups:
                return False
            self._groups[path] = group
            return True

    def settle(self, group: object, paths: Iterable[tuple[str, ...]]) -> None:
        """Forget these names, which are on disk, unless another group has taken them over."""
        with self.lock:
            for path in paths:
                if self._groups.get(path) is group:
                    del self._groups[path]


class Folder:
    """A folder that receives files.

    The constructor raises ``ConfigError`` if the folder cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.overwrite: Final = overwrite
        self.names: Final = UnsettledNames()
        self.open_files: Final = threading.Semaphore(share(_OPEN_FILES))
        self._path = os.path.abspath(path)
        try:
            os.makedirs(path, exist_ok=True)
            with self.open() as handles, contextlib.suppress(FileNotFoundError):
                handles.get(())
                _flush_named(handles.get((PARTIAL,)), path)
        except (OSError, FolderGone) as error:
            reason = error if isinstance(error, OSError) else FileNotFoundError(errno.ENOENT, "")
            raise ConfigError(why(reason, f"use the folder {os.fspath(path)}")) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"no permission to write to the folder {os.fspath(path)}")
        self.umask: Final = os.umask(0o077)
        os.umask(self.umask)
        self._remove_abandoned()

    def open(self) -> Handles:
        """Open the folder and return the handles of it and of those below it."""
        return Handles(self._path)

    def close(self) -> None:
        """Remove files that faults left without a final name, and their folder if it is empty and
        all names are on disk."""
        self._remove_abandoned()
        with contextlib.suppress(OSError, FolderGone), self.open() as handles:
            if len(self.names):
                flush_all(handles.get((PARTIAL,)))
            os.rmdir(PARTIAL, dir_fd=handles.get(()))

    def _remove_abandoned(self) -> None:
        """Remove what a killed receiver, or a fault, has left: small files without a final name,
        empty incomplete files, and second names of stored files."""
        with contextlib.suppress(OSError, FolderGone), self.open() as handles:
            parent = handles.get((PARTIAL,))
            for name in os.listdir(parent):
                remove = _remove_unlocked if name.startswith(WORK) else _remove_needless
                with contextlib.suppress(OSError):
                    remove(name, parent)

    def look(self, offer: Offer, handles: Handles) -> Present:
        """Report which part of a file is present.

        Raises:
            UnsafeName: the path is not allowed.
            NotStored: the name is taken by something else, or may not be replaced.
        """
        path = offer.path
        check_path(path)
        with errors_of(path):
            there = _status(path, handles)
            if there is not None:
                if not stat.S_ISREG(there.st_mode):
                    raise NotStored(f"{shown(path)}: something that is not a file has this name")
                if path in self.names:
                    there = None
                elif there.st_size != offer.size:
                    if not self.overwrite:
                        raise NotStored(taken(path))
                    there = None
                elif there.st_mtime_ns == offer.mtime_ns and not offer.checksum:
                    return Present(size=there.st_size, complete=True, unchanged=True)
            part = self._part(offer, handles)
            if part is not None and (self.overwrite or there is None):
                # Even if it is to replace a file of the same size.
                check_room(handles.free(), offer, part.size)
                return part
            if there is not None:
                return Present(size=there.st_size, complete=True, stamp=stamp(there))
            check_room(handles.free(), offer, 0)
            return NOTHING

    def _part(self, offer: Offer, handles: Handles) -> Present | None:
        """The usable incomplete file; files that travel whole have none."""
        if offer.size <= WHOLE:
            return None
        part = _status(partial_path(offer.path), handles)
        if part is None or not stat.S_ISREG(part.st_mode):
            return None
        if not 0 < part.st_size <= offer.size:
            return None
        return Present(size=part.st_size, complete=False, stamp=stamp(part))

    def hash(self, offer: Offer, present: Present, handles: Handles) -> "_Hash | None":
        """The digest of what is present; ``None`` if it is no longer what :meth:`look` found.

        Raises ``NotStored``: it cannot be read.
        """
        path = offer.path if present.complete else partial_path(offer.path)
        with errors_of(offer.path):
            try:
                parent = handles.get(path[:-1])
                file = os.open(path[-1], os.O_RDONLY | OPEN_FILE, dir_fd=parent)
            except FileNotFoundError:
                return None
            try:
                if stamp(os.fstat(file)) != present.stamp:
                    return None
                if not present.complete:
                    drop_cached(file)
                return hash_prefix(file, present.size)
            finally:
                os.close(file)

    def compare(
        self, offer: Offer, present: Present, digest: "_Hash | None", sha256: str
    ) -> Prefix | None:
        """Compare the digest of what is present with that of the same number of bytes at the
        sender. Returns ``None`` if it differs.

        Raises ``NotStored``: a complete file that differs and is not to be replaced.
        """
        if digest is not None and hmac.compare_digest(
            digest.hexdigest().encode(), sha256.encode("utf-8", "surrogatepass")
        ):
            return Prefix(size=present.size, digest=digest, stamp=present.stamp)
        if present.complete and not self.overwrite:
            raise NotStored(taken(offer.path))
        return None

    def make(self, offer: Offer, handles: Handles, group: object) -> bool:
        """Create a folder, for a group. False: it existed, and is unchanged. One that may not be on
        disk counts as new.

        Raises as :meth:`look`.
        """
        path = offer.path
        check_path(path)
        with errors_of(path):
            # Its presence tells the next receiver if this one is killed.
            handles.get((PARTIAL,), make=True)
            parent = handles.get(path[:-1], make=True)
            mode = offer.mode & 0o777 | stat.S_IRWXU
            try:
                self.names.give(group, path, partial(os.mkdir, path[-1], mode, dir_fd=parent))
            except FileExistsError:
                handles.get(path)
                if not self.names.take_over(group, path):
                    return False
            # A flush of the whole file system (Arrivals.settle) does not reach one mounted below.
            if os.fstat(parent).st_dev != os.fstat(handles.get(())).st_dev:
                flush(parent)
        return True

    def begin(self, offer: Offer, prefix: Prefix | None, handles: Handles) -> PartFile:
        """Open the incomplete file, to append to its verified prefix.

        Raises:
            NotStored: no space, no permission, or another transfer has it.
        """
        with errors_of(offer.path):
            parent = handles.get((PARTIAL,), make=True)
            part = open_part(parent, offer, prefix)
            try:
                check_room(handles.free(), offer, part.size)
            except BaseException:
                part.close()
                raise
            return part


def _status(path: tuple[str, ...], handles: Handles) -> os.stat_result | None:
    try:
        return os.stat(path[-1], dir_fd=handles.get(path[:-1]), follow_symlinks=False)
    except FileNotFoundError:
        return None


def _flush_named(partial: int, path: str | os.PathLike[str]) -> None:
    """Flush names that a killed receiver may have given: the folder for incomplete files, which an
    orderly shutdown removes, is still there. Raises ``ConfigError``: the disk failed, which the
    kernel reports once."""
    try:
        flush_all(partial)
    except OSError as error:
        raise ConfigError(
            f"{why(error, f'use the folder {os.fspath(path)}')}; files that an earlier receiver "
            "stored just before it was killed may be lost: see the kernel's log (dmesg), and start "
            "again"
        ) from None


def _remove_needless(name: str, parent: int) -> None:
    """Remove an incomplete file that is empty or has its final name already. Raises ``OSError``."""
    file = os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=parent)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and (not status.st_size or status.st_nlink > 1):
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(file)


def _remove_unlocked(name: str, parent: int) -> None:
    """Remove a folder with files that no process has locked. Raises ``OSError``."""
    folder = open_folder(name, parent)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in os.listdir(folder):
            os.unlink(file, dir_fd=folder)
        os.rmdir(name, dir_fd=parent)
    finally:
        os.close(folder)
