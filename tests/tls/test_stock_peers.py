"""What other implementations do or expect where RFC 9846 leaves a choice; found with BoGo."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tls_glue import ANY_GROUP, Pair, drain

from hybridkex.auth import Identity, InsecureNoVerification, TrustStore
from hybridkex.constants import Alert
from hybridkex.crypto.kex import SECP256R1, SECP384R1, X25519, X25519MLKEM768
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import CertificateRejected, ConfigError, IllegalParameter, PolicyRefused
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ServerConnection
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.session import AuthenticatedBy, MemoryTicketStore
from hybridkex.wire import extensions as ext
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import decode

EITHER = Policy(
    post_quantum=Requirement.PREFER,
    psk=Requirement.PREFER,
    authentication=Authentication.EITHER,
)


def psk(name: bytes, fill: int = 1) -> ExternalPsk:
    return ExternalPsk(identity=name, key=Secret(bytes((fill,)) * 32), context=b"test")


def records(data: bytes) -> list[tuple[int, int, bytes]]:
    """Type, version and fragment of each record."""
    found = []
    while data:
        end = 5 + int.from_bytes(data[3:5], "big")
        found.append((data[0], int.from_bytes(data[1:3], "big"), data[5:end]))
        data = data[end:]
    return found


def message(data: bytes) -> Any:
    """The handshake message in the first record."""
    found: Message = decode(records(data)[0][2])
    return found


# --- records ------------------------------------------------------------------------------------


def test_only_the_first_hello_looks_older(trust: TrustStore, identity: Identity) -> None:
    """RFC 9846 section 5.1; the second ClientHello has 0x0303."""
    client = ClientConfig(verifier=trust, policy=ANY_GROUP, groups=(SECP256R1, X25519))
    server = ServerConfig(identities=(identity,), policy=ANY_GROUP, groups=(X25519,))
    pair = Pair.make(client, server)
    pair.client.start()
    first = bytes(pair.client.data_to_send())
    assert [version for _, version, _ in records(first)] == [0x0301]
    pair.server.receive_data(first)
    pair.server.next_event()
    pair.client.receive_data(pair.server.data_to_send())
    pair.client.next_event()
    second = bytes(pair.client.data_to_send())
    assert [(type_, version) for type_, version, _ in records(second)] == [
        (20, 0x0303),
        (22, 0x0303),
    ]
    pair.server.receive_data(second)
    drain(pair.server)
    pair.pump()
    assert pair.both_complete


def test_change_cipher_spec_comes_before_an_encrypted_alert(identity: Identity) -> None:
    """A client that gives up in the middle of the server's flight still looks like TLS 1.2."""

    class Nobody:
        def verify_server(self, chain: Any, name: Any, **_: Any) -> Any:
            raise CertificateRejected("nobody")

    client = ClientConfig(verifier=Nobody(), policy=ANY_GROUP, groups=(X25519,))
    pair = Pair.make(client, ServerConfig(identities=(identity,), policy=ANY_GROUP))
    pair.client.start()
    pair.server.receive_data(pair.client.data_to_send())
    pair.server.next_event()
    pair.client.receive_data(pair.server.data_to_send())
    with pytest.raises(CertificateRejected):
        pair.client.next_event()
    assert [type_ for type_, _, _ in records(bytes(pair.client.data_to_send()))] == [20, 23]


def test_a_server_sends_change_cipher_spec_to_every_client(
    trust: TrustStore, identity: Identity
) -> None:
    client = ClientConfig(
        verifier=trust, policy=ANY_GROUP, groups=(X25519,), compatibility_mode=False
    )
    pair = Pair.make(client, ServerConfig(identities=(identity,), policy=ANY_GROUP))
    pair.client.start()
    hello = bytes(pair.client.data_to_send())
    assert message(hello).session_id == b""
    pair.server.receive_data(hello)
    pair.server.next_event()
    flight = bytes(pair.server.data_to_send())
    assert [type_ for type_, _, _ in records(flight)][:2] == [22, 20]
    pair.client.receive_data(flight)
    drain(pair.client)
    pair.pump()
    assert pair.both_complete


@pytest.mark.parametrize("level", [0, 3, 42])
def test_an_alert_has_one_of_two_levels(level: int, identity: Identity) -> None:
    server = ServerConnection(ServerConfig(identities=(identity,)))
    server.receive_data(bytes((21, 3, 3, 0, 2, level, 40)))
    with pytest.raises(IllegalParameter, match="level"):
        server.next_event()


def test_empty_records_are_counted_for_each_key(trust: TrustStore, identity: Identity) -> None:
    """32 in a row are tolerated, and what came during the handshake does not count."""
    pair = Pair.make(
        ClientConfig(verifier=trust, policy=ANY_GROUP, groups=(X25519,)),
        ServerConfig(identities=(identity,), policy=ANY_GROUP),
    ).connect()
    write = pair.client._records.writer.protection
    assert write is not None
    for _ in range(32):
        pair.server.receive_data(write.seal(23, memoryview(b""), 16384))
    assert pair.server.next_event() is None
    pair.server.receive_data(write.seal(23, memoryview(b""), 16384))
    with pytest.raises(Exception, match="too many empty records"):
        pair.server.next_event()


# --- what is offered and answered ---------------------------------------------------------------


def test_shares_of_chosen_groups() -> None:
    groups = (X25519, SECP256R1, X25519MLKEM768)
    config = ClientConfig(
        verifier=InsecureNoVerification(),
        policy=ANY_GROUP,
        groups=groups,
        key_shares=(X25519, X25519MLKEM768),
    )
    pair = Pair.make(config, ServerConfig(psks=(psk(b"x"),)))
    pair.client.start()
    offer = message(bytes(pair.client.data_to_send())).extensions.get(ext.KeyShareOffer)
    assert [entry.group for entry in offer.entries] == [X25519.code, X25519MLKEM768.code]
    for wrong in ((SECP384R1,), (X25519MLKEM768, X25519), (X25519, X25519)):
        with pytest.raises(ConfigError, match="key_shares"):
            replace(config, key_shares=wrong)


def test_the_name_is_acknowledged_only_with_a_certificate(
    trust: TrustStore, identity: Identity
) -> None:
    """RFC 6066 section 3: not where a session is resumed."""
    seen: list[bool] = []

    store = MemoryTicketStore()
    client = ClientConfig(verifier=trust, policy=ANY_GROUP, groups=(X25519,), ticket_store=store)
    server = ServerConfig(identities=(identity,), policy=ANY_GROUP)
    for resumed in (False, True):
        pair = Pair.make(client, server)
        pair.client.start()
        pair.server.receive_data(pair.client.data_to_send())
        pair.server.next_event()
        pair.client.receive_data(pair.server.data_to_send())
        channel = pair.client._records
        take, got = channel.reader.next_item, []

        def next_item(take: Callable[[], Any] = take, got: list[Any] = got) -> Any:
            item = take()
            if isinstance(item, bytes) and item[0] == 8:
                got.append(decode(item))
            return item

        channel.reader.next_item = next_item  # type: ignore[method-assign]
        drain(pair.client)
        pair.pump()
        assert pair.client.session.resumed is resumed
        seen.append(ext.ServerNameAck in got[0].extensions)
        pair.server.send_data(b"tickets")
        pair.pump()
    assert seen == [True, False]


# --- PSKs ---------------------------------------------------------------------------------------


def test_the_servers_order_among_its_psks() -> None:
    first, second = psk(b"first", 1), psk(b"second", 2)
    client = ClientConfig(psks=(second, first), policy=ANY_GROUP, groups=(X25519,))
    server = ServerConfig(psks=(first, second), policy=ANY_GROUP)
    pair = Pair.make(client, server, None).connect()
    assert pair.server.session.psk_identity == b"first"


def either(
    trust: TrustStore,
    identity: Identity,
    ours: tuple[ExternalPsk, ...],
    theirs: tuple[ExternalPsk, ...],
) -> Pair:
    client = ClientConfig(
        verifier=trust,
        psks=ours,
        policy=EITHER,
        groups=(X25519,),
        ticket_store=MemoryTicketStore(),
    )
    server = ServerConfig(identities=(identity,), psks=theirs, policy=EITHER)
    return Pair.make(client, server)


def test_either_takes_the_psk_where_both_have_it(trust: TrustStore, identity: Identity) -> None:
    pair = either(trust, identity, (psk(b"a"),), (psk(b"a"),)).connect()
    for end in (pair.client, pair.server):
        assert end.session.authenticated_by is AuthenticatedBy.PSK
        assert end.session.signature_scheme is None


def test_either_takes_the_certificate_otherwise(trust: TrustStore, identity: Identity) -> None:
    pair = either(trust, identity, (psk(b"a"),), (psk(b"b"),)).connect()
    for end in (pair.client, pair.server):
        assert end.session.authenticated_by is AuthenticatedBy.CERTIFICATE
        assert end.session.psk_identity is None


def test_either_with_a_client_that_has_one_of_them(trust: TrustStore, identity: Identity) -> None:
    server = ServerConfig(identities=(identity,), psks=(psk(b"a"),), policy=EITHER)
    for client, by in (
        (ClientConfig(verifier=trust, policy=ANY_GROUP, groups=(X25519,)), "certificate"),
        (ClientConfig(psks=(psk(b"a"),), policy=ANY_GROUP, groups=(X25519,)), "psk"),
        # RFC 9973 asks for both, and gets both.
        (
            ClientConfig(verifier=trust, psks=(psk(b"a"),), policy=ANY_GROUP, groups=(X25519,)),
            "certificate+psk",
        ),
    ):
        assert Pair.make(client, server).connect().server.session.authenticated_by.value == by


@pytest.mark.parametrize("theirs", [b"a", b"b"])
def test_sessions_of_either_kind_are_resumed(
    trust: TrustStore, identity: Identity, theirs: bytes
) -> None:
    pair = either(trust, identity, (psk(b"a"),), (psk(theirs),)).connect()
    pair.server.send_data(b"tickets")
    pair.pump()
    before = pair.server.session.authenticated_by
    again = Pair.make(pair.client._config, pair.server._state._config).connect()  # type: ignore[union-attr]
    assert again.client.session.resumed
    assert again.client.session.authenticated_by is before
    # A session belongs to the policy that made it: another policy makes its own.
    pair.server.send_data(b"more")
    wants = replace(
        pair.client._config,
        psks=(),
        policy=ANY_GROUP,
        ticket_store=pair.client._config.ticket_store,
    )
    strict = Pair.make(wants, pair.server._state._config)  # type: ignore[union-attr]
    strict.connect()
    assert not strict.client.session.resumed


def test_a_forged_psk_is_not_rescued_by_the_certificate(
    trust: TrustStore, identity: Identity
) -> None:
    pair = either(trust, identity, (psk(b"a", 1),), (psk(b"a", 2),))
    pair.client.start()
    pair.server.receive_data(pair.client.data_to_send())
    with pytest.raises(Exception, match="binder"):
        pair.server.next_event()


def test_either_does_not_go_with_a_psk_that_is_required() -> None:
    with pytest.raises(ConfigError, match="EITHER"):
        replace(EITHER, psk=Requirement.REQUIRE)


def test_a_psk_alone_still_refuses_a_certificate(identity: Identity) -> None:
    client = ClientConfig(psks=(psk(b"a"),), policy=ANY_GROUP, groups=(X25519,))
    assert client.authentication is Authentication.PSK
    server = ServerConfig(identities=(identity,), policy=ANY_GROUP)
    pair = Pair.make(client, server)
    pair.client.start()
    hello = message(bytes(pair.client.data_to_send()))
    assert ext.SignatureAlgorithms not in hello.extensions
    assert issubclass(PolicyRefused, Exception)


# --- certificates -------------------------------------------------------------------------------


def leaf(*, digital_signature: bool | None) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
    )
    if digital_signature is not None:
        usage = dict.fromkeys(
            (
                "content_commitment",
                "data_encipherment",
                "key_agreement",
                "key_cert_sign",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        usage |= {"digital_signature": digital_signature, "key_encipherment": True}
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize(("usage", "good"), [(None, True), (True, True), (False, False)])
def test_a_certificate_must_be_for_signatures(usage: bool | None, good: bool) -> None:
    """RFC 9846 section 4.5.1.2; whoever verifies."""
    chain = (leaf(digital_signature=usage),)
    if good:
        InsecureNoVerification().verify_server(chain, None)
        return
    with pytest.raises(CertificateRejected, match="keyUsage") as refused:
        InsecureNoVerification().verify_server(chain, None)
    assert refused.value.alert is Alert.UNSUPPORTED_CERTIFICATE
