"""A stream that keeps what is sent on it."""

import trio


class RecordingStream(trio.abc.Stream):
    """Passes everything on, and keeps a copy of what is sent."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream, self.sent = stream, bytearray()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self.stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        await self.stream.aclose()
