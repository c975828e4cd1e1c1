"""The messages of the file transfer; ``docs/file-transfer.md`` is the specification.

A frame is one byte of type, four bytes of length (big-endian) and a body: raw file data for type 0,
otherwise a JSON object. Every field is checked, although the peer is authenticated.

Resuming discloses nothing: the receiver states how many bytes it has, the sender sends the SHA-256
of as many of its own first bytes, and the receiver compares. A receiver never sends a digest, and
the sender cannot choose how many bytes are compared, so the sender learns neither the digest nor
the content of a file that another sender stored.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, NewType, TypeGuard, get_type_hints

from hybridkex.errors import HybridkexError
from hybridkex.json_text import load_json

__all__ = [
    "BEAT",
    "CHUNK",
    "DATA",
    "HEADER",
    "MAX_MESSAGE",
    "PROTOCOL",
    "VERSION",
    "WINDOW",
    "Alive",
    "Busy",
    "Bye",
    "Digest",
    "Drop",
    "End",
    "Failed",
    "Have",
    "Hello",
    "Message",
    "Nanoseconds",
    "Offer",
    "ProtocolError",
    "Send",
    "Start",
    "Stored",
    "decode",
    "encode",
    "header",
    "split_header",
]

PROTOCOL: Final = "hybridkex-transfer/1"
"""The ALPN name."""

VERSION: Final = 1
DATA: Final = 0
HEADER: Final = 5
CHUNK: Final = 1 << 20
"""Most bytes of file data in a frame."""
MAX_MESSAGE: Final = 1 << 16
WINDOW: Final = 64
"""Most offers that may await their outcome at once."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A file or a folder; ``n`` is its number in later messages.

    ``mode`` has the permission bits of chmod(2); the receiver takes the lower nine.
    """

    n: int
    path: tuple[str, ...]
    folder: bool
    size: int
    mtime_ns: Nanoseconds
    mode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Have:
    """Receiver: I have ``size`` bytes of this file; send the digest of as many of yours."""

    n: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """Sender: SHA-256, in hex, of as many bytes of the file as the receiver has."""

    n: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Receiver: send the file from ``offset`` on, which is 0 or the length of the digest's
    input."""

    n: int
    offset: int


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Receiver: verified, on disk and under its final name.

    ``already``: the receiver had it before. ``lost``: metadata that could not be kept, such as a
        date that the file system cannot store; empty if there is none.
    """

    n: int
    already: bool
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


Message = (
    Hello | Offer | Have | Digest | Send | Start | End | Drop | Stored | Failed | Bye | Alive | Busy
)

_TYPES: Final[dict[int, type[Message]]] = {
    1: Hello,
    2: Offer,
    3: Have,
    4: Digest,
    5: Send,
    6: Start,
    7: End,
    8: Drop,
    9: Stored,
    10: Failed,
    11: Bye,
    12: Alive,
    13: Busy,
}
_CODES: Final = {kind: code for code, kind in _TYPES.items()}
_HINTS: Final = {kind: get_type_hints(kind) for kind in _TYPES.values()}


def header(kind: int, length: int) -> bytes:
    """The header of a frame."""
    return bytes([kind]) + length.to_bytes(4)


def split_header(data: bytes) -> tuple[int, int]:
    """Type and length. Raises ``ProtocolError`` for an unknown type or an oversized frame."""
    kind, length = data[0], int.from_bytes(data[1:])
    if kind != DATA and kind not in _TYPES:
        raise ProtocolError(f"a frame of the unknown type {kind}")
    if length > (CHUNK if kind == DATA else MAX_MESSAGE):
        raise ProtocolError(f"a frame of {length} bytes")
    return kind, length


def encode(message: Message) -> bytes:
    """The whole frame. Paths and reasons are bounded, so that it never exceeds the limit."""
    # JSON escapes can carry lone surrogates, which represent non-UTF-8 bytes (PEP 383).
    body = json.dumps(asdict(message), separators=(",", ":")).encode("ascii")
    return header(_CODES[type(message)], len(body)) + body


def decode(kind: int, body: bytes) -> Message:
    """The message in a frame's body. Raises ``ProtocolError``."""
    wanted = _TYPES[kind]
    try:
        values = load_json(body)
    except ValueError:
        raise ProtocolError(f"{wanted.__name__}: not JSON") from None
    hints = _HINTS[wanted]
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(wanted)}:
        raise ProtocolError(f"{wanted.__name__}: wrong fields")
    return wanted(**{name: _checked(wanted, hints[name], value) for name, value in values.items()})


def _is_list_of_strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _checked(wanted: type[Message], hint: Any, value: object) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and type(value) is int and 0 <= value < 1 << 63:
        return value
    if hint is Nanoseconds and type(value) is int and abs(value) < _LATEST:
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint == tuple[str, ...] and _is_list_of_strings(value):
        return tuple(value)
    raise ProtocolError(f"{wanted.__name__}: a field of the wrong type")
