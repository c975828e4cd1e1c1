"""One party's end of the classical channel: messages, and tags over all that was sent.

No message is final before its tag has verified: the parties compute with what they receive, and
deliver no key before the last tag of the block.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from hybridkex.errors import LinkError
from hybridkex.link.authentication import Authenticator, collision_probability
from hybridkex.link.ledger import Direction
from hybridkex.link.wire import HEADER, LIMITS, VERSION, End, Message, SessionEnded, Type
from hybridkex.text import said

END_SECONDS = 1.0
"""Time limit in seconds for telling the other party why a session ends."""


class ClassicalChannel:
    """Messages to and from the other party, over any stream."""

    def __init__(self, stream: trio.abc.Stream, *, sends: Direction, timeout: float) -> None:
        """``timeout``: seconds to wait for a message, and to send one."""
        self._stream = stream
        self._sends = sends
        self._receives = Direction(1 - sends)
        self._timeout = timeout
        self._buffer = bytearray()
        self._uncovered: dict[Direction, list[bytes]] = {one: [] for one in Direction}
        self._tags = dict.fromkeys(Direction, 0)
        self._authenticator: Authenticator | None = None
        self._block = 0
        self._session = b""
        self.forgery: float = 0.0
        """Bound on the probability of a forgery in the current block."""
        self.received_bytes = 0
        self.sent_bytes = 0

    def begin_session(self, *parts: bytes) -> None:
        """Bind all tags to this session."""
        self._session = hashlib.sha256(b"".join(parts)).digest()

    def begin_block(self, block: int, authenticator: Authenticator) -> None:
        """Use this authentication from here on."""
        self._block, self._authenticator, self.forgery = block, authenticator, 0.0

    @property
    def authentication(self) -> str:
        """The name of the current block's authentication."""
        return "none" if self._authenticator is None else self._authenticator.name

    async def send(self, message: Message) -> None:
        """Send a message."""
        await self._send(message.type, message.encode())

    async def receive(self, kind: Type, *, patient: bool = False) -> bytes:
        """The body of the next message, which must be of this type.

        ``patient``: there is no limit to the time until it begins.
        """
        if patient:
            with self._errors(math.inf):
                await self._arrived(1)
        return (await self.receive_one_of(kind))[1]

    async def receive_one_of(self, *kinds: Type) -> tuple[Type, bytes]:
        """Type and body of the next message. Raises ``LinkError`` for another one, or none."""
        with self._errors(self._timeout):
            header = await self._exactly(HEADER.size)
            number, length = HEADER.unpack(header)
            if number not in (*kinds, Type.END) or length > LIMITS[Type(number)]:
                raise LinkError("the other party sent an unexpected message")
            body = await self._exactly(length)
        kind = Type(number)
        if kind is Type.END:
            raise SessionEnded(End.decode(body).words)
        if kind is not Type.TAG:
            self._uncovered[self._receives] += [header, body]
        return kind, body

    async def send_tag(self) -> None:
        """Authenticate what we sent since the last tag."""
        assert self._authenticator is not None
        tag = self._authenticator.tag(self._sends, self._covered(self._sends))
        await self._send(Type.TAG, tag)

    async def verify_tag(self) -> None:
        """Receive the tag over what the other party sent since its last one, and check it.

        Raises ``LinkError``.
        """
        assert self._authenticator is not None
        tag = await self.receive(Type.TAG)
        self._authenticator.check(self._receives, self._covered(self._receives), tag)

    def _covered(self, direction: Direction) -> list[bytes]:
        head = b"hybridkex QKD link v%d" % VERSION + self._session + bytes([direction])
        head += self._block.to_bytes(8) + self._tags[direction].to_bytes(8)
        parts = [head, *self._uncovered[direction]]
        self._tags[direction] += 1
        self._uncovered[direction] = []
        self.forgery += collision_probability(sum(map(len, parts)))
        return parts

    async def end(self, error: LinkError) -> None:
        """Tell the other party why the session ends, if the connection still works."""
        with suppress(LinkError), trio.move_on_after(END_SECONDS, shield=True):
            await self.send(End.because_of(error))

    async def _send(self, kind: Type, body: bytes) -> None:
        header = HEADER.pack(kind, len(body))
        if kind is not Type.TAG:
            self._uncovered[self._sends] += [header, body]
        with self._errors(self._timeout):
            await self._stream.send_all(header + body)
        self.sent_bytes += len(header) + len(body)

    async def _exactly(self, count: int) -> bytes:
        await self._arrived(count)
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def _arrived(self, count: int) -> None:
        """Wait until so many bytes are in the buffer."""
        while len(self._buffer) < count:
            data = await self._stream.receive_some(max(65536, min(count, 1 << 20)))
            if not data:
                raise SessionEnded("the other party closed the connection")
            self._buffer += data
            self.received_bytes += len(data)

    @contextmanager
    def _errors(self, timeout: float) -> Iterator[None]:
        try:
            with trio.fail_after(timeout):
                yield
        except trio.TooSlowError:
            raise LinkError("the other party does not answer") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkError(f"the classical channel broke: {said(error)}") from None
