"""pcapng: the capture files of Wireshark (draft-ietf-opsawg-pcapng).

Written: one section, one Ethernet interface, an Enhanced Packet Block for each frame. Read: files
of any writer, in either byte order; blocks of other kinds are skipped, as the format asks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error, pack, unpack_from
from typing import BinaryIO, Final

from hybridkex.errors import RecordingError

LINKTYPE_ETHERNET: Final = 1

_SECTION_HEADER: Final = 0x0A0D0D0A
_INTERFACE_DESCRIPTION: Final = 1
_ENHANCED_PACKET: Final = 6
_BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D

_END_OF_OPTIONS: Final = 0
_USER_APPLICATION: Final = 4  # of a section header
_TIMESTAMP_RESOLUTION: Final = 9  # of an interface

_NANOSECONDS: Final = 9
_MAX_BLOCK: Final = 16 << 20


@dataclass(frozen=True)
class Packet:
    """One frame: seconds since the epoch, link type, and the bytes."""

    time: float
    link_type: int
    data: bytes


class PcapngWriter:
    """Writes frames to a binary file, which the caller opens and closes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        name = b"hybridkex"
        section = pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, -1) + _option(_USER_APPLICATION, name)
        self._block(_SECTION_HEADER, section + _option(_END_OF_OPTIONS, b""))
        interface = pack("<HHI", LINKTYPE_ETHERNET, 0, 0)
        interface += _option(_TIMESTAMP_RESOLUTION, bytes((_NANOSECONDS,)))
        self._block(_INTERFACE_DESCRIPTION, interface + _option(_END_OF_OPTIONS, b""))

    def packet(self, time_ns: int, frame: bytes) -> None:
        """Append a frame; ``time_ns`` is in nanoseconds since the epoch."""
        size = len(frame)
        head = pack("<IIIII", 0, time_ns >> 32, time_ns & 0xFFFFFFFF, size, size)
        self._block(_ENHANCED_PACKET, head + _padded(frame))

    def _block(self, kind: int, body: bytes) -> None:
        length = len(body) + 12
        self._file.write(pack("<II", kind, length) + body + pack("<I", length))


def _option(code: int, value: bytes) -> bytes:
    return pack("<HH", code, len(value)) + _padded(value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


@dataclass(frozen=True)
class _Interface:
    link_type: int
    tick: float
    """Seconds."""


def read_pcapng(path: Path) -> Iterator[Packet]:
    """The frames of a capture file, in the order of the file.

    Raises:
        RecordingError: the file cannot be read, or is not pcapng.
    """
    try:
        data = path.read_bytes()
    except OSError as failure:
        raise RecordingError(f"cannot read {path.name}: {failure.strerror}") from failure
    try:
        yield from _packets(data)
    except (error, IndexError) as failure:
        raise RecordingError(f"{path.name}: a block ends too early") from failure
    except RecordingError as failure:
        raise RecordingError(f"{path.name}: {failure}") from None


def _packets(data: bytes) -> Iterator[Packet]:
    order, interfaces, position = "<", list[_Interface](), 0
    while position < len(data):
        (kind,) = unpack_from("<I", data, position)  # a section header reads the same either way
        if kind == _SECTION_HEADER:
            order, interfaces = _byte_order(data, position + 8), []
        elif position == 0:
            raise RecordingError("it does not start with a pcapng section header")
        head = Struct(order + "II")
        kind, length = head.unpack_from(data, position)
        if length < 12 or length % 4 or length > _MAX_BLOCK or position + length > len(data):
            raise RecordingError(f"a block of {length} bytes at offset {position}")
        body = data[position + 8 : position + length - 4]
        if kind == _INTERFACE_DESCRIPTION:
            interfaces.append(_interface(order, body))
        elif kind == _ENHANCED_PACKET:
            number, high, low, size, _ = unpack_from(order + "IIIII", body)
            if number >= len(interfaces) or 20 + size > len(body):
                raise RecordingError(
                    f"inconsistent lengths in the packet block at offset {position}"
                )
            time = (high << 32 | low) * interfaces[number].tick
            yield Packet(time, interfaces[number].link_type, body[20 : 20 + size])
        position += length


def _byte_order(data: bytes, position: int) -> str:
    for order in "<>":
        if unpack_from(order + "I", data, position)[0] == _BYTE_ORDER_MAGIC:
            return order
    raise RecordingError("a section without a byte order")


def _interface(order: str, body: bytes) -> _Interface:
    (link_type,) = unpack_from(order + "H", body)
    tick, position = 1e-6, 8
    while position + 4 <= len(body):
        code, size = unpack_from(order + "HH", body, position)
        if code == _END_OF_OPTIONS:
            break
        if code == _TIMESTAMP_RESOLUTION:
            value = body[position + 4]
            tick = 2.0 ** -(value & 0x7F) if value & 0x80 else 10.0**-value
        position += 4 + size + -size % 4
    return _Interface(link_type, tick)
