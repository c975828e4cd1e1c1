"""New threads when memory is short."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

PATIENCE: Final = 3.0
"""Seconds, twice: the first time may be over because the whole process was stopped."""


@contextmanager
def bounded_thread_starts() -> Iterator[None]:
    """Within the block the main thread raises ``MemoryError`` where a new thread does not begin.

    ``threading.Thread.start`` waits, without a limit, for the new thread to say that it runs. One
    that gets no memory for its first frame ends silently, and the command would stay for
    ever, deaf to everything but signals.
    """
    start = threading.Thread.start

    def start_in_time(thread: threading.Thread) -> None:
        if threading.current_thread() is not threading.main_thread():
            start(thread)
            return
        ticks = 0

        def tick(number: int, frame: FrameType | None) -> None:
            nonlocal ticks
            ticks += 1
            # Within what wait() calls, its lock may be free, which it would then release twice.
            waits = frame is not None and frame.f_code is threading.Condition.wait.__code__
            if ticks > 1 and waits and thread.ident is None:
                raise MemoryError

        before = signal.signal(signal.SIGALRM, tick)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
        try:
            start(thread)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    threading.Thread.start = start_in_time  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]
