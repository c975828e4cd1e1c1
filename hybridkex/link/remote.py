"""The quantum channel between two processes: detections go from Alice's process to Bob's.

This stream stands for the light. It is not part of the classical channel, and Alice's process,
which simulates the optical link, knows everything in it. On a real link Bob's bits are the results
of a measurement in Bob's detectors, and there is no such stream.

A request has a number (8 bytes, from 0 in each session) and a count of detections (4 bytes, both
big-endian). The answer repeats both; then come the pulses (8 bytes each, little-endian), the bases
and the bits, packed. Before it, Alice announces every 20 s that the answer will come: the number,
and 0 as the count. A request or an answer that is not the next one, because bytes were doubled or
lost, ends the session, and so does a minute without any bytes while Bob waits.
"""

import itertools
import math
import struct
from collections.abc import Callable
from typing import Final

import numpy as np
import trio

from hybridkex.errors import LinkError
from hybridkex.link.quantum import Detections, Detector
from hybridkex.link.wire import pack_bits, unpack_bits
from hybridkex.machine import leaves
from hybridkex.net.reading import EndOfStream, read_exactly
from hybridkex.text import said

REQUEST: Final = struct.Struct(">QI")
"""Number of the request, count of detections."""
LATE: Final = 20.0
"""Seconds between announcements of a late answer: the light takes long, or Alice's KME is full."""
STALLED: Final = 60.0
"""Seconds for the next part of a message, and for an answer or its announcement."""
PIECE: Final = 1 << 20
"""The most bytes of a part."""


class RemoteDetector:
    """Bob's end of an optical link that is simulated in another process."""

    def __init__(
        self, stream: trio.abc.Stream, *, late: Callable[[int], None] = lambda _: None
    ) -> None:
        """``late``: called with the number of announcements so far that an answer will be late."""
        self._stream = stream
        self._late = late
        self._requests = 0

    async def detect(self, count: int) -> Detections:
        """See :class:`~hybridkex.link.quantum.Detector`. Raises ``LinkError``."""
        request, late = (REQUEST.pack(self._requests, number) for number in (count, 0))
        self._requests += 1
        times = itertools.count(1)
        try:
            await self._stream.send_all(request)
            while (head := await _exactly(self._stream, REQUEST.size)) == late:
                self._late(next(times))
            if head != request:
                raise LinkError("the quantum channel gave an answer to another request")
            packed = -(-count // 8)
            data = await _exactly(self._stream, 8 * count + 2 * packed)
        except trio.BrokenResourceError as error:
            raise LinkError(f"the quantum channel broke: {said(error)}") from None
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
            request = await _exactly(stream, REQUEST.size, patient=True)
            number, count = REQUEST.unpack(request)
            if number != expected:
                raise LinkError("the requests on the quantum channel are not in order")
            if not 0 < count <= most:
                raise LinkError("more detections were requested than a block has")
            detections = await _announced(link, count, stream, REQUEST.pack(number, 0))
            await stream.send_all(
                request
                + detections.pulse.astype("<i8").tobytes()
                + pack_bits(detections.basis)
                + pack_bits(detections.bit)
            )
    except trio.BrokenResourceError as error:
        raise LinkError(f"the quantum channel broke: {said(error)}") from None


async def _announced(
    link: Detector, count: int, stream: trio.abc.Stream, late: bytes
) -> Detections:
    """Wait for the detections. Until they are there, send ``late`` at intervals."""
    found: list[Detections] = []
    there = trio.Event()

    async def detect() -> None:
        found.append(await link.detect(count))
        there.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(detect)
            while not found:
                with trio.move_on_after(LATE):
                    await there.wait()
                    break
                await stream.send_all(late)
    except ExceptionGroup as group:
        raise next(leaves(group)) from None
    return found[0]


async def _exactly(stream: trio.abc.Stream, count: int, *, patient: bool = False) -> bytes:
    """Receive the given number of bytes of a message.

    ``patient``: there is no limit to the time until its first byte arrives.
    """
    data = bytearray()
    while len(data) < count:
        early = patient and not data
        try:
            with trio.fail_after(math.inf if early else STALLED):
                data += await read_exactly(stream, 1 if early else min(count - len(data), PIECE))
        except trio.TooSlowError:
            raise LinkError(
                f"the quantum channel stood still for {STALLED:g} s: check whether the other party "
                "runs, and the network between"
            ) from None
        except EndOfStream:
            raise LinkError("the quantum channel was closed") from None
    return bytes(data)
