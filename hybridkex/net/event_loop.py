"""The event-loop functions that key sources need, on trio and on asyncio.

The loop that runs the caller is used; neither library is imported here. Cancellation follows the
rules of that loop.
"""

import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import ModuleType, coroutine
from typing import Any, Final, TypeAlias, TypeVar

from hybridkex.machine import leaves
from hybridkex.net.threads import Call, NoThread, run

T = TypeVar("T")
_Soon: TypeAlias = Callable[[Callable[[], object]], object]

THREAD_SECONDS: Final = 10.0
"""Seconds for which a blocking call waits for a worker if no new one can be started."""
LOOK_SECONDS: Final = 0.5
"""Seconds between two checks of a call whose caller has been cancelled."""


def _trio() -> ModuleType | None:
    """Return trio if the caller runs in it. (Another thread may be importing it.)"""
    in_task = getattr(sys.modules.get("trio.lowlevel"), "in_trio_task", None)
    return sys.modules["trio"] if in_task is not None and in_task() else None


def _asyncio() -> ModuleType:
    """Return asyncio, which is loaded already if it runs."""
    return sys.modules["asyncio"]


def on_trio() -> bool:
    return _trio() is not None


def current_time() -> float:
    """Return the seconds of the running loop's clock, or of the monotonic clock outside a loop."""
    if (trio := _trio()) is not None:
        now: float = trio.current_time()
        return now
    return time.monotonic()


async def sleep(seconds: float) -> None:
    if (trio := _trio()) is not None:
        await trio.sleep(seconds)
    else:
        await _asyncio().sleep(seconds)


async def checkpoint() -> None:
    """Let other tasks run; a pending cancellation is delivered here."""
    await sleep(0)


async def checkpoint_if_cancelled() -> None:
    """Deliver a pending cancellation, without running other tasks.

    asyncio delivers a cancellation when a task waits, so there is nothing to do there.
    """
    if (trio := _trio()) is not None:
        await trio.lowlevel.checkpoint_if_cancelled()


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Cancel the body after this many seconds (``math.inf``: never).

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


async def in_thread(
    function: Callable[..., T], *arguments: Any, abandon: bool = False, slow: bool = False
) -> T:
    """Run a blocking function in a worker thread (:mod:`hybridkex.net.threads`).

    Args:
        function: the function.
        arguments: its arguments.
        abandon: a cancelled caller does not wait for the thread, which finishes on its own.
            Otherwise the caller gets the function's result, so that no resource in it is lost, and
            the cancellation is delivered where the caller waits next. (asyncio delivers a
            cancellation only once: there it replaces the result.)
        slow: see :func:`hybridkex.net.threads.run`.

    Raises:
        NoThread: no thread was free for :data:`THREAD_SECONDS`, and none could be started.
    """
    await checkpoint_if_cancelled()
    finished = Event()
    soon = _from_threads()
    call = Call(partial(function, *arguments), lambda: soon(finished.set))
    sure = run(call, slow=slow)
    try:
        try:
            async with time_limit(math.inf if sure else THREAD_SECONDS):
                await finished.wait()
        except TimeoutError:
            if call.withdraw():
                raise NoThread from None
            await finished.wait()
    except BaseException as error:
        if call.withdraw() or abandon:
            raise
        await shielded(lambda: _ended(call, finished))
        if not _comes_again(error):
            raise
    result: T = call.result()
    return result


def _comes_again(error: BaseException) -> bool:
    """Return whether this is a cancellation that comes again at the next checkpoint (trio)."""
    trio = _trio()
    return trio is not None and isinstance(error, trio.Cancelled)


async def _ended(call: Call, finished: "Event") -> None:
    """Wait for the end of a call, also in a loop that is about to end.

    A loop without memory for its own work cancels its tasks and runs no more callbacks for other
    threads, so this polls.
    """
    while not call.has_ended:
        with suppress(TimeoutError):
            async with time_limit(LOOK_SECONDS):
                await finished.wait()


def _from_threads() -> _Soon:
    """A function that schedules calls in the running loop from other threads."""
    if (trio := _trio()) is not None:
        soon: _Soon = trio.lowlevel.current_trio_token().run_sync_soon
    else:
        soon = _asyncio().get_running_loop().call_soon_threadsafe
    return soon


async def ask(source: Callable[[], Awaitable[T]]) -> T:
    """Await a call of a key source, or of another object that is not ours.

    A cancellation of this task passes, and so do KeyboardInterrupt and SystemExit. Any other
    exception that is not an ``Exception`` is an error of the source. This is above all the
    cancellation of another task that the source has awaited: this task would seem to be cancelled.

    Raises:
        RuntimeError: the source raised such an exception, which is the ``__cause__``.
    """
    task = _current_task()
    cancellation, is_cancelled = _cancellation_of(task)
    try:
        return await source()
    except Exception:
        raise
    except BaseException as error:
        found = list(leaves(error))
        closed = _current_task() is not task  # GeneratorExit: the coroutine is being closed
        if closed or any(isinstance(one, KeyboardInterrupt | SystemExit) for one in found):
            raise
        ours = [one for one in found if isinstance(one, cancellation)] if is_cancelled() else []
        if ours:
            raise ours[0] from None
        raise for_future(error) from error


def called(function: Callable[[], T]) -> T:
    """Call a synchronous function that runs code of the application. An exception that is not an
    ``Exception`` (pyo3's PanicException) becomes one; KeyboardInterrupt and SystemExit pass."""
    try:
        return function()
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise for_future(error) from error


def for_future(error: BaseException) -> Exception:
    """Return the error, or a RuntimeError if it is not an ``Exception`` or if a ``Future`` cannot
    hold it (``StopIteration``, as in PEP 479)."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    name = type(error).__name__
    other = "" if isinstance(error, StopIteration) else ", and its caller was not cancelled"
    made = RuntimeError(f"the code that was called raised {name}{other}")
    made.__cause__ = error
    return made


def _current_task() -> Any:
    """Return the running task, if there is one."""
    if (trio := _trio()) is not None:
        return trio.lowlevel.current_task()
    asyncio = sys.modules.get("asyncio")
    running = asyncio is not None and asyncio._get_running_loop() is not None
    return _asyncio().current_task() if running else None


def _cancellation_of(task: Any) -> tuple[type[BaseException], Callable[[], bool]]:
    """The exception that cancels the running task, and whether it has been cancelled since."""
    if (trio := _trio()) is not None:
        return trio.Cancelled, lambda: trio.current_effective_deadline() == -math.inf
    if task is None:  # a coroutine without an event loop
        return BaseException, lambda: True
    # A cancellation that is still to be delivered is counted already.
    before = task.cancelling() - task._must_cancel
    return _asyncio().CancelledError, lambda: task.cancelling() > before


async def shielded(function: Callable[[], Awaitable[T]]) -> T:
    """Run an asynchronous function to completion even if the caller is cancelled.

    On asyncio, a program can cancel all tasks of its loop and continue. Then the function is
    started again, so it must be repeatable.
    """
    if (trio := _trio()) is not None:
        with trio.CancelScope(shield=True):
            return await function()
    asyncio = _asyncio()

    async def run() -> T:
        return await function()

    task: Any = None
    cancelled: BaseException | None = None
    while task is None or (task.cancelled() and task.cancelling()):
        task = asyncio.ensure_future(run())
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # the caller gets the cancellation, not this error
        raise cancelled
    result: T = task.result()
    return result


class Background:
    """A background task. Its creator must cancel it; it ends with the loop at the latest.

    ``function`` is always started: a cancellation is delivered where it first waits, or later.

    Args:
        function: the function to run. It must handle its own errors: nobody awaits the task.
        cancelled: runs if something other than :meth:`cancel` cancels the task. On asyncio, a
            program can cancel all tasks of its loop and continue.
    """

    def __init__(
        self,
        function: Callable[[], Awaitable[None]],
        *,
        cancelled: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._function = function
        self._cancelled = cancelled
        if (trio := _trio()) is not None:
            self._scope: Any = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._run)
        else:
            self._scope = _asyncio().ensure_future(begun(self._run_on_asyncio))

    def cancel(self) -> None:
        """Cancel the task where it waits next. Does nothing if it has ended."""
        self._cancelled = None
        self._scope.cancel()

    async def _run(self) -> None:
        with self._scope:
            await self._function()

    async def _run_on_asyncio(self) -> None:
        try:
            await self._function()
        except _asyncio().CancelledError:
            if self._cancelled is not None:
                await self._cancelled()
            raise


def begun(function: Callable[[], Awaitable[None]]) -> Coroutine[Any, Any, None]:
    """Make the coroutine for an asyncio task that runs a function.

    asyncio does not enter the coroutine of a task that is cancelled before its first step, so no
    ``finally`` in it would run. This coroutine has already been entered, and always starts the
    function.
    """
    run = _begin(function)
    run.send(None)
    return run


async def _begin(function: Callable[[], Awaitable[None]]) -> None:
    asyncio = _asyncio()
    try:
        await _first_step()
    except asyncio.CancelledError:
        asyncio.current_task().cancel()  # again
    await function()


@coroutine
def _first_step() -> Generator[None, None, None]:
    yield


class Event:
    """An event flag. It may be created outside any loop."""

    def __init__(self) -> None:
        self._set = False
        self._inner: Any = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Set the flag and wake all waiting tasks."""
        self._set = True
        if self._inner is not None:
            self._inner.set()

    async def wait(self) -> None:
        if self._set:
            await checkpoint()
            return
        if self._inner is None:
            self._inner = (_trio() or _asyncio()).Event()
        await self._inner.wait()


class Lock:
    """A fair lock: tasks acquire it in order of arrival. It may be created outside any loop.

    Args:
        holders: tasks that may hold it at the same time.
    """

    def __init__(self, holders: int = 1) -> None:
        self._free = holders
        self._waiting: Final = deque[Event]()

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn = Event()
        self._waiting.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self._release()  # pass our turn on to the next task
            else:
                self._waiting.remove(turn)
            raise

    async def __aexit__(self, *error: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
