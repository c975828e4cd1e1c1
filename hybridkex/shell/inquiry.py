"""Inquiry: a call of a key source in a separate task.

The caller continues meanwhile: a source that is slow, or never answers, delays neither a deadline
nor anything else.
"""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from hybridkex.net.event_loop import Background, ask

T = TypeVar("T")


class Inquiry(Generic[T]):
    """One call, started at once.

    Args:
        ask: the function to call.
        answered: called when :meth:`result` has become available.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], answered: Callable[[], None]) -> None:
        self._ask = ask
        self._answered = answered
        self._answers: list[T] = []
        self._error: Exception | None = None
        self._task = Background(self._run, cancelled=self._cancelled)

    @property
    def over(self) -> bool:
        return bool(self._answers) or self._error is not None

    def result(self) -> T:
        """The result, once :attr:`over`; raises the exception of the call."""
        if self._error is not None:
            raise self._error
        return self._answers[0]

    def cancel(self) -> None:
        """The result is no longer needed."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            self._answers.append(await ask(self._ask))
        except Exception as error:
            self._error = error
        self._answered()

    async def _cancelled(self) -> None:
        self._error = RuntimeError("the call of the key source was cancelled")
        self._answered()
