"""The seam between key sources and event loops does the same on trio and on asyncio."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import pytest
import trio

from hybridkex.net.event_loop import (
    Event,
    Lock,
    checkpoint,
    checkpoint_if_cancelled,
    current_time,
    in_thread,
    on_trio,
    shielded,
    sleep,
    time_limit,
)

RUN: dict[str, Callable[[Callable[[], Awaitable[Any]]], Any]] = {
    "trio": trio.run,
    "asyncio": lambda function: asyncio.run(function(), debug=True),  # type: ignore[arg-type]
}


@pytest.fixture(params=RUN)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    return RUN[request.param]


async def together(*functions: Callable[[], Awaitable[None]]) -> None:
    if on_trio():
        async with trio.open_nursery() as nursery:
            for function in functions:
                nursery.start_soon(function)
    else:
        await asyncio.gather(*(function() for function in functions))


async def cancelled_after(seconds: float, function: Callable[[], Awaitable[Any]]) -> bool:
    """Whether a cancellation from outside ended the function."""
    try:
        async with time_limit(seconds):
            await function()
    except TimeoutError:
        return True
    return False


def test_time(run: Any) -> None:
    async def main() -> None:
        started, clock = current_time(), time.monotonic()
        await sleep(0.05)
        await checkpoint()
        await checkpoint_if_cancelled()
        assert current_time() - started >= 0.04
        assert time.monotonic() - clock >= 0.04
        assert await cancelled_after(0.02, lambda: sleep(5))
        assert not await cancelled_after(float("inf"), lambda: sleep(0))

    run(main)
    assert current_time() > 0


def test_an_error_of_the_body_is_no_time_limit(run: Any) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="of the body"):
            async with time_limit(5):
                raise ValueError("of the body")

    run(main)


@pytest.mark.parametrize("abandon", [True, False])
def test_a_thread_and_a_caller_who_is_cancelled(run: Any, abandon: bool) -> None:
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait(0.2)
        done.set()

    async def main() -> None:
        assert await in_thread(lambda: 7, abandon=abandon) == 7
        await cancelled_after(0.02, lambda: in_thread(work, abandon=abandon))
        assert done.is_set() is not abandon

    run(main)
    # Without a free thread the call is cancelled before it begins.
    assert not begun.is_set() or done.wait(30)


def test_what_a_thread_has_taken_is_not_lost_with_a_cancellation() -> None:
    """The caller gets it; the cancellation is delivered where the caller waits next."""
    left, taken = iter(range(5)), []
    begun = threading.Event()

    def take() -> list[int]:
        begun.set()
        time.sleep(0.05)
        return list(left)

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    await trio.to_thread.run_sync(begun.wait)
                    scope.cancel()

                nursery.start_soon(cancel)
                taken.extend(await in_thread(take))
                await in_thread(taken.append, 7)
        assert scope.cancelled_caught

    trio.run(main)
    assert taken == [0, 1, 2, 3, 4]


def test_a_shielded_function_runs_to_its_end(run: Any) -> None:
    done: list[int] = []

    async def work() -> int:
        await sleep(0.1)
        done.append(1)
        return 5

    async def fail() -> None:
        await sleep(0)
        raise KeyError("of the function")

    async def main() -> None:
        assert await shielded(work) == 5
        await cancelled_after(0.02, lambda: shielded(work))
        assert done == [1, 1]
        with pytest.raises(KeyError):
            await shielded(fail)

    run(main)


def test_an_event_wakes_all(run: Any) -> None:
    event, woken = Event(), list[int]()

    async def wait() -> None:
        await event.wait()
        woken.append(1)

    async def set_it() -> None:
        await sleep(0.01)
        assert not woken
        event.set()

    async def main() -> None:
        await together(wait, wait, set_it)
        await event.wait()
        assert event.is_set()
        assert woken == [1, 1]

    run(main)


def test_a_lock_is_fair_and_survives_cancellation(run: Any) -> None:
    lock, order = Lock(), list[int]()

    def holder(number: int, pause: float) -> Callable[[], Awaitable[None]]:
        async def hold() -> None:
            await sleep(number / 20)
            async with lock:
                order.append(number)
                await sleep(pause)

        return hold

    async def give_up() -> None:
        await sleep(0.12)
        assert await cancelled_after(0.01, holder(0, 0))

    async def main() -> None:
        await together(holder(1, 0.4), holder(2, 0), holder(3, 0), give_up)
        assert order == [1, 2, 3]
        async with lock:
            pass

    run(main)
    order.clear()
    run(main)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hybridkex", {"asyncio", "anyio", "uvloop", "hybridkex.aio"}),
        ("hybridkex.qkd", {"asyncio", "anyio", "uvloop", "hybridkex.aio"}),
        ("hybridkex.aio", {"anyio", "uvloop", "httpx", "httpcore", "uvicorn", "hypercorn"}),
    ],
)
def test_what_is_not_loaded(module: str, absent: set[str]) -> None:
    """Whoever uses one event loop loads nothing of the others."""
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert absent & set(loaded.stdout.split()) == set()


@pytest.mark.parametrize("loaded", [(), ("trio",), ("trio", "trio.lowlevel")])
def test_while_another_thread_imports_trio(
    loaded: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module has no names yet; asyncio runs on."""
    for name in ("trio", "trio.lowlevel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in loaded:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    async def main() -> None:
        assert not on_trio()
        await sleep(0)

    asyncio.run(main())
