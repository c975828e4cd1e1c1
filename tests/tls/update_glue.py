"""Two engines that renew their keys, and what a test does to their messages."""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

from tls_glue import Pair, drain

from hybridkex import (
    X25519,
    ClientConfig,
    DevCa,
    ExternalPsk,
    Identity,
    Policy,
    QkdPskSource,
    Requirement,
    Secret,
    ServerConfig,
    TrustStore,
    UpdateKey,
)
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import Event, UpdateKeyWanted

REQUIRE, PREFER, OFF = Requirement.REQUIRE, Requirement.PREFER, Requirement.OFF


@cache
def authority() -> tuple[TrustStore, Identity]:
    ca = DevCa.create(algorithm="ed25519")
    return TrustStore((ca.certificate,)), ca.issue("localhost", algorithm="ed25519")


def policy(**more: Any) -> Policy:
    return Policy(
        **{"post_quantum": PREFER, "fresh_keys": REQUIRE, "psk": OFF, "fresh_qkd": OFF, **more}
    )


def configs(
    ours: Policy | None = None, theirs: Policy | None = None, **more: Any
) -> tuple[ClientConfig, ServerConfig]:
    """A client and a server with a source of QKD keys each, for their updates alone.

    The engine never asks the sources; that they are there is what makes the policy possible.
    """
    trust, identity = authority()
    alice, bob = in_process_pair("alice", "bob")
    more = {"groups": (X25519,), **more}
    return (
        ClientConfig(
            verifier=trust, psk_source=QkdPskSource(alice), policy=ours or policy(), **more
        ),
        ServerConfig(
            identities=(identity,), psk_source=QkdPskSource(bob), policy=theirs or policy(), **more
        ),
    )


def connected(ours: Policy | None = None, theirs: Policy | None = None, **more: Any) -> Pair:
    return Pair.make(*configs(ours, theirs, **more)).connect()


_numbers = itertools.count(1)


def fresh_key() -> UpdateKey:
    """A key that nobody had before."""
    number = next(_numbers)
    name = f"key-{number}".encode()
    psk = ExternalPsk(identity=name, key=Secret(number.to_bytes(32, "big")), context=b"epoch")
    return UpdateKey(psk=psk, key_ids=(name.decode(),), sources=("kme-a > kme-b",))


Answer = Callable[[bytes], UpdateKey | None]


def never(identity: bytes) -> UpdateKey | None:
    return None


def update(pair: Pair, who: str, key: UpdateKey | None = None, answer: Answer = never) -> None:
    """One update of one side, to its end; the responder gets ``answer``."""
    starter, _ = both(pair, who)
    starter.start_update(key, missing=None if key else "none was drawn")
    settle(pair, answer)


def both(pair: Pair, who: str) -> tuple[Connection, Connection]:
    ends: tuple[Connection, Connection] = (pair.client, pair.server)
    return ends if who == "client" else (ends[1], ends[0])


def settle(pair: Pair, answer: Answer = never) -> None:
    """Carry everything, and answer what is asked."""
    while True:
        pair.pump()
        asked = False
        for end, events in ((pair.client, pair.client_events), (pair.server, pair.server_events)):
            wanted = [one for one in events if isinstance(one, UpdateKeyWanted)]
            for one in wanted:
                events.remove(one)
                end.provide_update_key(answer(one.identity), "it was not found")
                asked = True
        if not asked:
            return


def events_of(pair: Pair, kind: type[Event], who: str) -> list[Any]:
    events = pair.client_events if who == "client" else pair.server_events
    return [one for one in events if isinstance(one, kind)]


__all__ = [
    "OFF",
    "PREFER",
    "REQUIRE",
    "both",
    "configs",
    "connected",
    "drain",
    "events_of",
    "fresh_key",
    "never",
    "policy",
    "settle",
    "update",
]
