"""Eve on the classical channel: a stream that changes what is received."""

import trio


class TamperedStream(trio.abc.Stream):
    """A stream on which one bit of what is received is flipped."""

    def __init__(self, stream: trio.abc.Stream, *, byte: int) -> None:
        """``byte``: its number among all bytes received, from 0."""
        self._stream = stream
        self._left = byte

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = bytearray(await self._stream.receive_some(max_bytes))
        if 0 <= self._left < len(data):
            data[self._left] ^= 1
        self._left -= len(data)
        return bytes(data)

    async def aclose(self) -> None:
        await self._stream.aclose()
