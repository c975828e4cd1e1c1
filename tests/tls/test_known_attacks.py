"""Attacks on TLS 1.3 and on external PSKs that have a name, carried out against two engines.

docs/known-attacks.md says what stops each of them; those that other files try are named there.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import DevCa, Identity, TrustStore
from hybridkex.constants import TLS13, Alert
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.signatures import ALL_SCHEMES, SignatureScheme
from hybridkex.crypto.suites import SHA256
from hybridkex.errors import (
    CertificateRejected,
    DecryptError,
    HybridkexError,
    IllegalParameter,
    MissingExtension,
    PeerError,
    PolicyRefused,
    ProtocolVersionError,
    UnknownPskIdentity,
)
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.wire import extensions as ext
from hybridkex.wire.extensions import Extensions
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import ImportedIdentity, decode, encode

KEY = Secret(bytes(range(32)))
PLAIN = ExternalPsk(identity=b"a key", key=KEY)
IMPORTED = ExternalPsk(identity=b"a key", key=KEY, context=b"a client, a server")
ECDSA = next(one for one in ALL_SCHEMES if one.name == "ecdsa_secp256r1_sha256")


def client_config(**options: Any) -> ClientConfig:
    return ClientConfig(**{"groups": (X25519,), "policy": ANY_GROUP, **options})


def server_config(**options: Any) -> ServerConfig:
    return ServerConfig(**{"groups": (X25519,), "policy": ANY_GROUP, **options})


def signing(sign: Callable[[Any, bytes], bytes]) -> tuple[SignatureScheme, ...]:
    """A scheme that signs otherwise than with the key of the identity."""
    return (replace(ECDSA, _sign=sign),)


def fought(client: ClientConfig, server: ServerConfig, name: str = "localhost") -> Pair:
    """A handshake that nobody may complete."""
    pair = Pair.make(client, server, name)
    pair.client.start()
    pair.fight()
    assert not pair.client.handshake_complete or not pair.server.handshake_complete
    assert set(pair.errors) == {"client", "server"}
    return pair


def edit_sent(connection: Connection, number: int, edit: Callable[[Any], Message]) -> None:
    """Change the message with this number on its way out."""
    channel, seen = connection._records, iter(range(99))
    send = channel.writer.send_raw
    channel.writer.send_raw = lambda raw: send(  # type: ignore[method-assign]
        encode(edit(decode(raw))) if next(seen) == number else raw
    )


# --- who the peer is ------------------------------------------------------------------------------


def test_key_compromise_impersonation(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    """Who has the client's private key and its PSK is not the server to that client.

    He shows the server's chain, which is public, and signs with the key that he has.
    """
    stolen = client_identity.private_key
    thief = signing(lambda _key, content: ECDSA.sign(stolen, content))
    pair = fought(
        client_config(verifier=trust, identity=client_identity),
        server_config(identities=(identity,), signature_schemes=thief),
    )
    assert type(pair.errors["client"]) is DecryptError

    both = Policy(post_quantum=Requirement.PREFER, authentication=Authentication.BOTH)
    client = client_config(verifier=trust, identity=client_identity, psks=(PLAIN,), policy=both)
    pair = fought(
        client, server_config(identities=(identity,), psks=(PLAIN,), signature_schemes=thief)
    )
    assert type(pair.errors["client"]) is DecryptError
    pair = fought(client, server_config(psks=(PLAIN,)))
    assert type(pair.errors["client"]) is PolicyRefused


def test_unknown_key_share(ca: DevCa, trust: TrustStore, identity: Identity) -> None:
    """A hello that is meant for one server and carried to another: the name does not fit."""
    pair = fought(client_config(verifier=trust), server_config(identities=(identity,)), "mallory")
    assert type(pair.errors["client"]) is CertificateRejected
    honest = server_config(identities=(identity,), require_known_name=True)
    pair = fought(client_config(verifier=trust), honest, "mallory")
    assert isinstance(pair.errors["server"], PeerError)
    assert pair.errors["server"].alert == Alert.UNRECOGNIZED_NAME


def test_triple_handshake(
    ca: DevCa, trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    """A server in the middle asks for the client's signature and shows it to another server.

    The signature covers the transcript, and no two connections have the same secrets.
    """
    captured: list[bytes] = []

    def sign(key: Any, content: bytes) -> bytes:
        captured.append(ECDSA.sign(key, content))
        return captured[-1]

    asking = {"client_verifier": trust, "require_client_certificate": True}
    victim = client_config(
        verifier=trust, identity=client_identity, signature_schemes=signing(sign)
    )
    mallory = server_config(identities=(ca.issue("mallory"),), psks=(), **asking)
    first = Pair.make(victim, mallory, "mallory").connect()
    (signature,) = captured

    relayed = signing(lambda _key, _content: signature)
    pair = fought(
        client_config(verifier=trust, identity=client_identity, signature_schemes=relayed),
        server_config(identities=(identity,), **asking),
    )
    assert type(pair.errors["server"]) is DecryptError

    # Nor do two legs that one attacker holds both ends of have a secret in common.
    own = client_config(verifier=trust, identity=ca.issue("mallory"))
    second = Pair.make(own, server_config(identities=(identity,), **asking)).connect()
    of_first, of_second = (
        one.export(b"EXPORTER-Channel-Binding", b"", 32).reveal()
        for one in (first.client, second.server)
    )
    assert of_first == first.server.export(b"EXPORTER-Channel-Binding", b"", 32).reveal()
    assert of_first != of_second


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentinel", [b"DOWNGRD\x01", b"DOWNGRD\x00", b"harmless"])
def test_a_server_hello_of_an_older_version(
    sentinel: bytes, trust: TrustStore, identity: Identity
) -> None:
    """With the sentinel of RFC 9846 section 4.2.3 or without it: there is no older version."""
    pair = Pair.make(client_config(verifier=trust), server_config(identities=(identity,)))

    def older(message: Any) -> Message:
        kept = [one for one in message.extensions if one.type != ext.SupportedVersionsChoice.type]
        changed: Message = replace(
            message, random=message.random[:24] + sentinel, extensions=Extensions(kept)
        )
        return changed

    edit_sent(pair.server, 0, older)
    pair.client.start()
    pair.fight()
    assert type(pair.errors["client"]) is ProtocolVersionError
    assert not pair.server.handshake_complete


# --- HelloRetryRequest ----------------------------------------------------------------------------


def test_the_cookie_of_another_client(trust: TrustStore, identity: Identity) -> None:
    client = client_config(verifier=trust, groups=(SECP256R1, X25519))
    server = server_config(identities=(identity,))
    cookies: list[ext.Cookie] = []

    def note(message: Any) -> Message:
        cookies.append(message.extensions.get(ext.Cookie))
        kept: Message = message
        return kept

    first = Pair.make(client, server)
    edit_sent(first.client, 1, note)
    first.connect()
    (cookie,) = cookies

    def swap(message: Any) -> Message:
        kept = [one for one in message.extensions if one.type != cookie.type]
        changed: Message = replace(message, extensions=Extensions([cookie, *kept]))
        return changed

    pair = Pair.make(client, server)
    edit_sent(pair.client, 1, swap)
    pair.client.start()
    pair.fight()
    assert type(pair.errors["server"]) is IllegalParameter
    assert not pair.client.handshake_complete


@pytest.mark.parametrize("psk", [PLAIN, IMPORTED], ids=["plain", "imported"])
def test_a_psk_that_is_dropped_after_a_retry(
    psk: ExternalPsk, trust: TrustStore, identity: Identity
) -> None:
    """Only PSKs that do not go with the suite may be removed (RFC 9846 section 4.2.2)."""
    prefer = Policy(post_quantum=Requirement.PREFER, psk=Requirement.PREFER)
    client = client_config(verifier=trust, psks=(psk,), groups=(SECP256R1, X25519), policy=prefer)
    server = server_config(identities=(identity,), psks=(psk,), policy=prefer)
    assert Pair.make(client, server).connect().server.session.psk_identity == psk.identity

    gone: set[int] = {
        ext.PreSharedKeyOffer.type,
        ext.PskKeyExchangeModes.type,
        ext.TlsCertWithExternPsk.type,
    }

    def drop(only: set[int]) -> Callable[[Any], Message]:
        def edit(message: Any) -> Message:
            kept = [one for one in message.extensions if one.type not in only]
            changed: Message = replace(message, extensions=Extensions(kept))
            return changed

        return edit

    # From both hellos they are gone: the transcript differs. From the second: that is seen at once.
    for number in (0, 1):
        pair = Pair.make(client, server)
        edit_sent(pair.client, number, drop(gone if number == 0 else {ext.PreSharedKeyOffer.type}))
        pair.client.start()
        pair.fight()
        assert not pair.client.handshake_complete
        assert "server" in pair.errors
    assert type(pair.errors["server"]) is MissingExtension


# --- external PSKs --------------------------------------------------------------------------------


def reflected(psk: ExternalPsk, at_home: ExternalPsk) -> Pair:
    """Alice's ClientHello comes back to herself: she also serves, with ``at_home``."""
    pair = Pair.make(client_config(psks=(psk,)), server_config(psks=(at_home,)), None)
    pair.client.start()
    pair.fight()
    return pair


def test_selfie() -> None:
    """RFC 9257 section 4.1: contexts that name client and server end it (RFC 9258 appendix B)."""
    to_bob = replace(IMPORTED, context=b"client alice, server bob")
    to_alice = replace(IMPORTED, context=b"client bob, server alice")
    pair = reflected(to_bob, at_home=to_alice)
    assert type(pair.errors["server"]) is UnknownPskIdentity
    assert not pair.client.handshake_complete
    # What the page says is not protected: one plain PSK for both roles.
    assert reflected(PLAIN, at_home=PLAIN).both_complete


@pytest.mark.parametrize(
    ("protocol", "kdf", "error"),
    [
        (TLS13, SHA256.kdf, DecryptError),  # the right name, with the key before the import
        (0xFEFC, SHA256.kdf, UnknownPskIdentity),  # DTLS 1.3
        (0x0303, SHA256.kdf, UnknownPskIdentity),
    ],
)
def test_a_psk_for_another_target(protocol: int, kdf: int, error: type[HybridkexError]) -> None:
    """An imported PSK is for one protocol and one hash; its key is not the key that was shared."""
    assert IMPORTED.context is not None
    name = ImportedIdentity(IMPORTED.identity, IMPORTED.context, protocol, kdf).encode()
    confused = ExternalPsk(identity=name, key=KEY)
    pair = fought(client_config(psks=(confused,)), server_config(psks=(IMPORTED,)))
    assert type(pair.errors["server"]) is error
    if error is UnknownPskIdentity:
        assert pair.errors["server"].alert == Alert.HANDSHAKE_FAILURE  # type: ignore[attr-defined]


def test_an_imported_psk_is_no_plain_one() -> None:
    for ours, theirs in ((PLAIN, IMPORTED), (IMPORTED, PLAIN)):
        pair = fought(client_config(psks=(ours,)), server_config(psks=(theirs,)))
        assert type(pair.errors["server"]) is UnknownPskIdentity


# --- tickets --------------------------------------------------------------------------------------


def test_a_stolen_ticket_without_its_secret(trust: TrustStore, identity: Identity) -> None:
    """A ticket is on the wire for all to see; the secret that goes with it is not."""
    store = MemoryTicketStore()
    server = server_config(identities=(identity,))
    pair = Pair.make(client_config(verifier=trust, ticket_store=store), server).connect()
    pair.exchange(b"a", b"b")
    ticket = store.take("localhost")
    assert ticket is not None
    thief = MemoryTicketStore()
    thief.put("localhost", replace(ticket, psk=Secret(bytes(len(ticket.psk)))))
    pair = fought(client_config(verifier=trust, ticket_store=thief), server)
    assert type(pair.errors["server"]) is DecryptError
    honest = MemoryTicketStore()
    honest.put("localhost", ticket)
    client = client_config(verifier=trust, ticket_store=honest)
    assert Pair.make(client, server).connect().client.session.resumed
