"""Running trio from a command."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Final, TypeVar

import trio

from hybridkex.cli.names import SharedLookups
from hybridkex.errors import LocalStateError
from hybridkex.machine import NO_MEMORY, leaves
from hybridkex.net import threads
from hybridkex.text import get_logger

LOG: Final = get_logger("hybridkex.cli.running")

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
        found = trio.run(run, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseException as error:
        first = next(leaves(error))
        if isinstance(first, KeyboardInterrupt) and threads.has_interrupted():
            raise LocalStateError(NO_MEMORY) from None
        if first is error:
            raise
        raise first from None
    if threads.has_interrupted():  # it was taken for a signal that asks for the end
        raise LocalStateError(NO_MEMORY)
    return found


class EndRequest:
    """Why a command that runs until it is asked to end is to end."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_due = False

    def note(self, number: int) -> None:
        """A signal asks for the end; the first one is logged."""
        if self.signal is None:
            self.signal = signal.Signals(number)
            LOG.warning("ending: %s", self.signal.name)
        self.is_due = True

    def finish(self) -> None:
        """The work that the command was started for is done."""
        self.is_due = True


def run_service(main: Callable[[EndRequest], Awaitable[None]]) -> None:
    """Run a command that runs until it is asked to end, as :func:`run_trio` does.

    ``main`` notes in the ``EndRequest`` why it returns.

    Raises:
        LocalStateError: the command has ended although nobody asked it to.
    """
    request = EndRequest()
    run_trio(partial(main, request))
    if not request.is_due:
        raise LocalStateError("ended although nothing asked it to; please report this fault")


@contextmanager
def end_as_interrupted() -> Iterator[None]:
    """In this context, SIGTERM and SIGHUP end a command as Ctrl-C does, so that it ends its
    processes and removes its temporary files.

    A command that a shell starts in the background ignores SIGINT, and Python then installs no
    handler for it; this context installs one. Under nohup, SIGHUP stays ignored.
    """

    def interrupt(_: int, frame: FrameType | None) -> None:
        # The current handler of Ctrl-C: trio's while it runs, Python's before and after.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    handlers: dict[int, Callable[[int, FrameType | None], object]] = {signal.SIGTERM: interrupt}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = interrupt
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        handlers[signal.SIGINT] = signal.default_int_handler
    before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
