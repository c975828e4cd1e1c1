"""Flushing written data to the disk: file by file, or the whole file system at once.

One flush of a file system (syncfs(2)) costs about as much as that of one file (fsync(2)), so a
group of small files shares one. It is used only where it is as reliable as fsync: on file systems
whose syncfs writes everything out, and with a kernel that reports its write errors (Linux 5.8).
Elsewhere, as on FUSE and network shares, each file is flushed.
"""

import contextlib
import ctypes
import errno
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Final

_LACKING: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
"""Errors of file systems that lack fsync(2), above all for folders: FUSE, network shares."""
_KINDS: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0xF2F52010,  # F2FS
        0xCA451A4E,  # bcachefs
        0x01021994,  # tmpfs
    }
)
"""``f_type`` of statfs(2) of the file systems whose syncfs can be relied on."""
_FAT: Final = 0x4D44
_REPORTS_ERRORS: Final = (5, 8)
_START: Final = 2
"""SYNC_FILE_RANGE_WRITE of sync_file_range(2)."""


def flush(file: int) -> None:
    """Flush a file or a folder to disk, if the file system can.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _LACKING:
            raise


def has_flush_all(file: int) -> bool:
    """Whether :func:`flush_all` is as reliable as :func:`flush` on this file's file system."""
    return _syncfs() is not None and _kind(file) in _KINDS


def flush_all(file: int) -> None:
    """Flush everything that any program has written to a file's file system.

    Raises:
        OSError: the disk failed, for this or for another file.
    """
    syncfs = _syncfs()
    if syncfs is None:
        os.sync()
    elif syncfs(file):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def is_fat(file: int) -> bool:
    """Whether directory entries hold the size and the location of files, as on FAT: a renamed file
    must be flushed again there, or a power failure leaves it empty."""
    return _kind(file) == _FAT


def start_flush(file: int, offset: int, length: int) -> None:
    """Start writing a part of a file to the disk, so that :func:`flush` waits less.

    Errors are reported by :func:`flush`.
    """
    start = getattr(_library(), "sync_file_range", None)
    if start is not None:
        start(file, ctypes.c_int64(offset), ctypes.c_int64(length), _START)


def drop_cached(file: int) -> None:
    """Let the next reads of a file come from the disk, as far as it has been written.

    A receiver that was killed may have left data that the disk failed to write: they are still in
    memory, and the kernel does not report the error again.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


@cache
def _syncfs() -> Callable[[int], int] | None:
    """syncfs(2) of the C library; ``None`` where the kernel does not report its write errors."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if sys.platform != "linux" or release is None:
        return None
    if (int(release[1]), int(release[2])) < _REPORTS_ERRORS:
        return None
    found: Callable[[int], int] | None = getattr(_library(), "syncfs", None)
    return found


def _kind(file: int) -> int:
    """``f_type`` of statfs(2), its first field, which Python does not offer; 0 if unknown."""
    result = (ctypes.c_long * 64)()
    fstatfs = getattr(_library(), "fstatfs", None)
    if fstatfs is None or fstatfs(file, result):
        return 0
    return result[0] & 0xFFFFFFFF
