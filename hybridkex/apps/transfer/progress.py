"""Progress reports of a transfer."""

from collections.abc import Sequence
from typing import Protocol


class File(Protocol):
    """A file of a transfer. All reports of a file pass the same object, since two files may be
    shown under the same name."""

    @property
    def path(self) -> tuple[str, ...]:
        """Its name at the receiver, as components."""

    @property
    def size(self) -> int:
        """In bytes."""


class Progress:
    """The callbacks of a transfer, called from its tasks; they must not block. These do nothing."""

    def begin(self, file: File, done: int) -> None:
        """A file begins; ``done`` of its bytes were stored earlier."""

    def advance(self, file: File, count: int) -> None:
        """``count`` more bytes have been transferred."""

    def end(self, file: File, outcome: str | None) -> None:
        """A file has ended; ``outcome`` is why it failed, ``None`` on success."""

    def stored(self, files: Sequence[File]) -> None:
        """These small files were transferred and stored; nothing else was reported of them."""

    def note(self, text: str) -> None:
        """A message for the user."""
