"""QKD keys in the handshake: who draws, who looks up and how often, and what the policy says."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest
import trio
import trio.testing

from hybridkex import (
    SECP256R1MLKEM768,
    X25519MLKEM768,
    AuthenticatedBy,
    Authentication,
    ClientConfig,
    ClientConnection,
    DevCa,
    ExternalPsk,
    MemoryTicketStore,
    Policy,
    QkdLimits,
    QkdPeer,
    QkdPskSource,
    Requirement,
    Secret,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.auth import Pins, spki_sha256
from hybridkex.errors import (
    AlertReceived,
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeyNotYetAvailable,
    KeySourceError,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
    PolicyRefused,
    UnknownPskIdentity,
)
from hybridkex.qkd.composite import CombinedSource, FailoverSource
from hybridkex.qkd.in_process import InProcessSource, in_process_pair
from hybridkex.qkd.psk import as_psk, identity_of
from hybridkex.qkd.source import KeyReference, KeySource, QkdKey, SourceStatus

PREFER = Policy(psk=Requirement.PREFER)
Outcome = BaseException | None


@dataclass
class Watched:
    """A source that counts, and fails in the way it is told to."""

    inner: KeySource
    draw_error: KeySourceError | None = None
    get_errors: list[KeySourceError] | None = None
    delay: float = 0
    wrong_key: bool = False
    draws: int = 0
    gets: int = 0

    @property
    def local_sae(self) -> str:
        return self.inner.local_sae

    @property
    def peer_sae(self) -> str:
        return self.inner.peer_sae

    async def get_key(self) -> QkdKey:
        self.draws += 1
        await trio.sleep(self.delay)
        if self.draw_error is not None:
            raise self.draw_error
        return self._perhaps_wrong(await self.inner.get_key())

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        self.gets += 1
        await trio.sleep(self.delay)
        if self.get_errors:
            raise self.get_errors.pop(0)
        return self._perhaps_wrong(await self.inner.get_key_with_id(name))

    def _perhaps_wrong(self, key: QkdKey) -> QkdKey:
        return replace(key, key=Secret(bytes(32))) if self.wrong_key else key

    def knows(self, name: KeyReference) -> bool:
        return self.inner.knows(name)

    async def status(self) -> SourceStatus:
        return await self.inner.status()


@dataclass
class Sites:
    """Alice connects to Bob; each has a key source of the pair."""

    alice: Watched
    bob: Watched
    client: ClientConfig
    server: ServerConfig

    @property
    def names(self) -> int:
        return len(self.bob_keys._asked)

    @property
    def alice_keys(self) -> QkdPskSource:
        assert isinstance(self.client.psk_source, QkdPskSource)
        return self.client.psk_source

    @property
    def bob_keys(self) -> QkdPskSource:
        assert isinstance(self.server.psk_source, QkdPskSource)
        return self.server.psk_source


@pytest.fixture(scope="module")
def ca() -> DevCa:
    return DevCa.create()


@pytest.fixture
def make_sites(ca: DevCa) -> Callable[..., Sites]:
    def make(
        *,
        certificates: bool = True,
        client: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
        names: tuple[str, ...] = (),
        limits: QkdLimits | None = None,
    ) -> Sites:
        one, other = in_process_pair("alice", "bob")
        alice, bob = Watched(one), Watched(other)
        return Sites(
            alice,
            bob,
            ClientConfig(
                **{
                    "verifier": TrustStore((ca.certificate,)) if certificates else None,
                    "psk_source": QkdPskSource(alice, limits=limits),
                    **(client or {}),
                }
            ),
            ServerConfig(
                **{
                    "identities": (ca.issue("localhost"),) if certificates else (),
                    "psk_source": QkdPskSource(QkdPeer(source=bob, names=names), limits=limits),
                    **(server or {}),
                }
            ),
        )

    return make


async def shake(sites: Sites) -> tuple[Any, Any, Outcome, Outcome]:
    """Both handshakes and a word both ways; the streams, and why each failed."""
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, sites.client, server_hostname="localhost")
    server = SecureStream(other, sites.server)
    failed: dict[str, BaseException] = {}

    async def side(who: str, stream: SecureStream[Any]) -> None:
        try:
            await stream.do_handshake()
            await stream.send_all(who.encode())
            assert await stream.receive_some() == (b"server" if who == "client" else b"client")
        except trio.BrokenResourceError as error:
            failed[who] = error.__cause__ or error
            await trio.aclose_forcefully(stream)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, "client", client)
            nursery.start_soon(side, "server", server)
    return client, server, failed.get("client"), failed.get("server")


async def succeed(sites: Sites) -> tuple[Any, Any]:
    client, server, *failures = await shake(sites)
    assert failures == [None, None]
    return client.session, server.session


@pytest.mark.parametrize("certificates", [True, False])
async def test_the_three_legs(make_sites: Callable[..., Sites], certificates: bool) -> None:
    sites = make_sites(certificates=certificates)
    for session in await succeed(sites):
        assert session.parts == ("ML-KEM-768", "X25519")
        assert len(session.qkd_key_ids) == 1
        assert session.qkd_sources == ("in-process-a > in-process-b",)
        assert session.qkd_fallback is None
        wanted = AuthenticatedBy.BOTH if certificates else AuthenticatedBy.PSK
        assert session.authenticated_by is wanted
        assert session.as_json()["policy"] == {
            "post_quantum": "require",
            "psk": "require",
            "authentication": wanted.value,
            "fresh_keys": "off",
            "fresh_qkd": "off",
            "one_time_pad": "off",
        }
        assert session.qkd_key_ids[0] in str(session)
    assert (sites.alice.draws, sites.bob.gets) == (1, 1)
    assert sites.alice_keys.counters.sessions == sites.bob_keys.counters.sessions == 1


async def test_client_certificates_too(make_sites: Callable[..., Sites], ca: DevCa) -> None:
    sites = make_sites(
        client={"identity": ca.issue("alice.example")},
        server={
            "client_verifier": TrustStore((ca.certificate,)),
            "require_client_certificate": True,
        },
    )
    client, server = await succeed(sites)
    assert client.qkd_key_ids == server.qkd_key_ids
    assert "alice.example" in server.peer_credential.names


async def test_every_connection_has_a_key_of_its_own(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    seen = {(await succeed(sites))[1].qkd_key_ids for _ in range(5)}
    assert len(seen) == 5


async def test_after_a_retry_the_same_key_is_offered(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites(
        client={"groups": (X25519MLKEM768, SECP256R1MLKEM768)},
        server={"groups": (SECP256R1MLKEM768,)},
    )
    client, server = await succeed(sites)
    assert client.group == "SecP256r1MLKEM768"
    assert client.qkd_key_ids == server.qkd_key_ids
    # The first ClientHello, which could not be answered, cost no look-up.
    assert (sites.alice.draws, sites.bob.gets) == (1, 1)


async def test_a_resumption_rests_on_the_first_key(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites(client={"ticket_store": MemoryTicketStore()})
    first, _ = await succeed(sites)
    again, at_server = await succeed(sites)
    assert again.resumed
    assert first.qkd_key_ids == again.qkd_key_ids == at_server.qkd_key_ids
    assert sites.alice.draws == 1


async def test_keys_of_two_links_combined(make_sites: Callable[..., Sites]) -> None:
    links = [in_process_pair("alice", "bob", kmes=kmes) for kmes in (("a1", "b1"), ("a2", "b2"))]
    ours, theirs = (CombinedSource(ends) for ends in zip(*links, strict=True))
    sites = make_sites(
        client={"psk_source": QkdPskSource(ours)}, server={"psk_source": QkdPskSource(theirs)}
    )
    client, server = await succeed(sites)
    assert client.qkd_sources == server.qkd_sources == ("a1 > b1", "a2 > b2")
    assert len(client.qkd_key_ids) == 2


async def test_fail_over_to_another_link(make_sites: Callable[..., Sites]) -> None:
    links = [in_process_pair("alice", "bob", kmes=kmes) for kmes in (("a1", "b1"), ("a2", "b2"))]
    dead = Watched(links[0][0], draw_error=KeySourceUnavailable("no answer"))
    sites = make_sites(
        client={"psk_source": QkdPskSource(FailoverSource([dead, links[1][0]]))},
        server={"psk_source": QkdPskSource(FailoverSource([links[0][1], links[1][1]]))},
    )
    client, _ = await succeed(sites)
    assert client.qkd_sources == ("a2 > b2",)


# --- policy ---------------------------------------------------------------------------------------


async def test_the_source_fails_and_keys_are_required(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    sites.alice.draw_error = KeySourceExhausted("nothing left")
    _, _, client, server = await shake(sites)
    assert type(client) is KeySourceExhausted
    assert isinstance(server, AlertReceived)
    assert server.name == "internal_error"
    assert sites.bob.gets == 0


@pytest.mark.parametrize(
    ("error", "alert"),
    [
        (KeyUnknown("no such key"), "unknown_psk_identity"),
        (KeyConsumed("gone"), "unknown_psk_identity"),
        (KeyExpired("too old"), "unknown_psk_identity"),
        (KeyUnauthorized("not for you"), "internal_error"),
        (KeySourceUnavailable("no answer"), "internal_error"),
    ],
)
async def test_the_look_up_fails_and_keys_are_required(
    make_sites: Callable[..., Sites], error: KeySourceError, alert: str
) -> None:
    sites = make_sites()
    sites.bob.get_errors = [error]
    _, _, client, server = await shake(sites)
    assert server is error
    assert isinstance(client, AlertReceived)
    assert client.name == alert
    assert sites.bob_keys.counters.failed == 1


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_fall_back_is_seen(
    make_sites: Callable[..., Sites], side: str, caplog: pytest.LogCaptureFixture
) -> None:
    sites = make_sites(client={"policy": PREFER}, server={"policy": PREFER})
    if side == "client":
        sites.alice.draw_error = KeySourceUnavailable("the KME is down")
    else:
        sites.bob.get_errors = [KeySourceUnavailable("the KME is down")]
    with caplog.at_level(logging.WARNING, "hybridkex.qkd.keys"):
        sessions = await succeed(sites)
    for session in sessions:
        assert session.qkd_key_ids == ()
        assert session.authenticated_by is AuthenticatedBy.CERTIFICATE
        assert "NO QKD KEY" in str(session)
    reason = sessions[0 if side == "client" else 1].as_json()["qkd_fallback"]
    assert reason == "the KME is down"
    assert sites.alice_keys.counters.fallbacks == sites.bob_keys.counters.fallbacks == 1
    assert sum("without a QKD key" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("strict", ["client", "server"])
async def test_one_side_that_requires_is_enough(
    make_sites: Callable[..., Sites], strict: str
) -> None:
    sites = make_sites(**{"server" if strict == "client" else "client": {"policy": PREFER}})
    if strict == "client":
        sites.bob.get_errors = [KeySourceUnavailable("down")]
    else:
        sites.alice.draw_error = KeySourceUnavailable("down")
    _, _, *failures = await shake(sites)
    assert all(failures)


async def test_nothing_but_the_key_could_authenticate(make_sites: Callable[..., Sites]) -> None:
    """There is nothing to fall back to: preferring is requiring."""
    sites = make_sites(certificates=False, client={"policy": PREFER}, server={"policy": PREFER})
    sites.alice.draw_error = KeySourceUnavailable("down")
    _, _, client, server = await shake(sites)
    assert type(client) is PolicyRefused
    assert server is not None


async def test_off(make_sites: Callable[..., Sites]) -> None:
    off = Policy(psk=Requirement.OFF, authentication=Authentication.CERTIFICATE)
    sites = make_sites(client={"policy": off}, server={"policy": off})
    for session in await succeed(sites):
        assert (session.qkd_key_ids, session.qkd_fallback) == ((), None)
    assert (sites.alice.draws, sites.bob.gets) == (0, 0)


async def test_another_psk_is_no_qkd_key(make_sites: Callable[..., Sites]) -> None:
    """A static PSK beside the source must not satisfy what asks for a QKD key."""
    static = ExternalPsk(identity=b"static", key=Secret(bytes(range(32))))
    sites = make_sites(certificates=False, client={"psks": (static,)}, server={"psks": (static,)})
    sites = replace(sites, client=replace(sites.client, psk_source=None))
    _, _, _, server = await shake(sites)
    assert type(server) is PolicyRefused


@pytest.mark.parametrize(
    ("certificate", "draws", "refused"),
    [
        ("alice.example", True, None),
        ("alice.example", False, PolicyRefused),  # must use its key, though the policy prefers
        ("carol.example", True, PolicyRefused),  # a key that is not hers
        ("carol.example", False, None),
        (None, False, None),
    ],
)
async def test_a_peer_by_its_certificate(
    make_sites: Callable[..., Sites],
    ca: DevCa,
    certificate: str | None,
    draws: bool,
    refused: type[Exception] | None,
) -> None:
    sites = make_sites(
        client={
            "identity": ca.issue(certificate) if certificate else None,
            "policy": PREFER,
        },
        server={"client_verifier": TrustStore((ca.certificate,)), "policy": PREFER},
        names=("alice.example",),
    )
    if not draws:
        sites.alice.draw_error = KeySourceUnavailable("down")
    _, _, _, server = await shake(sites)
    assert type(server) is (refused or type(None))


@pytest.mark.parametrize(
    ("named", "draws", "refused"),
    [
        (None, True, None),
        (None, False, PolicyRefused),  # a name that it wrote itself gets it out of nothing
        ("alice.example", True, PolicyRefused),  # nor does it make a key its own
        ("alice.example", False, None),
    ],
)
async def test_a_peer_by_its_pin(
    make_sites: Callable[..., Sites],
    ca: DevCa,
    named: str | None,
    draws: bool,
    refused: type[Exception] | None,
) -> None:
    """The holder of a pinned key calls himself alice.example: nobody vouches for that."""
    identity = ca.issue("alice.example")
    pin = spki_sha256(identity.leaf)
    sites = make_sites(
        client={"identity": identity, "policy": PREFER},
        server={"client_verifier": Pins(frozenset((pin,))), "policy": PREFER},
        names=(named or f"sha256:{pin}",),
    )
    if not draws:
        sites.alice.draw_error = KeySourceUnavailable("down")
    _, _, _, server = await shake(sites)
    assert type(server) is (refused or type(None))


# --- what a stranger can make a server do ---------------------------------------------------------


def recorded_hello(sites: Sites, key: QkdKey) -> bytes:
    """A ClientHello that offers this key."""
    config = replace(sites.client, psk_source=None, psks=(as_psk(key),))
    connection = ClientConnection(config, "localhost")
    connection.start()
    return bytes(connection.data_to_send())


async def send_alone(sites: Sites, hello: bytes) -> BaseException | None:
    """One connection that says this and no more; why the server gave up."""
    one, other = trio.testing.memory_stream_pair()
    server = SecureStream(other, sites.server, handshake_timeout=60)
    await one.send_all(hello)
    one.send_stream.close()
    with trio.fail_after(90):  # a thousand of them may be under way on a slow machine
        try:
            await server.do_handshake()
        except trio.BrokenResourceError as error:
            return error.__cause__
    return None


async def test_a_thousand_replays_are_one_look_up(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    hello = recorded_hello(sites, await sites.alice.get_key())
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(send_alone, sites, hello)
    assert sites.bob.gets == 1
    assert sites.bob_keys.counters.repeated == 999
    assert (await succeed(sites))[1].qkd_key_ids  # and those who are honest get through


async def test_a_key_of_a_handshake_that_failed_is_gone(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    key = await sites.alice.get_key()
    assert await send_alone(sites, recorded_hello(sites, key)) is not None
    assert type(await send_alone(sites, recorded_hello(sites, key))) is KeyConsumed
    with pytest.raises(KeyConsumed):
        await sites.bob.inner.get_key_with_id(key.name)


async def test_look_ups_are_rate_limited(
    make_sites: Callable[..., Sites], autojump_clock: trio.testing.MockClock
) -> None:
    limits = QkdLimits(look_ups_per_second=2, burst=3)
    sites = make_sites(limits=limits)
    for _ in range(10):
        await send_alone(sites, recorded_hello(sites, await sites.alice.get_key()))
    assert (sites.bob.gets, sites.bob_keys.counters.limited) == (3, 7)
    await trio.sleep(1)
    for _ in range(5):
        await send_alone(sites, recorded_hello(sites, await sites.alice.get_key()))
    assert sites.bob.gets == 5


async def test_what_is_remembered_is_bounded(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites(limits=QkdLimits(remembered=4))
    for _ in range(10):
        await send_alone(sites, recorded_hello(sites, await sites.alice.get_key()))
    assert sites.names == 4


async def test_only_names_of_ours_are_looked_up(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    key = await sites.alice.inner.get_key()
    (part,) = key.name
    others = [
        replace(key, master_sae="carol"),
        replace(key, slave_sae="carol"),
        replace(key, master_sae="bob", slave_sae="alice"),  # reflected
        replace(key, name=(replace(part, master_kme="in-process-b"),)),
        replace(key, name=(replace(part, slave_kme="in-process-a"),)),
        replace(key, name=(part, part)),
    ]
    for other in others:
        assert type(await send_alone(sites, recorded_hello(sites, other))) is KeyUnknown
    plain = ExternalPsk(identity=identity_of(key.name), key=key.key)  # not imported
    config = replace(sites.client, psk_source=None, psks=(plain,))
    connection = ClientConnection(config, "localhost")
    connection.start()
    hello = bytes(connection.data_to_send())
    assert isinstance(await send_alone(sites, hello), KeyUnknown | UnknownPskIdentity)
    assert sites.bob.gets == 0


async def test_a_hello_reflected_to_its_sender(make_sites: Callable[..., Sites]) -> None:
    """Selfie (RFC 9257 section 4.1): Alice serves, too, and gets her own ClientHello back."""
    sites = make_sites(certificates=False)
    hello = recorded_hello(sites, await sites.alice.inner.get_key())
    at_alice = replace(sites, server=replace(sites.server, psk_source=QkdPskSource(sites.alice)))
    assert type(await send_alone(at_alice, hello)) is KeyUnknown
    assert sites.alice.gets == 0


async def test_an_unknown_id_fails_closed(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    key = await sites.alice.get_key()
    stranger = replace(key, name=(replace(key.name[0], key_id=str(uuid4())),))
    assert type(await send_alone(sites, recorded_hello(sites, stranger))) is KeyUnknown
    assert sites.bob.gets == 1


# --- sources that are late, slow or wrong ---------------------------------------------------------


async def test_not_yet_is_asked_again(
    make_sites: Callable[..., Sites], autojump_clock: trio.testing.MockClock
) -> None:
    sites = make_sites()
    sites.bob.get_errors = [KeyNotYetAvailable("soon"), KeyNotYetAvailable("soon")]
    await succeed(sites)
    assert sites.bob.gets == 3


async def test_not_yet_has_an_end(
    make_sites: Callable[..., Sites], autojump_clock: trio.testing.MockClock
) -> None:
    sites = make_sites()
    sites.bob.get_errors = [KeyNotYetAvailable("soon")] * 100
    _, _, _, server = await shake(sites)
    assert type(server) is KeyNotYetAvailable
    assert sites.bob.gets == 5


@pytest.mark.parametrize("side", ["alice", "bob"])
async def test_a_slow_source(
    make_sites: Callable[..., Sites], side: str, autojump_clock: trio.testing.MockClock
) -> None:
    sites = make_sites(limits=QkdLimits(timeout=2))
    getattr(sites, side).delay = 60
    began = trio.current_time()
    _, _, client, server = await shake(sites)
    assert trio.current_time() - began < 4
    assert type(client if side == "alice" else server) is KeySourceUnavailable


@pytest.mark.parametrize("policy", [Policy(), PREFER])
async def test_a_wrong_key(
    make_sites: Callable[..., Sites], policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    """The KMEs disagree: no fall-back, since it cannot be told from an attack."""
    caplog.set_level(logging.DEBUG)
    sites = make_sites(client={"policy": policy}, server={"policy": policy})
    sites.bob.wrong_key = True
    _, _, client, server = await shake(sites)
    assert server is not None
    assert str(client).startswith("the peer sent decrypt_error")
    assert bytes(32).hex() not in caplog.text


async def test_a_short_key(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()

    async def draw() -> QkdKey:
        return replace(await InProcessSource.get_key(sites.alice.inner), key=Secret(b"too little"))  # type: ignore[arg-type]

    sites.alice.get_key = draw  # type: ignore[method-assign]
    _, _, client, _ = await shake(sites)
    assert type(client) is KeySourceUnavailable
    assert "too little" not in str(client)


async def test_cancelled_while_the_source_is_asked(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites()
    sites.alice.delay = 60
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, sites.client, server_hostname="localhost")
    with trio.move_on_after(0.01):
        await client.do_handshake()
    with pytest.raises(trio.BrokenResourceError, match="cancelled"):
        await client.do_handshake()
    await client.aclose()
    with contextlib.closing(other.send_stream), pytest.raises(trio.BrokenResourceError):
        await SecureStream(other, sites.server).do_handshake()


# --- configuration --------------------------------------------------------------------------------


async def test_configurations_that_cannot_be() -> None:
    alice, bob = in_process_pair("alice", "bob")
    with pytest.raises(ConfigError, match="at least one"):
        QkdPskSource()
    with pytest.raises(ConfigError, match="FailoverSource"):
        QkdPskSource(alice, alice)
    with pytest.raises(ConfigError, match="one QKD peer"):
        await QkdPskSource(alice, bob).offer()
    for wrong in ({"timeout": 0}, {"retries": -1}, {"burst": 0}, {"look_ups_per_second": 0}):
        with pytest.raises(ConfigError):
            QkdLimits(**wrong)


async def test_the_counters(make_sites: Callable[..., Sites]) -> None:
    sites = make_sites(client={"policy": PREFER}, server={"policy": PREFER})
    await succeed(sites)
    sites.alice.draw_error = KeySourceUnavailable("down")
    await succeed(sites)

    alice, bob = sites.alice_keys.counters, sites.bob_keys.counters
    assert (alice.drawn, alice.failed) == (1, 1)
    assert (bob.looked_up, bob.failed) == (1, 0)
    for one in (alice, bob):
        assert (one.sessions, one.fallbacks) == (1, 1)
