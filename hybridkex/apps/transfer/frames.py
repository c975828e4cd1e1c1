"""Frames over a stream."""

from typing import Any, Final

import trio

from hybridkex import HybridkexError, SecureStream
from hybridkex.apps.transfer.messages import (
    DATA,
    HEADER,
    Message,
    ProtocolError,
    decode,
    encode,
    split_header,
)

__all__ = ["Frames", "first_failure"]


def first_failure(group: BaseExceptionGroup[Any]) -> BaseException:
    """The error to report for a connection that several tasks share.

    All tasks see the same broken connection. An error that says more than that takes precedence; a
    cancellation or a bug takes precedence over both.
    """
    failures, other = group.split((trio.BrokenResourceError, HybridkexError))
    if failures is None or other is not None:
        return other or group
    told, _ = failures.split(HybridkexError)
    error: BaseException = told or failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Frames:
    """Messages and data on a stream. One task may receive, any number may send."""

    def __init__(self, stream: SecureStream[Any]) -> None:
        self.stream: Final = stream
        self._unread = memoryview(b"")
        self._data_left = 0
        self._sending = trio.Lock()

    async def send(self, message: Message) -> None:
        """Send one message."""
        async with self._sending:
            await self.stream.send_all(encode(message))

    async def send_frame(self, frame: bytearray) -> None:
        """Send a complete data frame, header included."""
        async with self._sending:
            await self.stream.send_all(frame)

    async def receive(self) -> Message | memoryview | None:
        """The next message, or the next piece of data; ``None`` at the end of the stream.

        A piece is whatever the stream returned, not a whole frame: reassembling frames would only
        add copies.

        Raises:
            ProtocolError: the data are not a frame.
            trio.BrokenResourceError: the connection broke.
        """
        while True:
            if self._data_left:
                piece = await self._some(self._data_left)
                if not piece:
                    raise ProtocolError("the end in the middle of a frame")
                self._data_left -= len(piece)
                return piece
            head = await self._exactly(HEADER)
            if head is None:
                return None
            kind, length = split_header(head)
            if kind == DATA:
                self._data_left = length
                continue
            body = await self._exactly(length)
            if body is None:
                raise ProtocolError("the end in the middle of a frame")
            return decode(kind, body)

    async def _some(self, at_most: int) -> memoryview:
        if not self._unread:
            self._unread = memoryview(await self.stream.receive_some())
        piece, self._unread = self._unread[:at_most], self._unread[at_most:]
        return piece

    async def _exactly(self, length: int) -> bytes | None:
        """Read exactly ``count`` bytes; ``None`` if the stream ends before the first one."""
        parts: list[memoryview] = []
        missing = length
        while missing:
            piece = await self._some(missing)
            if not piece:
                if parts:
                    raise ProtocolError("the end in the middle of a frame")
                return None
            parts.append(piece)
            missing -= len(piece)
        return b"".join(parts)
