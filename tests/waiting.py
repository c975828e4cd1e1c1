"""Wait for conditions without an event, in another process or task."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import trio

PATIENCE = 30.0
"""Seconds; far more than any condition takes on a busy machine."""

Condition = Callable[[], object]


def until(condition: Condition, process: Any = None, *, seconds: float = PATIENCE) -> None:
    """Block until the condition holds; fail at once if ``process`` ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.005)


async def trio_until(condition: Condition, *, seconds: float = PATIENCE) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  # see the module
            await trio.sleep(0.005)


async def asyncio_until(condition: Condition, *, seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # see the module
            await asyncio.sleep(0.005)
