"""The short way of one small record: the same outcome as the long way, for good and bad records."""

import gc
import random

import pytest

from hybridkex import (
    ClientConfig,
    ClientConnection,
    DevCa,
    ServerConfig,
    ServerConnection,
    TrustStore,
)
from hybridkex.aio.channel import _READ_SIZE
from hybridkex.errors import BadRecordMac, PeerError
from hybridkex.shell.secure_duplex import READ_SIZE
from hybridkex.tls.events import ApplicationData, SessionProposed

CA = DevCa.create()
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(CA.issue("localhost"),))


def connected() -> tuple[ClientConnection, ServerConnection]:
    client, server = ClientConnection(CLIENT, "localhost"), ServerConnection(SERVER)
    client.start()
    while not (client.handshake_complete and server.handshake_complete):
        for one, other in ((client, server), (server, client)):
            if one.has_data_to_send:
                other.receive_data(one.data_to_send())
                while (event := other.next_event()) is not None:
                    if isinstance(event, SessionProposed):
                        other.accept()
    return client, server


def receive_record(server: ServerConnection, data: bytes | bytearray) -> bytes | None:
    """As a shell calls it: a read shorter than a header has what an earlier read left behind it."""
    buffer = bytearray(b"\x17\3\3\0\x30")
    buffer[: len(data)] = data
    view = memoryview(buffer)
    return server.receive_record(view[:5], view[5 : len(data)])


def outcome(server: ServerConnection, data: bytes, *, short: bool) -> list[object]:
    """The data, and the error, of some bytes."""
    found: list[object] = []
    if short and (content := receive_record(server, data)) is not None:
        return [content]
    try:
        server.receive_data(data)
        while (event := server.next_event()) is not None:
            found.append(event.data if isinstance(event, ApplicationData) else type(event))
    except PeerError as error:
        found += [type(error), str(error), bytes(server.data_to_send()) != b""]
    return found


def say(client: ClientConnection, what: str) -> bytes:
    if what == "close":
        client.send_close()
    elif what == "update":
        client.update_keys()
    else:
        client.send_data(b"hello" * int(what))
    return bytes(client.data_to_send())


@pytest.mark.parametrize("what", ["1", "40", "409", "500", "5000", "close", "update"])
@pytest.mark.parametrize("change", ["none", "flip", "cut", "more", "twice", "type", "in two"])
def test_the_short_way_and_the_long_way(what: str, change: str) -> None:
    for seed in range(5):
        chance = random.Random(seed)
        found = []
        for short in (True, False):
            # Keys differ between the two, and so would the place of a bit that is flipped.
            client, server = connected()
            place = random.Random(seed)
            assert outcome(server, say(client, "1"), short=short) == [b"hello"]
            data = say(client, what)
            pieces = [data]
            if change == "flip":
                broken = bytearray(data)
                broken[place.randrange(5, len(data))] ^= 1 << place.randrange(8)
                pieces = [bytes(broken)]
            elif change == "cut":
                pieces = [data[: place.randrange(1, len(data))]]
            elif change == "more":
                pieces = [data + b"\x17"]
            elif change == "twice":
                pieces = [data, data]
            elif change == "type":
                pieces = [bytes((chance.choice((20, 21, 22, 24)),)) + data[1:]]
                chance = random.Random(seed)
            elif change == "in two":
                pieces = [data[:7], data[7:]]
            result: list[object] = []
            for piece in pieces:
                if any(isinstance(one, type) and issubclass(one, PeerError) for one in result):
                    break
                result += outcome(server, piece, short=short)
            found.append(result)
        assert found[0] == found[1]


def test_it_takes_what_it_is_for() -> None:
    client, server = connected()
    assert receive_record(server, say(client, "40")) == b"hello" * 40
    assert receive_record(server, say(client, "5000")) is None


def test_records_are_sealed_the_short_way_while_nothing_else_is_to_be_sent() -> None:
    client, server = connected()

    def long_way(end: ClientConnection | ServerConnection) -> None:
        assert end.seal_record(b"data") is None
        end.send_data(b"data")
        assert end.seal_record(b"data") is None  # it would overtake what is queued
        end.data_to_send()
        assert end.seal_record(b"data") is not None
        assert end.seal_record(b"") is None
        assert end.seal_record(bytes(5000)) is None

    assert client.seal_record(b"data") is not None
    client.update_keys(request_peer=True)
    long_way(client)
    client.send_close()
    client.data_to_send()
    assert client.seal_record(b"data") is None

    client, server = connected()
    long_way(server)  # our tickets go first
    client.update_keys(request_peer=True)
    outcome(server, bytes(client.data_to_send()), short=False)
    long_way(server)  # our own KeyUpdate goes first
    server.abort(BadRecordMac("for the test"))
    server.data_to_send()
    assert server.seal_record(b"data") is None


def test_a_bulk_read_ends_with_a_record() -> None:
    client, _ = connected()
    client.send_data(bytes(16 * 16384))
    assert len(client.data_to_send()) == READ_SIZE == _READ_SIZE


@pytest.mark.parametrize("seed", range(20))
def test_a_conversation_in_the_short_way_and_in_the_long_way(seed: int) -> None:
    """Every record reaches the other end, in order, whichever way it is sealed and opened."""
    chance = random.Random(seed)
    ends = list(connected())
    said: list[list[bytes]] = [[], []]
    heard: list[list[object]] = [[], []]
    for _ in range(100):
        which = chance.randrange(2)
        end, other = ends[which], ends[1 - which]
        step = chance.random()
        data = b""
        if step < 0.15:
            end.update_keys(request_peer=chance.random() < 0.5)
        if step < 0.3:
            message = chance.randbytes(chance.choice((1, 100, 3000)))
            end.send_data(message)
            said[which].append(message)
            data = bytes(end.data_to_send())
        elif step < 0.9:
            message = chance.randbytes(chance.choice((1, 100, 2048, 2049)))
            record = end.seal_record(message)
            if record is None:
                end.send_data(message)
                record = bytes(end.data_to_send())
            said[which].append(message)
            data = record
        cut = chance.choice((0, 0, 0, 1, len(data) // 2))
        for piece in filter(None, (data[:cut], data[cut:])):
            heard[1 - which] += outcome(other, piece, short=chance.random() < 0.8)
    for one, other_one in ((0, 1), (1, 0)):
        data_heard = b"".join(item for item in heard[other_one] if isinstance(item, bytes))
        assert data_heard == b"".join(said[one])


@pytest.mark.parametrize("before", [b"", b"data before it"])
@pytest.mark.parametrize("short", [True, False])
def test_an_error_holds_no_piece_of_a_buffer(before: bytes, short: bool) -> None:
    """Python 3.12 crashes where the garbage collector meets a BytesIO with such a piece."""
    client, server = connected()
    first = b""
    if before:
        client.send_data(before)
        first = bytes(client.data_to_send())
    record = bytearray(say(client, "40"))
    record[-1] ^= 1
    with pytest.raises(BadRecordMac) as caught:  # noqa: PT012
        if not (short and receive_record(server, record) is not None):
            server.receive_data(first + bytes(record))
        while server.next_event() is not None:
            pass
    error: BaseException | None = caught.value
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            for value in trace.tb_frame.f_locals.values():
                if isinstance(value, memoryview) and "released" not in repr(value):
                    assert not type(value.obj).__name__.startswith("_BytesIO")
            trace = trace.tb_next
        error = error.__context__
    ring: list[object] = [caught.value]
    ring.append(ring)
    del ring, error, caught
    gc.collect()
