"""Paths in a transfer: which are allowed, and how they are displayed."""

import re
from functools import lru_cache
from typing import Final

from hybridkex.errors import HybridkexError
from hybridkex.text import printable

PARTIAL: Final = ".hybridkex-partial"
"""The folder for incomplete files, inside the receiving folder: on the same file system."""

WORK: Final = "work-"
"""Beginning of the names of the folders in it that belong to one receiving process each."""

_CONTROLS: Final = re.compile("[\\0-\\x1f\\x7f-\\x9f]")
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
    if not path or len(path) > _DEEPEST:
        raise UnsafeName(f"{shown(path)}: the path has more than {_DEEPEST} parts, or none")
    above = _checked_folder(path[:-1])
    if not above:
        _check_first(path)
    if above + _checked_length(path[-1], path) > _LONGEST_PATH:
        raise UnsafeName(f"{shown(path)}: the path has more than {_LONGEST_PATH} bytes")


@lru_cache(maxsize=64)
def _checked_folder(path: tuple[str, ...]) -> int:
    """Check the folder of a path; its length in bytes. Most paths have their folder in common."""
    if not path:
        return 0
    _check_first(path)
    return sum(_checked_length(part, path) for part in path)


def _check_first(path: tuple[str, ...]) -> None:
    # As a file system that ignores case and trailing dots and spaces sees it (FAT).
    if path[0].casefold().rstrip(". ") == PARTIAL:
        raise UnsafeName(f"{shown(path)}: {PARTIAL} is reserved for incomplete files")


def _checked_length(part: str, path: tuple[str, ...]) -> int:
    """Check a part of a path; its length in bytes, with a separator."""
    try:
        length = len(part) if part.isascii() else len(part.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise UnsafeName(f"{shown(path)}: not a file name") from None
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        raise UnsafeName(f"{shown(path)}: {part!r} is not the name of a file")
    if length > _LONGEST:
        raise UnsafeName(f"{shown(path)}: a name of more than {_LONGEST} bytes")
    if _CONTROLS.search(part):
        raise UnsafeName(f"{shown(path)}: a name with control characters")
    return length + 1


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
