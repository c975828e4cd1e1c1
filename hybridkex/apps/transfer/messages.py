"""The messages of the file transfer; ``docs/file-transfer.md`` is the specification.

A frame is one byte of type, four bytes of length (big-endian) and a body: raw file data for type 0,
number, digest and content of a small file for type 14, otherwise a JSON object. Every field is
checked, although the peer is authenticated.

Resuming discloses nothing: the receiver states how many bytes it has, the sender sends the SHA-256
of as many of its own first bytes, and the receiver compares. A receiver never sends a digest, and
the sender cannot choose how many bytes are compared, so the sender learns neither the digest nor
the content of a file that another sender stored.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple, NewType, TypeAlias, TypeGuard, get_args, get_type_hints

from hybridkex.errors import HybridkexError
from hybridkex.json_text import load_json

PROTOCOL: Final = "hybridkex-transfer/2"
"""The ALPN name."""

VERSION: Final = 2
DATA: Final = 0
HEADER: Final = 5
CHUNK: Final = 1 << 20
"""The maximum number of file data bytes in a frame."""
WHOLE: Final = 1 << 18
"""The maximum size of a file that is sent in one frame, in bytes."""
MAX_MESSAGE: Final = 1 << 16
WINDOW: Final = 2048
"""The maximum number of offers without an outcome."""
BEAT: Final = 15
"""The longest pause between two messages of a receiver, in seconds."""

Nanoseconds = NewType("Nanoseconds", int)
"""Nanoseconds since 1970; negative before."""
_LATEST: Final = (1 << 63) * 10**9
"""No file system stores times beyond 64 bits of seconds."""


class ProtocolError(HybridkexError):
    """The other end violates the protocol."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First message of the sender; ``transfer`` identifies the transfer across connections."""

    version: int
    transfer: str


class Offer(NamedTuple):
    """A file or a folder; ``n`` is its number in later messages.

    ``mode`` has the permission bits of chmod(2); the receiver takes the lower nine. ``checksum``:
    compare an existing file by its content, even if its size and date are the same.
    """

    n: int
    path: tuple[str, ...]
    folder: bool
    size: int
    mtime_ns: Nanoseconds
    mode: int
    checksum: bool = False


Entry: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""The name and mode of a folder; the name, mode, size and date of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offers:
    """Files and folders that are in one folder; the first has the number ``n``, the others those
    that follow."""

    n: int
    folder: tuple[str, ...]
    checksum: bool
    entries: tuple[Entry, ...]

    def each(self) -> Iterator[Offer]:
        for n, entry in enumerate(self.entries, self.n):
            path = (*self.folder, entry[0])
            if len(entry) == 2:
                yield Offer(n, path, True, 0, Nanoseconds(0), entry[1])
            else:
                _, mode, size, mtime_ns = entry
                yield Offer(n, path, False, size, Nanoseconds(mtime_ns), mode, self.checksum)


@dataclass(frozen=True, kw_only=True, slots=True)
class Have:
    """Receiver: it has ``size`` bytes of this file; the sender sends the digest of as many
    bytes."""

    n: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """Sender: SHA-256, in hex, of as many bytes of the file as the receiver has."""

    n: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Receiver: send these files, each a number and an offset to begin at, which is 0 or the length
    of the digest's input."""

    files: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Whole:
    """Sender: a whole file of at most :data:`WHOLE` bytes, with the SHA-256 of its content."""

    n: int
    sha256: bytes
    content: bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Sender: the data follow, from the requested offset."""

    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """Sender: the data are complete; the digest covers the whole file."""

    n: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Sender: this file will not be sent."""

    n: int
    reason: str


class How(StrEnum):
    """The outcome of a file at the receiver."""

    NEW = "new"
    """From this transfer, verified."""
    SAME = "same"
    """It existed, and its content was compared; for a folder: it existed."""
    UNCHANGED = "unchanged"
    """It existed with the same size and date; its content was not compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Receiver: these files and folders are on disk and under their final names.

    ``lost``: metadata that could not be kept, such as a date that the file system cannot store;
        empty if there is none.
    """

    files: tuple[int, ...]
    how: How
    lost: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Receiver: this file is not stored."""

    n: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bye:
    """Sender: no more offers. Receiver: every offer has been answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alive:
    """Receiver, every :data:`BEAT` seconds: still alive, however slow the disk is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Busy:
    """Receiver, in answer to Hello: too many senders; try again later."""


Message: TypeAlias = (
    Hello
    | Offers
    | Have
    | Digest
    | Send
    | Start
    | End
    | Drop
    | Stored
    | Failed
    | Bye
    | Alive
    | Busy
)

_TYPES: Final[dict[int, type[Message]]] = dict(enumerate(get_args(Message), 1))
"""The type on the wire is the position in :data:`Message`."""
_CODES: Final = {kind: code for code, kind in _TYPES.items()}
_HINTS: Final = {kind: get_type_hints(kind) for kind in _TYPES.values()}


_WHOLE_CODE: Final = 14
_NUMBERED: Final = struct.Struct("!BIQ32s")
"""Type, length, number and digest of a :class:`Whole`."""
WHOLE_HEADER: Final = _NUMBERED.size


def header(kind: int, length: int) -> bytes:
    return bytes([kind]) + length.to_bytes(4)


def whole_header(n: int, sha256: bytes, size: int) -> bytes:
    """The bytes before the content in the frame of a :class:`Whole`."""
    return _NUMBERED.pack(_WHOLE_CODE, WHOLE_HEADER - HEADER + size, n, sha256)


def split_header(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Type and length. Raises ``ProtocolError`` for an unknown type or an oversized frame."""
    kind, length = data[0], int.from_bytes(data[1:HEADER])
    most = _LONGEST.get(kind)
    if most is None:
        raise ProtocolError(f"a frame of the unknown type {kind}")
    if length > most:
        raise ProtocolError(f"a frame of {length} bytes")
    return kind, length


_LONGEST: Final = {
    DATA: CHUNK,
    _WHOLE_CODE: WHOLE_HEADER - HEADER + WHOLE,
    **dict.fromkeys(_TYPES, MAX_MESSAGE),
}


def encode(message: Message | Whole) -> bytes:
    """The whole frame.

    Paths and reasons are bounded, so that it never exceeds the limit. The caller must bound lists,
    as :func:`offers` and :data:`MOST_FILES` do.
    """
    if isinstance(message, Whole):
        return whole_header(message.n, message.sha256, len(message.content)) + message.content
    values = {name: getattr(message, name) for name in _HINTS[type(message)]}
    # JSON escapes can carry lone surrogates, which represent non-UTF-8 bytes (PEP 383).
    body = json.dumps(values, separators=(",", ":")).encode("ascii")
    return header(_CODES[type(message)], len(body)) + body


MOST_FILES: Final = 512
"""The maximum number of files in one message."""
_ENTRY: Final = 80
"""Bytes of an entry without its name, in JSON, at most."""
_ESCAPED: Final = 12
"""Bytes of a character in JSON, at most; of an ASCII character that is printable, 2."""


def offers(given: Iterable[Offer]) -> Iterator[Offers]:
    """Offers with consecutive numbers, in as few messages as possible."""
    folder: tuple[str, ...] = ()
    first, checksum, room = 0, False, 0
    entries: list[Entry] = []
    for offer in given:
        name = offer.path[-1]
        cost = _ENTRY + (2 if name.isascii() else _ESCAPED) * len(name)
        if (
            not entries
            or cost > room
            or len(entries) >= MOST_FILES
            or offer.n != first + len(entries)
            or (offer.path[:-1], offer.checksum) != (folder, checksum)
        ):
            if entries:
                yield Offers(n=first, folder=folder, checksum=checksum, entries=tuple(entries))
            first, folder, checksum, entries = offer.n, offer.path[:-1], offer.checksum, []
            room = MAX_MESSAGE - len(json.dumps(folder)) - 2 * _ENTRY
        room -= cost
        if offer.folder:
            entries.append((name, offer.mode))
        else:
            entries.append((name, offer.mode, offer.size, offer.mtime_ns))
    if entries:
        yield Offers(n=first, folder=folder, checksum=checksum, entries=tuple(entries))


def decode(kind: int, body: bytes | bytearray | memoryview) -> Message | Whole:
    """The message in a frame's body. Raises ``ProtocolError``."""
    if kind == _WHOLE_CODE:
        return _whole(body)
    wanted = _TYPES[kind]
    try:
        values = load_json(bytes(body))
    except ValueError:
        raise ProtocolError(f"{wanted.__name__}: not JSON") from None
    hints = _HINTS[wanted]
    if not isinstance(values, dict) or values.keys() != hints.keys():
        raise ProtocolError(f"{wanted.__name__}: wrong fields")
    return wanted(**{name: _checked(wanted, hints[name], value) for name, value in values.items()})


def _whole(body: bytes | bytearray | memoryview) -> Whole:
    start = WHOLE_HEADER - HEADER
    if len(body) < start:
        raise ProtocolError("Whole: too short")
    n = int.from_bytes(body[:8])
    if n >= _MOST:
        raise ProtocolError("Whole: the number is too large")
    return Whole(n, bytes(body[8:start]), body[start:])


_MOST: Final = 1 << 63


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MOST


def _is_entry(value: object) -> bool:
    if type(value) is not list or not 2 <= len(value) <= 4 or not isinstance(value[0], str):
        return False
    if len(value) == 2:
        return _is_number(value[1])
    return (
        len(value) == 4
        and _is_number(value[1])
        and _is_number(value[2])
        and type(value[3]) is int
        and abs(value[3]) < _LATEST
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _checked(wanted: type[Message], hint: Any, value: object) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and _is_number(value):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is How and isinstance(value, str) and value in _HOW:
        return How(value)
    if isinstance(value, list):
        if hint == tuple[str, ...] and all(isinstance(part, str) for part in value):
            return tuple(value)
        if hint == tuple[int, ...] and all(map(_is_number, value)):
            return tuple(value)
        if hint == tuple[tuple[int, int], ...] and all(map(_is_pair, value)):
            return tuple(map(tuple, value))
        if hint == tuple[Entry, ...] and all(map(_is_entry, value)):
            return tuple(map(tuple, value))
    raise ProtocolError(f"{wanted.__name__}: a field of the wrong type")


_HOW: Final = frozenset(map(str, How))
