"""Reading of configured files, and writing of all files of the library.

Reading: a service rereads its files on a signal while it runs. If a file has become something else
(a folder, an endless device, a pipe without a writer, an invalid path), this must cause an error
that names it, and must neither block nor end the service.

Writing: whole, and by default readable by the owner alone. Every file that the library or a command
creates is created here (``tests/test_written_files.py`` reads the sources for others), except those
that a peer sends, whose mode the transfer decides. The mode does not depend on the umask. The
functions that write raise ``OSError`` with the path that they were given as its ``filename``.
"""

import contextlib
import errno
import os
import secrets
import select
import stat
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from hybridkex.errors import ConfigError

LIMIT: Final = 16 << 20
"""The maximum length of a file in bytes: far more than any certificate, key, key list or
configuration needs."""
PATIENCE: Final = 5.0
"""Seconds to wait for a pipe (``<(command)`` of a shell)."""
PRIVATE: Final = 0o600
"""Mode for keys, secrets, and records of who talked to whom."""
PUBLIC: Final = 0o644
"""Mode for certificates, ports and configurations without secrets."""

_OTHERS: Final = 0o077
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH
_DESCRIPTORS: Final = "/proc/self/fd"
_MOST_LINKS: Final = 40
"""As the kernel follows (path_resolution(7))."""


def read_file(
    path: str | os.PathLike[str],
    *,
    what: str = "",
    limit: int = LIMIT,
    missing: bytes | None = None,
    pipe: bool = True,
    own: bool = False,
) -> bytes:
    """Read a whole file, or a pipe to its end.

    Args:
        path: of the file.
        what: its kind, for the message: ``the key file``.
        limit: the maximum length in bytes.
        missing: the result if there is no such file; ``None`` makes that an error.
        pipe: whether it may be a pipe or a device, which can be read only once.
        own: whether to refuse a file that another user may have put there: for secrets, and for
            files that the program itself creates.

    Raises:
        ConfigError: the file cannot be read or is too long; the message names it.
    """
    name = f"{what} {_shown(path)}".strip()
    try:
        # Non-blocking: otherwise opening a pipe would wait for its writer.
        file = (
            _open_own(path, os.O_RDONLY, _check_reading)
            if own
            else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        )
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"cannot read {name}: the path has invalid characters") from None
    try:
        status = os.fstat(file)
        if not pipe and not stat.S_ISREG(status.st_mode):
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
    """Read everything; ``None`` if it is too long."""
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
                raise TimeoutError(0, f"it had no data for {PATIENCE:g} s") from None
            poll.poll(left * 1000)
            continue
        if not data:
            return bytes(found)
        found += data
    return None


def read_utf8(path: str | os.PathLike[str], **options: Any) -> str:
    """Read a text in UTF-8, with or without a byte order mark. For options and errors, see
    :func:`read_file`."""
    data = read_file(path, **options)
    zeros = b"\0" in data  # each line end of UTF-16 and UTF-32 has some, and no line of UTF-8
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("utf-8-sig")
        if not zeros:
            return text
    what = "text in UTF-16 or UTF-32, or damaged" if zeros else "not text in UTF-8"
    raise ConfigError(f"cannot read {_shown(path)}: it is {what}; save it as UTF-8")


@contextlib.contextmanager
def parsing(path: Path, what: str, *, hint: str = "") -> Iterator[None]:
    """Within the block a library parses the content of a file.

    Whatever it raises for a damaged file, or for one in another format, becomes a ``ConfigError``
    that names the file: the classes of the libraries' errors are many and not documented. The
    messages of a ``ConfigError`` raised here need not name it.

    Args:
        path: of the file.
        what: what it should be: ``a scan``.
        hint: the end of the message.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        raise ConfigError(f"{path}: not {what}: {error}{hint}") from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that is too long to be read as a whole.

    Raises ``OSError``, also for a pipe, which may block, and for a device, which may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            _refuse(path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse(path: str | os.PathLike[str]) -> NoReturn:
    raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        ConfigError: it cannot be read or is not TOML; the message names the file.
    """
    text = read_utf8(path)
    try:
        tables = tomllib.loads(text)
        _check_numbers(tables)
    except RecursionError:
        raise ConfigError(f"{_shown(path)}: arrays or tables are nested too deeply") from None
    except ValueError as error:  # not TOML, or a number of thousands of digits
        raise ConfigError(f"{_shown(path)}: {error}") from None
    return tables


def _check_numbers(tables: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an integer of more than 64 bits, which TOML 1.0 refuses and
    ``tomllib`` takes."""
    left: list[tuple[str, Any]] = [("", tables)]
    while left:
        name, value = left.pop()
        match value:
            case dict():
                left += [(f"{name}.{key}" if name else key, one) for key, one in value.items()]
            case list():
                left += [(f"{name}[{index}]", one) for index, one in enumerate(value)]
            case int() if value.bit_length() > 63 and value != -(1 << 63):
                raise ValueError(f"{name!r} is an integer of more than 64 bits")


def _shown(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    return text if text.isprintable() else repr(text)


def write_file(path: str | Path, content: bytes, *, mode: int = PRIVATE) -> None:
    """Create or replace a file atomically: a reader sees the old content or the new.

    The content is on disk on return. A symbolic link is replaced, not followed; a device or a pipe
    is written to directly.
    """
    path = Path(path)
    with _named(path):
        if _is_special(path):
            _write_special(path, content)
        else:
            with _temporary(path, 0, mode) as write:
                write(content)


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, or a link to one."""
    return path.exists() and not path.is_file()


def _write_special(path: Path, content: bytes) -> None:
    """Write to a device or a pipe, whose reader may come a little later."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = _open_own(path, os.O_WRONLY)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            break
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        rest = memoryview(content)
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(0, f"its reader took no data for {PATIENCE:g} s") from None
                poll.poll(left * 1000)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reserve_file(
    path: str | Path, size: int, *, mode: int = PRIVATE
) -> Iterator[Callable[[bytes], None]]:
    """Reserve disk space for a file before its content exists, for content that must not be lost.

    The context's value writes the content, at most once; the file is then created or replaced as by
    :func:`write_file`. Without it, nothing is changed.

    Args:
        path: of the file.
        size: the maximum length of the content in bytes.
        mode: of the file.
    """
    path = Path(path)
    if _is_special(path):  # a device or a pipe has no space to reserve
        with _named(path):
            if path.is_fifo():  # whose reader would see its end if we opened and closed it
                check_own(_followed(path))
            else:
                os.close(_open_own(path, os.O_WRONLY))  # a folder, say, cannot be opened
        yield lambda content: write_file(path, content)
        return
    with contextlib.ExitStack() as stack:
        with _named(path):
            write = stack.enter_context(_temporary(path, size, mode))

        def write_named(content: bytes) -> None:
            with _named(path):
                write(content)

        yield write_named


def write_files(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Create or replace files that belong together: all of them, or none if one cannot be written.

    Args:
        files: content and mode by path; missing folders are created.
    """
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            writers: list[Callable[[bytes], None]] = []
            for path, (content, mode) in files.items():
                with _named(path):
                    for folder in reversed([one for one in path.parents if not one.exists()]):
                        os.mkdir(folder)
                        made.append(folder)
                writers.append(stack.enter_context(reserve_file(path, len(content), mode=mode)))
            for write, (path, (content, _)) in zip(writers, files.items(), strict=True):
                is_new = not os.path.lexists(path)
                write(content)
                if is_new:
                    made.append(path)
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                (os.rmdir if path.is_dir() else os.unlink)(path)
        raise


@contextlib.contextmanager
def _temporary(
    path: Path, size: int, mode: int, *, replace: bool = True
) -> Iterator[Callable[[bytes], None]]:
    """A file with room for its content; the context's value writes that and gives it its path.

    Until then the file has no name, so that nothing of it is left however the process ends; where
    the file system has no such files (open(2), O_TMPFILE), it is beside the other.

    Args:
        path: of the file.
        size: the maximum length of the content in bytes.
        mode: of the file.
        replace: whether it may replace another file; otherwise ``FileExistsError``.
    """
    descriptor, name = _open_temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            if size:
                os.posix_fallocate(descriptor, 0, size)

            def write(content: bytes) -> None:
                nonlocal name
                file.write(content)
                file.flush()
                os.ftruncate(descriptor, len(content))
                os.fsync(descriptor)
                if name is None or not replace:
                    try:
                        _link(descriptor, name, path)
                    except FileExistsError:
                        if not replace:
                            raise
                        name = f"{path.parent}/.{path.name}.{secrets.token_hex(8)}"
                        _link(descriptor, None, name)
                if name is not None and replace:
                    os.replace(name, path)
                _flush_folder(path.parent)

            yield write
    finally:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _open_temporary(path: Path) -> tuple[int, str | None]:
    """Create a temporary file in the folder of ``path``. Returns its descriptor, and its name if it
    has one."""
    if os.path.isdir(_DESCRIPTORS):
        with contextlib.suppress(AttributeError, OSError):  # the system or file system has none
            flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
            return os.open(path.parent, flags, PRIVATE), None
    # mkstemp creates the file exclusively, with mode 600, under a name that nobody can guess.
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


def try_writing(path: Path, content: bytes) -> None:
    """Write to a temporary file beside a path, and remove it. Raises ``OSError``."""
    descriptor, name = _open_temporary(path)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            file.write(content)
    finally:
        if name is not None:
            os.unlink(name)


def _link(descriptor: int, name: str | None, path: str | Path) -> None:
    """Give a file a new name: its first, or an additional one."""
    if name is not None:
        os.link(name, path)
        return
    # As linkat(2) advises; only with a descriptor does Python follow the link.
    os.link(f"{_DESCRIPTORS}/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


def create_file(path: str | Path, content: bytes, *, mode: int = PRIVATE) -> None:
    """Create a file, whole or not at all. Raises ``FileExistsError`` if there is one, or a link."""
    path = Path(path)
    with _named(path):
        try:
            with _temporary(path, 0, mode, replace=False) as write:
                write(content)
        except FileExistsError:
            raise
        except OSError:
            _create_in_place(path, content, mode)  # a file system without hard links


def _create_in_place(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        os.unlink(path)  # part of a key is useless
        raise


def open_private(path: str | Path, *, append: bool = False) -> BinaryIO:
    """Open a file for writing, unbuffered, and make it private.

    A device or a pipe is used unchanged, and never waited for: it must have a reader, and writing
    returns ``None`` while that reader takes nothing (:class:`io.FileIO`). Raises
    ``PermissionError`` for what another user may have put there, who could read what is written.
    """
    descriptor = _open_own(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else 0))
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            wanted = _tightened(status)
            if wanted is not None:
                os.fchmod(descriptor, wanted)
            if not append:
                os.ftruncate(descriptor, 0)
        return open(descriptor, "wb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def create_private(path: str | Path) -> Path:
    """Make sure that a file exists, and return its path without a symbolic link at its end. A new
    file is private; another is left as it is.

    Raises ``PermissionError`` for what another user may have put there.
    """
    path = Path(_followed(path))
    with contextlib.suppress(FileExistsError):
        create_file(path, b"")
    check_own(path)
    return path


def make_private(path: str | Path) -> None:
    """Make sure that a file exists and only its owner can read it, for a library that opens it by
    name. The file is not opened, which would end a lock that this process has (fcntl(2)).

    Raises ``PermissionError`` for what another user may have put there.
    """
    path = create_private(path)
    status = os.lstat(path)
    wanted = _tightened(status) if stat.S_ISREG(status.st_mode) else None
    if wanted is not None:
        change_mode(path, wanted, inode=(status.st_dev, status.st_ino))


def _tightened(status: os.stat_result) -> int | None:
    """The permissions that make a file private; ``None`` if it has them."""
    wanted = status.st_mode & ~_OTHERS | PRIVATE
    return stat.S_IMODE(wanted) if wanted != status.st_mode else None


def change_mode(path: str | Path, mode: int, *, inode: tuple[int, int]) -> None:
    """Change the permissions of a file or socket, but not of another one that has replaced it.

    Args:
        path: of the file.
        mode: its permissions.
        inode: its device and its inode.

    Raises ``OSError``; ``FileNotFoundError`` if another one has this name.
    """
    if not os.path.isdir(_DESCRIPTORS):
        os.chmod(path, mode, follow_symlinks=False)
        return
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != inode:
            raise FileNotFoundError(errno.ENOENT, "another file was put there", os.fspath(path))
        os.chmod(f"{_DESCRIPTORS}/{descriptor}", mode)
    finally:
        os.close(descriptor)


# -- what other users may have put into a folder


def is_shared(path: str | Path) -> bool:
    """Whether another user than root may change the folder of a file."""
    folder = os.stat(os.path.dirname(path) or ".")
    return folder.st_uid not in (os.geteuid(), 0) or bool(folder.st_mode & _WRITABLE)


def _check_writing(path: str, status: os.stat_result) -> None:
    # What belongs to us can be another name (a hard link) of a file elsewhere.
    if status.st_uid != os.geteuid():
        reason = "it belongs to another user, who may have put it there"
    elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        reason = "it has another name (a hard link), which another user may have made"
    else:
        return
    if is_shared(path):
        raise PermissionError(errno.EPERM, reason, path)


def _check_reading(path: str, status: os.stat_result) -> None:
    folder = os.stat(os.path.dirname(path) or ".")
    trusted = (os.geteuid(), 0, folder.st_uid)
    if folder.st_mode & _WRITABLE and status.st_uid not in trusted:
        raise PermissionError(
            errno.EPERM, "it belongs to another user, who may have put it there", path
        )


_Check = Callable[[str, os.stat_result], None]


def check_own(path: str | Path) -> None:
    """Raise ``PermissionError`` for what another user may have put there; nothing may be there."""
    with contextlib.suppress(FileNotFoundError):
        _check_writing(os.fspath(path), os.lstat(path))


def _open_own(path: str | os.PathLike[str], flags: int, check: _Check = _check_writing) -> int:
    """Open without waiting. Raises ``PermissionError`` for what another user may have put there."""
    found = _followed(path, check)
    with contextlib.suppress(FileNotFoundError):
        check(found, os.lstat(found))
    if is_shared(found):
        flags |= os.O_NOFOLLOW  # another user may put a link there now
    descriptor = os.open(found, flags | os.O_CLOEXEC | os.O_NONBLOCK, PRIVATE)
    try:
        check(found, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _followed(path: str | os.PathLike[str], check: _Check = _check_writing) -> str:
    """Return the target of a symbolic link. Raises ``PermissionError`` for another user's link."""
    followed = os.fspath(path)
    for _ in range(_MOST_LINKS):
        try:
            status = os.lstat(followed)
        except FileNotFoundError:
            return followed
        if not stat.S_ISLNK(status.st_mode):
            return followed
        check(followed, status)
        target = os.path.join(os.path.dirname(followed), os.readlink(followed))
        if not os.path.lexists(target) and os.path.exists(followed):
            return followed  # a link of /proc to what has no path
        followed = target
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))


def make_private_folder(path: str | Path) -> None:
    """Create a folder and its parents. Raises ``FileExistsError`` if it exists."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkdir(path, 0o700)
    os.chmod(path, 0o700)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the requested file's name into errors of writing: write(2) names no file, and the name of
    a temporary file does not help the user."""
    try:
        yield
    except OSError as error:
        # A new error: a second name cannot be removed from this one, and would be shown as None.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _flush_folder(folder: Path) -> None:
    """Make a rename durable, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
