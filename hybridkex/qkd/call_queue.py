"""Calls of many tasks, executed in groups.

While one group is carried out, the calls that arrive wait and form the next one. So a store that
must flush its disk before it answers flushes once for a group, and nobody waits for a timer.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Generic, TypeVar

from hybridkex.errors import KeySourceUnavailable
from hybridkex.net.event_loop import Background, Event, shielded

T = TypeVar("T")


class Call(Generic[T]):
    """One call: an operation, and then its value or its error.

    Args:
        operation: what to do.
        size: how much work it is, in keys.
        writes: whether it changes the store.
        undo: called with the value if the caller will not get it: its group failed, or the caller
            was cancelled.
    """

    __slots__ = (
        *("begun", "ended", "error", "has_value"),
        *("operation", "size", "undo", "value", "writes"),
    )

    def __init__(
        self,
        operation: Callable[[], T],
        *,
        size: int,
        writes: bool,
        undo: Callable[[T], object] | None,
    ) -> None:
        self.operation: Final = operation
        self.size: Final = max(size, 1)
        self.writes: Final = writes
        self.undo: Final = undo
        self.begun = False
        self.ended: Final = Event()
        self.has_value = False
        self.value: Any = None
        self.error: Exception | None = None

    def succeed(self, value: T) -> None:
        self.value, self.has_value = value, True

    def fail(self, error: Exception) -> None:
        """Set the error; a value is taken back."""
        self._take_back()
        self.error = error

    def _take_back(self) -> None:
        if self.has_value:
            value, self.value, self.has_value = self.value, None, False
            if self.undo is not None:
                self.undo(value)

    def abandon(self) -> None:
        """The caller was cancelled, and will not get the value."""
        self._take_back()


class CallQueue:
    """Carries out calls in groups, in the order of their arrival.

    Args:
        carry_out: carries out a group: each of its calls gets its value or its error. An exception
            is the error of all that have none.
        most: the size of a group, in keys; a larger call is a group of its own.
    """

    def __init__(self, carry_out: Callable[[list[Call[Any]]], Awaitable[None]], most: int) -> None:
        self._carry_out = carry_out
        self._most = most
        self._waiting: Final = deque[Call[Any]]()
        self._worker: Background | None = None
        self._idle = Event()

    async def run(
        self,
        operation: Callable[[], T],
        *,
        size: int = 1,
        writes: bool = False,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Carry out one call.

        A caller that is cancelled while its call waits withdraws it. A call that has begun is
        carried out to its end.
        """
        call = Call(operation, size=size, writes=writes, undo=undo)
        self._waiting.append(call)
        if self._worker is None:
            self._idle = Event()
            self._worker = Background(self._work)
        try:
            await call.ended.wait()
        except BaseException:
            if call.begun:
                try:
                    await shielded(call.ended.wait)
                finally:  # on asyncio, shielded() raises a second cancellation
                    call.abandon()
            else:
                self._waiting.remove(call)
            raise
        if call.error is not None:
            error, call.error = call.error, None
            try:
                raise error
            finally:
                del error, call
        value: T = call.value
        return value

    async def idle(self) -> None:
        """Wait until no call waits and none is carried out."""
        while self._worker is not None:
            await self._idle.wait()

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._next()
        finally:
            self._worker = None
            self._end(self._waiting)
            self._waiting.clear()
            self._idle.set()

    async def _next(self) -> None:
        group = [self._waiting.popleft()]
        size = group[0].size
        while self._waiting and (size := size + self._waiting[0].size) <= self._most:
            group.append(self._waiting.popleft())
        for call in group:
            call.begun = True
        try:
            await self._carry_out(group)
        except Exception as error:  # its callers' to handle; it must not end the loop
            for call in group:
                if call.error is None:
                    call.fail(error)
        finally:
            self._end(group)

    @staticmethod
    def _end(calls: Iterable[Call[Any]]) -> None:
        for call in calls:
            call.begun = True
            if not call.has_value and call.error is None:  # the worker was cancelled
                call.error = KeySourceUnavailable("the key store was stopped")
            call.ended.set()
