"""Capture files: what is written is read again, by others too, and rubbish is refused."""

import io
import random
from contextlib import suppress
from pathlib import Path
from struct import pack

import pytest
import trio

from hybridkex.demos.rndl.capture.pcapng import (
    LINKTYPE_ETHERNET,
    Packet,
    PcapngWriter,
    read_pcapng,
)
from hybridkex.demos.rndl.capture.tcpip import ConnectionWriter, Flow, reassemble
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.errors import RecordingError

CLIENT, SERVER = ("127.0.0.1", 40_000), ("127.0.0.2", 443)
SECOND = 1_000_000_000


def written(*talk: tuple[bool, bytes], start: int = 1_700_000_000 * SECOND) -> bytes:
    """A capture of one connection; each part comes a millisecond after the one before."""
    file = io.BytesIO()
    connection = ConnectionWriter(PcapngWriter(file), CLIENT, SERVER, start)
    for number, (from_client, data) in enumerate(talk, 1):
        connection.data(start + number * 1_000_000, data, from_client=from_client)
    connection.end(start + SECOND, from_client=True)
    connection.end(start + SECOND, from_client=False)
    return file.getvalue()


def read(data: bytes, tmp_path: Path) -> list[Packet]:
    path = tmp_path / "a.pcapng"
    path.write_bytes(data)
    return list(read_pcapng(path))


def test_there_and_back(tmp_path: Path) -> None:
    big = random.Random(1).randbytes(100_000)
    packets = read(written((True, b"hello"), (False, big), (True, b"bye")), tmp_path)
    assert {packet.link_type for packet in packets} == {LINKTYPE_ETHERNET}
    assert max(len(packet.data) for packet in packets) == 1514
    (flow,) = reassemble(packets)
    assert (flow.client, flow.server) == (CLIENT, SERVER)
    assert flow.stream(from_client=True) == b"hellobye"
    assert flow.stream(from_client=False) == big
    assert flow.chunks[0].time == pytest.approx(1_700_000_000.001, abs=1e-6)
    assert [chunk.from_client for chunk in flow.chunks[:2]] == [True, False]
    assert str(flow) == "127.0.0.1:40000 > 127.0.0.2:443"


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff", bytes(1461), b"\xff\xff" * 700, bytes(range(256)) * 9]
)
def test_checksums(data: bytes, tmp_path: Path) -> None:
    """A header with its checksum adds up to ones (RFC 1071)."""
    for packet in read(written((True, data), (False, data[1:])), tmp_path):
        header, segment = packet.data[14:34], packet.data[34:]
        pseudo_header = header[12:20] + pack("!HH", 6, len(segment))
        for part in (header, pseudo_header + segment + bytes(len(segment) % 2)):
            total = sum(part[0::2]) * 256 + sum(part[1::2])
            while total > 0xFFFF:
                total = (total & 0xFFFF) + (total >> 16)
            assert total == 0xFFFF


def test_a_checksum_of_zero(tmp_path: Path) -> None:
    """It is 0 and not 0xFFFF, the other zero of ones' complement (RFC 1624)."""
    checksum = read(written((True, bytes(2))), tmp_path)[3].data[50:52]
    assert read(written((True, checksum)), tmp_path)[3].data[50:52] == bytes(2)


def test_segments_out_of_order_and_repeated(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(50_000)
    packets = read(written((True, data), (False, data[::-1])), tmp_path)
    opening, body = packets[:3], packets[3:]
    for seed in range(20):
        shuffled = body + body[::3]
        random.Random(seed).shuffle(shuffled)
        (flow,) = reassemble(opening + shuffled)
        assert flow.stream(from_client=True) == data
        assert flow.stream(from_client=False) == data[::-1]


def test_a_connection_that_was_open_before_the_capture(tmp_path: Path) -> None:
    packets = read(written((True, b"one"), (False, b"two"), (True, b"three")), tmp_path)
    (flow,) = reassemble(packets[3:])
    assert flow.client == CLIENT
    assert flow.stream(from_client=True) == b"onethree"


def test_two_connections_on_the_same_ports(tmp_path: Path) -> None:
    packets = read(written((True, b"one")), tmp_path) + read(written((True, b"two")), tmp_path)
    assert [flow.stream(from_client=True) for flow in reassemble(packets)] == [b"one", b"two"]


def test_what_is_not_tcp_over_ipv4_is_passed_over(tmp_path: Path) -> None:
    frame = read(written((True, b"data")), tmp_path)[3].data
    others = [
        b"",
        frame[:33],
        frame[:12] + b"\x86\xdd" + frame[14:],  # IPv6
        frame[:23] + b"\x11" + frame[24:],  # UDP
        frame[:20] + b"\x20\x00" + frame[22:],  # a fragment
        frame[:16] + b"\x00\x20" + frame[18:],  # too short for a TCP header
    ]
    assert reassemble(Packet(0, LINKTYPE_ETHERNET, data) for data in others) == []
    assert reassemble([Packet(0, 113, frame)]) == []
    assert len(reassemble([Packet(0, LINKTYPE_ETHERNET, frame)])) == 1


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return pack(order + "II", kind, len(body) + 12) + body + pack(order + "I", len(body) + 12)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("option", "tick"), [(b"", 1e-6), (b"\x03", 1e-3), (b"\x8a", 2.0**-10)], ids=str
)
def test_captures_of_other_tools(order: str, option: bytes, tick: float, tmp_path: Path) -> None:
    """Either byte order, other resolutions, blocks and options that nobody asked for."""
    interface = pack(order + "HHI", 1, 0, 65535) + pack(order + "HH", 2, 3) + b"eth\0"
    if option:
        interface += pack(order + "HH", 9, 1) + option + bytes(3)
    data = block(order, 0x0A0D0D0A, pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    data += block(order, 1, interface + pack(order + "HH", 0, 0))
    data += block(order, 5, b"statistics")
    data += block(order, 6, pack(order + "IIIII", 0, 1, 5, 3, 3) + b"abc\0" + bytes(4))
    (packet,) = read(data, tmp_path)
    assert packet == Packet(((1 << 32) + 5) * tick, 1, b"abc")


def test_a_damaged_file_is_refused_or_read_to_the_damage(tmp_path: Path) -> None:
    whole = written((True, b"hello"), (False, b"there"))
    count = len(read(whole, tmp_path))
    for length in range(0, len(whole), 3):
        with suppress(RecordingError):
            assert len(read(whole[:length], tmp_path)) <= count
    rng = random.Random(3)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with suppress(RecordingError):
            reassemble(read(bytes(data), tmp_path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot read missing"):
        list(read_pcapng(tmp_path / "missing"))
    with pytest.raises(RecordingError, match=r"a\.pcapng: it does not start with"):
        read(b"\0" * 64, tmp_path)


# --- the tap --------------------------------------------------------------------------------------


async def test_the_tap_passes_on_and_records(tmp_path: Path) -> None:
    """Many connections at once, both directions, large and small, with half-close."""
    up, down = random.Random(4).randbytes(300_000), random.Random(5).randbytes(200_000)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(down)
            got = b"".join([bytes(data) async for data in stream])
            await stream.send_all(got[::-1])

    async def call(address: tuple[str, int]) -> None:
        async with await trio.open_tcp_stream(*address) as stream:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, up)
                got = bytearray()
                while len(got) < len(down):
                    got += await stream.receive_some()
            await stream.send_eof()
            got += b"".join([bytes(data) async for data in stream])
            assert got == down + up[::-1]

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        where = ("127.0.0.1", listeners[0].socket.getsockname()[1])
        tap = wire_tap(tmp_path / "a.pcapng", where)
        async with tap as address, trio.open_nursery() as calls:
            for _ in range(5):
                calls.start_soon(call, address)
        nursery.cancel_scope.cancel()
    flows = reassemble(read_pcapng(tmp_path / "a.pcapng"))
    assert len(flows) == 5
    assert len({flow.client for flow in flows}) == 5
    for flow in flows:
        assert flow.server == address
        assert flow.stream(from_client=True) == up
        assert flow.stream(from_client=False) == down + up[::-1]


async def test_the_tap_survives_a_server_that_is_not_there(tmp_path: Path) -> None:
    """A real one behind a dead address: the client sees its connection end."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    where = listeners[0].socket.getsockname()
    await listeners[0].aclose()
    async with wire_tap(tmp_path / "a.pcapng", where) as address:
        for _ in range(2):
            async with await trio.open_tcp_stream(*address) as stream:
                assert await stream.receive_some() == b""
    assert all(flow.chunks == [] for flow in reassemble(read_pcapng(tmp_path / "a.pcapng")))


def test_an_empty_flow_is_one() -> None:
    assert Flow(CLIENT, SERVER).stream(from_client=True) == b""
