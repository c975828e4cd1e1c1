"""Names of files that come from the other end, and what of them may be shown."""

from typing import Final
from unicodedata import category

from hybridkex.errors import HybridkexError

__all__ = ["PARTIAL", "UnsafeName", "check_path", "shown"]

PARTIAL: Final = ".hybridkex-partial"
"""The folder for what is not yet complete, inside the receiving folder: on the same disk."""

_LONGEST: Final = 255
_DEEPEST: Final = 128


class UnsafeName(HybridkexError):
    """A path that could leave the folder, or that no honest folder has."""


def check_path(path: tuple[str, ...]) -> None:
    """Refuse what is not a plain relative path. Raises ``UnsafeName``.

    Nothing is rewritten: two names could become one. That the path does not leave the folder
    through a symbolic link is seen when it is walked, see :mod:`hybridkex.apps.transfer.folder`.
    """
    if not 1 <= len(path) <= _DEEPEST:
        raise UnsafeName(f"a path has 1 to {_DEEPEST} parts")
    # As a file system sees it that ignores case, and dots and spaces at the end (FAT).
    if path[0].casefold().rstrip(". ") == PARTIAL:
        raise UnsafeName(f"{PARTIAL} is the receiver's own")
    for part in path:
        try:
            length = len(part.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            raise UnsafeName(f"{shown(path)}: not a file name") from None
        if part in ("", ".", "..") or "/" in part or "\0" in part:
            raise UnsafeName(f"{shown(path)}: {part!r} is not the name of a file")
        if length > _LONGEST:
            raise UnsafeName(f"{shown(path)}: a name of more than {_LONGEST} bytes")
        if any(category(character) == "Cc" for character in part):
            raise UnsafeName(f"{shown(path)}: a name with control characters")


def shown(path: tuple[str, ...]) -> str:
    """The path for a terminal or a log: what could steer a terminal is escaped."""
    text = "/".join(path)
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )
