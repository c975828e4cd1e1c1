"""The event loops of the tests of the asyncio shell."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., Any]
"""``run(coroutine, seconds=60)``; see ``conftest.py``."""


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed: pip install uvloop")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
