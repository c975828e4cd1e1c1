"""Progress reports of a transfer."""

from collections.abc import Sequence


class Progress:
    """The callbacks of a transfer, called from its tasks; they must not block. These do nothing."""

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
