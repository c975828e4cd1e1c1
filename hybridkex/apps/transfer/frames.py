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
    """What went wrong with a connection that several tasks share.

    They all see the same end. Where one of them knows more than that it has broken, its word
    counts. A cancellation, or a bug, is more than any of that.
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
    """Messages and the data between them. One task may receive, any number may send."""

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
        """Send a frame of data, header and all."""
        async with self._sending:
            await self.stream.send_all(frame)

    async def receive(self) -> Message | memoryview | None:
        """The next message, or the next piece of data; ``None`` when the other end has ended.

        A piece is as long as the stream had it at hand, not a whole frame: nothing is put together
        here that is taken apart again by who writes it.

        Raises:
            ProtocolError: what came is not a frame.
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
        """``None`` at the end, where nothing of it has come."""
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
