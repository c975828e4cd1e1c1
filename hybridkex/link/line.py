"""One party's end of the classical channel: frames, and tags over all that was said.

Nothing that a message says is final before the tag that covers it: the parties compute with what
they hear and give no key away until the last tag of the block.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from hybridkex.errors import LinkError
from hybridkex.link.authentication import Authenticator, forgery_probability
from hybridkex.link.ledger import Direction
from hybridkex.link.wire import HEADER, LIMITS, Message, Type

__all__ = ["Line"]


class Line:
    """Messages to and from the other party, over any stream."""

    def __init__(self, stream: trio.abc.Stream, *, speaks: Direction, timeout: float) -> None:
        self._stream = stream
        self._speaks = speaks
        self._hears = Direction(1 - speaks)
        self._timeout = timeout
        self._buffer = bytearray()
        self._said: dict[Direction, list[bytes]] = {one: [] for one in Direction}
        self._tags = dict.fromkeys(Direction, 0)
        self._authenticator: Authenticator | None = None
        self._block = 0
        self._session = b""
        self.forgery: float = 0.0
        """Probability that a forger succeeded in the present block, by the bound."""
        self.heard_bytes = 0
        self.said_bytes = 0

    def begin_session(self, *parts: bytes) -> None:
        """Bind all tags to this session."""
        self._session = hashlib.sha256(b"".join(parts)).digest()

    def begin_block(self, block: int, authenticator: Authenticator) -> None:
        """Authenticate from here on with this."""
        self._block, self._authenticator, self.forgery = block, authenticator, 0.0

    @property
    def authentication(self) -> str:
        """How the present block is authenticated."""
        return "none" if self._authenticator is None else self._authenticator.name

    async def say(self, message: Message) -> None:
        """Send a message."""
        await self._send(message.type, message.encode())

    async def say_raw(self, kind: Type, body: bytes) -> None:
        """Send a body that was made by hand."""
        await self._send(kind, body)

    async def hear(self, kind: Type) -> bytes:
        """The body of the next message, which must be of this type."""
        return (await self.hear_one_of(kind))[1]

    async def hear_one_of(self, *kinds: Type) -> tuple[Type, bytes]:
        """Type and body of the next message. Raises ``LinkError`` for another one, or none."""
        with self._troubles():
            header = await self._exactly(HEADER.size)
            number, length = HEADER.unpack(header)
            if number not in kinds or length > LIMITS[Type(number)]:
                raise LinkError("a message that does not belong here")
            body = await self._exactly(length)
        kind = Type(number)
        if kind is not Type.TAG:
            self._said[self._hears] += [header, body]
        return kind, body

    async def seal(self) -> None:
        """Authenticate what we said since the last time."""
        assert self._authenticator is not None
        tag = self._authenticator.tag(self._speaks, self._covered(self._speaks))
        await self._send(Type.TAG, tag)

    async def confirm(self) -> None:
        """Hear the tag over what the other party said since the last time, and check it."""
        assert self._authenticator is not None
        tag = await self.hear(Type.TAG)
        self._authenticator.check(self._hears, self._covered(self._hears), tag)

    def _covered(self, direction: Direction) -> list[bytes]:
        head = b"hybridkex QKD link v1" + self._session + bytes([direction])
        head += self._block.to_bytes(8) + self._tags[direction].to_bytes(8)
        parts = [head, *self._said[direction]]
        self._tags[direction] += 1
        self._said[direction] = []
        self.forgery += forgery_probability(sum(map(len, parts)))
        return parts

    async def _send(self, kind: Type, body: bytes) -> None:
        header = HEADER.pack(kind, len(body))
        if kind is not Type.TAG:
            self._said[self._speaks] += [header, body]
        with self._troubles():
            await self._stream.send_all(header + body)
        self.said_bytes += len(header) + len(body)

    async def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = await self._stream.receive_some(max(65536, min(count, 1 << 20)))
            if not data:
                raise LinkError("the other party has hung up")
            self._buffer += data
            self.heard_bytes += len(data)
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        try:
            with trio.fail_after(self._timeout):
                yield
        except trio.TooSlowError:
            raise LinkError("the other party does not answer") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkError(f"the classical channel broke: {error}") from None
