"""Standard error that cannot fail, and descriptors 0 to 2 that are always open.

A command's standard error is a log: when its reader is gone (EPIPE), its file system is full
(ENOSPC), or its reader has stopped reading (a full pipe), lines are lost and the command continues.
Every message, log line and progress bar goes through ``sys.stderr``, so this module is the one
place that ensures it.
"""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO

PATIENCE: Final = 1.0
"""Seconds to wait for a reader that is slow; while it stays so, nothing more is waited for."""


class _Lossy(io.FileIO):
    """A file that drops what cannot be written. Nothing is buffered, so writing succeeds again as
    soon as there is room; the first line then says how much was lost to a slow reader."""

    _lost = 0
    """Bytes dropped since the reader stopped reading."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with contextlib.suppress(OSError):
            if self._lost and self._is_ready():
                notice = (
                    f"\nhybridkex: {self._lost:,} bytes of messages were lost here: nothing read "
                    "them\n"
                )
                self._lost = 0
                self._write_out(memoryview(notice.encode()))
            self._lost += self._write_out(view)
        return len(view)

    def _write_out(self, view: memoryview) -> int:
        """Returns the number of bytes that the reader did not take in time."""
        while view:
            # A pipe that is ready takes PIPE_BUF bytes at once (pipe(7)); more could block.
            if not self._is_ready():
                return len(view)
            # A non-blocking file returns None if nothing could be written.
            view = view[super().write(view[: select.PIPE_BUF]) or len(view) :]
        return 0

    def _is_ready(self) -> bool:
        return takes_output(self.fileno(), 0.0 if self._lost else PATIENCE)


def takes_output(descriptor: int, seconds: float) -> bool:
    """Whether a file, a pipe, a socket or a terminal takes ``PIPE_BUF`` bytes within a time, or
    fails, without blocking: a pipe whose reader has stopped reading does not."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


class StandardOutput:
    """Standard output; an error of writing to it says where it comes from.

    A caller may ignore an error, as ``argparse`` does for help; the next :meth:`flush` raises it
    again.
    """

    _failed: OSError | None = None

    def __init__(self, stream: TextIO) -> None:
        self.stream: Final = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            with _named():
                return self.stream.write(text)
        except OSError as error:
            self._failed = error
            raise

    def flush(self) -> None:
        """Flush the stream; a write that has failed raises again."""
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        with _named():
            self.stream.flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


@contextlib.contextmanager
def unfailing_standard_error() -> Iterator[None]:
    """While the context lasts, writing to ``sys.stderr`` raises no ``OSError``."""
    _open_missing()
    before = sys.stderr
    if before is not sys.__stderr__ and before is not None:
        yield  # replaced by another stream, for example in a test
        return
    raw: Any = _Lossy(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        raw, encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
    )
    try:
        yield
    finally:
        sys.stderr = before


def _open_missing() -> None:
    """Open standard descriptors that the caller closed (``2>&-``): otherwise the next file that is
    opened would get the number, and messages would be written to that file."""
    try:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    except OSError:  # no descriptor is left, so the lowest are open
        pass
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # until the process ends


def discard_standard_output() -> None:
    """Write nothing more to a standard output that failed; otherwise the interpreter would try to
    flush the same data at exit. Needs no new descriptor where there is none."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
