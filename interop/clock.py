"""A clock for a process under test that can be moved, forwards and back."""

import datetime
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ["follow"]


def follow(file: Path) -> None:
    """From now on the clock of this process is ahead by as many seconds as a file says.

    The file is read ten times a second, as far as it can be read. Whatever imports
    ``datetime.datetime`` later gets a moved one. What is measured (``time.monotonic``) stays as it
    is, and so do the clocks of libraries in C.
    """
    real, monotonic, moment = time.time, time.monotonic, datetime.datetime
    ahead = due = 0.0

    def offset() -> float:
        nonlocal ahead, due
        if monotonic() > due:
            due = monotonic() + 0.1
            with suppress(OSError, MemoryError):  # other faults may act at the same time
                ahead = float(file.read_text())
        return ahead

    class Any(type):
        def __instancecheck__(cls, one: object) -> bool:
            return isinstance(one, moment)

    class Moved(moment, metaclass=Any):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return super().now(tz) + datetime.timedelta(seconds=offset())

    time.time = lambda: real() + offset()
    datetime.datetime = Moved  # type: ignore[misc]
