"""What no message can carry is refused where it comes in, and ends no more than one connection."""

from dataclasses import replace
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair, drain

from hybridkex.auth import DevCa, Identity, TrustStore
from hybridkex.constants import HELLO_RETRY_RANDOM, TLS13, Alert
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import ConfigError, IllegalParameter, UnrecognizedName
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.events import TicketReceived
from hybridkex.tls.policy import Authentication, Requirement
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.tls.tickets import MAX_TICKET
from hybridkex.wire import extensions as ext
from hybridkex.wire.extensions import Extensions
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import ClientHello, HelloRetryRequest, NewSessionTicket, decode, encode

KEY = Secret(bytes(range(32)))


def client_config(**options: Any) -> ClientConfig:
    return ClientConfig(**{"groups": (X25519,), "policy": ANY_GROUP, **options})


def server_config(**options: Any) -> ServerConfig:
    return ServerConfig(**{"groups": (X25519,), "policy": ANY_GROUP, **options})


@pytest.mark.parametrize("junk", [9_000, 29_000, 33_000, 66_000, 100_000])
def test_a_ticket_for_a_client_with_a_long_chain(
    junk: int, ca: DevCa, trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    """Beyond the limit there is no ticket, and the connection goes on."""
    names = [f"{'x' * 60}.{number}.example" for number in range(junk // 230)]
    padding = ca.issue(*names).chain[:1] * 3
    bloated = replace(client_identity, chain=(*client_identity.chain, *padding))
    pair = Pair.make(
        client_config(verifier=trust, identity=bloated, ticket_store=MemoryTicketStore()),
        server_config(
            identities=(identity,), client_verifier=trust, require_client_certificate=True
        ),
    ).connect()
    pair.exchange(b"question", b"answer")
    tickets = [event for event in pair.client_events if isinstance(event, TicketReceived)]
    assert bool(tickets) == (sum(map(len, bloated.chain)) < MAX_TICKET - 300)
    assert (junk > 30_000) == (not tickets)


@pytest.mark.parametrize("length", [254, 255, 256, 1000, 65_350])
@pytest.mark.parametrize("retry", [False, True])
def test_a_server_name_of_any_length(
    length: int, retry: bool, trust: TrustStore, identity: Identity
) -> None:
    """RFC 1035 section 2.3.4: names have at most 255 bytes."""
    name = "a" * length
    store = MemoryTicketStore()
    pair = Pair.make(
        client_config(
            verifier=trust, ticket_store=store, groups=(SECP256R1, X25519) if retry else (X25519,)
        ),
        server_config(identities=(identity,)),
    )
    pair.client.start()
    hello = decode(bytes(pair.client.data_to_send())[5:])
    assert isinstance(hello, ClientHello)
    kept = [
        ext.ServerName(name) if isinstance(one, ext.ServerName) else one for one in hello.extensions
    ]
    raw = encode(replace(hello, extensions=Extensions(kept)))
    pair.server.receive_data(in_records(raw))
    if length <= 255:
        assert not drain(pair.server)
        return
    with pytest.raises(UnrecognizedName) as caught:
        pair.server.next_event()
    assert caught.value.alert is Alert.UNRECOGNIZED_NAME
    assert pair.server.has_data_to_send


def in_records(message: bytes) -> bytes:
    pieces = [message[at : at + 16384] for at in range(0, len(message), 16384)]
    return b"".join(b"\x16\3\3" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("length", [1, 1 << 14, 1 << 15, (1 << 16) - 1])
def test_a_client_keeps_no_ticket_that_it_could_not_offer(
    length: int, trust: TrustStore, identity: Identity
) -> None:
    store = MemoryTicketStore()
    config = client_config(verifier=trust, ticket_store=store)
    server = server_config(identities=(identity,), tickets=None)
    pair = Pair.make(config, server).connect()
    ticket = NewSessionTicket(100, 0, b"\0", b"t" * length, Extensions())
    pair.server._records.writer.send(ticket)
    pair.exchange(b"question", b"answer")
    kept = [event for event in pair.client_events if isinstance(event, TicketReceived)]
    assert len(kept) == (length <= config.ticket_room)
    again = Pair.make(config, server).connect()  # What was kept can be offered.
    assert again.both_complete


def test_a_stored_ticket_that_does_not_fit_is_left_out(
    trust: TrustStore, identity: Identity
) -> None:
    store = MemoryTicketStore()
    server = server_config(identities=(identity,))
    Pair.make(client_config(verifier=trust, ticket_store=store), server).connect().exchange(
        b"q", b"a"
    )
    ticket = store.take("localhost")
    assert ticket is not None
    store.put("localhost", replace(ticket, ticket=b"t" * 65_000))
    pair = Pair.make(client_config(verifier=trust, ticket_store=store), server).connect()
    assert not pair.client.session.resumed


@pytest.mark.parametrize("length", [1, 60_000, 65_300, 65_500, 65_522])
def test_a_cookie_of_any_length(length: int, trust: TrustStore) -> None:
    """The client has to send it back as it came (RFC 9846 section 4.3.2)."""
    pair = Pair.make(
        client_config(verifier=trust, ticket_store=MemoryTicketStore()),
        server_config(psks=(ExternalPsk(identity=b"x", key=KEY),)),
    )
    pair.client.start()
    hello = decode(bytes(pair.client.data_to_send())[5:])
    assert isinstance(hello, ClientHello)
    retry: Message = HelloRetryRequest(
        random=HELLO_RETRY_RANDOM,
        session_id=hello.session_id,
        cipher_suite=hello.cipher_suites[0],
        extensions=Extensions((ext.SupportedVersionsChoice(TLS13), ext.Cookie(b"c" * length))),
    )
    pair.client.receive_data(in_records(encode(retry)))
    if length <= 65_300:
        assert not drain(pair.client)
        assert pair.client.has_data_to_send
        return
    with pytest.raises(IllegalParameter, match="cookie"):
        pair.client.next_event()
    assert pair.client.has_data_to_send


@pytest.mark.parametrize(
    "options",
    [
        {"psks": (ExternalPsk(identity=b"i" * 65_000, key=KEY),)},
        {"psks": (ExternalPsk(identity=b"i" * 31_000, key=KEY, context=b""),)},
        {"psks": tuple(ExternalPsk(identity=b"%05d" % n, key=KEY) for n in range(1000))},
        {"alpn": tuple(f"{n:255d}" for n in range(250))},
    ],
)
def test_a_configuration_that_no_hello_can_carry(
    options: dict[str, Any], trust: TrustStore
) -> None:
    with pytest.raises(ConfigError, match="a ClientHello has room for"):
        client_config(verifier=trust, **options)


def test_a_psk_identity_of_the_greatest_length_at_a_server() -> None:
    """It would go into the ticket; there is none, and the connection goes on."""
    policy = replace(ANY_GROUP, psk=Requirement.REQUIRE, authentication=Authentication.PSK)
    for length, resumable in ((1000, True), (40_000, False)):
        psk = ExternalPsk(identity=b"i" * length, key=KEY)
        pair = Pair.make(
            client_config(psks=(psk,), policy=policy, ticket_store=MemoryTicketStore()),
            server_config(psks=(psk,), policy=policy),
        ).connect()
        pair.exchange(b"question", b"answer")
        assert any(isinstance(one, TicketReceived) for one in pair.client_events) is resumable
