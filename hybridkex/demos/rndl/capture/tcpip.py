"""TCP connections as Ethernet frames, and back.

A wire tap that is a TCP proxy sees byte streams; Wireshark wants frames. So a connection is written
as the frames that could have carried it: a three-way handshake, segments of at most 1,460 bytes
with sequence numbers and checksums, and a FIN from each side. Only the framing is synthetic, the
payload and the times are what the tap saw.

The reader also accepts captures of other tools: segments out of order, repeated or overlapping, and
connections whose beginning is missing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from socket import inet_aton, inet_ntoa
from struct import pack, unpack_from
from typing import Final

from hybridkex.demos.rndl.capture.pcapng import LINKTYPE_ETHERNET, Packet, PcapngWriter

Address = tuple[str, int]
"""IPv4 address and port."""

_SEGMENT: Final = 1460  # what fits into an Ethernet frame

_IPV4: Final = 0x0800
_TCP: Final = 6
_FIN, _SYN, _RST, _PSH, _ACK = 1, 2, 4, 8, 16
_WINDOW: Final = 0xFFFF

# Locally administered addresses, of no real hardware.
_CLIENT_MAC: Final = bytes.fromhex("020000000001")
_SERVER_MAC: Final = bytes.fromhex("020000000002")


class ConnectionWriter:
    def __init__(
        self, writer: PcapngWriter, client: Address, server: Address, time_ns: int
    ) -> None:
        self._writer = writer
        self._ends = [(inet_aton(host), port) for host, port in (client, server)]
        self._next = [1_000, 2_000]  # sequence numbers by side: client, server
        self._identification = 0
        self._frame(0, time_ns, _SYN, ack=False)
        self._frame(1, time_ns, _SYN | _ACK)
        self._frame(0, time_ns, _ACK)

    def data(self, time_ns: int, data: bytes, *, from_client: bool) -> None:
        """Write bytes of one direction, in as many segments as necessary."""
        for start in range(0, len(data), _SEGMENT):
            piece = data[start : start + _SEGMENT]
            last = start + _SEGMENT >= len(data)
            self._frame(not from_client, time_ns, _ACK | (_PSH if last else 0), piece)

    def end(self, time_ns: int, *, from_client: bool) -> None:
        self._frame(not from_client, time_ns, _FIN | _ACK)

    def _frame(
        self, side: int, time_ns: int, flags: int, data: bytes = b"", *, ack: bool = True
    ) -> None:
        (source, source_port), (target, target_port) = self._ends[side], self._ends[1 - side]
        acknowledged = self._next[1 - side] if ack else 0
        head = pack(
            "!HHIIBBHHH",
            source_port,
            target_port,
            self._next[side],
            acknowledged,
            5 << 4,
            flags,
            _WINDOW,
            0,
            0,
        )
        addresses = source + target
        pseudo = addresses + pack("!BBH", 0, _TCP, len(head) + len(data))
        head = head[:16] + pack("!H", _checksum(pseudo + head + data)) + head[18:]
        self._identification = (self._identification + 1) & 0xFFFF
        ip = pack(
            "!BBHHHBBH",
            0x45,
            0,
            20 + len(head) + len(data),
            self._identification,
            0x4000,  # do not fragment
            64,
            _TCP,
            0,
        )
        ip = ip[:10] + pack("!H", _checksum(ip + addresses)) + addresses
        macs = (_SERVER_MAC + _CLIENT_MAC) if side == 0 else (_CLIENT_MAC + _SERVER_MAC)
        self._writer.packet(time_ns, macs + pack("!H", _IPV4) + ip + head + data)
        moved = len(data) + bool(flags & _SYN) + bool(flags & _FIN)
        self._next[side] = (self._next[side] + moved) & 0xFFFFFFFF


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of data that are not all zero, so that it is never 0xFFFF
    (RFC 1624). A number and the sum of its 16-bit digits have the same remainder modulo 2^16 - 1.
    """
    return 0xFFFF - (int.from_bytes(data + bytes(len(data) % 2)) % 0xFFFF or 0xFFFF)


@dataclass(frozen=True)
class Chunk:
    """Bytes of one direction that arrived in one segment."""

    time: float
    from_client: bool
    data: bytes


@dataclass
class Flow:
    """One reassembled TCP connection."""

    client: Address
    server: Address
    chunks: list[Chunk] = field(default_factory=list)

    def __str__(self) -> str:
        return " > ".join(f"{host}:{port}" for host, port in (self.client, self.server))

    def stream(self, *, from_client: bool) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks if chunk.from_client == from_client)


@dataclass(frozen=True)
class _Segment:
    time: float
    source: Address
    target: Address
    sequence: int
    flags: int
    data: bytes


class _Direction:
    """Puts the segments of one direction in order."""

    def __init__(self) -> None:
        self._expected: int | None = None
        self._waiting: dict[int, bytes] = {}

    def begin(self, sequence: int) -> None:
        self._expected = sequence

    def take(self, sequence: int, data: bytes) -> bytes:
        """The bytes that this segment adds to the stream, with buffered later segments."""
        if self._expected is None:
            self._expected = sequence
        self._waiting[sequence] = max(data, self._waiting.get(sequence, b""), key=len)
        ready = b""
        while True:
            for start, piece in sorted(self._waiting.items(), key=lambda one: self._ahead(one[0])):
                ahead = self._ahead(start)
                if ahead <= 0:
                    del self._waiting[start]
                    fresh = piece[-ahead:]
                    ready += fresh
                    self._expected = (self._expected + len(fresh)) & 0xFFFFFFFF
                    break
            else:
                return ready

    def _ahead(self, sequence: int) -> int:
        """The distance of a sequence number from the next expected one, modulo 2^32."""
        assert self._expected is not None
        return (sequence - self._expected + (1 << 31)) % (1 << 32) - (1 << 31)


class _Open:
    """A connection being reassembled."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.directions = {flow.client: _Direction(), flow.server: _Direction()}


def reassemble(packets: Iterable[Packet]) -> list[Flow]:
    """The TCP connections in a capture, in the order in which they began."""
    flows: list[Flow] = []
    open_: dict[frozenset[Address], _Open] = {}
    for packet in packets:
        segment = _segment(packet)
        if segment is None:
            continue
        ends = frozenset((segment.source, segment.target))
        opens = bool(segment.flags & _SYN) and not segment.flags & _ACK
        if opens or ends not in open_:
            # If the beginning is missing, the first sender seen is taken for the client.
            flow = Flow(segment.source, segment.target)
            flows.append(flow)
            open_[ends] = _Open(flow)
        connection = open_[ends]
        direction = connection.directions[segment.source]
        if segment.flags & _SYN:
            direction.begin((segment.sequence + 1) & 0xFFFFFFFF)
            continue
        data = direction.take(segment.sequence, segment.data) if segment.data else b""
        if data:
            from_client = segment.source == connection.flow.client
            connection.flow.chunks.append(Chunk(segment.time, from_client, data))
    return flows


def _segment(packet: Packet) -> _Segment | None:
    """The TCP segment in a frame, if there is one; IP fragments are not reassembled."""
    data = packet.data
    if packet.link_type != LINKTYPE_ETHERNET or len(data) < 34:
        return None
    kind, version, length, fragment, protocol = (
        *unpack_from("!HB", data, 12),
        *unpack_from("!H", data, 16),
        *unpack_from("!H", data, 20),
        data[23],
    )
    if kind != _IPV4 or version >> 4 != 4 or fragment & 0x3FFF or protocol != _TCP:
        return None
    start = 14 + 4 * (version & 15)
    end = min(14 + length, len(data))
    if end < start + 20:
        return None
    source_port, target_port, sequence, _, offset, flags = unpack_from("!HHIIBB", data, start)
    return _Segment(
        time=packet.time,
        source=(inet_ntoa(data[26:30]), source_port),
        target=(inet_ntoa(data[30:34]), target_port),
        sequence=sequence,
        flags=flags,
        data=data[start + 4 * (offset >> 4) : end],
    )
