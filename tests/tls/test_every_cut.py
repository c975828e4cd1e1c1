"""Every variant of the handshake over every way of cutting the stream gives the same events.

A variant is a conversation of two engines, with records added where a peer may add them. The
reference is what both sides tell when each record arrives alone; the variant says how it must end.
Then the same conversation is delivered in one read, byte by byte, cut once at each place, several
records to a read, and in random segments.

Records are added because our own engines do not send all that a peer may: tests that cut only what
two of them say to each other missed a fault with a change_cipher_spec between records of early data
that are skipped, which showed only where they came in one read.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from tls_glue import ANY_GROUP, ELSEWHERE, Pair

from hybridkex.auth import DevCa, TrustStore
from hybridkex.constants import Alert
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import TLS_AES_128_GCM_SHA256
from hybridkex.errors import HybridkexError
from hybridkex.secret import Secret
from hybridkex.tls import client as client_module
from hybridkex.tls import server as server_module
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import ApplicationData, PskWanted, SessionProposed
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.wire.extensions import EarlyDataIndication, Extensions
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import ClientHello, decode, encode

Cut = Callable[[int, bytes], list[bytes]]
"""Number of the delivery and its bytes, to the reads in which it arrives."""

PSK = ExternalPsk(identity=b"a key", key=Secret(bytes(range(32))))
CCS = b"\x14\3\3\0\1\1"


class Ended(Exception):
    """One side has failed: the conversation is over."""


@dataclass
class Wire:
    """Carries the bytes of a conversation and writes down what both sides tell."""

    pair: Pair
    cut: Cut
    told: list[Any] = field(default_factory=list)
    deliveries: list[bytes] = field(default_factory=list)

    def deliver(self, target: Connection, data: bytes) -> None:
        who = "client" if target is self.pair.client else "server"
        number = len(self.deliveries)
        self.deliveries.append(data)
        self.told.append(who)
        for piece in self.cut(number, data):
            try:
                target.receive_data(piece)
                while (event := target.next_event()) is not None:
                    self._tell(event)
                    if isinstance(event, SessionProposed):
                        target.accept()
                    elif isinstance(event, PskWanted):
                        target.provide_psk(PSK)
            except HybridkexError as error:
                self.told.append(f"{type(error).__name__}: {error}")
                raise Ended from None

    def _tell(self, event: Any) -> None:
        if not isinstance(event, ApplicationData):
            self.told.append(type(event).__name__)
        elif isinstance(self.told[-1], bytes):
            self.told[-1] += bytes(event.data)
        else:
            self.told.append(bytes(event.data))

    def to_server(self, ahead: bytes = b"", between: bytes = b"", behind: bytes = b"") -> None:
        """What the client has to say, with records around it and between its records."""
        records = split(bytes(self.pair.client.data_to_send()))
        self.deliver(self.pair.server, ahead + between.join(records) + behind)

    def to_client(self, ahead: bytes = b"", between: bytes = b"", behind: bytes = b"") -> None:
        records = split(bytes(self.pair.server.data_to_send()))
        self.deliver(self.pair.client, ahead + between.join(records) + behind)

    def handshake(self) -> None:
        self.pair.client.start()
        self.to_server()
        self.to_client()

    def both_speak(self) -> None:
        """Data both ways, with tickets and updates of keys, and the end."""
        client, server = self.pair.client, self.pair.server
        client.send_data(b"question")
        self.to_server()
        server.send_data(b"answer")
        server.update_keys(request_peer=True)
        server.send_data(b"of two generations")
        self.to_client()
        client.send_data(b"thanks")
        client.update_keys()
        client.send_data(b"bye")
        client.send_close()
        self.to_server()
        server.send_close()
        self.to_client()


def split(data: bytes) -> list[bytes]:
    """The records in some bytes."""
    found, at = [], 0
    while at < len(data):
        end = at + 5 + int.from_bytes(data[at + 3 : at + 5], "big")
        found.append(data[at:end])
        at = end
    return found


def record(type_: int, body: bytes) -> bytes:
    return bytes((type_, 3, 3)) + len(body).to_bytes(2, "big") + body


def early(length: int) -> bytes:
    """A record of early data under a key that the server does not have."""
    return record(23, bytes(length - 1) + b"x")


@cache
def certified() -> tuple[ClientConfig, ServerConfig]:
    """Ed25519, whose signatures all have one length; a client certificate."""
    ca = DevCa.create(algorithm="ed25519")
    trust = TrustStore((ca.certificate,))
    client = ClientConfig(
        verifier=trust,
        identity=ca.issue("bob", algorithm="ed25519"),
        groups=(X25519,),
        suites=(TLS_AES_128_GCM_SHA256,),
        policy=ANY_GROUP,
        alpn=("h2",),
    )
    server = ServerConfig(
        identities=(ca.issue("localhost", algorithm="ed25519"),),
        client_verifier=trust,
        require_client_certificate=True,
        groups=(X25519,),
        policy=ANY_GROUP,
        alpn=("h2",),
    )
    return client, server


CLIENT = ClientConfig(
    psks=(PSK,), groups=(X25519,), suites=(TLS_AES_128_GCM_SHA256,), policy=ANY_GROUP
)
SERVER = ServerConfig(psks=(PSK,), groups=(X25519,), policy=ANY_GROUP)
RETRY = replace(CLIENT, groups=(SECP256R1, X25519))


def one_record_per_message(connection: Connection) -> None:
    channel = connection._records
    send = channel.writer.send_raw

    def send_and_flush(raw: bytes) -> None:
        send(raw)
        channel.writer.flush()

    channel.writer.send_raw = send_and_flush  # type: ignore[method-assign]


# --- the variants ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A conversation, and how the reference must end."""

    play: Callable[[Wire], None]
    ends: str
    """The last thing told, or its beginning."""
    client: ClientConfig | None = CLIENT
    server: ServerConfig = SERVER
    says_early_data: bool = False

    def run(self, cut: Cut) -> Wire:
        client, server = (self.client, self.server) if self.client else certified()
        assert client is not None
        with pytest.MonkeyPatch.context() as patch:
            if self.says_early_data:
                announce_early_data(patch)
            wire = Wire(Pair.make(client, server), cut)
            try:
                self.play(wire)
            except Ended:
                # What the peer is told does not depend on the cut either.
                wire.told.append(wire.pair.server.has_data_to_send)
        return wire


def announce_early_data(patch: pytest.MonkeyPatch) -> None:
    """The client says in its first hello that early data follows."""
    said = []

    def encode_with(message: Message) -> bytes:
        if isinstance(message, ClientHello) and not said:
            said.append(message)
            hello = decode(encode(message))
            assert isinstance(hello, ClientHello)
            extensions = [EarlyDataIndication(), *hello.extensions]
            message = replace(hello, extensions=Extensions(extensions))
        return encode(message)

    patch.setattr(client_module.wire, "encode", encode_with)


def plain(wire: Wire) -> None:
    wire.handshake()
    wire.both_speak()


def retried(wire: Wire) -> None:
    wire.handshake()
    wire.to_server()
    wire.to_client()
    wire.both_speak()


def ccs_everywhere(wire: Wire) -> None:
    """Section 5: at any time after the first ClientHello and before the peer's Finished."""
    wire.pair.client.start()
    wire.to_server(behind=CCS * 2)
    one_record_per_message(wire.pair.client)
    wire.to_client(ahead=CCS, between=CCS * 2)
    wire.to_server(ahead=CCS, between=CCS * 2)
    wire.both_speak()


def ccs_everywhere_in_a_retry(wire: Wire) -> None:
    wire.pair.client.start()
    wire.to_server(behind=CCS)
    wire.to_client(ahead=CCS, behind=CCS)
    wire.to_server(ahead=CCS, behind=CCS * 3)
    wire.to_client(between=CCS)
    wire.to_server(ahead=CCS * 2)
    wire.both_speak()


def early_data_skipped(wire: Wire) -> None:
    """Section 4.3.10: records that do not decrypt, up to a limit; with change_cipher_spec among
    them, whose place no key decides."""
    wire.pair.client.start()
    wire.to_server(behind=CCS + early(40) + CCS + early(300) + CCS * 2 + early(17))
    wire.to_client()
    wire.to_server(ahead=early(40) + CCS + early(5) + CCS, between=CCS)
    wire.both_speak()


def early_data_skipped_in_a_retry(wire: Wire) -> None:
    wire.pair.client.start()
    wire.to_server(behind=CCS + early(40) + CCS + early(300))
    wire.to_client()
    wire.to_server(ahead=early(40) + CCS + early(1), behind=CCS)
    wire.to_client()
    wire.both_speak()


def early_data_over_the_limit(wire: Wire) -> None:
    wire.pair.client.start()
    wire.to_server(behind=CCS + early(16000) + CCS + early(400))


def early_data_unannounced(wire: Wire) -> None:
    wire.pair.client.start()
    wire.to_server(behind=CCS + early(40))


def early_data_after_the_handshake(wire: Wire) -> None:
    wire.handshake()
    wire.pair.client.send_data(b"good")
    wire.to_server(behind=early(40))


def pieces(wire: Wire) -> None:
    """Section 5.1: messages in several records, and several messages in one."""
    wire.pair.client.start()
    hello = bytes(wire.pair.client.data_to_send())[5:]
    wire.deliver(wire.pair.server, b"".join(record(22, bytes((one,))) for one in hello))
    wire.pair.client._records.writer.record_limit = 7
    wire.to_client()
    wire.both_speak()


def small_records(wire: Wire) -> None:
    wire.pair.client.start()
    wire.pair.server._records.writer.record_limit = 5
    wire.to_server()
    wire.to_client()
    wire.both_speak()


def user_canceled(wire: Wire) -> None:
    """Section 6.1: read on until close_notify."""
    wire.handshake()
    wire.pair.client.send_data(b"some")
    wire.pair.client._records.writer.send_alert(Alert.USER_CANCELED)
    wire.pair.client.send_data(b" more")
    wire.pair.client.send_close()
    wire.to_server()


def user_canceled_in_the_handshake(wire: Wire) -> None:
    wire.pair.client.start()
    wire.to_server(behind=record(21, bytes((1, Alert.USER_CANCELED))))
    wire.to_client()
    wire.both_speak()


def fatal_in_the_clear(wire: Wire) -> None:
    wire.pair.client.start()
    wire.to_server(behind=CCS + record(21, bytes((2, Alert.DECODE_ERROR))))


def fatal_after_data(wire: Wire) -> None:
    wire.handshake()
    wire.pair.client.send_data(b"some")
    wire.pair.client._records.writer.send_alert(Alert.INTERNAL_ERROR)
    wire.to_server(behind=early(40))


def inside(content: bytes, type_: int) -> Callable[[Wire], None]:
    """A protected record of this content behind data."""

    def play(wire: Wire) -> None:
        wire.handshake()
        client = wire.pair.client
        client.send_data(b"some")
        write = client._records.writer.protection
        assert write is not None
        client._records.writer._outgoing.append(write.seal(type_, memoryview(content), 1 << 14))
        client.send_data(b"never seen")
        wire.to_server()

    return play


def behind_data(rest: bytes) -> Callable[[Wire], None]:
    """These bytes behind good data."""

    def play(wire: Wire) -> None:
        wire.handshake()
        wire.pair.client.send_data(b"some")
        wire.to_server(behind=rest)

    return play


def behind_hello(rest: bytes) -> Callable[[Wire], None]:
    """These bytes behind the ClientHello."""

    def play(wire: Wire) -> None:
        wire.pair.client.start()
        wire.to_server(behind=rest)

    return play


def behind_the_end(wire: Wire) -> None:
    """Section 6.1: what comes behind close_notify is ignored."""
    wire.handshake()
    wire.pair.client.send_data(b"all")
    wire.pair.client.send_close()
    wire.to_server(behind=early(40) + b"GET / HTTP/1.0\r\n")


def storm(wire: Wire) -> None:
    wire.handshake()
    for _ in range(33):
        wire.pair.client.update_keys()
    wire.to_server()


def straddling(wire: Wire) -> None:
    wire.handshake()
    wire.pair.client.send_data(b"some")
    wire.pair.client._records.writer.send_raw(b"\x18\0\0\1\0\x18")
    wire.to_server()


VARIANTS = {
    "psk": Variant(plain, "CloseReceived"),
    "psk looked up": Variant(
        plain,
        "CloseReceived",
        server=ServerConfig(psk_source=ELSEWHERE, groups=(X25519,), policy=ANY_GROUP),
    ),
    "no compatibility": Variant(
        plain, "CloseReceived", client=replace(CLIENT, compatibility_mode=False)
    ),
    "tickets": Variant(
        plain, "CloseReceived", client=replace(CLIENT, ticket_store=MemoryTicketStore())
    ),
    "retry": Variant(retried, "CloseReceived", client=RETRY),
    "certificates": Variant(plain, "CloseReceived", client=None),
    "ccs everywhere": Variant(ccs_everywhere, "CloseReceived"),
    "ccs everywhere, certificates": Variant(ccs_everywhere, "CloseReceived", client=None),
    "ccs everywhere, retry": Variant(ccs_everywhere_in_a_retry, "CloseReceived", client=RETRY),
    "early data": Variant(early_data_skipped, "CloseReceived", says_early_data=True),
    "early data, retry": Variant(
        early_data_skipped_in_a_retry, "CloseReceived", client=RETRY, says_early_data=True
    ),
    "too much early data": Variant(
        early_data_over_the_limit, "UnexpectedMessage", says_early_data=True
    ),
    "unannounced early data": Variant(early_data_unannounced, "BadRecordMac"),
    "late early data": Variant(
        early_data_after_the_handshake, "BadRecordMac", says_early_data=True
    ),
    "pieces": Variant(pieces, "CloseReceived"),
    "small records": Variant(small_records, "CloseReceived"),
    "user_canceled": Variant(user_canceled, "CloseReceived"),
    "user_canceled, handshake": Variant(user_canceled_in_the_handshake, "CloseReceived"),
    "fatal alert in the clear": Variant(fatal_in_the_clear, "AlertReceived"),
    "fatal alert behind data": Variant(fatal_after_data, "AlertReceived"),
    "empty alert": Variant(inside(b"", 21), "UnexpectedMessage"),
    "short alert": Variant(inside(b"\2", 21), "DecodeError"),
    "empty handshake record": Variant(inside(b"", 22), "UnexpectedMessage"),
    "protected ccs": Variant(inside(b"\1", 20), "UnexpectedMessage"),
    "unknown inner type": Variant(inside(b"x", 99), "UnexpectedMessage"),
    "ccs behind data": Variant(behind_data(CCS), "UnexpectedMessage"),
    "alert in the clear behind data": Variant(
        behind_data(record(21, b"\1\0")), "UnexpectedMessage"
    ),
    "forged record behind data": Variant(behind_data(early(40)), "BadRecordMac"),
    "not TLS behind data": Variant(behind_data(b"GET / HTTP/1.0\r\n\r\n"), "DecodeError"),
    "too long behind data": Variant(behind_data(b"\x17\3\3\x41\1" + bytes(99)), "RecordOverflow"),
    "ccs of another value": Variant(behind_hello(CCS + record(20, b"\2")), "UnexpectedMessage"),
    "ccs of two bytes": Variant(behind_hello(record(20, b"\1\1")), "UnexpectedMessage"),
    "33 ccs": Variant(behind_hello(CCS * 33), "UnexpectedMessage"),
    "handshake in the clear": Variant(behind_hello(record(22, b"\x14\0\0\0")), "UnexpectedMessage"),
    "empty alert in the clear": Variant(behind_hello(record(21, b"")), "UnexpectedMessage"),
    "behind close_notify": Variant(behind_the_end, "CloseReceived"),
    "storm of updates": Variant(storm, "UnexpectedMessage"),
    "straddling a change of keys": Variant(straddling, "UnexpectedMessage"),
}


# --- the cuts -------------------------------------------------------------------------------------


def by_record(_: int, data: bytes) -> list[bytes]:
    return tolerant_split(data)


def tolerant_split(data: bytes) -> list[bytes]:
    """As :func:`split`; what is not whole, or no record, is one piece."""
    return [piece for piece in split(data) if piece]


def sized(*sizes: int) -> Cut:
    def cut(_: int, data: bytes) -> list[bytes]:
        found, at, turn = [], 0, 0
        while at < len(data):
            end = at + sizes[turn % len(sizes)]
            found.append(data[at:end])
            at, turn = end, turn + 1
        return found

    return cut


def several_records(count: int, offset: int) -> Cut:
    """``count`` records to a read, the first read with fewer."""

    def cut(_: int, data: bytes) -> list[bytes]:
        records = tolerant_split(data)
        reads = [
            records[:offset],
            *(records[at : at + count] for at in range(offset, len(records), count)),
        ]
        return [b"".join(read) for read in reads if read]

    return cut


def random_segments(seed: int) -> Cut:
    chance = random.Random(seed)

    def cut(_: int, data: bytes) -> list[bytes]:
        found, at = [], 0
        while at < len(data):
            end = at + chance.choice((1, 2, 4, 5, 6, 7, 11, 22, 23, chance.randint(1, 400)))
            found.append(data[at:end])
            at = end
        return found

    return cut


def once(number: int, position: int) -> Cut:
    """One delivery in two reads, all others whole."""

    def cut(at: int, data: bytes) -> list[bytes]:
        if at != number or position >= len(data):
            return [data]
        return [data[:position], data[position:]]

    return cut


@cache
def reference(name: str) -> Wire:
    wire = VARIANTS[name].run(by_record)
    last = next(one for one in reversed(wire.told) if not isinstance(one, bool))
    assert str(last).startswith(VARIANTS[name].ends), (name, wire.told)
    return wire


def check(name: str, cut: Cut, how: str) -> None:
    assert VARIANTS[name].run(cut).told == reference(name).told, f"{name}: {how}"


def test_the_variants_enter_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = set()
    enter = Connection._enter

    def noted(self: Connection, state: Any) -> None:
        entered.add(type(state))
        enter(self, state)

    monkeypatch.setattr(Connection, "_enter", noted)
    for name in ("psk looked up", "tickets", "retry", "certificates"):
        VARIANTS[name].run(by_record)
    # A client waits for a PSK before the first byte.
    assert entered == {*client_module.STEPS, *server_module.STEPS} - {client_module.WaitPsk}


@pytest.mark.parametrize("name", VARIANTS)
def test_in_one_read(name: str) -> None:
    check(name, lambda _, data: [data], "in one read")


@pytest.mark.parametrize("name", VARIANTS)
def test_byte_by_byte(name: str) -> None:
    check(name, sized(1), "byte by byte")


@pytest.mark.parametrize("name", VARIANTS)
def test_several_records_in_a_read(name: str) -> None:
    for count in (2, 3, 4):
        for offset in range(count):
            check(name, several_records(count, offset), f"{count} records, {offset} first")


@pytest.mark.parametrize("name", VARIANTS)
def test_random_segments(name: str) -> None:
    seed = int(os.environ.get("HYBRIDKEX_SEED", "9846"))
    for number in range(seed, seed + 12):
        check(name, random_segments(number), f"segments of seed {number}")


def near_records(data: bytes) -> Iterator[int]:
    """Around every boundary of records and of their headers."""
    at = 0
    for one in tolerant_split(data):
        for place in (at - 1, at, at + 1, at + 4, at + 5, at + 6):
            if 0 < place < len(data):
                yield place
        at += len(one)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_cut_at_each_boundary(name: str, thorough: bool) -> None:
    """At each place with ``--thorough``, else at up to 12 of each delivery."""
    chance = random.Random(name)
    for number, data in enumerate(reference(name).deliveries):
        places = sorted(set(near_records(data)))
        if not thorough:
            places = chance.sample(places, min(12, len(places)))
        for place in places:
            check(name, once(number, place), f"delivery {number} cut at {place}")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_one_cut_at_each_byte(name: str, thorough: bool) -> None:
    """At each byte with ``--thorough``, else at up to 5 places of each delivery."""
    for number, data in enumerate(reference(name).deliveries):
        step = 1 if thorough else len(data) // 5 + 1
        for place in range(1 + number % step, len(data), step):
            check(name, once(number, place), f"delivery {number} cut at {place}")
