"""The local files and folders to send."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hybridkex.apps.transfer.errors import why
from hybridkex.apps.transfer.handles import FOLDER, open_folder
from hybridkex.apps.transfer.messages import Nanoseconds
from hybridkex.apps.transfer.names import UnsafeName, check_path, shown
from hybridkex.errors import ConfigError

_LeaveOut = Callable[[str], None]


class Item(NamedTuple):
    """A file or a folder to send, with its attributes when it was found.

    Args:
        source: where it is.
        path: its name at the receiver, as components.
        folder: whether it is a folder.
        size: in bytes; 0 for a folder.
        mtime_ns: nanoseconds since 1970; negative before.
        mode: permission bits, as of chmod(2).
        inode: device and inode number, which reveal a replaced file.
        ctime_ns: the last change of its status or content, a time that programs cannot set.
    """

    source: str
    path: tuple[str, ...]
    folder: bool
    size: int
    mtime_ns: Nanoseconds
    mode: int
    inode: tuple[int, int]
    ctime_ns: int


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def collect(paths: Sequence[Path], leave_out: _LeaveOut) -> Iterator[Item]:
    """Everything below the paths in the order of the walk: each folder before its content.

    The paths themselves are examined before this returns, and their content during the iteration,
    so that memory does not grow with the number of files. The disk is read: use the iterator in a
    thread.

    Links given as paths are followed. Entries that cannot be sent are left out, and ``leave_out``
    is called with a line that names them: links inside a folder, devices, pipes, names that
    :func:`~hybridkex.apps.transfer.names.check_path` refuses, what cannot be read.

    Raises:
        ConfigError: two of the paths have the same name.
    """
    found: list[Item] = []
    named: dict[str, Path] = {}
    for path in paths:
        try:
            # "." and "folder/.." are sent under the folder's real name.
            name = path.name if path.name not in ("", "..") else path.resolve().name
            status = path.stat()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in it; a loop of links
            reason = why(error, "read it") if isinstance(error, OSError) else str(error)
            leave_out(f"{_text(path)}: {reason}")
            continue
        if not name:
            leave_out(f"{_text(path)}: it has no name under which to send it")
            continue
        if name in named:
            raise ConfigError(
                f"{_text(named[name])} and {_text(path)} have the same name; send them separately"
            )
        named[name] = path
        item = _item(str(path), (name,), status, leave_out)
        if item is not None:
            found.append(item)
    return _walk(found, leave_out)


def total_size(paths: Sequence[Path]) -> int:
    """The bytes of all files below the paths, as far as they can be read."""
    return sum(item.size for item in collect(paths, lambda _: None))


def _text(path: Path | str) -> str:
    return shown((str(path),))


def _walk(roots: list[Item], leave_out: _LeaveOut) -> Iterator[Item]:
    """Iterative, since a tree may be deeper than Python's stack. The files of a folder come before
    its folders, so that only the folders are kept in memory."""
    waiting = [(item.source, item) for item in reversed(roots)]
    while waiting:
        root, item = waiting.pop()
        yield item
        if item.folder:
            folders: list[Item] = []
            yield from _files(root, item, folders, leave_out)
            folders.sort(reverse=True)
            waiting += [(root, folder) for folder in folders]


def _files(root: str, folder: Item, folders: list[Item], leave_out: _LeaveOut) -> Iterator[Item]:
    """The files in a folder; the folders in it are added to ``folders``."""
    try:
        with _listed(root, folder.path[1:]) as entries:
            for entry in entries:
                source = os.path.join(folder.source, entry.name)
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError as error:
                    leave_out(f"{_text(source)}: {why(error, 'read it')}")
                    continue
                item = _item(source, (*folder.path, entry.name), status, leave_out)
                if item is not None and item.folder:
                    folders.append(item)
                elif item is not None:
                    yield item
    except OSError as error:
        leave_out(f"{_text(folder.source)}: {why(error, 'list it')}")


@contextmanager
def _listed(root: str, below: tuple[str, ...]) -> Iterator[Iterator[os.DirEntry[str]]]:
    """The entries of a folder below a root. Links are not followed, since another user may replace
    a folder by a link after the walk has found it (the race of rsync, CVE-2024-12747). Files are
    identified by their inode numbers when they are opened. Raises ``OSError``."""
    here = os.open(root, FOLDER & ~os.O_NOFOLLOW)
    try:
        for name in below:
            above, here = here, open_folder(name, here)
            os.close(above)
        with os.scandir(here) as entries:
            yield entries
    finally:
        os.close(here)


def _item(
    source: str, path: tuple[str, ...], status: os.stat_result, leave_out: _LeaveOut
) -> Item | None:
    kind = stat.S_IFMT(status.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        leave_out(f"{_text(source)}: {_KINDS.get(kind, 'neither a file nor a folder')}")
        return None
    folder = kind == stat.S_IFDIR
    try:
        check_path(path)
    except UnsafeName as error:
        below = ", and everything below it" if folder else ""
        leave_out(f"{error}{below}")
        return None
    return Item(
        source,
        path,
        folder,
        0 if folder else status.st_size,
        Nanoseconds(status.st_mtime_ns),
        stat.S_IMODE(status.st_mode),
        (status.st_dev, status.st_ino),
        status.st_ctime_ns,
    )
