"""The few things that key sources need of an event loop, on trio and on asyncio.

Whichever loop runs the caller is used; neither is imported here. Cancellation is that loop's own.
"""

import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import TypeVar

__all__ = ["checkpoint", "current_time", "in_thread", "sleep", "time_limit"]

T = TypeVar("T")


def _trio() -> ModuleType | None:
    """trio, if the caller runs in it."""
    trio = sys.modules.get("trio")
    return trio if trio is not None and trio.lowlevel.in_trio_task() else None


def _asyncio() -> ModuleType:
    """asyncio, which is loaded already where it runs."""
    return sys.modules["asyncio"]


def current_time() -> float:
    """Seconds of the running loop's clock; of the monotonic clock outside any loop."""
    if (trio := _trio()) is not None:
        now: float = trio.current_time()
        return now
    return time.monotonic()


async def sleep(seconds: float) -> None:
    """Wait."""
    if (trio := _trio()) is not None:
        await trio.sleep(seconds)
    else:
        await _asyncio().sleep(seconds)


async def checkpoint() -> None:
    """Let other tasks run, and be cancelled here if the caller has been cancelled."""
    await sleep(0)


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Cancel the body after so many seconds (``math.inf``: never).

    Raises:
        TimeoutError: the body was cancelled by this limit.
    """
    if (trio := _trio()) is not None:
        with trio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError
    else:
        async with _asyncio().timeout(None if seconds == float("inf") else seconds):
            yield


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a worker thread.

    A caller who is cancelled does not wait for the thread, which ends by itself.
    """
    result: T
    if (trio := _trio()) is not None:
        result = await trio.to_thread.run_sync(function, abandon_on_cancel=True)
    else:
        result = await _asyncio().to_thread(function)
    return result
