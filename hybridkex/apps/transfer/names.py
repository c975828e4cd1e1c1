"""Paths in a transfer: which are allowed, and how they are displayed."""

from typing import Final
from unicodedata import category

from hybridkex.errors import HybridkexError
from hybridkex.text import printable

__all__ = ["PARTIAL", "UnsafeName", "check_path", "reason_alone", "shown"]

PARTIAL: Final = ".hybridkex-partial"
"""The folder for incomplete files, inside the receiving folder: on the same file system."""

_LONGEST: Final = 255
_DEEPEST: Final = 128
_SHOWN: Final = 300
_LONGEST_PATH: Final = 4096
"""PATH_MAX of Linux: a longer path cannot be opened by its name, and would not fit a message."""


class UnsafeName(HybridkexError):
    """A path that could leave the receiving folder, or that many file systems do not support."""


def check_path(path: tuple[str, ...]) -> None:
    """Refuse everything but a plain relative path. Raises ``UnsafeName``.

    Names are never rewritten, since two names could become one. Symbolic links are detected when
    the path is opened, see :mod:`hybridkex.apps.transfer.folder`.
    """
    if not 1 <= len(path) <= _DEEPEST:
        raise UnsafeName(f"{shown(path)}: the path has more than {_DEEPEST} parts, or none")
    # As a file system that ignores case and trailing dots and spaces sees it (FAT).
    if path[0].casefold().rstrip(". ") == PARTIAL:
        raise UnsafeName(f"{shown(path)}: {PARTIAL} is reserved for incomplete files")
    total = 0
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
        total += length + 1
    if total > _LONGEST_PATH:
        raise UnsafeName(f"{shown(path)}: the path has more than {_LONGEST_PATH} bytes")


def shown(path: tuple[str, ...]) -> str:
    """The path for a terminal or a log: control characters are escaped, and a long path is
    shortened in the middle."""
    text = "/".join(path[:_DEEPEST])
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 2 :]}"
    return printable(text)


def reason_alone(reason: str, path: tuple[str, ...]) -> str:
    """A reason without the path before it, for a line that names the path itself."""
    return reason.removeprefix(f"{shown(path)}: ")
