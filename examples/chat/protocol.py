"""The wire format: a length of four bytes, big-endian, and that many bytes of JSON in UTF-8.

A client's messages are numbered and kept until the server has acknowledged them. What happens in a
room is an entry of the server's log with an increasing identifier; a returning client names the
last one it has seen. So nothing is lost and nothing is duplicated.
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
"""The application protocol that both sides name (ALPN)."""

MAX_FRAME: Final = 32 * 1024
"""Bytes of one message on the wire."""

MAX_TEXT: Final = 4000
"""Characters that a person can say at once."""

_NAME: Final = re.compile(r"[\w.-]{1,24}")
_LENGTH: Final = struct.Struct(">I")


class ChatError(HybridkexError):
    """The conversation cannot continue; the text says why."""


class ProtocolError(ChatError):
    """The other end sent a malformed or unexpected message."""


@dataclass(frozen=True)
class Hello:
    """A client's first words, on every connection."""

    nickname: str
    room: str
    token: str
    """Random, chosen by the client; a client that presents it is the returning client."""
    seen: int
    """The last entry it has seen."""

    def __post_init__(self) -> None:
        check_name("nickname", self.nickname)
        check_name("room", self.room)
        if not re.fullmatch("[0-9a-f]{64}", self.token):
            raise ProtocolError("a token has 32 bytes in hexadecimal")


@dataclass(frozen=True)
class Action:
    """What a client does; ``number`` counts its actions from 1 without a gap."""

    number: int
    verb: str
    text: str

    def __post_init__(self) -> None:
        if self.verb not in ("say", "join", "leave"):
            raise ProtocolError(f"there is no action {printable(self.verb)!r}")
        if self.verb == "join":
            check_name("room", self.text)
        if len(self.text) > MAX_TEXT:
            raise ProtocolError(f"a message has at most {MAX_TEXT} characters")


@dataclass(frozen=True)
class Ask:
    """A question that changes nothing: ``who`` is in the room, which ``rooms`` there are."""

    what: str


@dataclass(frozen=True)
class Welcome:
    """The server's response to Hello."""

    accepted: int
    """The last of the client's actions that is in the log."""
    seen: int
    """Where the entries that follow begin."""
    room: str
    resumed: bool
    """Whether the server knows the client; if not, its numbers start over."""


@dataclass(frozen=True)
class Accepted:
    """An action is in the log, as are all before it."""

    number: int


@dataclass(frozen=True)
class Entry:
    """Something that happened in a room."""

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
    """The last word of the server on a connection."""

    reason: str
    again: bool
    """Whether the client may reconnect."""


Message: TypeAlias = Hello | Action | Ask | Welcome | Accepted | Entry | Notice | Bye
_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__.lower(): kind
    for kind in (Hello, Action, Ask, Welcome, Accepted, Entry, Notice, Bye)
}


def check_name(what: str, name: str) -> None:
    """Nicknames and rooms: letters and digits of any script, ``_``, ``.`` and ``-``."""
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"a {what} has 1 to 24 letters, digits, '_', '.' or '-'")


def encode(message: Message) -> bytes:
    """The frame of a message."""
    fields_ = {"type": type(message).__name__.lower(), **asdict(message)}
    body = json.dumps(fields_, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message has at most {MAX_FRAME} bytes")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message of a frame's body. Raises :class:`ProtocolError`."""
    try:
        values = json.loads(body.decode("utf-8"))
        # JSON can escape half a surrogate pair, which is no text.
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise ProtocolError("a message is not JSON in UTF-8") from None
    kind = _KINDS.get(str(values.pop("type", ""))) if isinstance(values, dict) else None
    if kind is None:
        raise ProtocolError("a message of no known type")
    wanted = {field.name: field.type for field in fields(kind)}
    if values.keys() != wanted.keys() or any(
        type(values[name]) is not type_ for name, type_ in wanted.items()
    ):
        raise ProtocolError(f"a {kind.__name__.lower()} with wrong fields")
    if any(type(value) is int and not 0 <= value < 1 << 62 for value in values.values()):
        raise ProtocolError("a number out of range")
    message: Message = kind(**values)
    return message


def printable(text: str) -> str:
    """Text as a terminal may show it: no control characters, no marks that turn the line around.

    Categories of Unicode: Cc and Cf (controls, directions), Cs and Co (surrogates, private), Zl and
    Zp (line and paragraph separators). The joiners that emoji and some scripts need stay.
    """
    return "".join(
        char
        for char in text
        if char in "\u200c\u200d"
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    )


class Frames:
    """Messages over a stream. One task receives."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: Final = stream
        self._unread = bytearray()

    async def send(self, message: Message) -> None:
        """Send one message; not while another task sends."""
        await self.stream.send_all(encode(message))

    async def receive(self) -> Message | None:
        """The next message; ``None`` at the end.

        Raises:
            ProtocolError: what came is no message.
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
                    raise ProtocolError("the end in the middle of a message")
                return None
            self._unread += data
