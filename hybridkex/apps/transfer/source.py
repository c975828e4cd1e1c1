"""What is to be sent: files and folders of this machine."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridkex.apps.transfer.folder import why
from hybridkex.errors import ConfigError

__all__ = ["Item", "collect"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A file or a folder to send, as it was when it was found."""

    source: Path
    path: tuple[str, ...]
    """Its name on the other side."""
    folder: bool
    size: int
    mtime_ns: int
    executable: bool


def collect(paths: list[Path], leave_out: Callable[[str], None]) -> list[Item]:
    """Everything below the paths, folders before what is in them, in order of name.

    Links that are named themselves are followed. Links inside a folder, devices and the like are
    not sent; ``leave_out`` is told.

    Raises ``ConfigError`` for a path that is not there, or two of one name.
    """
    found: list[Item] = []
    for path in paths:
        # The name of "." or "folder/.." is what it is called where it is.
        name = path.name if path.name not in ("", "..") else path.resolve().name
        if not name:
            raise ConfigError(f"{path} has no name to send it under")
        try:
            found += _walk(path, (name,), path.stat(), leave_out)
        except OSError as error:
            raise ConfigError(why(error, f"read {path}")) from None
    seen: dict[tuple[str, ...], Path] = {}
    for item in found:
        if item.path in seen:
            raise ConfigError(f"{seen[item.path]} and {item.source} have the same name")
        seen[item.path] = item.source
    return found


def _walk(
    source: Path, path: tuple[str, ...], status: os.stat_result, leave_out: Callable[[str], None]
) -> Iterator[Item]:
    if stat.S_ISREG(status.st_mode):
        yield Item(
            source=source,
            path=path,
            folder=False,
            size=status.st_size,
            mtime_ns=max(0, status.st_mtime_ns),
            executable=bool(status.st_mode & 0o111),
        )
    elif stat.S_ISDIR(status.st_mode):
        yield Item(source=source, path=path, folder=True, size=0, mtime_ns=0, executable=False)
        for below in sorted(source.iterdir()):
            try:
                yield from _walk(below, (*path, below.name), below.lstat(), leave_out)
            except OSError as error:
                leave_out(why(error, f"read {below}"))
    else:
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "neither file nor folder"
        leave_out(f"{source} is {kind}")
