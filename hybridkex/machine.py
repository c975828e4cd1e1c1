"""Messages for errors of the operating system: full disks, permissions, memory, threads.

Each is one line with the fault, the place and the next step. All commands, and all code that writes
files, use these messages.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from hybridkex.errors import ConfigError
from hybridkex.text import said

_ELSEWHERE: Final = "choose another place"
_ADVICE: Final = {
    errno.ENOSPC: f"free some space there, or {_ELSEWHERE}",
    errno.EDQUOT: f"your quota is used up: free some space there, or {_ELSEWHERE}",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another file system",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: f"check the permissions of the file and of its folder, or {_ELSEWHERE}",
    errno.EPERM: f"check the permissions of the file and of its folder, or {_ELSEWHERE}",
    errno.ENOENT: "check that the folder exists",
    errno.ENOTDIR: "a file is where a folder is needed: check the path",
    errno.EEXIST: "choose another name, or remove it first",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk reports an error: see the kernel's log (dmesg)",
    errno.ENXIO: "no program reads from it: start its reader first",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many open files: end other programs",
    errno.ENOMEM: "end other programs, or raise the limit of memory (ulimit -v)",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u), or end other programs",
}
NO_MEMORY: Final = (
    "there is no more memory for the program; end other programs, or raise the limit (ulimit -v)"
)
"""The message when memory is needed and there is none."""
NO_THREAD: Final = (
    "no more threads can be started for the program; raise the limit of processes and threads "
    "(ulimit -u) or of memory (ulimit -v), or end other programs"
)
"""The message when a thread is needed and none can be started."""

_TRIOS: Final = "Error connecting to"
"""How the words of trio begin that repeat the address."""
_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_GONE: Final = frozenset(
    {errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN}
)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of nested groups, or the error itself if it is not a group."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, the nearest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def broken(error: BaseException) -> str:
    """Why a connection broke: a message about the innermost cause."""
    cause = error.__cause__ or error
    if not isinstance(cause, OSError):
        return said(cause)
    if cause.errno in _GONE:
        why = cause.strerror or type(cause).__name__
        return f"the other end cut the connection ({why}): its log may say why"
    if cause.errno == errno.ETIMEDOUT:
        return "the other end no longer answers: check whether it runs, and the network between"
    return reason(cause)


def reason(error: BaseException) -> str:
    """The words of the operating system for an error, or those of the error itself."""
    if isinstance(error, MemoryError):
        return "out of memory"
    words: str | None = getattr(error, "strerror", None)
    if isinstance(error, OSError) and error.errno and words and words.startswith(_TRIOS):
        return os.strerror(error.errno)
    return words or said(error)


def write_error(what: object, error: OSError, *, elsewhere: str = _ELSEWHERE) -> ConfigError:
    """The error to raise when a file or a folder cannot be written.

    Args:
        what: its path, or a description of it.
        error: the system's error.
        elsewhere: the advice that tells how to choose another place.
    """
    return ConfigError(f"cannot write {what}: {_said(error).replace(_ELSEWHERE, elsewhere)}")


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn an error of the operating system in this context into that of :func:`write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(what, error) from None


_SHORTAGES: Final = (
    (MemoryError, "", NO_MEMORY),
    # Of the dynamic loader, which NumPy and others quote.
    (ImportError, "failed to map segment", NO_MEMORY),
    # Of CPython where it has no memory even for its MemoryError, or not for a lock.
    (SystemError, "without exception set", NO_MEMORY),
    (RuntimeError, "can't allocate", NO_MEMORY),
    # threading has no exception of its own for it.
    (RuntimeError, "new thread", NO_THREAD),
)
"""Exceptions that say that memory or threads are exhausted: class, words, and our message."""


def refusal(error: BaseException) -> str | None:
    """An error of the operating system, or exhausted memory or threads, in one line; ``None`` for
    every other error, which is a defect of the program.

    Exhausted memory or threads may be the cause of the error: in the tasks of trio itself they
    become its internal error.
    """
    if isinstance(error, OSError):
        where = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        return where + _said(error)
    for cause in _related(error):
        for kind, words, meaning in _SHORTAGES:
            if isinstance(cause, kind) and words in str(cause):
                return meaning
    return None


def is_scarce(error: BaseException) -> bool:
    """Whether an error says that memory, threads or descriptors are exhausted."""
    return refusal(error) in (NO_MEMORY, NO_THREAD) or any(
        isinstance(one, OSError) and one.errno in _SCARCE for one in _related(error)
    )


def _related(error: BaseException) -> list[BaseException]:
    """The error and all its causes."""
    found: list[BaseException] = [error]
    for one in found:  # it grows
        if isinstance(one, BaseExceptionGroup):
            found += one.exceptions
        for before in (one.__cause__, one.__context__):
            if before is not None and before not in found:
                found.append(before)
    return found


def _named(where: object) -> str:
    return os.fsdecode(where) if isinstance(where, str | bytes) else str(where)


def _said(error: OSError) -> str:
    advice = _ADVICE.get(error.errno or 0)
    return f"{reason(error)}; {advice}" if advice else reason(error)


@contextmanager
def hangup_mask(how: int) -> Iterator[None]:
    """Block or unblock (``how``: ``SIG_BLOCK``, ``SIG_UNBLOCK``) SIGHUP, which ends a process that
    has no handler yet, or none any more; one that is still pending at the end is dropped."""
    before = signal.pthread_sigmask(how, [signal.SIGHUP])
    try:
        yield
    finally:
        signal.sigtimedwait([signal.SIGHUP], 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
