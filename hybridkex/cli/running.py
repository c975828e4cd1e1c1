"""Running trio from a command."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import trio

from hybridkex.cli.names import SharedLookups
from hybridkex.machine import leaves

T = TypeVar("T")


def run_trio(main: Callable[[], Awaitable[T]]) -> T:
    """Run to completion; an error is unwrapped from the exception groups of its nurseries.

    Of several errors the first is raised: a command reports one failure.
    Ctrl-C is delivered at a checkpoint: elsewhere it could leave coroutines unawaited.
    """

    async def run() -> T:
        trio.socket.set_custom_hostname_resolver(SharedLookups())
        return await main()

    try:
        return trio.run(run, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        raise next(leaves(group)) from None


@contextmanager
def end_as_interrupted() -> Iterator[None]:
    """In the context, SIGTERM and SIGHUP end a command as Ctrl-C does, so that it ends its
    processes and removes its temporary files."""

    def interrupt(_: int, frame: FrameType | None) -> None:
        # The current handler of Ctrl-C: trio's while it runs, Python's before and after.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
