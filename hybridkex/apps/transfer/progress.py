"""What a transfer tells about itself while it runs."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Called from the transfer's tasks; must not block."""

    def begin(self, name: str, size: int, done: int) -> None:
        """A file begins; ``done`` of its ``size`` bytes are there from an earlier time."""
        ...

    def advance(self, name: str, count: int) -> None:
        """``count`` bytes more."""
        ...

    def end(self, name: str, outcome: str | None) -> None:
        """It is over; ``outcome`` is why it failed, ``None`` where it went well."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should know."""
        ...


class Silent:
    """Tells nobody."""

    def begin(self, name: str, size: int, done: int) -> None:
        """Nothing."""

    def advance(self, name: str, count: int) -> None:
        """Nothing."""

    def end(self, name: str, outcome: str | None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
