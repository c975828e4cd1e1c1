"""Progress reports of a transfer."""

from collections.abc import Sequence
from typing import Protocol


class Progress(Protocol):
    """The callbacks of a transfer, called from its tasks; they must not block."""

    def begin(self, name: str, size: int, done: int) -> None:
        """A file begins; ``done`` of its ``size`` bytes were stored earlier."""

    def advance(self, name: str, count: int) -> None:
        """``count`` more bytes have been transferred."""

    def end(self, name: str, outcome: str | None) -> None:
        """A file has ended; ``outcome`` is why it failed, ``None`` on success."""

    def stored(self, files: Sequence[tuple[str, int]]) -> None:
        """These small files, names and sizes, were transferred and stored; nothing else was
        reported of them."""

    def note(self, text: str) -> None:
        """A message for the user."""


class NullProgress:
    """Reports nothing."""

    def begin(self, name: str, size: int, done: int) -> None:
        """Do nothing."""

    def advance(self, name: str, count: int) -> None:
        """Do nothing."""

    def end(self, name: str, outcome: str | None) -> None:
        """Do nothing."""

    def stored(self, files: Sequence[tuple[str, int]]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
