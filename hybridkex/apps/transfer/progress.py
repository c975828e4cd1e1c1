"""How a transfer reports what it does."""

from typing import Protocol

__all__ = ["NullProgress", "Progress"]


class Progress(Protocol):
    """Is called from the transfer's tasks and must not block."""

    def begin(self, name: str, size: int, done: int) -> None:
        """A file begins; ``done`` of its ``size`` bytes were stored earlier."""
        ...

    def advance(self, name: str, count: int) -> None:
        """``count`` bytes more."""
        ...

    def end(self, name: str, outcome: str | None) -> None:
        """A file has ended; ``outcome`` is why it failed, ``None`` on success."""
        ...

    def note(self, text: str) -> None:
        """A message for the user."""
        ...


class NullProgress:
    """Reports nothing."""

    def begin(self, name: str, size: int, done: int) -> None:
        """Do nothing."""

    def advance(self, name: str, count: int) -> None:
        """Do nothing."""

    def end(self, name: str, outcome: str | None) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
