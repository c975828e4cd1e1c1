"""SQLite database files that one process uses alone."""

import contextlib
import os
import sqlite3
import stat
from pathlib import Path
from typing import Final

from hybridkex.errors import ConfigError
from hybridkex.files import check_own, create_private, is_shared, make_private, read_file
from hybridkex.machine import reason

LOCK_SECONDS: Final = 0.1
"""Seconds to wait for the lock: another process may read the file for a moment."""
SYNCHRONOUS: Final = "FULL"
"""A transaction has ended when it is on the disk."""

_LOG: Final = "-wal"
_BESIDE: Final = (_LOG, "-journal", "-shm")
"""The suffixes of files that SQLite treats as part of the database."""


class FileInUse(ConfigError):
    """Another process uses the file."""


def open_unlocked(path: Path) -> sqlite3.Connection:
    """A connection that can read a file which another process uses, and does not disturb it.

    It sees what is in the file, and not what is only in the write-ahead log; and it may see a page
    that is being written. Raises ``sqlite3.Error``.
    """
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def open_locked(path: Path, *, what: str = "key store", create: bool = True) -> sqlite3.Connection:
    """Open the only connection to an SQLite database; a new file is private. A file in use is not
    touched, and this one is in use until the connection is closed or the process ends.

    Args:
        path: of the file.
        what: its kind, for messages.
        create: whether a missing file is created.

    Raises:
        FileInUse: another process uses it.
        ConfigError: it cannot be opened.
    """
    try:
        real = _checked(path, what, create=create)
        db = sqlite3.connect(
            f"{real.as_uri()}?mode=rw",  # an empty file in its place would have lost everything
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=LOCK_SECONDS,
        )
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open the {what} {path}: {reason(error)}") from error
    try:
        # The lock is taken here and kept; with it, SQLite needs no shared memory.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        db.execute("COMMIT")
        if create:
            make_private(path)  # only now: a file that is not a database stays as it is
    except OSError as error:
        db.close()
        raise ConfigError(f"cannot make the {what} {path} private: {error.strerror}") from error
    except sqlite3.Error as error:
        db.close()
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise FileInUse(
                f"the {what} {path} is in use by another process, and only one may use it: end "
                "that process, or give this one a store of its own"
            ) from None
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            _remove_empty(f"{real}{_LOG}")  # _checked may have created it
        raise ConfigError(f"cannot use the {what} {path}: {error}") from error
    return db


def _checked(path: Path, what: str, *, create: bool) -> Path:
    """The path without symbolic links of a file that may be opened, which then exists.

    Raises ``ConfigError`` and ``OSError``.
    """
    # SQLite would wait forever for /proc/kmsg, and treat /proc/cpuinfo as empty.
    if path.is_file() and not path.stat().st_size and read_file(path, what=f"the {what}"):
        raise ConfigError(f"cannot use the {what} {path}: it is not a file on a disk")
    if create:
        create_private(path)
    # SQLite names its log after the path: through a symbolic link it would use another log.
    real = path.resolve()
    for suffix in ("", *_BESIDE):
        check_own(f"{real}{suffix}")
    found = real.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"the {what} {path} is not a regular file")
    if found.st_nlink > 1:
        raise ConfigError(
            f"the {what} {path} has several names (hard links), and its log would not be found "
            "under another one; remove the other names"
        )
    if found.st_size and is_shared(real):
        make_private(f"{real}{_LOG}")  # before another user makes one
    return real


def _remove_empty(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not os.path.getsize(path):
            os.unlink(path)


def use_log(db: sqlite3.Connection, path: Path) -> None:
    """Have changes written to a write-ahead log, in a file of ours. SQLite opens the log of a new
    database with its first change, and would take another user's file for it.

    Raises:
        ConfigError: another user has put a file there.
        sqlite3.Error: it cannot be used.
    """
    db.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    db.execute("PRAGMA journal_mode=WAL")
    try:
        make_private(f"{path.resolve()}{_LOG}")
    except OSError as error:
        raise ConfigError(f"cannot use the log of {path}: {error.strerror}") from error
