"""Port files: a server that listens on any free port writes the number to a file."""

import errno
import os
from pathlib import Path

from hybridkex.errors import ConfigError
from hybridkex.files import PUBLIC, write_file
from hybridkex.machine import writing


def check_new_file(path: str | Path) -> None:
    """Raise ``ConfigError`` if a file cannot be created, or replaced, under a path."""
    where = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"cannot write {str(path)!r}: the path has invalid characters")
    with writing(path):
        if where.is_dir():
            raise ConfigError(f"cannot write {path}: Is a directory")
        where.parent.stat()
    if not os.path.isdir(where.parent):
        raise ConfigError(f"cannot write {path}: Not a directory")
    system = os.statvfs(where.parent)
    if not os.access(where.parent, os.W_OK | os.X_OK):
        is_fixed = system.f_flag & os.ST_RDONLY
        reason = errno.EROFS if is_fixed else errno.EACCES
        raise ConfigError(f"cannot write {path}: {os.strerror(reason)}")
    if len(where.name.encode("utf-8", "surrogateescape")) > system.f_namemax:
        raise ConfigError(f"cannot write {path}: File name too long")


def write_port(path: str | Path | None, port: int) -> None:
    """Write the port to a file, if one was asked for.

    The file appears atomically: a program that waits for it can read it at once.

    Raises:
        ConfigError: it cannot be written.
    """
    if path is None:
        return
    check_new_file(path)
    with writing(path):
        write_file(path, f"{port}\n".encode("ascii"), mode=PUBLIC)
