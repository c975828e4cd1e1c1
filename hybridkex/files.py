"""The files that a configuration names, read with care.

A service reads them again while it runs, on a signal: whatever has become of a file since (a
folder, a device without an end, a pipe that nobody writes to, a path that cannot be one) must be an
error that names it, and neither a hang nor the end of the service.
"""

import os
import select
import stat
import time
import tomllib
from pathlib import Path
from typing import Any, Final

from hybridkex.errors import ConfigError

__all__ = ["read_file", "read_toml"]

LIMIT: Final = 16 << 20
"""Bytes: far more than any certificate, key, key list or configuration has."""
PATIENCE: Final = 5.0
"""Seconds that a pipe (``<(command)`` of a shell) may take."""


def read_file(
    path: str | os.PathLike[str],
    *,
    what: str = "",
    limit: int = LIMIT,
    missing: bytes | None = None,
    pipe: bool = True,
) -> bytes:
    """Read a whole file, or a pipe to its end.

    Args:
        path: of the file.
        what: its kind, for the message: ``the key file``.
        limit: the most bytes that it may have.
        missing: what to return if there is no such file; ``None`` if that is an error.
        pipe: whether it may be a pipe or a device, which can be read only once.

    Raises:
        ConfigError: the file cannot be read, or is too long; the message names it.
    """
    name = f"{what} {_shown(path)}".strip()
    try:
        # Not blocking: to open a pipe would wait for its writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"cannot read {name}: no path has such characters") from None
    try:
        if not pipe and not stat.S_ISREG(os.fstat(file).st_mode):
            raise ConfigError(f"cannot read {name}: it is not a regular file")
        data = _read(file, limit)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    finally:
        os.close(file)
    if data is None:
        raise ConfigError(f"cannot read {name}: it has more than {limit >> 20} MiB")
    return data


def _read(file: int, limit: int) -> bytes | None:
    """All of it; ``None`` where there is too much."""
    deadline = time.monotonic() + PATIENCE
    poll = select.poll()
    poll.register(file, select.POLLIN)
    found = bytearray()
    while len(found) <= limit:
        try:
            data = os.read(file, 1 << 16)
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(0, f"nothing came out of it for {PATIENCE:g} s") from None
            poll.poll(left * 1000)
            continue
        if not data:
            return bytes(found)
        found += data
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        ConfigError: it cannot be read or is not TOML; the message names the file.
    """
    data = read_file(path)
    try:
        return tomllib.loads(data.decode())
    except RecursionError:
        raise ConfigError(f"{_shown(path)}: too many arrays or tables in each other") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{_shown(path)}: {error}") from None


def _shown(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)
