"""The wire format: a length of four bytes, big-endian, and that many bytes of JSON in UTF-8.

A client's messages are numbered and kept until the server has acknowledged them. Each event in a
room is an entry of the server's log with an increasing identifier; a client that reconnects names
the last entry that it has received. So nothing is lost and nothing is duplicated.
"""

import json
import re
import struct
import unicodedata
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypeAlias

import trio

from hybridkex import HybridkexError

__all__ = [
    "MAX_FRAME",
    "MAX_TEXT",
    "PROTOCOL",
    "Accepted",
    "Action",
    "Ask",
    "Bye",
    "ChatError",
    "Entry",
    "Frames",
    "Hello",
    "Message",
    "Notice",
    "ProtocolError",
    "Welcome",
    "check_name",
    "decode",
    "encode",
    "printable",
]

PROTOCOL: Final = "hkx-chat/1"
"""The ALPN protocol name."""

MAX_FRAME: Final = 32 * 1024
"""The maximum number of bytes of one message on the wire."""

MAX_TEXT: Final = 4000
"""The maximum number of characters of one chat message."""

_NAME: Final = re.compile(r"[\w.-]{1,24}")
_LENGTH: Final = struct.Struct(">I")


class ChatError(HybridkexError):
    """The conversation cannot continue; the text says why."""


class ProtocolError(ChatError):
    """The other end sent a malformed or unexpected message."""


@dataclass(frozen=True)
class Hello:
    """A client's first message on each connection."""

    nickname: str
    room: str
    token: str
    """A random value that the client chose; it identifies the client when it reconnects."""
    seen: int
    """The identifier of the last entry that the client has received."""

    def __post_init__(self) -> None:
        check_name("nickname", self.nickname)
        check_name("room", self.room)
        if not re.fullmatch("[0-9a-f]{64}", self.token):
            raise ProtocolError("a token has 32 bytes in hexadecimal")


@dataclass(frozen=True)
class Action:
    """An action of a client; ``number`` counts its actions from 1 without a gap."""

    number: int
    verb: str
    text: str

    def __post_init__(self) -> None:
        if self.verb not in ("say", "join", "leave"):
            raise ProtocolError(f"unknown action {printable(self.verb)!r}")
        if self.verb == "join":
            check_name("room", self.text)
        if len(self.text) > MAX_TEXT:
            raise ProtocolError(f"a message has at most {MAX_TEXT} characters")


@dataclass(frozen=True)
class Ask:
    """A query: ``who`` is in the room, or which ``rooms`` exist."""

    what: str


@dataclass(frozen=True)
class Welcome:
    """The server's response to Hello."""

    accepted: int
    """The number of the client's last action in the log."""
    seen: int
    """The entries that follow have higher identifiers."""
    room: str
    resumed: bool
    """Whether the server knows the client; if not, the client numbers its actions from 1 again."""


@dataclass(frozen=True)
class Accepted:
    """An acknowledgement: this action and all before it are in the log."""

    number: int


@dataclass(frozen=True)
class Entry:
    """An event in a room."""

    id: int
    at: int
    """Seconds since the epoch, by the server's clock."""
    kind: str
    """``said``, ``joined`` or ``left``."""
    room: str
    nickname: str
    text: str


@dataclass(frozen=True)
class Notice:
    """A notice for this client alone, which is not stored."""

    text: str


@dataclass(frozen=True)
class Bye:
    """The server's last message on a connection."""

    reason: str
    again: bool
    """Whether the client may reconnect."""


Message: TypeAlias = Hello | Action | Ask | Welcome | Accepted | Entry | Notice | Bye
_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__.lower(): kind
    for kind in (Hello, Action, Ask, Welcome, Accepted, Entry, Notice, Bye)
}


def check_name(what: str, name: str) -> None:
    """Check a nickname or room: 1 to 24 letters or digits of any script, ``_``, ``.`` or ``-``."""
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"a {what} has 1 to 24 letters, digits, '_', '.' or '-'")


def encode(message: Message) -> bytes:
    """Encode a message as a frame."""
    fields_ = {"type": type(message).__name__.lower(), **asdict(message)}
    body = json.dumps(fields_, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message has at most {MAX_FRAME} bytes")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """Decode the body of a frame. Raises :class:`ProtocolError`."""
    try:
        values = json.loads(body.decode("utf-8"))
        # JSON can contain a lone surrogate, which UTF-8 cannot encode.
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise ProtocolError("a message is not JSON in UTF-8") from None
    kind = _KINDS.get(str(values.pop("type", ""))) if isinstance(values, dict) else None
    if kind is None:
        raise ProtocolError("unknown message type")
    wanted = {field.name: field.type for field in fields(kind)}
    if values.keys() != wanted.keys() or any(
        type(values[name]) is not type_ for name, type_ in wanted.items()
    ):
        raise ProtocolError(f"the message {kind.__name__.lower()} has wrong fields")
    if any(type(value) is int and not 0 <= value < 1 << 62 for value in values.values()):
        raise ProtocolError("a number in the message is out of range")
    message: Message = kind(**values)
    return message


def printable(text: str) -> str:
    """Remove characters that could control a terminal or reverse the direction of the text.

    These are the Unicode categories Cc and Cf (control and format characters), Cs and Co
    (surrogates, private use), Zl and Zp (line and paragraph separators). The joiners that emoji and
    some scripts need stay.
    """
    return "".join(
        char
        for char in text
        if char in "\u200c\u200d"
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    )


class Frames:
    """Messages over a stream. Only one task may receive at a time."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: Final = stream
        self._unread = bytearray()

    async def send(self, message: Message) -> None:
        """Send one message. Only one task may send at a time."""
        await self.stream.send_all(encode(message))

    async def receive(self) -> Message | None:
        """Receive the next message; ``None`` at the end.

        Raises:
            ProtocolError: the received data is not a valid message.
            trio.BrokenResourceError: the connection broke.
        """
        while True:
            if len(self._unread) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._unread)
                if length > MAX_FRAME:
                    raise ProtocolError(f"a message has at most {MAX_FRAME} bytes")
                end = _LENGTH.size + length
                if len(self._unread) >= end:
                    body = bytes(self._unread[_LENGTH.size : end])
                    del self._unread[:end]
                    return decode(body)
            data = await self.stream.receive_some()
            if not data:
                if self._unread:
                    raise ProtocolError("the connection ended within a message")
                return None
            self._unread += data
