"""Reading a known number of bytes from a stream."""

from trio.abc import ReceiveStream

from hybridkex.errors import HybridkexError

_CHUNK = 1 << 20


class EndOfStream(HybridkexError):
    """The peer ended the stream before a message was complete."""


async def read_exactly(stream: ReceiveStream, count: int) -> bytes:
    """Read exactly ``count`` bytes.

    Memory grows with the data received, not with ``count``.

    Raises:
        EndOfStream: the stream ended early.
        trio.BrokenResourceError: it broke.
    """
    data = bytearray()
    while len(data) < count:
        part = await stream.receive_some(min(count - len(data), _CHUNK))
        if not part:
            raise EndOfStream(f"the stream ended after {len(data)} of {count} bytes")
        data += part
    return bytes(data)
