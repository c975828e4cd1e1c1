"""The tables of the handshake's steps say what the engine does: no more and no less."""

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
from tls_glue import ANY_GROUP, ELSEWHERE, Pair

from hybridkex.auth import DevCa, TrustStore
from hybridkex.constants import HandshakeType
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import InternalError
from hybridkex.secret import Secret
from hybridkex.tls import client, connection, server
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.tls.steps import Step
from hybridkex.tls.transcript import Transcript

FRESH = Policy(post_quantum=Requirement.PREFER, fresh_keys=Requirement.REQUIRE)
PSK = ExternalPsk(identity=b"site", key=Secret(bytes(range(32))), context=b"")


def handshakes() -> list[tuple[ClientConfig, ServerConfig]]:
    """Configurations that take every way through the handshake; a pair twice for resumption."""
    ca = DevCa.create()
    trust, identity = TrustStore((ca.certificate,)), ca.issue("localhost")
    prefer = Policy(post_quantum=Requirement.PREFER, psk=Requirement.PREFER)
    either = Policy(
        post_quantum=Requirement.PREFER,
        psk=Requirement.PREFER,
        authentication=Authentication.EITHER,
    )

    def ours(**more: Any) -> ClientConfig:
        return ClientConfig(**{"groups": (X25519,), "policy": ANY_GROUP, **more})

    def theirs(**more: Any) -> ServerConfig:
        return ServerConfig(**{"groups": (X25519,), "policy": ANY_GROUP, **more})

    plain = theirs(identities=(identity,))
    asking = theirs(identities=(identity,), client_verifier=trust)
    resuming = ours(verifier=trust, ticket_store=MemoryTicketStore())
    retry = {"groups": (SECP256R1, X25519)}
    outside = theirs(identities=(identity,), client_verifier=trust, psk_source=ELSEWHERE,
                     policy=either)  # fmt: skip
    return [
        (ours(verifier=trust), plain),
        (resuming, plain),
        (resuming, plain),
        (ours(verifier=trust, **retry), plain),
        (ours(verifier=trust, identity=ca.issue("bob"), **retry), asking),
        (ours(verifier=trust), asking),
        (ours(verifier=trust, policy=FRESH), theirs(identities=(identity,), policy=FRESH)),
        (ours(psks=(PSK,)), theirs(psks=(PSK,))),
        (ours(psks=(PSK,), **retry), theirs(psks=(PSK,))),
        (ours(verifier=trust, psk_source=ELSEWHERE, policy=prefer), plain),
        (ours(psk_source=ELSEWHERE), outside),
        (ours(psk_source=ELSEWHERE, **retry), outside),
        (ours(verifier=trust, psk_source=ELSEWHERE, policy=prefer), outside),
        (ours(verifier=trust, psk_source=ELSEWHERE, policy=prefer, **retry), outside),
    ]


def complete(pair: Pair) -> None:
    """Run a handshake, with the PSK if the client asks for one."""
    pair.client.start()
    if isinstance(pair.client._state, client.WaitPsk):
        while pair.client.next_event() is not None:
            pass
        pair.client.provide_psk(PSK)
    pair.pump()
    assert pair.both_complete


class Observed:
    """What the engines did, by state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first: set[type] = set()
        self.received: defaultdict[type, set[int]] = defaultdict(set)
        self.sent: defaultdict[type, set[int]] = defaultdict(set)
        self.then: defaultdict[type, set[type]] = defaultdict(set)
        enter, message = Connection._enter, Connection._message

        def entering(engine: Connection, state: Any) -> None:
            if engine._state is None:
                self.first.add(type(state))
            else:
                self.then[type(engine._state)].add(type(state))
            enter(engine, state)

        def receiving(engine: Connection, raw: bytes) -> None:
            self.received[type(engine._state)].add(raw[0])
            message(engine, raw)

        monkeypatch.setattr(Connection, "_enter", entering)
        monkeypatch.setattr(Connection, "_message", receiving)

    def watch(self, engine: Connection) -> None:
        writer = engine._records.writer
        send_raw = writer.send_raw

        def sending(raw: bytes) -> None:
            if engine._state is not None:
                self.sent[type(engine._state)].add(raw[0])
            send_raw(raw)

        writer.send_raw = sending  # type: ignore[method-assign]


def test_the_tables_are_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    observed = Observed(monkeypatch)
    for ours, theirs in handshakes():
        pair = Pair.make(ours, theirs, lookup=lambda _: PSK)
        observed.watch(pair.client)
        observed.watch(pair.server)
        complete(pair)
        pair.client.send_data(b"x")
        pair.server.send_data(b"y")  # with the tickets
        pair.pump()
        pair.client.update_keys()
        pair.server.update_keys()
        pair.pump()
    for role in (client, server):
        assert observed.first & set(role.START) == set(role.START)
        for state, step in role.STEPS.items():
            assert observed.received[state] == set(step.receives), state
            assert observed.then[state] == set(step.then), state
            if not issubclass(state, connection._TRAFFIC):
                assert observed.sent[state] == set(step.sends), state


def frozen(value: Any, seen: dict[int, object]) -> object:
    """What a state holds, as values that no later change of an object reaches."""
    if isinstance(value, Transcript):
        return value._hash.copy().digest()
    if dataclasses.is_dataclass(value) and id(value) not in seen:
        seen[id(value)] = value
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, frozen(getattr(value, name), seen)) for name in names]
    if isinstance(value, bytes | str | int | None):
        return value
    return id(value)


def test_later_states_change_nothing_in_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of the handshake is a value, and shares no mutable transcript with the next one."""
    entered: list[tuple[Any, object]] = []
    enter = Connection._enter

    def entering(engine: Connection, state: Any) -> None:
        if not isinstance(state, connection._TRAFFIC):
            entered.append((state, frozen(state, {})))
        enter(engine, state)

    monkeypatch.setattr(Connection, "_enter", entering)
    for ours, theirs in handshakes():
        pair = Pair.make(ours, theirs, lookup=lambda _: PSK)
        complete(pair)
    handshaking = {
        state
        for role in (client, server)
        for state in role.STEPS
        if not issubclass(state, connection._TRAFFIC)
    }
    assert {type(state) for state, _ in entered} == handshaking
    for state, before in entered:
        assert frozen(state, {}) == before, type(state)


@pytest.mark.parametrize("role", [client, server], ids=["client", "server"])
def test_every_state_is_in_the_table_and_can_be_reached(role: Any) -> None:
    states = {
        one
        for one in vars(role).values()
        if isinstance(one, type)
        and one.__module__ == role.__name__
        and (one.__name__.startswith("Wait") or one.__name__ == "Proposed")
    }
    traffic = set(role.STEPS) - states
    assert states <= set(role.STEPS)
    assert len(traffic) == 1
    reached = set(role.START)
    while more := {after for state in reached for after in role.STEPS[state].then} - reached:
        reached |= more
    assert reached == set(role.STEPS)


def test_a_transition_that_the_table_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is not a description: the engine runs by it."""
    wrong = Step((HandshakeType.SERVER_HELLO,), (), (client.WaitSecondServerHello,))
    monkeypatch.setitem(connection._STEPS, client.WaitServerHello, wrong)
    ours, theirs = handshakes()[0]
    pair = Pair.make(ours, theirs)
    pair.client.start()
    with pytest.raises(InternalError, match="WaitEncryptedExtensions after WaitServerHello"):
        pair.pump()
