"""Files that not even root can change, as on a file system that became read-only."""

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["can_be_immutable", "immutable"]

_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
"""Of ioctl_iflags(2)."""


@contextmanager
def immutable(paths: Iterable[Path]) -> Iterator[None]:
    """In this context these files and folders cannot be changed, whoever has them open (chattr(1),
    ``i``). Raises ``OSError`` where that cannot be done: see :func:`can_be_immutable`."""
    found = [path for path in paths if path.is_file() or path.is_dir()]
    try:
        for path in found:
            _set(path, True)
        yield
    finally:
        for path in found:
            _set(path, False)


def can_be_immutable(folder: Path) -> bool:
    """Whether this user may make files of a folder immutable, and its file system can.

    It takes CAP_LINUX_IMMUTABLE (``docker run --cap-add LINUX_IMMUTABLE``), and ext4, XFS or Btrfs.
    """
    file = folder / "immutable"
    file.touch()
    try:
        with immutable([file]):
            pass
    except OSError:
        return False
    finally:
        file.unlink()
    return True


def _set(path: Path, on: bool) -> None:
    """A file that is gone stays so."""
    with suppress(FileNotFoundError):
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            [flags] = struct.unpack("l", fcntl.ioctl(opened, _GET_FLAGS, bytes(8)))
            flags = flags | _IMMUTABLE if on else flags & ~_IMMUTABLE
            fcntl.ioctl(opened, _SET_FLAGS, struct.pack("l", flags))
        finally:
            os.close(opened)
