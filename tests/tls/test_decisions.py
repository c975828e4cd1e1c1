"""Every combination of policy, authentication, credential, ticket and fallback, in both roles.

What two engines come to is compared with an oracle of ten lines, which knows nothing of messages.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import pytest
from tls_glue import ELSEWHERE, Pair

from hybridkex import (
    X25519,
    AuthenticatedBy,
    Authentication,
    ClientConfig,
    DevCa,
    ExternalPsk,
    Identity,
    MemoryTicketStore,
    Policy,
    Requirement,
    Secret,
    ServerConfig,
    TicketIssuer,
    TrustStore,
)
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.tls.events import PskWanted, TicketReceived
from hybridkex.tls.session import SessionTicket

PSK: Final = ExternalPsk(identity=b"site", key=Secret(bytes(range(32))))
OTHER: Final = replace(PSK, identity=b"another site")
NOW: Final = float(int(time.time()))
CERTIFICATE, BOTH = AuthenticatedBy.CERTIFICATE, AuthenticatedBy.BOTH
By = AuthenticatedBy | None


@dataclass
class Clock:
    """Seconds since the epoch, as a test says."""

    now: float

    def __call__(self) -> float:
        return self.now


@cache
def authority() -> tuple[TrustStore, Identity, Identity, Identity]:
    """A trust store, a server, and two clients."""
    ca = DevCa.create(algorithm="ed25519")
    names = ("localhost", "alice", "bob")
    server, alice, bob = (ca.issue(name, algorithm="ed25519") for name in names)
    return TrustStore((ca.certificate,)), server, alice, bob


@dataclass(frozen=True)
class Side:
    """What one side is configured with."""

    certificate: bool
    """A client: a verifier. A server: an identity."""
    psk: str
    """``none``, ``static``, ``other``, ``source``, or ``dry``: a source without a key."""
    requirement: Requirement | None
    authentication: Authentication | None
    client: str = ""
    """The client's certificate. At the client ``none`` or ``alice``, at the server ``none``,
    ``asked`` or ``required``."""

    def arguments(self) -> dict[str, Any]:
        policy = Policy(
            post_quantum=Requirement.PREFER,
            psk=self.requirement,
            authentication=self.authentication,
        )
        static = {"static": (PSK,), "other": (OTHER,)}.get(self.psk, ())
        source = ELSEWHERE if self.psk in ("source", "dry") else None
        return {
            "groups": (X25519,),
            "policy": policy,
            "psks": static,
            "psk_source": source,
            "clock": lambda: NOW,
        }


@cache
def client_of(side: Side) -> ClientConfig | None:
    trust, _, alice, _ = authority()
    try:
        return ClientConfig(
            verifier=trust if side.certificate else None,
            identity=alice if side.client == "alice" else None,
            **side.arguments(),
        )
    except ConfigError:
        return None


@cache
def server_of(side: Side) -> ServerConfig | None:
    trust, server, _, _ = authority()
    try:
        return ServerConfig(
            identities=(server,) if side.certificate else (),
            client_verifier=None if side.client == "none" else trust,
            require_client_certificate=side.client == "required",
            **side.arguments(),
        )
    except ConfigError:
        return None


def sides(psks: tuple[str, ...], client: tuple[str, ...]) -> Iterator[Side]:
    requirements = (None, *Requirement)
    for parts in itertools.product(
        (True, False), psks, requirements, (None, *Authentication), client
    ):
        yield Side(*parts)


CLIENTS: Final = [
    side
    for side in sides(("none", "static", "source", "dry"), ("none", "alice"))
    # Otherwise the system's authorities would be taken.
    if (side.certificate or (side.psk != "none" and side.requirement is not Requirement.OFF))
    and client_of(side)
]
SERVERS: Final = [
    side
    for side in sides(("none", "static", "other", "source", "dry"), ("none", "asked", "required"))
    if server_of(side)
]


def enough(policy: Policy, by: AuthenticatedBy) -> bool:
    """What the words of a policy say."""
    psk = by in (BOTH, AuthenticatedBy.PSK)
    certificate = by in (BOTH, CERTIFICATE)
    if policy.psk is Requirement.REQUIRE and not psk:
        return False
    return {
        Authentication.PSK: psk and not certificate,
        Authentication.CERTIFICATE: certificate,
        Authentication.BOTH: certificate and (psk or policy.psk is Requirement.PREFER),
        Authentication.EITHER: True,
    }[policy.authentication]  # type: ignore[index]


def oracle(client: Side, server: Side, *, offers_psk: bool = True) -> By:
    """How the server is authenticated, or ``None`` where there must be no connection."""
    ours, theirs = client_of(client).policy_in_force, server_of(server).policy_in_force  # type: ignore[union-attr]
    alone = (Authentication.PSK, Authentication.EITHER)
    offered = offers_psk and client.psk in ("static", "source") and ours.psk is not Requirement.OFF
    known = server.psk in ("static", "source") and theirs.psk is not Requirement.OFF
    together = offered and ours.authentication not in alone  # RFC 9973
    psk = (
        offered and known and (theirs.authentication in alone or (together and server.certificate))
    )
    certificate = server.certificate and client.certificate and (together or not psk)
    certificate &= theirs.authentication is not Authentication.PSK
    by = {(1, 1): BOTH, (1, 0): CERTIFICATE, (0, 1): AuthenticatedBy.PSK}.get((certificate, psk))
    if by is None or not enough(ours, by) or not enough(theirs, by):
        return None
    asked = server.client == "required"
    return by if not asked or (certificate and client.client == "alice") else None


def run(
    client: ClientConfig, server: ServerConfig, client_psk: str, server_psk: str
) -> tuple[Pair, By]:
    """Two engines, and what they came to."""

    def look_up(identities: tuple[bytes, ...]) -> ExternalPsk | None:
        return PSK if server_psk == "source" and PSK.identity in identities else None

    pair = Pair.make(client, server, lookup=look_up)
    try:
        pair.client.start()
        event = pair.client.next_event()
        if isinstance(event, PskWanted):
            pair.client.provide_psk(PSK if client_psk == "source" else None)
    except HybridkexError:
        return pair, None
    pair.fight()
    if not pair.both_complete or pair.errors:
        return pair, None
    ours, theirs = pair.client.session, pair.server.session
    assert ours.authenticated_by is theirs.authenticated_by
    assert ours.psk_identity == theirs.psk_identity
    assert ours.resumed is theirs.resumed
    assert (ours.psk_identity is not None) is (ours.authenticated_by not in (CERTIFICATE,))
    return pair, ours.authenticated_by


def check(client: Side, server: Side) -> None:
    """A full handshake, then what each change in between makes of a resumption."""
    ours, theirs = client_of(client), server_of(server)
    assert ours is not None
    assert theirs is not None
    now = [NOW]
    ours = replace(ours, ticket_store=MemoryTicketStore(clock=lambda: now[0]), clock=lambda: now[0])
    theirs = replace(theirs, tickets=TicketIssuer(clock=lambda: now[0]), clock=lambda: now[0])
    pair, by = run(ours, theirs, client.psk, server.psk)
    assert by is oracle(client, server), (client, server)
    if by is None:
        return
    shown = pair.server.session.peer_subject
    assert shown == ("CN=alice" if _is_shown(client, server, by) else None)

    def tickets() -> None:
        pair.server.send_data(b"tickets")
        pair.pump()

    tickets()
    again, same = run(ours, theirs, client.psk, server.psk)
    assert same is by
    assert again.client.session.resumed
    assert again.client.session.began_at == NOW
    assert again.server.session.peer_subject == shown

    # Somebody else's identity: the ticket stays where it is.
    if ours.identity is not None:
        bob = replace(ours, identity=authority()[3])
        other, full = run(bob, theirs, client.psk, server.psk)
        assert full is by
        assert not other.client.session.resumed
        assert other.server.session.peer_subject in (None, "CN=bob")

    # Another policy of the server: the ticket is declined. A client that may not offer a PSK beside
    # a ticket (RFC 9973 section 4) has no PSK then.
    policy = replace(theirs.policy, post_quantum=Requirement.OFF)
    alone = ours.authentication in (Authentication.PSK, Authentication.EITHER)
    declined, full = run(ours, replace(theirs, policy=policy), client.psk, server.psk)
    if client.psk != "source":  # a client with a ticket does not ask a source
        assert full is oracle(client, server, offers_psk=alone)
    assert full is None or not declined.client.session.resumed

    # The first handshake is too long ago.
    tickets()
    now[0] += theirs.policy.session_lifetime
    late, full = run(ours, theirs, client.psk, server.psk)
    assert full is by
    assert not late.client.session.resumed
    assert late.client.session.began_at == now[0]


def _is_shown(client: Side, server: Side, by: AuthenticatedBy) -> bool:
    asked = server.client in ("asked", "required")
    return asked and client.client == "alice" and by is not AuthenticatedBy.PSK


def test_the_table_is_large() -> None:
    assert len(CLIENTS) > 60
    assert len(SERVERS) > 100
    outcomes = {oracle(client, server) for client in CLIENTS for server in SERVERS}
    assert outcomes == {None, CERTIFICATE, BOTH, AuthenticatedBy.PSK}


def test_a_sample_of_the_table() -> None:
    everything = list(itertools.product(CLIENTS, SERVERS))
    chosen = random.Random(9973)
    failing = [pair for pair in everything if oracle(*pair) is None]
    passing = [pair for pair in everything if oracle(*pair) is not None]
    for client, server in (*chosen.sample(failing, 100), *chosen.sample(passing, 60)):
        check(client, server)


def distinct(sides: list[Side], config_of: Callable[[Side], Any]) -> list[Side]:
    """One of those whose policies come to the same: a default that is written out adds nothing."""
    return list(
        {
            (one.certificate, one.psk, one.client, config_of(one).policy_in_force): one
            for one in reversed(sides)
        }.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_the_whole_table(part: int, thorough: bool) -> None:
    """Without ``--thorough`` an eighth of it, drawn at random."""
    clients, servers = distinct(CLIENTS, client_of), distinct(SERVERS, server_of)
    assert len(clients) > 30
    assert len(servers) > 60
    table = list(itertools.product(clients, servers))
    random.Random(9973).shuffle(table)
    for client, server in table[part :: 8 if thorough else 64]:
        check(client, server)


# --- what a session may claim, and for how long ---------------------------------------------------

WEEK: Final = 7 * 24 * 3600


class Credulous(MemoryTicketStore):
    """A client that thinks every ticket fresh."""

    def take(self, server: str, binding: bytes | None = None) -> SessionTicket | None:
        ticket = super().take(server, binding)
        return replace(ticket, began_at=self.clock(), lifetime=WEEK) if ticket else None

    def put(self, server: str, ticket: SessionTicket) -> None:
        super().put(server, replace(ticket, lifetime=WEEK))


@pytest.mark.parametrize("lax", ["nobody", "client", "server"])
def test_ninety_connections_in_thirty_days(lax: str) -> None:
    """No session claims the first handshake's proofs for longer than either side's policy says."""
    trust, identity, _, _ = authority()
    clock = Clock(NOW)
    small: dict[str, Any] = {"groups": (X25519,), "psks": (PSK,), "clock": clock}
    policy = Policy(post_quantum=Requirement.PREFER)
    long = replace(policy, session_lifetime=60 * 24 * 3600)
    store = Credulous if lax == "client" else MemoryTicketStore
    client = ClientConfig(
        verifier=trust,
        ticket_store=store(clock=clock),
        policy=long if lax == "client" else policy,
        **small,
    )
    server = ServerConfig(
        identities=(identity,),
        tickets=TicketIssuer(lifetime=WEEK, clock=clock),
        policy=long if lax == "server" else policy,
        **small,
    )
    resumed = 0
    for _ in range(90):
        pair, by = run(client, server, "static", "static")
        if by is None:  # The ticket was declined, and RFC 9973 allows no PSK beside it.
            assert lax == "client"
            # Its siblings are gone with it.
            pair, by = run(client, server, "static", "static")
        assert by is BOTH
        resumed += pair.server.session.resumed
        for session in (pair.client.session, pair.server.session):
            assert clock() - session.began_at < policy.session_lifetime
        pair.server.send_data(b"tickets")
        pair.pump()
        clock.now += 8 * 3600
    assert resumed == 45  # every second one


def test_a_lifetime_of_zero_is_no_resumption() -> None:
    trust, identity, _, _ = authority()
    off = Policy(post_quantum=Requirement.PREFER, session_lifetime=0)
    for ours, theirs in ((off, replace(off, session_lifetime=60)), (off, off)):
        client = ClientConfig(
            verifier=trust, groups=(X25519,), policy=ours, ticket_store=MemoryTicketStore()
        )
        server = ServerConfig(identities=(identity,), groups=(X25519,), policy=theirs)
        for _ in range(2):
            pair, _ = run(client, server, "none", "none")
            assert not pair.client.session.resumed
            pair.server.send_data(b"no ticket")
            pair.pump()
            assert not any(isinstance(one, TicketReceived) for one in pair.client_events)


def test_two_servers_share_an_issuer() -> None:
    """One requires a PSK, and does not take over the sessions of the one that prefers it."""
    trust, identity, _, _ = authority()
    issuer = TicketIssuer()
    strict, lax = (
        ServerConfig(
            identities=(identity,),
            psks=(PSK,),
            groups=(X25519,),
            tickets=issuer,
            policy=Policy(
                post_quantum=Requirement.PREFER,
                psk=psk,
                authentication=Authentication.CERTIFICATE,
            ),
        )
        for psk in (Requirement.REQUIRE, Requirement.PREFER)
    )
    client = ClientConfig(
        verifier=trust,
        groups=(X25519,),
        policy=Policy(post_quantum=Requirement.PREFER),
        ticket_store=MemoryTicketStore(),
    )
    pair, by = run(client, lax, "none", "none")
    assert by is CERTIFICATE
    pair.server.send_data(b"tickets")
    pair.pump()
    assert run(client, lax, "none", "none")[0].client.session.resumed
    assert run(client, strict, "none", "none")[1] is None


def test_a_psk_that_is_withdrawn_is_not_resumed() -> None:
    """Nor is one whose key was changed under its name."""
    config: dict[str, Any] = {
        "groups": (X25519,),
        "policy": Policy(post_quantum=Requirement.PREFER),
    }
    issuer = TicketIssuer()
    client = ClientConfig(psks=(PSK,), ticket_store=MemoryTicketStore(), **config)
    server = ServerConfig(psks=(PSK,), tickets=issuer, **config)
    pair, _ = run(client, server, "static", "static")
    pair.server.send_data(b"tickets")
    pair.pump()
    changed = replace(PSK, key=Secret(b"x" * 32))
    for psks in ((OTHER,), (changed,)):
        assert run(client, replace(server, psks=psks), "static", "static")[1] is None
