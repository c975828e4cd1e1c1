"""What sender and receiver say to each other; ``docs/file-transfer.md`` is the specification.

A frame is one byte of type, four bytes of length (big-endian) and a body: raw bytes of a file for
type 0, else a JSON object. Everything comes from an authenticated peer and is checked all the same.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, get_type_hints

from hybridkex.errors import HybridkexError

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
    "Bye",
    "Drop",
    "End",
    "Failed",
    "Have",
    "Hello",
    "Message",
    "Offer",
    "ProtocolError",
    "Same",
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
"""Bytes of a file in a frame, at most."""
MAX_MESSAGE: Final = 1 << 16
WINDOW: Final = 64
"""Offers that may wait for their outcome at once."""
BEAT: Final = 15
"""Seconds between two words of a receiver, at most."""


class ProtocolError(HybridkexError):
    """The other end does not keep to the protocol."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First message of the sender: the transfer goes on under its name after a break."""

    version: int
    transfer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A file or a folder; ``n`` is its number from now on."""

    n: int
    path: tuple[str, ...]
    folder: bool
    size: int
    mtime_ns: int
    executable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Have:
    """What the receiver has of an offered file: its first ``size`` bytes have this digest.

    ``complete``: they stand under the final name, and it may be replaced if ``replace`` is set.
    """

    n: int
    size: int
    sha256: str
    complete: bool
    replace: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Same:
    """The file that stands there is the file that was offered."""

    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The data from ``offset`` on follow."""

    n: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The data are complete; the digest is of the whole file."""

    n: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The sender gives this one up."""

    n: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Verified, on the disk and under its final name; ``already``: it was there before."""

    n: int
    already: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The receiver cannot or will not take this one."""

    n: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bye:
    """Nothing more will be asked for (sender), all was answered (receiver)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alive:
    """The receiver is there, however slow its disk: it says so every :data:`BEAT` seconds."""


Message = Hello | Offer | Have | Same | Start | End | Drop | Stored | Failed | Bye | Alive

_TYPES: Final[dict[int, type[Message]]] = {
    1: Hello,
    2: Offer,
    3: Have,
    4: Same,
    5: Start,
    6: End,
    7: Drop,
    8: Stored,
    9: Failed,
    10: Bye,
    11: Alive,
}
_CODES: Final = {kind: code for code, kind in _TYPES.items()}
_HINTS: Final = {kind: get_type_hints(kind) for kind in _TYPES.values()}


def header(kind: int, length: int) -> bytes:
    """The head of a frame."""
    return bytes([kind]) + length.to_bytes(4)


def split_header(data: bytes) -> tuple[int, int]:
    """Type and length. Raises ``ProtocolError`` for a frame that must not be."""
    kind, length = data[0], int.from_bytes(data[1:])
    if kind != DATA and kind not in _TYPES:
        raise ProtocolError(f"a frame of the unknown type {kind}")
    if length > (CHUNK if kind == DATA else MAX_MESSAGE):
        raise ProtocolError(f"a frame of {length} bytes")
    return kind, length


def encode(message: Message) -> bytes:
    """The whole frame."""
    # JSON's escapes carry the lone surrogates that stand for bytes outside UTF-8 (PEP 383).
    body = json.dumps(asdict(message), separators=(",", ":")).encode("ascii")
    return header(_CODES[type(message)], len(body)) + body


def decode(kind: int, body: bytes) -> Message:
    """The message in a frame's body. Raises ``ProtocolError``."""
    wanted = _TYPES[kind]
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ProtocolError(f"{wanted.__name__}: not JSON") from None
    hints = _HINTS[wanted]
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(wanted)}:
        raise ProtocolError(f"{wanted.__name__}: wrong fields")
    return wanted(**{name: _checked(wanted, hints[name], value) for name, value in values.items()})


def _checked(wanted: type[Message], hint: Any, value: object) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and type(value) is int and 0 <= value < 1 << 63:
        return value
    if hint is str and isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ProtocolError(f"{wanted.__name__}: a field of the wrong type")
