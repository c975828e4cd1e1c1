"""The local files and folders to send."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybridkex.apps.transfer.errors import why
from hybridkex.apps.transfer.messages import Nanoseconds
from hybridkex.apps.transfer.names import UnsafeName, check_path, shown
from hybridkex.errors import ConfigError

__all__ = ["Item", "collect"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A file or a folder to send, with its attributes when it was found.

    Args:
        source: where it is.
        path: its name at the receiver, as components.
        folder: whether it is a folder.
        size: in bytes; 0 for a folder.
        mtime_ns: nanoseconds since 1970; negative before.
        mode: permission bits, as of chmod(2).
        inode: device and inode number, which reveal a replaced file.
    """

    source: Path
    path: tuple[str, ...]
    folder: bool
    size: int
    mtime_ns: Nanoseconds
    mode: int
    inode: tuple[int, int]


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def collect(paths: list[Path], leave_out: Callable[[str], None]) -> list[Item]:
    """List everything below the paths: folders before their content, sorted by name.

    Links given as paths are followed. What cannot be sent is left out, and ``leave_out`` is called
    with a line that names it: links inside a folder, devices, pipes, names that
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
        found += _tree(path, (name,), status, leave_out)
    return found


def _text(path: Path) -> str:
    return shown((str(path),))


def _tree(
    source: Path, path: tuple[str, ...], status: os.stat_result, leave_out: Callable[[str], None]
) -> list[Item]:
    """A file, or a folder and everything below it.

    Iterative, since a tree may be deeper than Python's stack.
    """
    found: list[Item] = []
    waiting = [(source, path, status)]
    while waiting:
        source, path, status = waiting.pop()
        item = _item(source, path, status, leave_out)
        if item is None:
            continue
        below = []
        if item.folder:
            try:
                for entry in sorted(os.listdir(source)):
                    child = source / entry
                    try:
                        below.append((child, (*path, entry), child.lstat()))
                    except OSError as error:
                        leave_out(f"{_text(child)}: {why(error, 'read it')}")
            except OSError as error:
                leave_out(f"{_text(source)}: {why(error, 'list it')}")
        found.append(item)
        waiting += reversed(below)
    return found


def _item(
    source: Path, path: tuple[str, ...], status: os.stat_result, leave_out: Callable[[str], None]
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
        source=source,
        path=path,
        folder=folder,
        size=0 if folder else status.st_size,
        mtime_ns=Nanoseconds(status.st_mtime_ns),
        mode=stat.S_IMODE(status.st_mode),
        inode=(status.st_dev, status.st_ino),
    )
