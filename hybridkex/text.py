r"""Text from outside, made safe to display.

A certificate, a file name or a KME's answer can contain characters that clear a terminal, forge a
log line, or reverse a line. They are escaped in four places that all text passes through:

- :class:`~hybridkex.errors.HybridkexError` escapes its message;
- a logger from :func:`get_logger` escapes the arguments of each record;
- the command line writes through :class:`PrintableOutput`;
- the description of a peer (:attr:`PeerCertificate.subject
  <hybridkex.auth.PeerCertificate.subject>`, the names in a :class:`~hybridkex.Session`) is escaped
  when it is read.

The escapes are Python's: ``\n``, ``\x1b``, ``\u202e``. Escaping twice changes nothing.
"""

import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any, Final, TextIO

MOST: Final = 4096
"""The maximum number of characters of a text to show."""

_INVISIBLE: Final = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)
"""Characters that Python calls printable but that are invisible (Default_Ignorable_Code_Point, and
a blank)."""


def printable(text: str, *, most: int = MOST) -> str:
    r"""Text without control characters or invisible characters, of bounded length: a message that
    quotes a long text still says what happened, at its beginning, and what to do, at its end.

    Args:
        text: from anywhere.
        most: characters to show; what is left out is in the middle.
    """
    # Not all of it is escaped: a peer's text may have millions of characters.
    middle = max(0, len(text) - 2 * most)
    shown = escaped(text[:most] + text[-most:] if middle else text)
    if len(shown) <= most:
        return shown
    note = f"... ({len(shown) + middle:,} characters in all) ..."
    end = (most - len(note)) // 3
    return f"{shown[: most - len(note) - end]}{note}{shown[-end:]}"


def said(error: BaseException) -> str:
    """The text of an exception, or its class's name where it has none, for a message that quotes
    it."""
    return str(error) or type(error).__name__


def escaped(text: str, *, keep: str = "") -> str:
    r"""Text without control characters or invisible characters, as long as it is.

    Escaped are control characters (C0, DEL, C1), the characters that reverse a line or have no
    width, line and paragraph separators, lone surrogates, private and unassigned code points, and
    all spaces but U+0020.

    Args:
        text: from anywhere.
        keep: characters to pass as they are, such as ``"\n"``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in keep or (char.isprintable() and char not in _INVISIBLE) else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return ascii(char)[1:-1]


def json_line(value: object, *, indent: int | None = None) -> str:
    """One line of ASCII JSON that any parser accepts and any terminal can show.

    Lone surrogates, which many parsers refuse, are escaped inside the string (``\\\\udc80``).
    """
    text = json.dumps(_without_surrogates(value), indent=indent)
    return text.replace("\x7f", "\\u007f")


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return "".join(_escaped(one) if "\ud800" <= one <= "\udfff" else one for one in value)
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(one) for one in value]
    return value


class _PrintableRecords(logging.Filter):
    """Escapes the arguments of a record, and the traceback that goes with it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = printable(str(record.msg))
        if isinstance(record.args, Mapping):
            record.args = {key: _argument(value) for key, value in record.args.items()}
        elif record.args:
            record.args = tuple(map(_argument, record.args))
        if record.exc_info and not record.exc_text:
            lines = traceback.format_exception(*record.exc_info)
            record.exc_text = escaped("".join(lines), keep="\n").rstrip("\n")
        return True


PRINTABLE: Final = _PrintableRecords()
"""A filter for handlers that may get records of other loggers."""


def _argument(value: object) -> object:
    if isinstance(value, int | float | None):
        return value
    return printable(said(value) if isinstance(value, BaseException) else str(value))


def get_logger(name: str) -> logging.Logger:
    """The logger of this name; its records cannot forge lines of the log."""
    logger = logging.getLogger(name)
    logger.addFilter(PRINTABLE)  # once per logger
    return logger


class PrintableOutput:
    """A text stream that escapes all but line feeds and tabs, and what its encoding lacks.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream: Final = stream

    def write(self, text: str) -> int:
        """Write text, escaped. Returns the length of the text given."""
        shown = escaped(text, keep="\n\t")
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def terminal(stream: Any) -> TextIO:
    """The stream underneath a :class:`PrintableOutput`, for code that draws on a terminal.

    It still escapes what its encoding lacks.
    """
    while isinstance(stream, PrintableOutput):
        stream = stream.stream
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    found: TextIO = stream
    return found
