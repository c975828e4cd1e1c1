"""Frames over a stream."""

from collections import deque
from typing import Any, Final, TypeAlias

import trio

from hybridkex import HybridkexError, SecureStream
from hybridkex.apps.transfer import messages as wire

Received: TypeAlias = wire.Message | wire.Whole | memoryview
"""A message, a whole file, or a piece of a file's data."""


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
        self._received: deque[Received] = deque()
        self._data_left = 0
        self._head = bytearray()
        self._kind = wire.DATA
        self._body = bytearray()
        self._missing = 0
        """Bytes of a body that are still to come."""
        self._failure: wire.ProtocolError | None = None
        self._sending = trio.Lock()

    async def send(self, *messages: wire.Message | wire.Whole) -> None:
        """Send messages, all at once."""
        await self.send_frames(b"".join(map(wire.encode, messages)))

    async def send_frames(self, frames: bytes | bytearray) -> None:
        """Send complete frames, headers included."""
        async with self._sending:
            await self.stream.send_all(frames)

    async def receive(self) -> Received | None:
        """Return the next message or piece of data; ``None`` at the end of the stream.

        A piece is whatever the stream returned, not a whole frame: reassembling frames would only
        add copies.

        Raises:
            ProtocolError: the data are not a frame.
            trio.BrokenResourceError: the connection broke.
        """
        if not self._received and not await self._read():
            return None
        return self._received.popleft()

    async def receive_all(self) -> list[Received]:
        """Return all messages and data that have arrived, at least one; empty at the end of the
        stream. Raises as :meth:`receive`."""
        if not self._received and not await self._read():
            return []
        received = list(self._received)
        self._received.clear()
        return received

    async def _read(self) -> bool:
        """Read until a message or data has arrived; false at the end of the stream."""
        while not self._received:
            if self._failure is not None:
                raise self._failure
            data = await self.stream.receive_some()
            if not data:
                if self._data_left or self._head or self._missing:
                    raise wire.ProtocolError("the stream ended in the middle of a frame")
                return False
            try:
                self._parse(memoryview(data))
            except wire.ProtocolError as error:  # raised after the messages before it
                self._failure = error
        return True

    def _parse(self, data: memoryview) -> None:
        while data:
            if self._data_left:
                piece, data = data[: self._data_left], data[self._data_left :]
                self._data_left -= len(piece)
                self._received.append(piece)
            elif self._missing:
                piece, data = data[: self._missing], data[self._missing :]
                self._missing -= len(piece)
                self._body += piece
                if not self._missing:
                    body, self._body = self._body, bytearray()
                    self._received.append(wire.decode(self._kind, body))
            else:
                data = self._begin(data)

    def _begin(self, data: memoryview) -> memoryview:
        """Read a header, and the body if it is there; returns what follows."""
        count = wire.HEADER - len(self._head)
        head, data = data[:count], data[count:]
        self._head += head
        if len(self._head) < wire.HEADER:
            return data
        kind, length = wire.split_header(self._head)
        self._head.clear()
        if kind == wire.DATA:
            self._data_left = length
            return data
        body, data = data[:length], data[length:]
        if len(body) == length:
            self._received.append(wire.decode(kind, body))
        else:
            self._kind, self._missing = kind, length - len(body)
            self._body += body
        return data
