"""The folders below the receiving folder, open while one batch of messages is handled.

Paths are opened component by component, and symbolic links are never followed: a link inside the
folder cannot lead out of it. Each folder is opened once in a batch, as long as few are open, and
none stays open longer: others may move the receiving folder, or mount another disk there.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from hybridkex.apps.transfer.names import PARTIAL

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS: Final = 0o077
_MOST: Final = 8
"""Handles to keep from one item of a batch to the next."""

T = TypeVar("T")


class FolderGone(Exception):
    """The receiving folder does not exist, or has been replaced."""


def open_folder(path: str, parent: int) -> int:
    """Open a folder in another one; a link is refused. Raises ``OSError``."""
    return os.open(path, FOLDER, dir_fd=parent)


def _check_ours(folder: int) -> None:
    """Make sure that no other user can change what is in a folder.

    Where the receiving folder is shared, another user could have made it, with files to write into.

    Raises:
        OSError: it belongs to another user.
    """
    status = os.fstat(folder)
    if status.st_uid == os.geteuid():
        if status.st_mode & _OTHERS:
            with contextlib.suppress(OSError):  # FAT has one mode for all
                os.fchmod(folder, stat.S_IRWXU)
    elif status.st_uid != _owner_of_new(folder):
        raise OSError(
            0,
            f"{PARTIAL} in the receiver's folder belongs to another user (uid {status.st_uid}), "
            "who could read what arrives; remove it",
        )


def _owner_of_new(folder: int) -> int:
    """The owner of new files in a folder. It is another user on some network shares, and where the
    owner is an option of mount(8)."""
    name = f".{secrets.token_hex(8)}"
    os.mkdir(name, stat.S_IRWXU, dir_fd=folder)
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=folder)


class Handles:
    """Open folders, by their paths below the receiving folder. A context manager."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._open: dict[tuple[str, ...], int] = {}
        self._free: int | None = -1
        self.made: list[tuple[str, ...]] = []
        """Paths of the folders that were created, and of their parents."""

    def __enter__(self) -> "Handles":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a batch, one by one. Between two of them, handles are closed if many are
        open: a handle is valid until the next item, and never closed before."""
        for item in items:
            yield item
            if len(self._open) > _MOST:
                self._close()

    def get(self, path: tuple[str, ...], *, make: bool = False) -> int:
        """Return the handle of a folder, valid until the next item of :meth:`each`. Do not close
        it.

        Args:
            path: of the folder; empty for the receiving folder.
            make: create folders that were not offered, private to our user.

        Raises:
            FolderGone: the receiving folder does not exist.
            FileNotFoundError: a folder does not exist.
            OSError: a part of the path is a link or not a folder, or access is denied; the folder
            for incomplete files belongs to another user.
        """
        found = self._open.get(path)
        if found is not None:
            return found
        here = self._root_handle()
        for depth in range(1, len(path) + 1):
            below = self._open.get(path[:depth])
            if below is None:
                below = self._below(path[:depth], here, make=make)
                self._open[path[:depth]] = below
                if path[:depth] == (PARTIAL,):
                    _check_ours(below)
            here = below
        return here

    def free(self) -> int | None:
        """Bytes that were free when this was first asked; ``None`` if the file system does not
        count them, as some of FUSE do not."""
        if self._free == -1:
            disk = os.fstatvfs(self.get(()))
            self._free = disk.f_bavail * disk.f_frsize if disk.f_blocks else None
        return self._free

    def check_root(self) -> None:
        """Raise ``FolderGone`` unless the receiving folder still has its name."""
        try:
            same = os.path.samestat(os.stat(self._root), os.fstat(self._root_handle()))
        except FileNotFoundError:
            same = False
        if not same:
            raise FolderGone

    def _root_handle(self) -> int:
        found = self._open.get(())
        if found is None:
            try:
                found = os.open(self._root, FOLDER & ~os.O_NOFOLLOW)
            except FileNotFoundError:
                raise FolderGone from None
            self._open[()] = found
        return found

    def _below(self, path: tuple[str, ...], here: int, *, make: bool) -> int:
        try:
            return open_folder(path[-1], here)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(path[-1], stat.S_IRWXU, dir_fd=here)
        if path[0] != PARTIAL:  # which need not be on disk
            self.made += path[:-1], path
        return open_folder(path[-1], here)
