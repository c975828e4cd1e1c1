"""The seam between key sources and event loops does the same on trio and on asyncio."""

import asyncio
import subprocess
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import ModuleType
from typing import Any

import pytest
import trio

from hybridkex.net.event_loop import (
    Background,
    Event,
    Lock,
    ask,
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
        go.wait(30 if abandon else 0.2)
        done.set()

    async def main() -> None:
        assert await in_thread(lambda: 7, abandon=abandon) == 7
        while not begun.is_set():  # without a free thread, the call is cancelled before it begins
            await cancelled_after(0.02, lambda: in_thread(work, abandon=abandon))
        assert done.is_set() is not abandon
        go.set()

    run(main)
    assert done.wait(30)


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


def cancel_all_tasks() -> None:
    """As programs do at their end, and tests between two cases."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


@pytest.mark.parametrize("turns", range(3))
def test_a_task_that_somebody_cancels_is_always_begun(turns: int) -> None:
    """Also one that has had no step yet: what it sets or clears at its end is in order."""
    said: list[str] = []

    async def work() -> None:
        said.append("begun")
        try:
            await asyncio.sleep(3600)
        finally:
            said.append("ended")

    async def tell() -> None:
        said.append("told")

    async def main() -> None:
        Background(work, cancelled=tell)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancel_all_tasks()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
        assert said == ["begun", "ended", "told"]

    asyncio.run(main(), debug=True)


def test_a_task_that_its_maker_cancels_at_once_is_begun(run: Any) -> None:
    said: list[str] = []

    async def work() -> None:
        said.append("begun")
        await sleep(3600)
        said.append("not cancelled")

    async def main() -> None:
        Background(work).cancel()
        for _ in range(5):
            await checkpoint()
        assert said == ["begun"]

    run(main)


@pytest.mark.parametrize("turns", range(4))
def test_a_shielded_function_outlives_a_program_that_cancels_all_tasks(turns: int) -> None:
    event = Event()

    async def main() -> None:
        waiting = asyncio.create_task(shielded(event.wait))
        for _ in range(turns):
            await asyncio.sleep(0)
        begun = turns > 0  # or there is nothing to shield
        cancel_all_tasks()
        for _ in range(5):
            await asyncio.sleep(0)
        assert waiting.done() is not begun
        event.set()
        await asyncio.wait((waiting,))
        assert waiting.cancelled()

    asyncio.run(main(), debug=True)


def test_a_shielded_function_that_ends_with_a_cancellation_ends() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await shielded(cancelled)

    asyncio.run(main(), debug=True)


async def _cancellation() -> BaseException:
    """A cancellation that hit another task, on the loop that runs."""
    caught: list[BaseException] = []

    async def wait() -> None:
        try:
            await sleep(3600)
        except BaseException as error:
            caught.append(error)
            raise

    if on_trio():
        with trio.CancelScope() as scope:
            scope.cancel()
            await wait()
    else:
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
    return caught[0]


class OfErrors(BaseExceptionGroup[Exception]):
    """A group that is no ``Exception``, although all in it are."""


FOREIGN: dict[str, Callable[[BaseException], BaseException]] = {
    "a cancellation": lambda one: one,
    "a group with one": lambda one: BaseExceptionGroup("", [KeyError(), one]),
    "a group in a group": lambda one: BaseExceptionGroup("", [BaseExceptionGroup("", [one])]),
    "a group of errors": lambda _: OfErrors("", [KeyError()]),
    "GeneratorExit": lambda _: GeneratorExit(),
    "an exception of its own": lambda _: type("Odd", (BaseException,), {})(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_a_source_raises_is_an_error_of_the_source(run: Any, kind: str) -> None:
    async def main() -> None:
        error = FOREIGN[kind](await _cancellation())

        async def source() -> None:
            await checkpoint()
            raise error

        with pytest.raises(RuntimeError, match="its caller was not cancelled") as caught:
            await ask(source)
        assert caught.value.__cause__ is error

    run(main)


@pytest.mark.parametrize(
    "error", [KeyError(), ExceptionGroup("", [KeyError()]), SystemExit(), KeyboardInterrupt()]
)
def test_what_passes_through_a_question(run: Any, error: BaseException) -> None:
    async def source() -> None:
        await checkpoint()
        raise error

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                await ask(source)
            assert caught.value is error
        whole = BaseExceptionGroup("", [SystemExit(), KeyError()])

        async def more() -> None:
            raise whole

        with pytest.raises(BaseExceptionGroup) as group:
            await ask(more)
        assert group.value is whole

    run(main)


@pytest.mark.parametrize("raises", ["the cancellation", "a group with it", "a group of groups"])
def test_our_own_cancellation_passes_through_a_question(run: Any, raises: str) -> None:
    """Alone, whatever else the source has met at its end."""

    async def source() -> None:
        try:
            await sleep(3600)
        except BaseException as error:
            if raises == "the cancellation":
                raise
            group = BaseExceptionGroup("", [KeyError(), error])
            raise (
                group if raises == "a group with it" else BaseExceptionGroup("", [group])
            ) from None

    async def main() -> None:
        async def limited() -> None:
            async with time_limit(0.01):
                await ask(source)

        with pytest.raises(TimeoutError):
            await limited()
        await checkpoint()

    run(main)


def test_a_cancellation_before_the_question_and_one_that_was_ignored() -> None:
    """asyncio counts requests to cancel: one may wait to be delivered, one may be over."""

    async def wait() -> None:
        await asyncio.sleep(3600)

    async def foreign() -> None:
        raise asyncio.CancelledError

    passed: list[bool] = []

    async def asker() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ask(wait)
        # Nobody has called uncancel().
        with pytest.raises(RuntimeError):
            await ask(foreign)
        task.cancel()
        passed.append(True)
        await ask(wait)

    async def main() -> None:
        task = asyncio.create_task(asker())
        await asyncio.wait((task,))
        assert task.cancelled()
        assert passed

    asyncio.run(main(), debug=True)


@types.coroutine
def forever() -> Generator[None, None, None]:
    yield


def test_a_question_that_is_thrown_away(run: Any) -> None:
    """A coroutine that is closed, by its owner or the garbage collector, ends without a word."""
    ended: list[bool] = []

    async def source() -> None:
        try:
            await forever()
        finally:
            ended.append(True)

    async def main() -> Coroutine[Any, Any, None]:
        coroutine = ask(source)
        coroutine.send(None)
        return coroutine

    run(main).close()
    assert ended == [True]


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
