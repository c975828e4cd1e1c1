"""Signals from a service manager, and reports to it (sd_notify(3))."""

import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from hybridkex.machine import hangup_mask

SIGNALS: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
NOTIFY_SECONDS: Final = 1.0
"""Seconds that a report waits for a service manager that is stopped."""


@contextmanager
def open_signals() -> Iterator[AsyncIterator[int]]:
    """Receive signals for :func:`obey`, including a SIGHUP blocked since the command began."""
    with trio.open_signal_receiver(*SIGNALS) as received, hangup_mask(signal.SIG_UNBLOCK):
        yield received


async def obey(
    received: AsyncIterator[int],
    reload: Callable[[], Awaitable[None]],
    end: Callable[[int], object],
) -> None:
    """Call ``reload`` for SIGHUP, once at a time, and ``end`` with the number of any other signal.

    Args:
        received: the signals, of :func:`open_signals`.
        reload: cancelled by a signal to end, so that a file or a name server that does not answer
            does not delay the shutdown. It handles its own errors.
        end: called for each such signal; a second one may ask for an immediate end.
    """
    wanted, reloading = trio.Event(), trio.CancelScope()

    async def reload_when_asked() -> None:
        nonlocal wanted
        with reloading:
            while True:
                await wanted.wait()
                wanted = trio.Event()
                await reload()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reload_when_asked)
        async for number in received:
            if number == signal.SIGHUP:
                wanted.set()
            else:
                reloading.cancel()
                end(number)


def notify(*fields: str) -> None:
    """Send ``KEY=value`` fields, if a service manager listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A leading @ denotes the zero byte of an abstract socket (unix(7)).
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.settimeout(NOTIFY_SECONDS)
            sender.connect(address)
            sender.sendall("\n".join(fields).encode())
        except OSError:
            # Without a listener the service continues.
            return


def notify_reloading() -> None:
    """Report that a reload has begun; ``READY=1`` reports its end."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify("RELOADING=1", f"MONOTONIC_USEC={microseconds}")
