"""Storing complete files: a group of files is flushed, then named, then flushed again.

A file is renamed to its final name once its data are on disk, and is reported as stored once that
name is on disk, too. Both flushes are shared by a group of files
(:mod:`~hybridkex.apps.transfer.durable`). Small files wait in a folder that belongs to this group
alone and is locked, so that what a killed process leaves there can be removed.
"""

import contextlib
import fcntl
import os
import secrets
import stat
import time
from functools import partial
from hashlib import sha256
from typing import Final, NamedTuple
from unicodedata import normalize

from hybridkex.apps.transfer.durable import flush, flush_all, has_flush_all, is_fat
from hybridkex.apps.transfer.errors import NotStored
from hybridkex.apps.transfer.folder import Folder, errors_of, not_stored, taken
from hybridkex.apps.transfer.handles import FolderGone, Handles
from hybridkex.apps.transfer.messages import How, Offer, Whole
from hybridkex.apps.transfer.names import PARTIAL, WORK, shown
from hybridkex.apps.transfer.part import OPEN_FILE, Ready, close_file, limit_mode, set_date

_FEW: Final = 8
"""Up to so many files or folders are flushed individually: a flush of the whole file system also
waits for what other programs have written."""
_MOST: Final = 1024
"""The maximum number of files and folders in a group."""
_MOST_OPEN: Final = 32
"""The maximum number of large files in a group. They stay open and locked until they are renamed;
there are fewer where the process lacks descriptors."""
_LONGEST: Final = 0.5
"""The maximum time in seconds that a file waits for others."""
_TRIES: Final = 3
_PIECE: Final = 1 << 20
"""Bytes to compare at once."""


class Settled(NamedTuple):
    """The outcome of an offer.

    Args:
        offer: the offer.
        how: :attr:`How.SAME` if another transfer has stored the same content first.
        lost: the metadata that could not be kept, as text; empty if there is none.
        error: why it is not stored.
    """

    offer: Offer
    how: How = How.NEW
    lost: str = ""
    error: NotStored | None = None


class Arrivals:
    """The group of one connection. Its calls block on the disk."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._ready: list[Ready] = []
        self._made: list[Offer] = []
        self._touched: dict[tuple[str, ...], None] = {}
        """Folders that are new or have new entries. A new folder and its parent are both flushed:
        the parent holds its name, and on ext2 a flush of one does not include the other."""
        self._open = 0
        self._places = 0
        """The open files that count towards the limit of the folder."""
        self._since = 0.0
        self._flush_all = False
        self._work = -1
        self._where: tuple[str, ...] = ()
        self._count = 0

    def __len__(self) -> int:
        return len(self._ready) + len(self._made)

    @property
    def is_full(self) -> bool:
        """Whether :meth:`settle` is due."""
        waiting = time.monotonic() - self._since if len(self) else 0.0
        open_files = self._open >= _MOST_OPEN or self._open > self._places
        return len(self) >= _MOST or open_files or waiting > _LONGEST

    def _begin(self) -> None:
        if not len(self):
            self._since = time.monotonic()

    def add_folder(self, offer: Offer) -> None:
        self._begin()
        self._made.append(offer)
        self.add_touched([offer.path[:-1], offer.path])

    def add_touched(self, folders: list[tuple[str, ...]]) -> None:
        """Add the paths of folders that are new or have new entries, to flush them with the
        group."""
        self._touched.update(dict.fromkeys(folders))

    def add(self, ready: Ready) -> None:
        """Add a file that was written elsewhere. It is closed when the group is settled."""
        self._begin()
        self._ready.append(ready)
        self._open += 1
        self._places += self._folder.open_files.acquire(blocking=False)

    def _close_files(self, ready: list[Ready]) -> None:
        for one in ready:
            one.close()
        if self._places:
            self._folder.open_files.release(self._places)
        self._open = self._places = 0

    def write(self, offer: Offer, whole: Whole, handles: Handles) -> None:
        """Verify and write a small file.

        Raises ``NotStored``: the digest differs, the disk is full, or similar.
        """
        if sha256(whole.content).digest() != whole.sha256:
            raise NotStored(f"{shown(offer.path)}: the received data differ from what was sent")
        with errors_of(offer.path):
            if self._work < 0:
                self._make_work(handles)
            self._count += 1
            name = str(self._count)
            # Never readable by more users than the finished file.
            mode = offer.mode & 0o777 & ~self._folder.umask
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FILE
            file = os.open(name, flags, mode, dir_fd=self._work)
            try:
                self._fill(file, name, mode, offer, whole.content)
            except BaseException:
                close_file(file)
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._work)
                raise

    def _fill(
        self, file: int, name: str, mode: int, offer: Offer, content: bytes | bytearray | memoryview
    ) -> None:
        status = limit_mode(file, mode, offer)
        done = 0
        while done < len(content):
            done += os.pwrite(file, content[done:], done)
        lost = set_date(file, offer.mtime_ns)
        inode = status.st_dev, status.st_ino
        ready = Ready(offer=offer, where=(*self._where, name), file=file, inode=inode, lost=lost)
        if not self._flush_all:
            flush(file)
        self._begin()
        self._ready.append(ready)
        if not self._flush_all or len(self._ready) > _FEW:
            ready.close()

    def _make_work(self, handles: Handles) -> None:
        """Make the folder of this group, and lock it."""
        partial = handles.get((PARTIAL,), make=True)
        self._flush_all = has_flush_all(partial)
        for _ in range(_TRIES):
            where = (PARTIAL, WORK + secrets.token_hex(8))
            self._work = os.dup(handles.get(where, make=True))
            self._where = where
            with contextlib.suppress(OSError):  # file systems without locks
                fcntl.flock(self._work, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process, which has just started, may have removed it before it was locked.
            if os.fstat(self._work).st_nlink:
                break
            os.close(self._work)
            self._work = -1
        else:
            raise FileNotFoundError

    def settle(self) -> list[Settled]:
        """Flush the files, rename them to their final names, and return the outcome of each."""
        ready, made, touched = self._ready, self._made, self._touched
        self._ready, self._made, self._touched = [], [], {}
        settled: list[Settled] = []
        durable = [Settled(offer) for offer in made]
        try:
            with self._folder.open() as handles:
                group_error = self._flush_files(ready, handles)
                named = []
                for one in handles.each(ready):
                    try:
                        with errors_of(one.offer.path):
                            _flush_file(one, group_error, handles)
                            how = self._name(one, handles)
                        touched[one.offer.path[:-1]] = None
                        durable.append(Settled(one.offer, how, one.lost))
                        named.append(one)
                    except NotStored as error:
                        settled.append(Settled(one.offer, error=error))
                touched.update(dict.fromkeys(handles.made))
                self._add_above(touched)
                try:
                    self._flush_names(ready, named, list(touched), handles)
                    handles.check_root()
                    self._folder.names.settle(self, (one.offer.path for one in durable))
                except (OSError, FolderGone) as error:
                    if isinstance(error, OSError):
                        self._take_back(named, handles)
                    durable = [
                        Settled(offer, error=not_stored(error, offer.path)) for offer, *_ in durable
                    ]
        finally:
            self._close_files(ready)
            self._remove_work()
        return settled + durable

    def _flush_files(self, ready: list[Ready], handles: Handles) -> OSError | None:
        """Flush the data of many files at once. Returns an error of the disk, which may concern
        another program's file."""
        disk = self._disk(ready, handles) if len(ready) > _FEW else None
        if disk is None:
            return None
        try:
            flush_all(disk)
        except OSError as error:
            return error
        for one in ready:
            if one.where[:-1] == self._where:
                one.close()
        return None

    def _disk(self, ready: list[Ready], handles: Handles) -> int | None:
        """Return a descriptor for flushing the whole file system; ``None`` if files are flushed
        individually.

        It was opened before the small files were written: a flush reports the errors since its
        descriptor was opened, and older ones only if no program has seen them.
        """
        if self._work >= 0:  # as it was decided when they were written
            return self._work if self._flush_all else None
        disk = ready[0].file if ready else handles.get(())
        return disk if has_flush_all(disk) else None

    def _add_above(self, touched: dict[tuple[str, ...], None]) -> None:
        """Add parent folders whose names may not be on disk, such as those of a broken
        connection."""
        for path in list(touched):
            for depth in range(len(path)):
                if path[: depth + 1] in self._folder.names:
                    touched[path[:depth]] = touched[path[: depth + 1]] = None

    def _flush_names(
        self,
        ready: list[Ready],
        named: list[Ready],
        folders: list[tuple[str, ...]],
        handles: Handles,
    ) -> None:
        disk = self._disk(ready, handles) if len(folders) > _FEW else None
        if disk is not None:
            flush_all(disk)
            return
        if named and is_fat(handles.get(())):
            # The old names, too: of two names of the same disk blocks, fsck would empty one.
            folders += {one.where[:-1]: None for one in named}
            for one in handles.each(named):
                *parent, name = one.offer.path
                file = os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=handles.get(tuple(parent)))
                try:
                    flush(file)
                finally:
                    close_file(file)
        for path in handles.each(folders):
            flush(handles.get(path))

    def _name(self, ready: Ready, handles: Handles) -> How:
        """Rename a complete file to its final name, unless that name has the same content already.

        Raises ``NotStored`` or ``OSError``.
        """
        path, name = ready.offer.path, ready.where[-1]
        source = _check_in_place(ready, handles)
        target = handles.get(path[:-1], make=True)
        names = self._folder.names
        replace = partial(_replace, ready, source, target)
        if self._folder.overwrite:
            _refuse_alias(path, target)
            names.give(self, path, replace)
        elif not names.give(self, path, partial(_rename_new, name, source, path, target)):
            if not _have_same_content((name, source), (path[-1], target)):
                raise NotStored(taken(path))
            _refuse_alias(path, target)
            if path in names:  # another group may still remove its file, but not ours
                names.give(self, path, replace)
            else:
                os.unlink(name, dir_fd=source)
            return How.SAME
        return How.NEW

    def _take_back(self, named: list[Ready], handles: Handles) -> None:
        """Remove names that may not be on disk: a later receiver would take them for stored files.
        A file that replaced another one stays: its data are on disk, and the old file is gone.
        """
        with self._folder.names.lock:
            for one in handles.each(named):
                path = one.offer.path
                with contextlib.suppress(OSError, FolderGone):
                    parent = handles.get(path[:-1])
                    if not one.replaces and _inode(path[-1], parent) == one.inode:
                        os.unlink(path[-1], dir_fd=parent)

    def close(self) -> list[Offer]:
        """Discard the files that have not been settled, and return them. Large files are kept for
        the next attempt."""
        dropped = [one.offer for one in self._ready]
        self._close_files(self._ready)
        self._ready, self._made, self._touched = [], [], {}
        self._remove_work()
        return dropped

    def _remove_work(self) -> None:
        if self._work < 0:
            return
        with contextlib.suppress(OSError, FolderGone):
            for name in os.listdir(self._work):
                os.unlink(name, dir_fd=self._work)
            with self._folder.open() as handles:
                os.rmdir(self._where[-1], dir_fd=handles.get(self._where[:-1]))
        os.close(self._work)
        self._work = -1


def _flush_file(one: Ready, group_error: OSError | None, handles: Handles) -> None:
    """Flush a file that is still open.

    A large file is also flushed individually: it was written to before its group began, and its own
    descriptor reports the errors since then. After an error of the group, flushing each file would
    not find the damaged one: the kernel reports an error once, and then treats the data as written.
    Therefore an incomplete file is removed, and the next attempt starts from zero.

    Raises ``OSError``.
    """
    error = group_error
    if error is None and one.file >= 0:
        try:
            flush(one.file)
        except OSError as own:
            error = own
    if error is not None:
        if one.file >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(one.file, 0)
            with contextlib.suppress(OSError, FolderGone, NotStored):
                os.unlink(one.where[-1], dir_fd=_check_in_place(one, handles))
        raise OSError(error.errno, error.strerror)


def _check_in_place(ready: Ready, handles: Handles) -> int:
    """Return the folder of a file whose name still refers to it.

    A rename moves whatever has the name; another program, such as a second transfer, may have
    replaced the verified file.

    Raises ``NotStored``: the file was removed or replaced.
    """
    try:
        parent = handles.get(ready.where[:-1])
        found = os.stat(ready.where[-1], dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        found = None
    if found is None or (found.st_dev, found.st_ino) != ready.inode:
        raise NotStored(
            f"{shown(ready.offer.path)}: the receiver's incomplete file was removed or replaced "
            "while it arrived; send it again"
        )
    return parent


def _refuse_alias(path: tuple[str, ...], folder: int) -> None:
    """Raise ``NotStored`` if the file system treats this name as that of another file.

    File systems that ignore case or Unicode normalisation do so: the file that is there could be
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


def _replace(ready: Ready, source: int, target: int) -> None:
    """Rename, and note whether a file has been replaced. Raises ``OSError``."""
    name = ready.offer.path[-1]
    ready.replaces = _inode(name, target) is not None
    os.rename(ready.where[-1], name, src_dir_fd=source, dst_dir_fd=target)


def _rename_new(name: str, source: int, path: tuple[str, ...], target: int) -> bool:
    """Rename without replacing a file: link(2) refuses an existing name atomically.

    Returns whether the name was free. Raises ``OSError``.
    """
    try:
        os.link(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
    except FileExistsError:
        return False
    except OSError:
        # Probably a file system without hard links (FAT, FUSE, some network shares), whose errors
        # differ. Check, then rename, which reports any other error. A file that is created under
        # the name in between is replaced.
        try:
            os.stat(path[-1], dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(name, path[-1], src_dir_fd=source, dst_dir_fd=target)
            return True
        return False
    with contextlib.suppress(OSError):  # the file has its name all the same
        os.unlink(name, dir_fd=source)
    return True


def _have_same_content(*files: tuple[str, int]) -> bool:
    """Whether two files, each a name and the folder that it is in, have the same content.

    Raises ``OSError``.
    """
    with contextlib.ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(
                os.fdopen(os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=folder), "rb")
            )
            for name, folder in files
        )
        first, second = (os.fstat(file.fileno()) for file in (ours, theirs))
        if not stat.S_ISREG(second.st_mode) or first.st_size != second.st_size:
            return False
        while piece := ours.read(_PIECE):
            if piece != theirs.read(_PIECE):
                return False
        return not theirs.read(1)
