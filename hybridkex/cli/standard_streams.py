"""Standard error that cannot fail, and descriptors 0 to 2 that are always open.

A command's standard error is a log: when its reader is gone (EPIPE) or its file system is full
(ENOSPC), lines are lost and the command continues. Every message, log line and progress bar goes
through ``sys.stderr``, so this module is the one place that ensures it.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from hybridkex.text import PrintableOutput

__all__ = ["StandardOutput", "unfailing_standard_error"]


class _Lossy(io.FileIO):
    """A file that drops what cannot be written. Nothing is buffered, so writing succeeds again as
    soon as there is room."""

    def write(self, data: Any) -> int:
        """Always the length of ``data``."""
        view = memoryview(data).cast("B")
        total = len(view)
        with contextlib.suppress(OSError):
            while view:
                # A non-blocking file returns None if nothing could be written.
                view = view[super().write(view) or len(view) :]
        return total


class StandardOutput(PrintableOutput):
    """Standard output, escaped; an error of writing to it says where it comes from."""

    def write(self, text: str) -> int:
        """As of the stream."""
        with _named():
            return super().write(text)

    def flush(self) -> None:
        """As of the stream."""
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
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # until the process ends
