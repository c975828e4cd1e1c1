"""The engine asks before it completes a handshake, and does no input and output of its own."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex import (
    X25519,
    ClientConfig,
    ExternalPsk,
    Identity,
    KnownPeers,
    MemoryTicketStore,
    RawIdentity,
    Secret,
    ServerConfig,
    TrustStore,
)
from hybridkex.constants import Alert
from hybridkex.errors import AlertReceived, CertificateRejected, LocalStateError, PolicyRefused
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.tls.events import (
    ApplicationData,
    HandshakeCompleted,
    SessionProposed,
)

PSK = ExternalPsk(identity=b"site", key=Secret(bytes(range(32))), origin=("from", 7))
ROLES = ("client", "server")


@pytest.fixture
def configs(trust: TrustStore, identity: Identity) -> tuple[ClientConfig, ServerConfig]:
    small: dict[str, Any] = {"groups": (X25519,), "policy": ANY_GROUP}
    return (
        ClientConfig(verifier=trust, ticket_store=MemoryTicketStore(), **small),
        ServerConfig(identities=(identity,), **small),
    )


def until_proposed(pair: Pair, who: str) -> tuple[Connection, Connection, SessionProposed]:
    """Drive a handshake until this side is asked; the other side accepts at once."""
    ours, other = (pair.client, pair.server) if who == "client" else (pair.server, pair.client)
    pair.client.start()
    for _ in range(4):
        for source, target in ((pair.client, pair.server), (pair.server, pair.client)):
            if not source.has_data_to_send:
                continue
            target.receive_data(source.data_to_send())
            while (event := target.next_event()) is not None:
                if isinstance(event, SessionProposed):
                    if target is ours:
                        return ours, other, event
                    target.accept()
    raise AssertionError("no session was proposed")


@pytest.mark.parametrize("who", ROLES)
def test_nothing_leaves_before_the_decision(
    configs: tuple[ClientConfig, ServerConfig], who: str
) -> None:
    ours, _, event = until_proposed(Pair.make(*configs), who)
    ours.data_to_send()
    assert not ours.handshake_complete
    assert ours.next_event() is None
    for call in (
        lambda: ours.send_data(b"too early"),
        lambda: ours.session,
        lambda: ours.export(b"label", b"", 32),
        ours.update_keys,
    ):
        with pytest.raises(LocalStateError):
            call()
    assert not ours.has_data_to_send
    ours.accept()
    assert ours.session is event.session
    # The client's Finished comes with the acceptance, and not before.
    assert ours.has_data_to_send is (who == "client")
    with pytest.raises(LocalStateError):
        ours.accept()


def test_nothing_is_read_before_the_decision(
    configs: tuple[ClientConfig, ServerConfig],
) -> None:
    """What the peer sends right behind its Finished waits."""
    ours, other, _ = until_proposed(Pair.make(*configs), "server")
    other.send_data(b"early")
    ours.receive_data(other.data_to_send())
    assert ours.next_event() is None
    ours.accept()
    assert isinstance(ours.next_event(), HandshakeCompleted)
    event = ours.next_event()
    assert isinstance(event, ApplicationData)
    assert event.data == b"early"


@pytest.mark.parametrize("who", ROLES)
def test_a_refused_session_is_an_alert(
    configs: tuple[ClientConfig, ServerConfig], who: str
) -> None:
    ours, other, _ = until_proposed(Pair.make(*configs), who)
    ours.abort(PolicyRefused("not this peer"))
    with pytest.raises(LocalStateError, match="not this peer"):
        ours.accept()
    other.receive_data(ours.data_to_send())
    with pytest.raises(AlertReceived) as caught:
        other.next_event()
    assert caught.value.alert == Alert.INSUFFICIENT_SECURITY
    assert other.handshake_complete is (who == "server")  # A client has finished by then.


@pytest.mark.parametrize("who", ROLES)
def test_the_accepted_session_is_the_session(
    configs: tuple[ClientConfig, ServerConfig], who: str
) -> None:
    ours, _, event = until_proposed(Pair.make(*configs), who)
    known_better = replace(event.session, qkd_fallback="the KME is down")
    ours.accept(known_better)
    assert ours.session is known_better
    completed = ours.next_event()
    assert isinstance(completed, HandshakeCompleted)
    assert completed.session is known_better


def test_the_origin_of_a_psk_comes_back() -> None:
    config: dict[str, Any] = {"psks": (PSK,), "groups": (X25519,), "policy": ANY_GROUP}
    client = ClientConfig(ticket_store=MemoryTicketStore(), **config)
    server = ServerConfig(**config)
    pair = Pair.make(client, server, None).connect()
    assert pair.client.session.psk_origin == pair.server.session.psk_origin == ("from", 7)
    assert "from" not in repr(pair.client.session) + repr(PSK)
    pair.exchange(b"a", b"b")
    again = Pair.make(client, server, None).connect()
    assert again.client.session.resumed
    assert again.client.session.psk_origin is None


def test_a_first_use_is_not_remembered_by_the_engine(tmp_path: Path) -> None:
    known, raw = tmp_path / "known", RawIdentity.generate()
    pair = Pair.make(
        ClientConfig(verifier=KnownPeers(known), groups=(X25519,), policy=ANY_GROUP),
        ServerConfig(identities=(raw,), groups=(X25519,), policy=ANY_GROUP),
    )
    ours, _, event = until_proposed(pair, "client")
    assert event.peer is not None
    assert event.peer.remember is not None
    ours.abort(PolicyRefused("not this peer"))
    assert not known.exists()


# --- no input, no output --------------------------------------------------------------------------

_watched: list[str] | None = None
_IO = ("open", "os.", "socket.", "subprocess.", "fcntl.", "pathlib.", "shutil.", "tempfile.")


def _hook(event: str, _arguments: object) -> None:
    # An audit hook stays for the life of the process: it looks only while it is told to.
    if _watched is not None and event.startswith(_IO):
        _watched.append(event)


sys.addaudithook(_hook)


@contextmanager
def audited() -> Iterator[list[str]]:
    """What the interpreter asks of the system meanwhile."""
    global _watched  # noqa: PLW0603
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def test_the_engine_does_no_io(
    configs: tuple[ClientConfig, ServerConfig],
    client_identity: Identity,
    trust: TrustStore,
    tmp_path: Path,
) -> None:
    client, server = configs
    asking = {"client_verifier": trust, "require_client_certificate": True}
    raw = RawIdentity.generate()
    known = KnownPeers(tmp_path / "known")
    known.add("localhost", raw.chain[0])
    scenarios = [
        (client, server),
        (replace(client, verifier=known), replace(server, identities=(raw,))),
        (replace(client, identity=client_identity), replace(server, **asking)),
        (replace(client, psks=(PSK,)), replace(server, psks=(PSK,))),
    ]
    for one, other in scenarios:
        Pair.make(one, other).connect().exchange(b"a", b"b")  # what is imported once, is
        with audited() as seen:
            pair = Pair(ClientConnection(one, "localhost"), ServerConnection(other)).connect()
            pair.exchange(b"a", b"b")
            pair.client.update_keys(request_peer=True)
            pair.exchange(b"a", b"b")
        assert pair.client.session.resumed
        assert seen == []
    with audited() as seen:
        Path(__file__).read_bytes()
    assert "open" in seen, "the test sees nothing"


def test_time_and_randomness_are_injected(configs: tuple[ClientConfig, ServerConfig]) -> None:
    def zeros(length: int) -> bytes:
        return b"\0" * length

    def at(now: float) -> Pair:
        return Pair.make(*(replace(one, clock=lambda: now, entropy=zeros) for one in configs))

    now = time.time()
    session = at(now).connect().client.session
    assert session.began_at == now
    pair = at(now)
    pair.client.start()
    assert bytes(pair.client.data_to_send())[11:43] == bytes(32)
    with pytest.raises(CertificateRejected, match="expired"):
        at(now + 100 * 365 * 86_400).connect()
