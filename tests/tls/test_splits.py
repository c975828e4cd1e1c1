"""However the bytes are cut on their way, the events are the same."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tls_glue import ANY_GROUP, Pair, drain

from hybridkex.auth import Identity, TrustStore
from hybridkex.constants import Alert
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.errors import HybridkexError, PeerError
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import ApplicationData, SessionProposed
from hybridkex.tls.session import MemoryTicketStore

Cut = Callable[[bytes], Iterable[bytes]]


def told(events: Iterable[Any]) -> list[Any]:
    """Events without their pieces: data in a row is one, the rest by its name."""
    found: list[Any] = []
    for event in events:
        if not isinstance(event, ApplicationData):
            found.append(type(event).__name__)
        elif found and isinstance(found[-1], bytes):
            found[-1] += bytes(event.data)
        else:
            found.append(bytes(event.data))
        assert not isinstance(event, ApplicationData) or event.data, "an empty piece of data"
    return found


def feed(target: Connection, data: bytes, cut: Cut) -> list[Any]:
    """The events, and at the end the error if there is one."""
    events: list[Any] = []
    for piece in cut(data):
        target.receive_data(piece)
        try:
            while (event := target.next_event()) is not None:
                if isinstance(event, SessionProposed):
                    target.accept()
                else:
                    events.append(event)
        except HybridkexError as error:
            return [*told(events), f"{type(error).__name__}: {error}"]
    return told(events)


def pieces(sizes: list[int]) -> Cut:
    """Cut at these sizes, again and again."""

    def cut(data: bytes) -> Iterator[bytes]:
        at, turn = 0, 0
        while at < len(data):
            size = sizes[turn % len(sizes)]
            yield data[at : at + size]
            at, turn = at + size, turn + 1

    return cut


def conversation(pair: Pair, cut: Cut) -> list[list[Any]]:
    """A handshake with all that can follow; what both sides tell of every flight."""
    heard = []
    pair.client.start()
    for step in range(8):
        if step == 4:
            assert pair.both_complete
            pair.server.send_data(b"s" * 40000)
            pair.server.update_keys(request_peer=True)
            pair.server.send_data(b"t" * 5)
        if step == 5:
            pair.client.send_data(b"c" * 300)
            pair.client.update_keys()
            pair.client.update_keys()
            pair.client.send_data(b"d" * 17000)
            pair.client.send_close()
        if step == 6:
            pair.server.send_data(b"half-closed")
            pair.server.send_close()
        for source, target in ((pair.client, pair.server), (pair.server, pair.client)):
            if data := bytes(source.data_to_send()):
                heard.append(feed(target, data, cut))
    assert pair.client.close_received
    assert pair.server.close_received
    return heard


@pytest.fixture(scope="module")
def configs(trust: TrustStore, identity: Identity) -> tuple[ClientConfig, ServerConfig]:
    """With HelloRetryRequest, client certificates and tickets."""
    return (
        ClientConfig(
            verifier=trust,
            identity=identity,
            groups=(SECP256R1, X25519),
            policy=ANY_GROUP,
            ticket_store=MemoryTicketStore(),
        ),
        ServerConfig(
            identities=(identity,),
            groups=(X25519,),
            policy=ANY_GROUP,
            client_verifier=trust,
            require_client_certificate=True,
        ),
    )


@pytest.fixture(scope="module")
def whole(configs: tuple[ClientConfig, ServerConfig]) -> list[list[Any]]:
    """What is told where every flight arrives in one piece."""
    heard = conversation(Pair.make(*configs), lambda data: [data])
    assert [
        "TicketReceived",
        "TicketReceived",
        b"s" * 40000,
        "KeyUpdated",
        b"t" * 5,
    ] in heard
    # The request is answered before the next data; then come the client's own two updates.
    assert [
        "KeyUpdated",
        b"c" * 300,
        "KeyUpdated",
        "KeyUpdated",
        b"d" * 17000,
        "CloseReceived",
    ] in heard
    return heard


def test_byte_by_byte(configs: tuple[ClientConfig, ServerConfig], whole: list[list[Any]]) -> None:
    assert conversation(Pair.make(*configs), pieces([1])) == whole


@given(sizes=st.lists(st.integers(1, 20000) | st.integers(1, 30), min_size=1, max_size=12))
@example(sizes=[5])
@example(sizes=[4, 1])
@example(sizes=[5, 16384 + 17])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_split(
    sizes: list[int], configs: tuple[ClientConfig, ServerConfig], whole: list[list[Any]]
) -> None:
    assert conversation(Pair.make(*configs), pieces(sizes)) == whole


@pytest.mark.parametrize("size", [1, 3, 5, 21, 22, 23, 100, 1000, 1 << 20])
def test_an_error_comes_behind_the_data_before_it(
    size: int, trust: TrustStore, identity: Identity
) -> None:
    """Good records, a bad one, more good ones: the same in whatever pieces."""

    def spoiled(how: str) -> list[Any]:
        pair = Pair.make(
            ClientConfig(verifier=trust, groups=(X25519,), policy=ANY_GROUP),
            ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP),
        ).connect()
        pair.client.send_data(b"good")
        data = bytes(pair.client.data_to_send())
        if how == "forged":
            pair.client.send_data(b"bad")
            bad = bytearray(pair.client.data_to_send())
            bad[-1] ^= 1
            data += bad
        elif how == "alert":
            pair.client._records.writer.send_alert(Alert.INTERNAL_ERROR)
        elif how == "in the clear":
            data += b"\x15\x03\x03\0\2\2\x50"
        elif how == "change_cipher_spec":
            data += b"\x14\x03\x03\0\1\1"
        elif how == "handshake in the clear":
            data += b"\x16\x03\x03\0\5\x18\0\0\1\0"
        elif how == "not TLS":
            data += b"GET / HTTP/1.0\r\n\r\n"
        pair.client.send_data(b"never seen")
        data += bytes(pair.client.data_to_send())
        heard = feed(pair.server, data, pieces([size]))
        if how != "alert":
            assert pair.server.has_data_to_send
        return heard

    for how, error in (
        ("forged", "BadRecordMac"),
        ("alert", "AlertReceived"),
        ("in the clear", "UnexpectedMessage"),
        ("change_cipher_spec", "UnexpectedMessage"),
        ("handshake in the clear", "UnexpectedMessage"),
        ("not TLS", "DecodeError"),
    ):
        heard = spoiled(how)
        assert heard[0] == b"good", how
        assert heard[1].startswith(error), how
        assert len(heard) == 2, how


def records(*bodies: tuple[int, bytes]) -> bytes:
    return b"".join(
        bytes((type_, 3, 3)) + len(body).to_bytes(2, "big") + body for type_, body in bodies
    )


def test_messages_may_be_cut_into_records(trust: TrustStore, identity: Identity) -> None:
    """RFC 9846 section 5.1: a ClientHello in records of one byte is a ClientHello."""
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    hello = bytes(pair.client.data_to_send())[5:]
    pair.server.receive_data(records(*((22, bytes((byte,))) for byte in hello)))
    assert pair.server.next_event() is None
    pair.pump()
    assert pair.both_complete


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (records((22, b"")), "empty handshake record"),
        (records((20, b"\1")), "change_cipher_spec"),
        (records((21, b"\2\x28")), "between the fragments"),
        (records((23, b"x" * 40)), "between the fragments"),
        (records((24, b"x")), "unknown type 24"),
    ],
)
def test_nothing_may_stand_between_the_pieces(
    between: bytes, reason: str, trust: TrustStore, identity: Identity
) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    pair.server._records.reader.change_cipher_spec_allowed = True
    hello = bytes(pair.client.data_to_send())[5:]
    pair.server.receive_data(records((22, hello[:100])) + between + records((22, hello[100:])))
    with pytest.raises(PeerError, match=reason) as caught:
        pair.server.next_event()
    assert caught.value.alert == Alert.UNEXPECTED_MESSAGE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (records((20, b"\1")), "not allowed here"),  # before the first ClientHello
        (records((21, b"\2")), "alert of 1 bytes"),
        (records((23, b"x" * 40)), "type 23 is not allowed here"),
        (records((22, b"\1\xff\xff\xff")), "16777215 bytes"),
        (b"\x16\x03\x03\x40\x01", "16385 bytes"),
        (b"\x17\x03\x03\x41\x01", "16641 bytes"),
        (b"\x80\x2e\x01\x03\x01", "not TLS"),
    ],
)
def test_rubbish_at_the_beginning(
    data: bytes, reason: str, trust: TrustStore, identity: Identity
) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.server.receive_data(data)
    with pytest.raises(PeerError, match=reason):
        pair.server.next_event()
    assert pair.server.has_data_to_send


def small(trust: TrustStore, identity: Identity) -> tuple[ClientConfig, ServerConfig]:
    return (
        ClientConfig(verifier=trust, groups=(X25519,), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP),
    )


def test_too_many_change_cipher_specs(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(*small(trust, identity))
    pair.client.start()
    ccs = records((20, b"\1"))
    pair.server.receive_data(bytes(pair.client.data_to_send()) + ccs * 32)
    assert pair.server.next_event() is None
    pair.server.receive_data(ccs)
    with pytest.raises(PeerError, match="too many"):
        pair.server.next_event()


def test_too_many_empty_records(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(*small(trust, identity)).connect()
    for _ in range(3):
        pair.client.send_data(b"x")
        for _ in range(32):
            pair.client._records.writer.send_data(memoryview(b""))
    pair.pump()
    pair.client._records.writer.send_data(memoryview(b""))
    pair.fight()
    assert "too many empty records" in str(pair.errors["server"])


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (b"", "only zeros"),
        (b"\0\0\0\0", "only zeros"),
        (b"\x14\1", "a record of type 1"),
        (b"\1\x14", "a record of type 20"),
        (b"\x16", "empty handshake record"),
        (b"\2\x15", "alert of 1 bytes"),
        (b"xyz\x63", "a record of type 99"),
    ],
)
@pytest.mark.parametrize("ahead", [b"", b"data\x17"], ids=["alone", "behind data"])
def test_what_must_not_be_inside_a_record(
    inner: bytes, reason: str, ahead: bytes, trust: TrustStore, identity: Identity
) -> None:
    pair = Pair.make(*small(trust, identity)).connect()
    if ahead:
        pair.client.send_data(ahead)
    write = pair.client._records.writer.protection
    assert write is not None
    content, type_ = (inner[:-1], inner[-1]) if inner else (b"", 0)
    pair.client._records.writer._outgoing.append(write.seal(type_, memoryview(content), 1 << 14))
    pair.fight()
    assert reason in str(pair.errors["server"])
    assert isinstance(pair.errors["server"], PeerError)


@pytest.mark.parametrize("ahead", [b"", b"data\x17"], ids=["alone", "behind data"])
def test_a_record_with_nothing_inside(ahead: bytes, trust: TrustStore, identity: Identity) -> None:
    """Not even a content type: a good tag over no bytes."""
    pair = Pair.make(*small(trust, identity)).connect()
    if ahead:
        pair.client.send_data(ahead)
    write = pair.client._records.writer.protection
    assert write is not None
    head, tag = b"\x17\3\3\0\x10", bytearray(16)
    nonce = (write._iv ^ write._sequence).to_bytes(12, "big")
    write._aead.encrypt_into(nonce, b"", head, tag)
    pair.client._records.writer._outgoing.append(head + tag)
    pair.fight()
    assert "only zeros" in str(pair.errors["server"])


def test_data_between_the_pieces_of_a_message(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(*small(trust, identity)).connect()
    channel = pair.client._records
    channel.writer.send_raw(b"\x18\0")
    pair.client.send_data(b"between")
    channel.writer.send_raw(b"\0\1\0")
    pair.fight()
    assert "between the fragments" in str(pair.errors["server"])


def test_data_before_the_handshake_is_complete(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(*small(trust, identity))
    pair.client.start()
    pair.server.receive_data(pair.client.data_to_send())
    assert pair.server.next_event() is None
    pair.client.receive_data(pair.server.data_to_send())
    drain(pair.client)
    # Under the handshake key, which the client has no more: as if it were early by one flight.
    pair.server._records.reader.protection = replace_traffic(pair)
    pair.client._records.writer._outgoing.clear()
    pair.client._records.writer._flight.clear()
    pair.client.send_data(b"too early")
    pair.fight()
    assert "before the handshake is complete" in str(pair.errors["server"])


def replace_traffic(pair: Pair) -> Any:
    """A server that would take the client's application key already."""
    state: Any = pair.server._state
    protection = pair.server._records.reader.protection
    assert protection is not None
    return type(protection)(state.flight.main.client)


@pytest.mark.parametrize("where", ["hello", "key update"])
def test_messages_must_not_straddle_a_change_of_keys(
    where: str, trust: TrustStore, identity: Identity
) -> None:
    pair = Pair.make(*small(trust, identity))
    if where == "hello":
        pair.client.start()
        hello = bytearray(pair.client.data_to_send())
        hello[3:5] = (len(hello) - 5 + 1).to_bytes(2, "big")
        pair.server.receive_data(hello + b"\x14")
        with pytest.raises(PeerError, match="key change"):
            pair.server.next_event()
        return
    pair.connect()
    pair.client._records.writer.send_raw(b"\x18\0\0\1\0\x18")
    pair.fight()
    assert "key change" in str(pair.errors["server"])


def test_an_alert_in_the_clear_from_a_peer_without_keys(
    trust: TrustStore, identity: Identity
) -> None:
    """A client that cannot follow our ServerHello can only say so in the clear."""
    client, server = small(trust, identity)
    pair = Pair.make(replace(client, alpn=("x",)), server)
    pair.client.start()
    pair.server.receive_data(pair.client.data_to_send())
    assert pair.server.next_event() is None
    pair.server.receive_data(records((21, bytes((2, Alert.ILLEGAL_PARAMETER)))))
    with pytest.raises(HybridkexError, match="illegal_parameter"):
        pair.server.next_event()
