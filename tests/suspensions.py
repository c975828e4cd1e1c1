"""Run a coroutine, and have it cancelled at any one of its suspensions."""

import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any


@types.coroutine
def cancelled_at(
    step: int, work: Coroutine[Any, Any, Any], cancel: Callable[[], object], reached: list[bool]
) -> Generator[Any, Any, Any]:
    """Run ``work``, and call ``cancel`` just before its suspension number ``step``."""
    act: Callable[[], Any] = partial(work.send, None)
    while True:
        try:
            waits_for = act()
        except StopIteration as end:
            return end.value
        if step == 0:
            reached.append(True)
            cancel()
        step -= 1
        try:
            value = yield waits_for
        except BaseException as error:  # handed on to the coroutine
            act = partial(work.throw, error)
        else:
            act = partial(work.send, value)
