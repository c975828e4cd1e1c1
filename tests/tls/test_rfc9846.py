"""What RFC 9846 changed against RFC 8446 (section 1.2), one test for each change."""

from dataclasses import replace
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair, drain

from hybridkex.auth import Identity, TrustStore
from hybridkex.constants import Alert, PskKeyExchangeMode
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import SHA256, SHA384
from hybridkex.errors import AlertReceived, LocalStateError, MissingExtension
from hybridkex.secret import Secret
from hybridkex.tls import traffic
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.events import CloseReceived, KeyUpdated, TicketReceived
from hybridkex.wire import extensions as ext
from hybridkex.wire.extensions import Extensions
from hybridkex.wire.messages import (
    CertificateRequest,
    ClientHello,
    ImportedIdentity,
    KeyUpdate,
    NewSessionTicket,
    decode,
)

KEY = Secret(bytes(range(32)))
PSK = ExternalPsk(identity=b"a key", key=KEY)
CLIENT = ClientConfig(psks=(PSK,), groups=(X25519,), policy=ANY_GROUP)
SERVER = ServerConfig(psks=(PSK,), groups=(X25519,), policy=ANY_GROUP)


@pytest.fixture
def pair() -> Pair:
    return Pair.make(CLIENT, SERVER).connect()


def test_a_client_without_resumption_ignores_every_ticket(pair: Pair) -> None:
    """Section 4.7.1: such a client "MUST silently ignore this message"."""
    for number in range(100):
        lifetime = 7 * 24 * 3600 + number
        pair.server._records.writer.send(NewSessionTicket(lifetime, 0, b"", b"t", Extensions()))
    pair.exchange(b"question", b"answer")
    assert not [one for one in pair.client_events if isinstance(one, TicketReceived)]


def test_a_sender_does_not_exceed_the_number_of_key_updates(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 4.7.3: the sender stops at 2^48-1; at the limit it ignores update_requested."""
    assert traffic.MAX_KEY_UPDATES == (1 << 48) - 1
    monkeypatch.setattr(traffic, "MAX_KEY_UPDATES", 2)
    for _ in range(2):
        pair.server.update_keys()
    pair.exchange(b"question", b"answer")
    with pytest.raises(LocalStateError, match="new connection"):
        pair.server.update_keys()
    before = len(pair.client_events)
    pair.client.update_keys(request_peer=True)
    pair.exchange(b"please change", b"no more")
    pair.exchange(b"please change", b"no more")
    assert not [one for one in pair.client_events[before:] if isinstance(one, KeyUpdated)]
    pair.exchange(b"and again", b"no more")


def test_a_receiver_does_not_count_key_updates(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 4.7.3: "receiving implementations MUST NOT enforce this rule"."""
    state: Any = pair.server._state
    monkeypatch.setattr(state, "_read_generation", (1 << 48) + 5)
    pair.client.update_keys(request_peer=True)
    pair.exchange(b"question", b"answer")
    pair.exchange(b"question", b"answer")
    assert [one for one in pair.client_events if isinstance(one, KeyUpdated)]


def test_one_request_at_a_time(pair: Pair) -> None:
    """Section 4.7.3: no second update_requested before the peer's KeyUpdate."""
    sent: list[bool] = []
    channel = pair.client._records
    send = channel.writer.send_raw

    def record(raw: bytes) -> None:
        message = decode(raw)
        assert isinstance(message, KeyUpdate)
        sent.append(message.update_requested)
        send(raw)

    channel.writer.send_raw = record  # type: ignore[method-assign]
    for _ in range(3):
        pair.client.update_keys(request_peer=True)
    pair.exchange(b"question", b"answer")
    pair.exchange(b"question", b"answer behind the peer's update")
    pair.client.update_keys(request_peer=True)
    assert sent == [True, False, False, True]


@pytest.mark.parametrize("level", [1, 2])
def test_user_canceled_ends_nothing(pair: Pair, level: int) -> None:
    """Section 6.1: read on until close_notify, whatever the level says."""
    write = pair.client._records.writer.protection
    assert write is not None
    alert = bytes((level, Alert.USER_CANCELED))
    pair.client._records.writer._outgoing.append(write.seal(21, memoryview(alert), 1 << 14))
    pair.exchange(b"goes on", b"indeed")
    pair.client.send_close()
    pair.pump()
    assert isinstance(pair.server_events[-1], CloseReceived)


def test_general_error_has_a_name(pair: Pair) -> None:
    """Section 6.2."""
    pair.client._records.writer.send_alert(Alert.GENERAL_ERROR)
    pair.server.receive_data(pair.client.data_to_send())
    with pytest.raises(AlertReceived, match="general_error") as caught:
        drain(pair.server)
    assert caught.value.alert == 117


def test_a_certificate_request_without_extensions(
    trust: TrustStore, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 4.4.2: the vector may be empty, which parses; signature_algorithms is mandatory."""
    assert decode(b"\x0d\0\0\3\0\0\0") == CertificateRequest(b"", Extensions())
    pair = Pair.make(
        ClientConfig(verifier=trust, groups=(X25519,), policy=ANY_GROUP),
        ServerConfig(
            identities=(identity,), client_verifier=trust, groups=(X25519,), policy=ANY_GROUP
        ),
    )
    send = pair.server._records.writer.send_raw

    def emptied(raw: bytes) -> None:
        send(b"\x0d\0\0\3\0\0\0" if raw[0] == CertificateRequest.type else raw)

    monkeypatch.setattr(pair.server._records.writer, "send_raw", emptied)
    pair.client.start()
    pair.fight()
    assert isinstance(pair.errors["client"], MissingExtension)
    assert pair.errors["client"].alert == Alert.MISSING_EXTENSION


@pytest.mark.parametrize("hash_function", [SHA256, SHA384])
def test_which_hash_after_hello_retry_request(hash_function: Any) -> None:
    """Section 4.3.11.2: the first binder is over the PSK's hash; after a retry message_hash is
    over the negotiated one, so only PSKs of that hash are offered again."""
    psk = ExternalPsk(identity=b"a key", key=KEY, context=b"")
    suites = tuple(one for one in CLIENT.suites if one.hash is hash_function)
    pair = Pair.make(
        replace(CLIENT, psks=(psk,), groups=(SECP256R1, X25519)),
        replace(SERVER, psks=(psk,), suites=suites),
    )
    hellos: list[ClientHello] = []
    send = pair.client._records.writer.send_raw

    def record(raw: bytes) -> None:
        if raw[0] == ClientHello.type:
            message = decode(raw)
            assert isinstance(message, ClientHello)
            hellos.append(message)
        send(raw)

    pair.client._records.writer.send_raw = record  # type: ignore[method-assign]
    pair.connect()
    kdfs = []
    for hello in hellos:
        offer = hello.extensions.get(ext.PreSharedKeyOffer)
        assert offer is not None
        found = [ImportedIdentity.decode(one.identity) for one in offer.identities]
        kdfs.append([one.target_kdf for one in found if one is not None])
    assert sorted(kdfs[0]) == [SHA256.kdf, SHA384.kdf]
    assert kdfs[1] == [hash_function.kdf]


def test_key_shares_are_not_reused() -> None:
    """Key shares of a connection are its own: every handshake makes fresh ones."""
    shares = set()
    for _ in range(3):
        pair = Pair.make(CLIENT, SERVER)
        pair.client.start()
        hello = decode(bytes(pair.client.data_to_send())[5:])
        assert isinstance(hello, ClientHello)
        offered, modes = (
            hello.extensions.get(ext.KeyShareOffer),
            hello.extensions.get(ext.PskKeyExchangeModes),
        )
        assert offered is not None
        assert modes is not None
        shares.add(offered.entries[0].share)
        assert modes.modes == (PskKeyExchangeMode.PSK_DHE_KE,)
    assert len(shares) == 3
