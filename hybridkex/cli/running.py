"""Running trio from a command."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

__all__ = ["first_of", "run_trio"]

T = TypeVar("T")


def run_trio(main: Callable[[], Awaitable[T]]) -> T:
    """Run to the end; an error comes out of the exception groups of the nurseries around it.

    Where there are several the first is raised: a command has one thing to say when it fails.
    """
    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def first_of(error: BaseException) -> BaseException:
    """The first error inside of nested groups; the error itself, if it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
