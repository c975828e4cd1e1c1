"""Running trio from a command."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import trio

__all__ = ["end_as_interrupted", "first_of", "run_trio"]

T = TypeVar("T")


def run_trio(main: Callable[[], Awaitable[T]]) -> T:
    """Run to the end; an error comes out of the exception groups of the nurseries around it.

    Where there are several the first is raised: a command has one thing to say when it fails.
    Ctrl-C comes at a checkpoint: between two lines it would leave coroutines that nobody awaits.
    """
    try:
        return trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


@contextmanager
def end_as_interrupted() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end a command as Ctrl-C does: what it started and what it
    has in temporary places goes with it."""

    def interrupt(_: int, frame: FrameType | None) -> None:
        # Whoever handles Ctrl-C now: trio while it runs, Python before and after.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def first_of(error: BaseException) -> BaseException:
    """The first error inside of nested groups; the error itself, if it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
