"""The quantum channel between two processes: detections go from Alice's process to Bob's.

This stream stands for the light. It is not part of the classical channel, and Alice's process,
which simulates the optical link, knows everything in it. On a real link Bob's bits are the results
of a measurement in Bob's detectors, and there is no such stream.

A request has a number (8 bytes, from 0 in each session) and a count of detections (4 bytes, both
big-endian). The answer repeats both; then come the pulses (8 bytes each, little-endian), the bases
and the bits, packed. A request or an answer that is not the next one, because bytes were doubled
or lost, ends the session.
"""

import itertools
import math
import struct
from typing import Final

import numpy as np
import trio

from hybridkex.errors import LinkError
from hybridkex.link.quantum import Detections, Detector
from hybridkex.link.wire import pack_bits, unpack_bits

REQUEST: Final = struct.Struct(">QI")
"""Number of the request, count of detections."""
STALLED: Final = 60.0
"""Seconds without another byte of a message that has begun."""


class RemoteDetector:
    """Bob's end of an optical link that is simulated in another process."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._requests = 0

    async def detect(self, count: int) -> Detections:
        """See :class:`~hybridkex.link.quantum.Detector`. Raises ``LinkError``."""
        request = REQUEST.pack(self._requests, count)
        self._requests += 1
        try:
            await self._stream.send_all(request)
            if await _exactly(self._stream, REQUEST.size) != request:
                raise LinkError("the quantum channel gave an answer to another request")
            packed = -(-count // 8)
            data = await _exactly(self._stream, 8 * count + 2 * packed, begun=True)
        except trio.BrokenResourceError as error:
            raise LinkError(f"the quantum channel broke: {error}") from None
        pulse = np.frombuffer(data[: 8 * count], dtype="<i8").astype(np.int64)
        if int(pulse[0]) < 0 or bool((pulse[1:] <= pulse[:-1]).any()):
            raise LinkError("the quantum channel gave malformed detections")
        return Detections(
            pulse=pulse,
            basis=unpack_bits(data[8 * count : 8 * count + packed], count),
            bit=unpack_bits(data[8 * count + packed :], count),
        )


async def serve_detector(link: Detector, stream: trio.abc.Stream, *, most: int) -> None:
    """Send Bob the detections, up to ``most`` at a time, until Bob closes the connection.

    Raises ``LinkError``.
    """
    try:
        for expected in itertools.count():
            request = await _exactly(stream, REQUEST.size)
            number, count = REQUEST.unpack(request)
            if number != expected:
                raise LinkError("the requests on the quantum channel are not in order")
            if not 0 < count <= most:
                raise LinkError("more detections were requested than a block has")
            detections = await link.detect(count)
            await stream.send_all(
                request
                + detections.pulse.astype("<i8").tobytes()
                + pack_bits(detections.basis)
                + pack_bits(detections.bit)
            )
    except trio.BrokenResourceError as error:
        raise LinkError(f"the quantum channel broke: {error}") from None


async def _exactly(stream: trio.abc.Stream, count: int, *, begun: bool = False) -> bytes:
    """Receive so many bytes of a message.

    Unless it has ``begun``, there is no limit to the time until its first byte arrives. The rest
    comes with it.
    """
    data = bytearray()
    while len(data) < count:
        try:
            with trio.fail_after(STALLED if begun or data else math.inf):
                part = await stream.receive_some(min(count - len(data), 1 << 20))
        except trio.TooSlowError:
            raise LinkError("the quantum channel stopped in the middle of a message") from None
        if not part:
            raise LinkError("the quantum channel was closed")
        data += part
    return bytes(data)
