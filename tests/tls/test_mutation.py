"""Nothing that is changed on the way ends in a handshake that both sides believe in.

Messages are changed inside the encryption: the sender's own transcript keeps what it meant to send,
as if an attacker knew the handshake keys. Records are changed on the wire as well. Whoever notices
must raise a typed error and have an alert for the peer; any other exception ends the test.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tls_glue import ANY_GROUP, ELSEWHERE, Pair, drain

from hybridkex.auth import DevCa, TrustStore
from hybridkex.constants import Alert, HandshakeType
from hybridkex.crypto.kex import SECP256R1, X25519, X25519MLKEM768
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import TLS_AES_128_GCM_SHA256
from hybridkex.errors import (
    AlertReceived,
    HybridkexError,
    PeerError,
    TruncationError,
    UnexpectedMessage,
)
from hybridkex.secret import Secret
from hybridkex.tls import client as client_module
from hybridkex.tls import server as server_module
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.tls.traffic import ClientTraffic, ServerTraffic
from hybridkex.wire.messages import encode
from hybridkex.wire.update_messages import UpdateFinish

Change = Callable[[bytes], list[bytes]]
"""From the message that is due to those that go out in its place."""


@cache
def scenarios() -> dict[str, tuple[ClientConfig, ServerConfig]]:
    """Handshakes that together have every message, by the way in which they differ."""
    ca = DevCa.create()
    trust = TrustStore((ca.certificate,))
    leaf, bob = ca.issue("localhost"), ca.issue("bob")
    psk = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(range(32))), context=b"A to B")
    client = ClientConfig(
        verifier=trust, groups=(X25519,), suites=(TLS_AES_128_GCM_SHA256,), policy=ANY_GROUP
    )
    server = ServerConfig(identities=(leaf,), groups=(X25519,), policy=ANY_GROUP)
    mutual = (
        replace(client, identity=bob, alpn=("h2",)),
        replace(server, client_verifier=trust, require_client_certificate=True, alpn=("h2",)),
    )
    store = MemoryTicketStore(tickets_per_server=1 << 20)
    resumed = replace(client, ticket_store=store), server
    first = Pair.make(*resumed).connect()
    first.server.send_data(b"a ticket")
    first.pump()
    ticket = store.take("localhost")
    assert ticket is not None

    class Endless:
        """The same ticket again and again, so that each handshake resumes the same session."""

        def take(self, server: str, binding: bytes) -> Any:
            return ticket

        def put(self, server: str, ticket: Any) -> None:
            pass

    rsa_ca = DevCa.create(algorithm="rsa")
    rsa = rsa_ca.issue("localhost", algorithm="rsa")
    mldsa_ca = DevCa.create(algorithm="mldsa44")
    mldsa = mldsa_ca.issue("localhost", algorithm="mldsa44")
    return {
        "mutual": mutual,
        "retry": (replace(client, groups=(SECP256R1, X25519)), server),
        "psk": (
            ClientConfig(psks=(psk,), groups=(X25519,), policy=ANY_GROUP),
            ServerConfig(psks=(psk,), groups=(X25519,), policy=ANY_GROUP),
        ),
        "psk and certificate": (replace(client, psks=(psk,)), replace(server, psks=(psk,))),
        "resumption": (replace(client, ticket_store=Endless()), server),
        "hybrid": (
            ClientConfig(verifier=trust, groups=(X25519MLKEM768,)),
            ServerConfig(identities=(leaf,)),
        ),
        "rsa": (
            replace(client, verifier=TrustStore((rsa_ca.certificate,))),
            replace(server, identities=(rsa,)),
        ),
        "mldsa": (
            replace(client, verifier=TrustStore((mldsa_ca.certificate,))),
            replace(server, identities=(mldsa,)),
        ),
    }


NAMES = ("mutual", "retry", "psk", "psk and certificate", "resumption", "hybrid", "rsa", "mldsa")


def intercept(connection: Connection, change: Callable[[int, bytes], list[bytes]]) -> None:
    """Put ``change`` between a state and the record layer: number and message in, messages out."""
    channel, count = connection._records, iter(range(1 << 20))
    send = channel.writer.send_raw

    def changed(raw: bytes) -> None:
        for one in change(next(count), raw):
            send(one)

    channel.writer.send_raw = changed  # type: ignore[method-assign]


def messages(name: str) -> dict[str, list[bytes]]:
    """What each side sends in this handshake."""
    sent: dict[str, list[bytes]] = {"client": [], "server": []}
    pair = Pair.make(*scenarios()[name])
    for who, one in (("client", pair.client), ("server", pair.server)):

        def record(_: int, raw: bytes, who: str = who) -> list[bytes]:
            sent[who].append(raw)
            return [raw]

        intercept(one, record)
    pair.connect()
    return sent


def attacked(name: str, who: str, index: int, change: Change) -> Pair:
    """A handshake in which message ``index`` of ``who`` is changed, played to its end."""
    pair = Pair.make(*scenarios()[name])
    changed = []

    def hook(number: int, raw: bytes) -> list[bytes]:
        if number != index:
            return [raw]
        changed.append(raw)
        return change(raw)

    intercept(pair.client if who == "client" else pair.server, hook)
    pair.client.start()
    pair.fight()
    assert changed, "the message was never sent"
    return pair


def check(pair: Pair, what: str, *, may_wait: bool = False) -> None:
    """Nobody is fooled: not both have finished, and nobody waits for ever without an error."""
    assert not pair.both_complete or "server" in pair.errors, f"{what}: both believe"
    if not pair.errors:
        # Only where a length grew: the victim waits for bytes that never come, until the transport
        # ends (or the deadline of the stream passes).
        assert may_wait, f"{what}: nobody noticed"
        pair.cut()
    assert not pair.server.handshake_complete, f"{what}: the server finished"
    for error in pair.errors.values():
        assert isinstance(error, PeerError | AlertReceived | TruncationError), what
    assert any(isinstance(error, PeerError | TruncationError) for error in pair.errors.values())


def flips(length: int, dense: int, sampled: int) -> Iterator[tuple[int, int]]:
    """Positions, each with a bit: the first ``dense`` bytes and so many of those behind them."""
    step = max(1, (length - dense) // sampled)
    for index in [*range(min(length, dense)), *range(dense, length, step)]:
        yield index, 1 << (index * 5 + length) % 8


HELLOS = (HandshakeType.CLIENT_HELLO, HandshakeType.SERVER_HELLO)
SIGNED = (HandshakeType.CERTIFICATE, HandshakeType.CERTIFICATE_VERIFY)
OWN = dict.fromkeys(NAMES, HELLOS) | {
    "mutual": tuple(HandshakeType),
    "rsa": SIGNED,
    "mldsa": SIGNED,
}
"""The messages in which each handshake differs from the first."""


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("name", NAMES)
def test_any_flipped_byte_of_any_message(name: str, who: str, thorough: bool) -> None:
    """Every byte of every message, one bit of it. Without ``--thorough``: of the messages in which
    a handshake differs from the others the first 250 bytes (of a Certificate 100), of the others
    eight, and of all some of the bytes behind them, where keys, names and signatures are.
    tests/auth/test_auth_verify.py flips every byte of a certificate."""
    tried = 0
    for number, raw in enumerate(messages(name)[who]):
        dense, sampled = (250, 60) if raw[0] in OWN[name] else (8, 20)
        if raw[0] == HandshakeType.CERTIFICATE:
            dense = min(dense, 100)
        for index, bit in flips(len(raw), len(raw) if thorough else dense, sampled):

            def flip(raw: bytes, index: int = index, bit: int = bit) -> list[bytes]:
                if index >= len(raw):
                    return [raw[:-1] + bytes((raw[-1] ^ bit,))]  # signatures vary in length
                return [raw[:index] + bytes((raw[index] ^ bit,)) + raw[index + 1 :]]

            pair = attacked(name, who, number, flip)
            check(pair, f"{name}, {who} {number}, byte {index}", may_wait=index in (1, 2, 3))
            tried += 1
    assert tried > 40


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("name", NAMES)
def test_any_message_dropped_doubled_truncated_or_lengthened(name: str, who: str) -> None:
    def with_length(type_: int, body: bytes) -> bytes:
        return bytes((type_,)) + len(body).to_bytes(3, "big") + body

    changes: dict[str, Change] = {
        "dropped": lambda raw: [],
        "doubled": lambda raw: [raw, raw],
        "cut short": lambda raw: [raw[:-1]],
        "cut in half": lambda raw: [raw[: len(raw) // 2]],
        "one byte less": lambda raw: [with_length(raw[0], raw[4:-1])],
        "emptied": lambda raw: [with_length(raw[0], b"")],
        "one byte more": lambda raw: [with_length(raw[0], raw[4:] + b"\0")],
        "too long to hold": lambda raw: [raw[:1] + b"\xff\xff\xff" + raw[4:]],
    }
    sent = messages(name)[who]
    for number in range(len(sent)):
        for what, change in changes.items():
            pair = attacked(name, who, number, change)
            waits = what in ("dropped", "cut short", "cut in half")
            last = number == len(sent) - 1
            if what == "doubled" and last and who == "client":
                # The first one was good; the second one ends the connection all the same.
                assert type(pair.errors["server"]) is UnexpectedMessage
                continue
            check(pair, f"{name}, {who} {number} {what}", may_wait=waits)


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("name", NAMES)
def test_any_message_swapped_with_the_next(name: str, who: str) -> None:
    for number in range(len(messages(name)[who]) - 1):
        pair = Pair.make(*scenarios()[name])
        held: list[bytes] = []

        def swap(
            index: int, raw: bytes, number: int = number, held: list[bytes] = held
        ) -> list[bytes]:
            if index == number:
                held.append(raw)
                return []
            return [raw, *([held.pop()] if index == number + 1 else [])]

        intercept(pair.client if who == "client" else pair.server, swap)
        pair.client.start()
        pair.fight()
        # Where the next message is the answer to an answer, the first one is simply missing.
        check(pair, f"{name}, {who} {number} swapped", may_wait=bool(held))


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("name", ["mutual", "retry", "hybrid"])
def test_any_flipped_byte_on_the_wire(name: str, who: str) -> None:
    flights: list[bytes] = []
    scenario = scenarios()[name]

    def is_target(pair_target: Connection) -> bool:
        return (
            type(pair_target).__name__.lower().startswith("server" if who == "client" else "client")
        )

    def record(target: Connection, data: bytes) -> bytes:
        if is_target(target):
            flights.append(data)
        return data

    Pair.make(*scenario, on_wire=record).connect()
    for number, flight in enumerate(flights):
        ignored = legacy_versions(flight)
        for index, bit in flips(len(flight), 60, 80):
            if index in ignored:
                continue
            seen = 0

            def flip(
                target: Connection,
                data: bytes,
                number: int = number,
                index: int = index,
                bit: int = bit,
            ) -> bytes:
                nonlocal seen
                if not is_target(target):
                    return data
                seen += 1
                if seen != number + 1 or index >= len(data):
                    return data
                return data[:index] + bytes((data[index] ^ bit,)) + data[index + 1 :]

            pair = Pair.make(*scenario, on_wire=flip)
            pair.client.start()
            pair.fight()
            if seen > number and index >= len(flight) - 8 and pair.both_complete:
                continue  # a shorter signature this time: the byte was not there to flip
            check(pair, f"{name}, flight {number} of the {who}, byte {index}", may_wait=True)


def legacy_versions(flight: bytes) -> set[int]:
    """Where an unprotected record has the second byte of its version, which nobody reads."""
    found, at = set(), 0
    while at < len(flight):
        if flight[at] != 23:
            found.add(at + 2)
        at += 5 + int.from_bytes(flight[at + 3 : at + 5], "big")
    return found


@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 30, -1])
def test_any_flipped_byte_after_the_handshake(index: int) -> None:
    for name, sender in (("mutual", "client"), ("resumption", "server")):
        for what in ("data", "tickets", "key update", "close"):
            pair = Pair.make(*scenarios()[name]).connect()
            source, victim = (
                (pair.client, "server") if sender == "client" else (pair.server, "client")
            )
            if what == "key update":
                source.update_keys()
            elif what == "close":
                source.send_close()
            else:
                source.send_data(b"some data of more than thirty bytes")
            flight = bytearray(source.data_to_send())
            flight[min(index, len(flight) - 1)] ^= 4
            target = pair.server if victim == "server" else pair.client
            if index in (3, 4):
                flight += bytes(1 << 15)  # so that a longer record ends, too
            target.receive_data(flight)
            with pytest.raises(PeerError):
                drain(target)
            assert target.has_data_to_send


# --- every state against every message ------------------------------------------------------------

HANDSHAKE_STATES = {
    "WaitServerHello": ("mutual", "server", 0),
    "WaitSecondServerHello": ("retry", "server", 1),
    "WaitEncryptedExtensions": ("mutual", "server", 1),
    "WaitCertificateOrRequest": ("mutual", "server", 2),
    "WaitCertificate": ("mutual", "server", 3),
    "WaitCertificateVerify": ("mutual", "server", 4),
    "WaitFinished": ("mutual", "server", 5),
    "WaitClientHello": ("mutual", "client", 0),
    "WaitSecondClientHello": ("retry", "client", 1),
    "WaitClientCertificate": ("mutual", "client", 1),
    "WaitClientCertificateVerify": ("mutual", "client", 2),
    "WaitClientFinished": ("mutual", "client", 3),
}
"""Where each state waits: the handshake, who sends, and the number of the message that is due."""


def states(module: Any, base: type) -> set[str]:
    return {
        name
        for name, one in vars(module).items()
        if isinstance(one, type) and issubclass(one, base) and one is not base
    }


def test_no_state_is_forgotten() -> None:
    ours = states(client_module, client_module.ClientState)
    theirs = states(server_module, server_module.ServerState)
    assert (ours | theirs) - {"WaitPsk", "Proposed"} == set(HANDSHAKE_STATES)


@cache
def samples() -> dict[int, bytes]:
    """A well-formed message of every type, and one of a type that does not exist."""
    found = {
        254: b"\xfe\0\0\0",
        0: b"\0\0\0\0",
        HandshakeType.END_OF_EARLY_DATA: b"\5\0\0\0",
        HandshakeType.EXTENDED_KEY_UPDATE: encode(UpdateFinish()),
    }
    for name in ("mutual", "retry"):
        for raw in (one for sent in messages(name).values() for one in sent):
            found[raw[0]] = raw
    pair = Pair.make(*scenarios()["resumption"]).connect()
    sent: list[bytes] = []
    intercept(pair.server, lambda _, raw: sent.append(raw) or [raw])  # type: ignore[func-returns-value]
    pair.server.send_data(b"x")
    pair.server.update_keys()
    for raw in sent:
        found[raw[0]] = raw
    assert set(HandshakeType) <= set(found)
    return found


@pytest.mark.parametrize("state", HANDSHAKE_STATES)
def test_every_message_in_every_state_of_the_handshake(state: str) -> None:
    name, who, index = HANDSHAKE_STATES[state]
    victim = "client" if who == "server" else "server"
    module: Any = client_module if victim == "client" else server_module
    accepts = module.STEPS[getattr(module, state)].receives
    for type_, raw in samples().items():
        if type_ in accepts:
            continue
        pair = attacked(name, who, index, lambda _, raw=raw: [raw])  # type: ignore[misc]
        error = pair.errors[victim]
        assert type(error) is UnexpectedMessage, (state, type_, error)
        assert error.alert == Alert.UNEXPECTED_MESSAGE
        assert f"while in {state}" in str(error)
        check(pair, f"message of type {type_} in {state}")


@pytest.mark.parametrize("victim", ["client", "server"])
def test_every_message_after_the_handshake(victim: str) -> None:
    accepts = (
        client_module.STEPS[ClientTraffic]
        if victim == "client"
        else server_module.STEPS[ServerTraffic]
    ).receives
    for type_, raw in samples().items():
        if type_ in accepts:
            continue
        pair = Pair.make(*scenarios()["mutual"]).connect()
        source = pair.server if victim == "client" else pair.client
        source._records.writer.send_raw(raw)
        pair.fight()
        assert type(pair.errors[victim]) is UnexpectedMessage
        heard = pair.errors["server" if victim == "client" else "client"]
        assert isinstance(heard, AlertReceived)
        assert heard.alert == Alert.UNEXPECTED_MESSAGE


def test_every_message_while_a_psk_is_looked_up() -> None:
    """It waits until the PSK is there, and is then in the clear where it must not be."""
    psk = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(32)))
    for raw in samples().values():
        pair = Pair.make(ClientConfig(psks=(psk,)), ServerConfig(psk_source=ELSEWHERE))
        pair.client.start()
        pair.client._records.writer.flush()
        pair.client._records.writer.send_raw(raw)
        pair.server.receive_data(pair.client.data_to_send())
        try:
            pair.server.next_event()
            assert pair.server.next_event() is None
            pair.server.provide_psk(psk)
        except HybridkexError as error:
            pytest.fail(f"too early: {error}")
        pair.fight()
        with pytest.raises(HybridkexError):
            pair.server.next_event()
        assert not pair.server.handshake_complete
