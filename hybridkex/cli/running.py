"""Running trio from a command."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

__all__ = ["first_of", "run_trio"]

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


def first_of(error: BaseException) -> BaseException:
    """The first error inside of nested groups; the error itself, if it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
