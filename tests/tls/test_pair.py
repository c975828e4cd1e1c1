"""The engine against itself: whatever two configurations can agree on, and what they cannot."""

import errno
import os
from dataclasses import replace
from typing import Any

import pytest
from tls_glue import ANY_GROUP, ELSEWHERE, Pair, data_of

from hybridkex.auth import DevCa, Identity, InsecureNoVerification, TrustStore
from hybridkex.constants import Alert
from hybridkex.crypto.kex import (
    ALL_GROUPS,
    MLKEM768,
    SECP256R1,
    SECP256R1MLKEM768,
    X25519,
    X25519MLKEM768,
    Group,
)
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import (
    ALL_SUITES,
    SHA384,
    TLS_AES_128_GCM_SHA256,
    TLS_AES_256_GCM_SHA384,
    CipherSuite,
)
from hybridkex.errors import (
    AlertReceived,
    BadRecordMac,
    CertificateRejected,
    ConfigError,
    DecryptError,
    HandshakeFailure,
    HandshakeTimeout,
    IllegalParameter,
    KeySourceUnavailable,
    LocalStateError,
    MissingExtension,
    NoApplicationProtocol,
    PeerError,
    PolicyRefused,
    RecordOverflow,
    TruncationError,
    UnexpectedMessage,
    UnknownPskIdentity,
    UnrecognizedName,
)
from hybridkex.secret import Secret
from hybridkex.tls import client as client_module
from hybridkex.tls.config import ClientConfig, Limits, PadToMultiple, ServerConfig
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.tls.events import (
    ApplicationData,
    CloseReceived,
    HandshakeCompleted,
    KeyUpdated,
    PskWanted,
    SessionProposed,
    TicketReceived,
)
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.session import AuthenticatedBy, MemoryTicketStore
from hybridkex.tls.tickets import CookieProtector, TicketIssuer
from hybridkex.wire.extensions import EarlyDataIndication, Extensions
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import ClientHello, ImportedIdentity, decode, encode


def connect(client: ClientConfig, server: ServerConfig, **options: Any) -> Pair:
    """A finished handshake, with data and an exporter that agree."""
    pair = Pair.make(client, server, **options).connect()
    ours, theirs = pair.client.session, pair.server.session
    for field in ("cipher_suite", "group", "parts", "alpn", "resumed", "psk_identity"):
        assert getattr(ours, field) == getattr(theirs, field)
    exported = pair.client.export(b"EXPORTER-test", b"context", 40).reveal()
    assert exported == pair.server.export(b"EXPORTER-test", b"context", 40).reveal()
    pair.exchange(b"to the server" * 2000, b"to the client" * 3000)
    return pair


def refused(
    client: ClientConfig, server: ServerConfig, who: str, error: type[PeerError], **options: Any
) -> PeerError:
    """One side refuses with this error, and the other hears the alert."""
    pair = Pair.make(client, server, **options)
    pair.client.start()
    pair.fight()
    found, heard = pair.errors[who], pair.errors["server" if who == "client" else "client"]
    assert type(found) is error
    assert isinstance(heard, AlertReceived)
    assert heard.alert == found.alert
    assert not pair.server.handshake_complete
    with pytest.raises(LocalStateError, match="the connection has failed") as later:
        (pair.client if who == "client" else pair.server).receive_data(b"")
    assert type(later.value.__cause__) is error
    assert str(later.value.__cause__) == str(found)
    return found


# --- every group, suite and signature -------------------------------------------------------------


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
@pytest.mark.parametrize("group", ALL_GROUPS, ids=str)
def test_group_and_suite(
    group: Group, suite: CipherSuite, trust: TrustStore, identity: Identity
) -> None:
    pair = connect(
        ClientConfig(verifier=trust, groups=(group,), suites=(suite,), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=ALL_GROUPS, policy=ANY_GROUP),
    )
    session = pair.client.session
    assert (session.group, session.cipher_suite) == (group.name, suite.name)
    assert session.authenticated_by is AuthenticatedBy.CERTIFICATE
    assert session.peer_subject == "CN=localhost"
    assert isinstance(pair.client_events[0], HandshakeCompleted)
    assert isinstance(pair.server_events[0], HandshakeCompleted)


def test_the_default_is_the_hybrid(trust: TrustStore, identity: Identity) -> None:
    session = connect(
        ClientConfig(verifier=trust), ServerConfig(identities=(identity,))
    ).client.session
    assert session.group == "X25519MLKEM768"
    assert session.parts == ("ML-KEM-768", "X25519")
    assert session.post_quantum
    assert not session.resumed


@pytest.mark.parametrize(
    ("algorithm", "scheme"),
    [
        ("ecdsa", "ecdsa_secp256r1_sha256"),
        ("ecdsa-p384", "ecdsa_secp384r1_sha384"),
        ("ecdsa-p521", "ecdsa_secp521r1_sha512"),
        ("rsa", "rsa_pss_rsae_sha256"),
        ("rsa-pss", "rsa_pss_rsae_sha256"),
        ("ed25519", "ed25519"),
        ("mldsa44", "mldsa44"),
        ("mldsa65", "mldsa65"),
        ("mldsa87", "mldsa87"),
    ],
)
def test_signature_algorithm_of_both_sides(algorithm: str, scheme: str, issue: Any) -> None:
    trust, leaf = issue(algorithm)
    pair = connect(
        ClientConfig(verifier=trust, identity=leaf),
        ServerConfig(identities=(leaf,), client_verifier=trust, require_client_certificate=True),
    )
    assert pair.client.session.signature_scheme == scheme
    assert pair.server.session.peer_subject == "CN=localhost"


def test_the_server_takes_the_identity_that_the_client_can_verify(
    trust: TrustStore, identity: Identity, issue: Any
) -> None:
    _, rsa = issue("rsa")
    config = ClientConfig(verifier=trust)
    schemes = tuple(one for one in config.signature_schemes if "ecdsa" in one.name)
    pair = connect(
        replace(config, signature_schemes=schemes), ServerConfig(identities=(rsa, identity))
    )
    assert pair.client.session.signature_scheme == "ecdsa_secp256r1_sha256"


def test_nothing_in_common(trust: TrustStore, identity: Identity, issue: Any) -> None:
    server = ServerConfig(identities=(identity,))
    client = ClientConfig(verifier=trust)
    refused(
        replace(client, suites=(TLS_AES_128_GCM_SHA256,)),
        replace(server, suites=(TLS_AES_256_GCM_SHA384,)),
        "server",
        HandshakeFailure,
    )
    refused(
        replace(client, groups=(X25519MLKEM768,)),
        replace(server, groups=(MLKEM768,)),
        "server",
        HandshakeFailure,
    )
    refused(
        replace(client, signature_schemes=client.signature_schemes[:1]),
        server,
        "server",
        HandshakeFailure,
    )


def test_without_compatibility_mode(trust: TrustStore, identity: Identity) -> None:
    connect(
        ClientConfig(verifier=trust, compatibility_mode=False), ServerConfig(identities=(identity,))
    )


def test_an_untrusted_certificate(identity: Identity) -> None:
    stranger = TrustStore((DevCa.create().certificate,))
    error = refused(
        ClientConfig(verifier=stranger),
        ServerConfig(identities=(identity,)),
        "client",
        CertificateRejected,
    )
    assert error.alert == Alert.UNKNOWN_CA


def test_insecure_says_so(identity: Identity) -> None:
    pair = connect(
        ClientConfig(verifier=InsecureNoVerification()),
        ServerConfig(identities=(identity,)),
        name=None,
    )
    assert pair.client.session.authenticated_by is AuthenticatedBy.NOTHING
    assert pair.server.session.server_name is None


def test_a_certificate_message_beyond_the_limit(trust: TrustStore, ca: DevCa) -> None:
    big = ca.issue("localhost", *(f"{'x' * 60}{i}.example.org" for i in range(20)))
    refused(
        ClientConfig(verifier=trust, limits=Limits(certificate_message=1024)),
        ServerConfig(identities=(big,)),
        "client",
        IllegalParameter,
    )


# --- HelloRetryRequest ----------------------------------------------------------------------------


@pytest.mark.parametrize("compatible", [True, False])
def test_hello_retry_request(trust: TrustStore, identity: Identity, compatible: bool) -> None:
    pair = connect(
        ClientConfig(
            verifier=trust,
            groups=(X25519MLKEM768, SECP256R1MLKEM768),
            compatibility_mode=compatible,
        ),
        ServerConfig(identities=(identity,), groups=(SECP256R1MLKEM768,)),
    )
    assert pair.client.session.group == "SecP256r1MLKEM768"


def test_no_share_at_all_costs_a_round_trip(trust: TrustStore, identity: Identity) -> None:
    flights = []

    def count(target: Connection, data: bytes) -> bytes:
        flights.append(type(target))
        return data

    Pair.make(
        ClientConfig(verifier=trust, key_shares=0),
        ServerConfig(identities=(identity,)),
        on_wire=count,
    ).connect()
    assert flights == [ServerConnection, ClientConnection] * 2 + [ServerConnection]


def test_a_second_share_saves_the_round_trip(trust: TrustStore, identity: Identity) -> None:
    flights = []

    def count(target: Connection, data: bytes) -> bytes:
        flights.append(type(target))
        return data

    Pair.make(
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, SECP256R1MLKEM768), key_shares=2),
        ServerConfig(identities=(identity,), groups=(SECP256R1MLKEM768,)),
        on_wire=count,
    ).connect()
    assert flights == [ServerConnection, ClientConnection, ServerConnection]


def test_an_equal_group_with_a_share_goes_first(trust: TrustStore, identity: Identity) -> None:
    pair = connect(
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, SECP256R1MLKEM768)),
        ServerConfig(identities=(identity,), groups=(SECP256R1MLKEM768, X25519MLKEM768)),
    )
    assert pair.client.session.group == "X25519MLKEM768"


def test_a_stronger_group_is_worth_the_round_trip(trust: TrustStore, identity: Identity) -> None:
    pair = connect(
        ClientConfig(verifier=trust, groups=(X25519, X25519MLKEM768), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=(X25519MLKEM768, X25519), policy=ANY_GROUP),
    )
    assert pair.client.session.group == "X25519MLKEM768"


def test_servers_that_share_the_cookie_key_answer_for_each_other(
    trust: TrustStore, identity: Identity
) -> None:
    """The second server has never seen the first ClientHello: the cookie is all there is."""
    key = Secret(os.urandom(32))

    def server(cookies: CookieProtector) -> ServerConnection:
        config = ServerConfig(identities=(identity,), groups=(SECP256R1MLKEM768,), cookies=cookies)
        return ServerConnection(config)

    client = ClientConnection(
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, SECP256R1MLKEM768)), "localhost"
    )
    client.start()
    first_hello = bytes(client.data_to_send())
    first = server(CookieProtector(key))
    first.receive_data(first_hello)
    assert first.next_event() is None
    client.receive_data(first.data_to_send())
    assert client.next_event() is None

    second = server(CookieProtector(key))
    second.receive_data(first_hello)
    assert second.next_event() is None
    second.data_to_send()  # Its own HelloRetryRequest, with another cookie, is lost.
    pair = Pair(client, second)
    pair.pump()
    assert pair.both_complete


@pytest.mark.parametrize("reason", ["another key", "stale"])
def test_a_cookie_that_is_not_ours(trust: TrustStore, identity: Identity, reason: str) -> None:
    now = [1000.0]
    config = ServerConfig(
        identities=(identity,),
        groups=(SECP256R1MLKEM768,),
        cookies=CookieProtector(lifetime=30, clock=lambda: now[0]),
    )
    pair = Pair.make(
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, SECP256R1MLKEM768)), config
    )
    pair.client.start()
    hello = bytes(pair.client.data_to_send())
    pair.server.receive_data(hello)
    assert pair.server.next_event() is None
    pair.client.receive_data(pair.server.data_to_send())
    assert pair.client.next_event() is None
    if reason == "stale":
        now[0] += 31
    else:
        pair.server = ServerConnection(replace(config, cookies=CookieProtector()))
        pair.server.receive_data(hello)
        assert pair.server.next_event() is None
        pair.server.data_to_send()
    pair.fight()
    assert type(pair.errors["server"]) is IllegalParameter
    assert not pair.client.handshake_complete


# --- client certificates --------------------------------------------------------------------------


def test_client_certificate_required(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    server = ServerConfig(
        identities=(identity,), client_verifier=trust, require_client_certificate=True
    )
    pair = connect(ClientConfig(verifier=trust, identity=client_identity), server)
    assert pair.server.session.peer_subject == "CN=bob"

    # The client is done before the server has looked for its certificate (section 4.5.1).
    error = refused(ClientConfig(verifier=trust), server, "server", CertificateRejected)
    assert error.alert == Alert.CERTIFICATE_REQUIRED

    stranger = DevCa.create().issue("mallory")
    refused(ClientConfig(verifier=trust, identity=stranger), server, "server", CertificateRejected)


def test_client_certificate_optional(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    server = ServerConfig(identities=(identity,), client_verifier=trust)
    assert connect(ClientConfig(verifier=trust), server).server.session.peer_credential is None
    pair = connect(ClientConfig(verifier=trust, identity=client_identity), server)
    assert pair.server.session.peer_subject == "CN=bob"
    # A key that the server cannot verify is as good as none.
    unfit = replace(server, signature_schemes=server.signature_schemes[3:4])
    _, mldsa = trust, DevCa.create(algorithm="mldsa44").issue("bob", algorithm="mldsa44")
    pair = connect(ClientConfig(verifier=trust, identity=mldsa), unfit)
    assert pair.server.session.peer_credential is None


def test_client_certificate_not_asked_for(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    pair = connect(
        ClientConfig(verifier=trust, identity=client_identity), ServerConfig(identities=(identity,))
    )
    assert pair.server.session.peer_credential is None


# --- SNI and ALPN ---------------------------------------------------------------------------------


def test_the_name_picks_the_identity(ca: DevCa, trust: TrustStore, identity: Identity) -> None:
    other = ca.issue("example.org", "*.example.org")
    server = ServerConfig(identities=(identity, other))
    client = ClientConfig(verifier=trust)
    for name, subject in (
        ("localhost", "CN=localhost"),
        ("example.org", "CN=example.org"),
        ("WWW.example.org", "CN=example.org"),
        ("127.0.0.1", "CN=localhost"),
    ):
        pair = connect(client, server, name=name)
        assert pair.client.session.peer_subject == subject
        is_address = name[0].isdigit()
        assert pair.server.session.server_name == (None if is_address else name.lower())


def test_an_unknown_name(trust: TrustStore, identity: Identity) -> None:
    client, server = ClientConfig(verifier=trust), ServerConfig(identities=(identity,))
    refused(client, server, "client", CertificateRejected, name="other.example")
    strict = replace(server, require_known_name=True)
    refused(client, strict, "server", UnrecognizedName, name="other.example")
    refused(client, strict, "server", UnrecognizedName, name="127.0.0.1")
    connect(client, strict)


def test_alpn(trust: TrustStore, identity: Identity) -> None:
    client, server = ClientConfig(verifier=trust), ServerConfig(identities=(identity,))
    for offered, known, chosen in (
        (("h2", "http/1.1"), ("http/1.1", "h2"), "http/1.1"),
        (("h2", "ü"), ("ü",), "ü"),
        ((), ("h2",), None),
        (("h2",), (), None),
    ):
        pair = connect(replace(client, alpn=offered), replace(server, alpn=known))
        assert pair.client.session.alpn == chosen
    error = refused(
        replace(client, alpn=("h2",)), replace(server, alpn=("x",)), "server", NoApplicationProtocol
    )
    assert error.alert == Alert.NO_APPLICATION_PROTOCOL


# --- external PSKs --------------------------------------------------------------------------------

PLAIN = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(range(32))))
PLAIN_384 = replace(PLAIN, hash=SHA384, identity=b"qkd-384")
IMPORTED = replace(PLAIN, identity=b"qkd-2", context=b"site A to site B")
NOT_THE_SAME = Secret(bytes(32))


@pytest.mark.parametrize("psk", [PLAIN, PLAIN_384, IMPORTED, replace(IMPORTED, context=b"")])
def test_psk_alone(psk: ExternalPsk) -> None:
    pair = connect(ClientConfig(psks=(psk,)), ServerConfig(psks=(psk,)))
    for session in (pair.client.session, pair.server.session):
        assert session.psk_identity == psk.identity
        assert session.authenticated_by is AuthenticatedBy.PSK
        assert session.peer_credential is None
        assert session.signature_scheme is None
        assert session.post_quantum
        assert not session.resumed


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
def test_an_imported_psk_goes_with_every_suite(suite: CipherSuite) -> None:
    pair = connect(ClientConfig(psks=(IMPORTED,)), ServerConfig(psks=(IMPORTED,), suites=(suite,)))
    assert pair.client.session.cipher_suite == suite.name


@pytest.mark.parametrize("psk", [PLAIN, PLAIN_384, IMPORTED])
def test_psk_and_retry(psk: ExternalPsk) -> None:
    groups = (X25519MLKEM768, SECP256R1MLKEM768)
    pair = connect(
        ClientConfig(psks=(psk,), groups=groups), ServerConfig(psks=(psk,), groups=groups[1:])
    )
    assert pair.client.session.psk_identity == psk.identity


@pytest.mark.parametrize("psk", [PLAIN, IMPORTED])
def test_psk_and_certificate(psk: ExternalPsk, trust: TrustStore, identity: Identity) -> None:
    """RFC 9973."""
    pair = connect(
        ClientConfig(psks=(psk,), verifier=trust), ServerConfig(psks=(psk,), identities=(identity,))
    )
    for session in (pair.client.session, pair.server.session):
        assert session.authenticated_by is AuthenticatedBy.BOTH
        assert session.psk_identity == psk.identity
        assert session.signature_scheme == "ecdsa_secp256r1_sha256"


def test_psk_and_certificates_of_both(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    pair = connect(
        ClientConfig(psks=(PLAIN,), verifier=trust, identity=client_identity),
        ServerConfig(
            psks=(PLAIN,),
            identities=(identity,),
            client_verifier=trust,
            require_client_certificate=True,
        ),
    )
    assert pair.server.session.peer_subject == "CN=bob"
    assert pair.server.session.authenticated_by is AuthenticatedBy.BOTH


def test_several_psks_and_the_one_in_common() -> None:
    others = tuple(replace(PLAIN, identity=bytes((65 + i,))) for i in range(3))
    pair = connect(ClientConfig(psks=(*others, IMPORTED)), ServerConfig(psks=(IMPORTED, PLAIN)))
    assert pair.server.session.psk_identity == IMPORTED.identity


@pytest.mark.parametrize("psk", [PLAIN, IMPORTED])
def test_another_key_under_the_same_identity(psk: ExternalPsk) -> None:
    refused(
        ClientConfig(psks=(psk,)),
        ServerConfig(psks=(replace(psk, key=NOT_THE_SAME),)),
        "server",
        DecryptError,
    )


def test_another_context_is_another_identity() -> None:
    refused(
        ClientConfig(psks=(IMPORTED,)),
        ServerConfig(psks=(replace(IMPORTED, context=b"elsewhere"),)),
        "server",
        UnknownPskIdentity,
    )


def test_psk_required_and_the_server_has_none(trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(psks=(PLAIN,), verifier=trust)
    server = ServerConfig(identities=(identity,))
    error = refused(client, server, "client", PolicyRefused)
    assert error.alert == Alert.INSUFFICIENT_SECURITY

    prefer = replace(client, policy=Policy(psk=Requirement.PREFER))
    session = connect(prefer, server).client.session
    assert session.psk_identity is None
    assert session.authenticated_by is AuthenticatedBy.CERTIFICATE

    off = replace(client, policy=Policy(psk=Requirement.OFF))
    both = ServerConfig(
        identities=(identity,), psks=(PLAIN,), policy=Policy(psk=Requirement.PREFER)
    )
    assert connect(off, both).client.session.psk_identity is None


def test_psk_required_and_the_client_has_none(trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(verifier=trust)
    refused(
        client, ServerConfig(identities=(identity,), psks=(PLAIN,)), "server", UnknownPskIdentity
    )
    refused(client, ServerConfig(psks=(PLAIN,)), "server", UnknownPskIdentity)
    off = ServerConfig(identities=(identity,), psks=(PLAIN,), policy=Policy(psk=Requirement.OFF))
    assert connect(client, off).server.session.psk_identity is None
    refused(ClientConfig(psks=(PLAIN,)), off, "server", MissingExtension)


def test_nothing_but_a_psk_can_authenticate(identity: Identity, trust: TrustStore) -> None:
    # The client cannot verify certificates at all, and does not say that it could.
    refused(
        ClientConfig(psks=(PLAIN,)),
        ServerConfig(identities=(identity,)),
        "server",
        MissingExtension,
    )


def test_the_server_must_not_leave_out_the_certificate(trust: TrustStore) -> None:
    refused(
        ClientConfig(psks=(PLAIN,), verifier=trust),
        ServerConfig(psks=(PLAIN,)),
        "client",
        PolicyRefused,
    )


def test_a_policy_of_certificates_is_not_met_by_a_psk(trust: TrustStore) -> None:
    refused(
        ClientConfig(
            psks=(PLAIN,),
            verifier=trust,
            policy=Policy(psk=Requirement.PREFER, authentication=Authentication.CERTIFICATE),
        ),
        ServerConfig(psks=(PLAIN,)),
        "client",
        PolicyRefused,
    )


def test_a_server_with_both_wants_both(trust: TrustStore, identity: Identity) -> None:
    server = ServerConfig(psks=(PLAIN,), identities=(identity,))
    refused(ClientConfig(psks=(PLAIN,)), server, "server", UnknownPskIdentity)


# --- PSKs from outside ----------------------------------------------------------------------------


@pytest.mark.parametrize("psk", [PLAIN, IMPORTED])
def test_a_psk_is_looked_up(psk: ExternalPsk, trust: TrustStore, identity: Identity) -> None:
    asked: list[bytes] = []

    def lookup(identities: tuple[bytes, ...]) -> ExternalPsk:
        asked.extend(identities)
        return psk

    pair = connect(
        ClientConfig(psks=(psk,), verifier=trust),
        ServerConfig(psk_source=ELSEWHERE, identities=(identity,)),
        lookup=lookup,
    )
    assert pair.server.session.psk_identity == psk.identity
    assert isinstance(pair.server_events[0], PskWanted)
    if psk.imported:
        (one,) = map(ImportedIdentity.decode, asked)
        assert one is not None
        assert (one.external_identity, one.context) == (psk.identity, psk.context)
    else:
        assert asked == [psk.identity]


def test_the_look_up_finds_nothing(trust: TrustStore, identity: Identity) -> None:
    prefer = Policy(psk=Requirement.PREFER)
    server = ServerConfig(psk_source=ELSEWHERE, identities=(identity,))
    client = ClientConfig(psks=(PLAIN,), verifier=trust, policy=prefer)
    refused(client, server, "server", UnknownPskIdentity, lookup=lambda _: None)
    pair = connect(client, replace(server, policy=prefer), lookup=lambda _: None)
    assert pair.server.session.psk_identity is None
    assert pair.client.session.authenticated_by is AuthenticatedBy.CERTIFICATE


def test_what_is_provided_must_be_wanted() -> None:
    pair = Pair.make(ClientConfig(psks=(PLAIN,)), ServerConfig(psk_source=ELSEWHERE))
    with pytest.raises(LocalStateError):
        pair.server.provide_psk(PLAIN)
    pair.client.start()
    pair.server.receive_data(pair.client.data_to_send())
    assert pair.server.next_event() == PskWanted((PLAIN.identity,))
    assert pair.server.next_event() is None
    with pytest.raises(LocalStateError):
        pair.server.provide_psk(IMPORTED)
    assert not pair.server.has_data_to_send
    pair.server.provide_psk(PLAIN)
    pair.pump()
    assert pair.both_complete


def test_the_provided_key_is_another() -> None:
    pair = Pair.make(ClientConfig(psks=(PLAIN,)), ServerConfig(psk_source=ELSEWHERE))
    pair.client.start()
    pair.server.receive_data(pair.client.data_to_send())
    pair.server.next_event()
    with pytest.raises(DecryptError):
        pair.server.provide_psk(replace(PLAIN, key=NOT_THE_SAME))
    pair.fight()
    assert pair.errors["client"].alert == Alert.DECRYPT_ERROR  # type: ignore[attr-defined]


def test_a_plain_sha384_psk_is_not_asked_for() -> None:
    """Only SHA-256 goes without saying (section 4.3.11)."""
    pair = Pair.make(
        ClientConfig(psks=(PLAIN,)),
        ServerConfig(psk_source=ELSEWHERE, suites=(TLS_AES_256_GCM_SHA384,)),
    )
    pair.client.start()
    pair.fight()
    assert type(pair.errors["server"]) is UnknownPskIdentity
    assert pair.server_events == []


# --- resumption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
def test_resumption(suite: CipherSuite, trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(verifier=trust, ticket_store=MemoryTicketStore(), suites=(suite,))
    server = ServerConfig(identities=(identity,))
    first = connect(client, server)
    assert sum(isinstance(event, TicketReceived) for event in first.client_events) == 2
    second = connect(client, server)
    for session in (second.client.session, second.server.session):
        assert session.resumed
        assert session.signature_scheme is None
        assert session.group == "X25519MLKEM768"  # always with a fresh key exchange
        assert session.authenticated_by is AuthenticatedBy.CERTIFICATE
    assert second.client.session.peer_subject == "CN=localhost"


def test_a_ticket_is_used_once(trust: TrustStore, identity: Identity) -> None:
    store = MemoryTicketStore()
    client = ClientConfig(verifier=trust, ticket_store=store)
    server = ServerConfig(identities=(identity,), tickets_per_connection=1)
    connect(client, server)
    assert Pair.make(client, server).connect().client.session.resumed
    assert not Pair.make(client, server).connect().client.session.resumed


def test_no_ticket_before_the_servers_first_write(trust: TrustStore, identity: Identity) -> None:
    store = MemoryTicketStore()
    pair = Pair.make(
        ClientConfig(verifier=trust, ticket_store=store), ServerConfig(identities=(identity,))
    ).connect()
    assert not pair.server.has_data_to_send
    pair.client.send_data(b"a client that only writes")
    pair.pump()
    assert not any(isinstance(event, TicketReceived) for event in pair.client_events)
    assert store.take("localhost") is None
    pair.server.send_data(b"now")
    pair.pump()
    assert [type(event) for event in pair.client_events[-3:]] == [
        TicketReceived,
        TicketReceived,
        ApplicationData,
    ]
    assert store.take("localhost") is not None


def test_tickets_only_for_clients_that_can_use_them(trust: TrustStore, identity: Identity) -> None:
    pair = connect(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    assert not any(isinstance(event, TicketReceived) for event in pair.client_events)
    # One that has no store throws away what comes all the same.
    config = ClientConfig(psks=(PLAIN,))
    pair = connect(config, ServerConfig(psks=(PLAIN,)))
    assert not any(isinstance(event, TicketReceived) for event in pair.client_events)


def test_no_tickets_at_all(trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(verifier=trust, ticket_store=MemoryTicketStore())
    server = ServerConfig(identities=(identity,), tickets=None)
    for _ in range(2):
        assert not connect(client, server).client.session.resumed


def test_a_declined_ticket_falls_back(trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(verifier=trust, ticket_store=MemoryTicketStore())
    connect(client, ServerConfig(identities=(identity,)))
    session = connect(client, ServerConfig(identities=(identity,))).client.session
    assert not session.resumed
    assert session.signature_scheme is not None


def test_resumption_and_retry(trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(
        verifier=trust,
        ticket_store=MemoryTicketStore(),
        groups=(X25519MLKEM768, SECP256R1MLKEM768),
    )
    server = ServerConfig(identities=(identity,))
    connect(client, server)
    session = connect(client, replace(server, groups=(SECP256R1MLKEM768,))).client.session
    assert session.resumed
    assert session.group == "SecP256r1MLKEM768"


def test_a_retry_with_another_hash_drops_the_ticket(trust: TrustStore, identity: Identity) -> None:
    client = ClientConfig(
        verifier=trust,
        ticket_store=MemoryTicketStore(),
        groups=(X25519MLKEM768, SECP256R1MLKEM768),
    )
    server = ServerConfig(identities=(identity,))
    connect(client, server)
    other = replace(server, groups=(SECP256R1MLKEM768,), suites=(TLS_AES_128_GCM_SHA256,))
    assert not connect(client, other).client.session.resumed


def test_ticket_keys_rotate(trust: TrustStore, identity: Identity) -> None:
    now = [1_000_000.0]
    issuer = TicketIssuer(lifetime=100, rotation=10, clock=lambda: now[0])
    store = MemoryTicketStore()
    client = ClientConfig(verifier=trust, ticket_store=store)
    server = ServerConfig(identities=(identity,), tickets=issuer)

    def ticket() -> bytes:
        connect(replace(client, ticket_store=(mine := MemoryTicketStore())), server)
        found = mine.take("localhost")
        assert found is not None
        return found.ticket

    early = ticket()
    assert ticket()[:8] == early[:8]
    now[0] += 10
    late = ticket()
    assert late[:8] != early[:8]  # the names of two keys
    assert issuer.open(early) is not None
    assert issuer.open(late) is not None
    now[0] += 90
    assert issuer.open(early) is None  # expired
    assert issuer.open(late) is not None
    now[0] += 10
    assert issuer.open(late) is None
    for forged in (b"", early[:8], early[:19], late[:-1], late + b"x", os.urandom(200)):
        assert issuer.open(forged) is None


def test_resumption_keeps_the_clients_certificate(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    client = ClientConfig(
        verifier=trust, identity=client_identity, ticket_store=MemoryTicketStore()
    )
    server = ServerConfig(
        identities=(identity,), client_verifier=trust, require_client_certificate=True
    )
    connect(client, server)
    session = connect(client, server).server.session
    assert session.resumed
    assert session.peer_subject == "CN=bob"
    # Trust that is gone is gone for resumption, too.
    gone = replace(server, client_verifier=TrustStore((DevCa.create().certificate,)))
    refused(client, gone, "server", CertificateRejected)


def test_a_session_without_the_clients_certificate_is_not_enough(
    trust: TrustStore, identity: Identity, client_identity: Identity
) -> None:
    client = ClientConfig(
        verifier=trust, identity=client_identity, ticket_store=MemoryTicketStore()
    )
    server = ServerConfig(identities=(identity,))
    connect(client, server)
    strict = replace(server, client_verifier=trust, require_client_certificate=True)
    session = connect(client, strict).server.session
    assert not session.resumed
    assert session.peer_subject == "CN=bob"


def test_a_ticket_is_for_its_name(ca: DevCa, trust: TrustStore) -> None:
    both = ca.issue("localhost", "other.example")
    store = MemoryTicketStore()
    client = ClientConfig(verifier=trust, ticket_store=store)
    server = ServerConfig(identities=(both,))
    connect(client, server)
    ticket = store.take("localhost")
    assert ticket is not None
    store.put("other.example", ticket)
    assert not connect(client, server, name="other.example").client.session.resumed


def test_a_server_that_is_not_trusted_any_more_is_not_resumed(
    trust: TrustStore, identity: Identity
) -> None:
    client = ClientConfig(verifier=trust, ticket_store=MemoryTicketStore())
    server = ServerConfig(identities=(identity,))
    connect(client, server)
    doubting = replace(client, verifier=TrustStore((DevCa.create().certificate,)))
    refused(doubting, server, "client", CertificateRejected)


def test_resumption_of_psk_sessions(trust: TrustStore, identity: Identity) -> None:
    """What a resumed session rests on is what the first one rested on."""
    for extra_client, extra_server, by in (
        ({}, {}, AuthenticatedBy.PSK),
        ({"verifier": trust}, {"identities": (identity,)}, AuthenticatedBy.BOTH),
    ):
        client = ClientConfig(psks=(PLAIN,), ticket_store=MemoryTicketStore(), **extra_client)
        server = ServerConfig(psks=(PLAIN,), **extra_server)
        connect(client, server)
        session = connect(client, server).client.session
        assert session.resumed
        assert session.psk_identity == PLAIN.identity
        assert session.authenticated_by is by


# --- after the handshake --------------------------------------------------------------------------


def simple(trust: TrustStore, identity: Identity, **options: Any) -> Pair:
    """A connection with a small and fast group."""
    return Pair.make(
        ClientConfig(verifier=trust, groups=(X25519,), policy=ANY_GROUP, **options),
        ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP),
    ).connect()


def updates(events: list[Any]) -> list[int]:
    return [event.generation for event in events if isinstance(event, KeyUpdated)]


def test_key_update_of_one_direction(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    pair.client.update_keys()
    pair.exchange(b"a", b"b")
    assert (updates(pair.client_events), updates(pair.server_events)) == ([], [1])
    pair.server.update_keys()
    pair.exchange(b"c", b"d")
    assert (updates(pair.client_events), updates(pair.server_events)) == ([1], [1])


def test_key_update_with_a_request(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    pair.client.update_keys(request_peer=True)
    pair.client.update_keys(request_peer=True)
    pair.pump()
    assert updates(pair.client_events) == []  # the answer waits for data
    pair.exchange(b"a", b"b")
    assert (updates(pair.client_events), updates(pair.server_events)) == ([1], [1, 2])
    pair.exchange(b"c", b"d")
    assert (updates(pair.client_events), updates(pair.server_events)) == ([1], [1, 2])


def test_keys_change_before_their_limit(trust: TrustStore, identity: Identity) -> None:
    small = replace(TLS_AES_128_GCM_SHA256, record_limit=20)  # 16 of them are kept for alerts
    pair = Pair.make(
        ClientConfig(verifier=trust, suites=(small,)),
        ServerConfig(identities=(identity,), suites=(small,)),
    ).connect()
    data = os.urandom(9 * 16384 + 1)  # ten records, four to a key
    pair.exchange(data, data)
    assert (updates(pair.client_events), updates(pair.server_events)) == ([1, 2], [1, 2])
    for _ in range(10):
        pair.exchange(b"x", b"y")
    assert max(updates(pair.client_events)) >= 4


def test_a_storm_of_key_updates(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    for _ in range(40):
        for _ in range(30):
            pair.client.update_keys()
        pair.client.send_data(b"and data between")
        pair.pump()
    for _ in range(33):
        pair.client.update_keys()
    pair.fight()
    assert type(pair.errors["server"]) is UnexpectedMessage


def test_too_many_tickets(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(
        ClientConfig(verifier=trust, ticket_store=MemoryTicketStore()),
        ServerConfig(identities=(identity,), tickets_per_connection=16),
    ).connect()
    pair.server.send_data(b"16 tickets")
    state = pair.server._state
    for _ in range(2):
        state._tickets_due = 16  # type: ignore[union-attr]
        pair.server.send_data(b"16 more")
    pair.fight()
    assert type(pair.errors["client"]) is UnexpectedMessage


@pytest.mark.parametrize("name", ["key_updates", "empty_records"])
def test_limits_can_be_set(name: str, trust: TrustStore, identity: Identity) -> None:
    """What is refused above a limit is taken where the limit is higher."""
    for most, refused in ((5, True), (6, False)):
        limits = Limits(**{name: most})
        server = ServerConfig(identities=(identity,), limits=limits)
        pair = Pair.make(ClientConfig(verifier=trust), server).connect()
        for _ in range(6):
            if name == "key_updates":
                pair.client.update_keys()
            else:
                pair.client._records.writer.send_data(memoryview(b""))
        pair.client.send_data(b"alive")
        pair.fight()
        assert ("server" in pair.errors) == refused


def test_the_limit_of_tickets_can_be_set(trust: TrustStore, identity: Identity) -> None:
    for most, refused in ((15, True), (16, False)):
        pair = Pair.make(
            ClientConfig(
                verifier=trust, ticket_store=MemoryTicketStore(), limits=Limits(tickets=most)
            ),
            ServerConfig(identities=(identity,), tickets_per_connection=16),
        ).connect()
        pair.server.send_data(b"16 tickets")
        pair.fight()
        assert ("client" in pair.errors) == refused


def test_the_limit_of_psk_identities_can_be_set() -> None:
    """A server finds the PSK that it knows among those that it looks at, and no further."""
    psks = tuple(
        ExternalPsk(identity=b"psk %d" % number, key=Secret(bytes([number]) * 32))
        for number in range(5)
    )
    for most, refused in ((4, True), (5, False)):
        pair = Pair.make(
            ClientConfig(psks=psks),
            ServerConfig(psks=psks[-1:], limits=Limits(psk_identities=most)),
        )
        pair.client.start()
        pair.fight()
        assert bool(pair.errors) == refused


def test_exporter(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)

    def both(label: bytes, context: bytes, length: int) -> bytes:
        ours = pair.client.export(label, context, length).reveal()
        assert ours == pair.server.export(label, context, length).reveal()
        assert len(ours) == length
        return ours

    a = both(b"EXPORTER-a", b"", 32)
    assert a != both(b"EXPORTER-b", b"", 32)
    assert a != both(b"EXPORTER-a", b"c", 32)
    assert len({a, both(b"EXPORTER-a", b"", 33)[:32]}) == 2  # the length is an input, too
    assert both(b"EXPORTER-a", b"", 1)
    assert both(b"EXPORTER-a", b"", 255 * 48)
    for length in (0, -1, 255 * 48 + 1):
        with pytest.raises(ConfigError):
            pair.client.export(b"a", b"", length)


def test_key_log(trust: TrustStore, identity: Identity) -> None:
    ours: list[str] = []
    theirs: list[str] = []
    pair = Pair.make(
        ClientConfig(verifier=trust, key_log=ours.append),
        ServerConfig(identities=(identity,), key_log=theirs.append),
    ).connect()
    assert sorted(ours) == sorted(theirs)
    assert {line.split()[0] for line in ours} == {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
        "EXPORTER_SECRET",
    }
    randoms = {line.split()[1] for line in ours}
    assert randoms == {pair.client._records.client_random.hex()}
    assert all(len(line.split()[2]) == 96 for line in ours)  # SHA-384


def test_half_close(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    pair.client.send_data(b"last words")
    pair.client.send_close()
    pair.client.send_close()  # once is enough, twice does no harm
    pair.pump()
    assert isinstance(pair.server_events[-1], CloseReceived)
    assert data_of(pair.server_events) == b"last words"
    assert pair.server.close_received
    assert not pair.server.close_sent
    with pytest.raises(LocalStateError):
        pair.client.send_data(b"more")
    with pytest.raises(LocalStateError):
        pair.client.update_keys()
    pair.server.send_data(b"an answer all the same")
    pair.pump()
    assert data_of(pair.client_events) == b"an answer all the same"
    pair.server.send_close()
    pair.server.receive_data(b"")  # the end of the transport is fine now
    pair.pump()
    assert isinstance(pair.client_events[-1], CloseReceived)
    assert pair.client.close_sent


def test_what_comes_behind_close_notify(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    assert pair.server.trailing_data() == b""
    pair.client.send_close()
    pair.server.receive_data(bytes(pair.client.data_to_send()) + b"not TLS")
    assert isinstance(pair.server.next_event(), CloseReceived)
    assert pair.server.next_event() is None
    assert pair.server.trailing_data() == b"not TLS"


def test_truncation(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    pair.client.send_data(b"half of it")
    pair.pump()
    with pytest.raises(TruncationError):
        pair.server.receive_data(b"")
    with pytest.raises(LocalStateError):
        pair.server.send_data(b"dead")
    with pytest.raises(LocalStateError):
        pair.server.next_event()


def test_truncation_during_the_handshake(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    for one in (pair.client, pair.server):
        with pytest.raises(TruncationError):
            one.receive_data(b"")


def test_events_come_before_the_end() -> None:
    pair = Pair.make(ClientConfig(psks=(PLAIN,)), ServerConfig(psks=(PLAIN,))).connect()
    pair.client.update_keys()
    pair.client.send_close()
    pair.server.receive_data(pair.client.data_to_send())
    assert isinstance(pair.server.next_event(), KeyUpdated)
    assert isinstance(pair.server.next_event(), CloseReceived)


def test_close_notify_during_the_handshake(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    pair.client.send_close()
    pair.fight()
    assert isinstance(pair.errors["server"], AlertReceived)
    assert not pair.both_complete


def test_user_canceled_is_a_warning(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    for _ in range(4):
        pair.client._records.writer.send_alert(Alert.USER_CANCELED)
    pair.exchange(b"still", b"alive")
    pair.client._records.writer.send_alert(Alert.USER_CANCELED)
    pair.fight()
    assert type(pair.errors["server"]) is UnexpectedMessage


def test_any_other_alert_ends_the_connection(trust: TrustStore, identity: Identity) -> None:
    for number in (Alert.INTERNAL_ERROR, 199):
        pair = simple(trust, identity)
        pair.client._records.writer.send_alert(number)  # type: ignore[arg-type]
        with pytest.raises(AlertReceived) as caught:
            pair.pump()
        assert caught.value.alert == number
        assert not pair.server.has_data_to_send  # no alert in answer to an alert


def refuse_without_a_key() -> None:
    try:
        try:
            os.close(-1)
        except OSError as error:
            raise KeySourceUnavailable("no answer") from error
    except KeySourceUnavailable as error:
        raise PolicyRefused("no QKD key") from error


def test_a_failed_engine_keeps_the_causes_of_its_error_and_no_frames(identity: Identity) -> None:
    server = ServerConnection(ServerConfig(identities=(identity,)))
    with pytest.raises(PolicyRefused) as refused:
        refuse_without_a_key()
    server.abort(refused.value)
    with pytest.raises(LocalStateError) as later:
        server.receive_data(b"x")
    kept: BaseException = later.value
    for kind, text in (
        (PolicyRefused, "no QKD key"),
        (KeySourceUnavailable, "no answer"),
        (OSError, str(OSError(errno.EBADF, os.strerror(errno.EBADF)))),
    ):
        assert kept.__cause__ is not None
        kept = kept.__cause__
        assert (type(kept), str(kept)) == (kind, text)
        assert kept.__traceback__ is kept.__context__ is None
    theirs = refused.value.__cause__
    assert theirs is not None
    assert theirs.__traceback__ is not None, "the error of the source was changed"


@pytest.mark.parametrize("answered", [False, True])
def test_the_caller_gives_up(answered: bool, trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    if answered:
        pair.server.receive_data(pair.client.data_to_send())
        assert pair.server.next_event() is None
    pair.server.abort(HandshakeTimeout("too slow"))
    pair.server.abort(HandshakeTimeout("once is enough"))
    pair.client.receive_data(pair.server.data_to_send())
    if answered:  # The client has seen the server's Finished.
        assert isinstance(pair.client.next_event(), SessionProposed)
        pair.client.accept()
        assert isinstance(pair.client.next_event(), HandshakeCompleted)
        assert isinstance(pair.client.next_event(), CloseReceived)
    else:
        with pytest.raises(AlertReceived):
            pair.client.next_event()
    with pytest.raises(LocalStateError, match="too slow"):
        pair.server.send_data(b"x")


def test_what_a_connection_cannot_do_yet(trust: TrustStore, identity: Identity) -> None:
    client = ClientConnection(ClientConfig(verifier=trust), "localhost")
    for call in (
        lambda: client.send_data(b"x"),
        client.update_keys,
        lambda: client.export(b"l", b"c", 32),
        lambda: client.session,
    ):
        with pytest.raises(LocalStateError):
            call()
    assert client.next_event() is None
    server = ServerConnection(ServerConfig(identities=(identity,)))
    server.abort(HandshakeFailure("an alert, so that there is a message to hear"))
    client.start()
    with pytest.raises(LocalStateError):
        client.start()
    client.receive_data(server.data_to_send())
    with pytest.raises(AlertReceived):
        client.next_event()


def test_a_message_before_the_start(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    idle = ClientConnection(ClientConfig(verifier=trust), "localhost")
    idle.receive_data(pair.client.data_to_send())
    with pytest.raises(LocalStateError):
        idle.next_event()


def test_empty_data_sends_nothing(trust: TrustStore, identity: Identity) -> None:
    pair = simple(trust, identity)
    pair.client.send_data(b"")
    assert not pair.client.has_data_to_send
    assert pair.client.data_to_send() == b""


# --- records --------------------------------------------------------------------------------------


def lengths(data: bytes) -> list[int]:
    """The lengths of the protected records in a flight."""
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] == 23:
            found.append(length)
        at += 5 + length
    return found


@pytest.mark.parametrize("size", [1, 64, 1000, 16384])
def test_padding_hides_the_length(size: int, trust: TrustStore, identity: Identity) -> None:
    seen: list[int] = []

    def watch(target: Connection, data: bytes) -> bytes:
        if isinstance(target, ServerConnection):
            seen.extend(lengths(data))
        return data

    padded = ClientConfig(verifier=trust, padding=PadToMultiple(size=size))
    pair = Pair.make(padded, ServerConfig(identities=(identity,)), on_wire=watch).connect()
    for amount in (1, 63, 64, 65, 999, 16383, 16384, 16385, 50000):
        pair.exchange(os.urandom(amount), b"x")
    for length in seen:
        content = length - 17
        assert content % size == 0 or content == 16384


def test_padding_within_a_record_size_limit(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(
        ClientConfig(verifier=trust, record_size_limit=100),
        ServerConfig(identities=(identity,), padding=PadToMultiple(size=64)),
    ).connect()
    pair.exchange(b"x" * 500, b"y" * 500)
    pair.server.send_data(b"z" * 250)
    sizes = [length - 17 for length in lengths(bytes(pair.server.data_to_send()))]
    assert sizes == [100, 100, 64]


def test_a_policy_that_pads_too_much_is_cut(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(
        ClientConfig(verifier=trust, padding=lambda length, limit: 10**6),
        ServerConfig(identities=(identity,), padding=lambda length, limit: -5),
    ).connect()
    pair.exchange(b"x", b"y")


def test_record_size_limit(trust: TrustStore, identity: Identity) -> None:
    seen: dict[str, list[int]] = {"ClientConnection": [], "ServerConnection": []}

    def watch(target: Connection, data: bytes) -> bytes:
        seen[type(target).__name__].extend(lengths(data))
        return data

    pair = Pair.make(
        ClientConfig(verifier=trust, record_size_limit=64),
        ServerConfig(identities=(identity,), record_size_limit=1000),
        on_wire=watch,
    ).connect()
    pair.exchange(b"x" * 5000, b"y" * 5000)
    assert max(seen["ClientConnection"]) == 64 + 1 + 16
    assert max(seen["ServerConnection"]) == 1000 + 1 + 16


def test_a_record_beyond_the_limit(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(
        ClientConfig(verifier=trust, record_size_limit=64), ServerConfig(identities=(identity,))
    ).connect()
    pair.server._records.writer.record_limit = 65
    pair.server.send_data(b"y" * 65)
    pair.fight()
    assert type(pair.errors["client"]) is RecordOverflow


def test_a_server_without_the_limit_stays_within_it(trust: TrustStore, identity: Identity) -> None:
    pair = connect(
        ClientConfig(verifier=trust), ServerConfig(identities=(identity,), record_size_limit=64)
    )
    assert pair.client._records.writer.record_limit == 16384  # nobody asked


# --- early data, which we never take --------------------------------------------------------------


def early_record(length: int) -> bytes:
    return b"\x17\x03\x03" + length.to_bytes(2, "big") + os.urandom(length)


def with_early_data(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(client_module.wire, "encode", encode_with)


@pytest.mark.parametrize("retry", [False, True])
def test_early_data_is_skipped(
    retry: bool, monkeypatch: pytest.MonkeyPatch, trust: TrustStore, identity: Identity
) -> None:
    with_early_data(monkeypatch)
    pair = Pair.make(
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, SECP256R1MLKEM768)),
        ServerConfig(
            identities=(identity,), groups=(SECP256R1MLKEM768 if retry else X25519MLKEM768,)
        ),
    )
    pair.client.start()
    hello = bytes(pair.client.data_to_send())
    pair.server.receive_data(hello + early_record(40) + early_record(16000) + early_record(17))
    assert pair.server.next_event() is None
    pair.pump()
    assert pair.both_complete
    pair.exchange(b"late data", b"is fine")
    # The budget ends with the handshake.
    pair.server.receive_data(early_record(40))
    with pytest.raises(BadRecordMac):
        pair.server.next_event()


@pytest.mark.parametrize("retry", [False, True])
def test_too_much_early_data(
    retry: bool, monkeypatch: pytest.MonkeyPatch, trust: TrustStore, identity: Identity
) -> None:
    with_early_data(monkeypatch)
    pair = Pair.make(
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, SECP256R1MLKEM768)),
        ServerConfig(
            identities=(identity,), groups=(SECP256R1MLKEM768 if retry else X25519MLKEM768,)
        ),
    )
    pair.client.start()
    pair.server.receive_data(bytes(pair.client.data_to_send()) + early_record(16000) * 2)
    with pytest.raises(UnexpectedMessage):
        pair.server.next_event()


def test_early_data_that_was_not_announced(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,)))
    pair.client.start()
    pair.server.receive_data(bytes(pair.client.data_to_send()) + early_record(40))
    with pytest.raises(BadRecordMac):
        pair.server.next_event()


def test_classical_groups_retry(trust: TrustStore, identity: Identity) -> None:
    pair = connect(
        ClientConfig(verifier=trust, groups=(X25519, SECP256R1), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=(SECP256R1,), policy=ANY_GROUP),
    )
    assert not pair.client.session.post_quantum
