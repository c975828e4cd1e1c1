"""Key updates with fresh keys beside full handshakes, both engines, no network.

The CPU time of both ends together. The handshake and the updates use the same group, and QKD keys
where they are asked for; the handshake has the server's certificate too. All take turns, and the
fastest tenth of each counts.

A key exchange is part of both. So are its primitives, which OpenSSL computes: they are measured by
themselves, because no update with a new exchange can cost less.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, mlkem
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.engines import Pair
from benchmarks.results import Options, Row
from hybridkex import (
    MLKEM1024,
    SECP256R1MLKEM768,
    SECP384R1MLKEM1024,
    X25519MLKEM768,
    ClientConfig,
    DevCa,
    ExternalPsk,
    Group,
    Policy,
    Requirement,
    Secret,
    ServerConfig,
    TrustStore,
    UpdateKey,
)
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import Event

__all__ = ["measure", "run"]

_PSK = ExternalPsk(identity=b"qkd", key=Secret(bytes(range(32))), context=b"")
_UPDATE = UpdateKey(psk=ExternalPsk(identity=b"qkd", key=Secret(bytes(range(32))), context=b"1"))


class _NoSource:
    """A placeholder for a source of QKD keys; the engine never calls it."""

    async def _never(self, *parts: Any, **more: Any) -> Any:
        raise NotImplementedError

    offer = look_up = draw_for_update = look_up_for_update = stock_for_updates = _never

    def authorize(self, session: object, missing: str | None) -> object:
        raise NotImplementedError


class Costs(NamedTuple):
    """CPU milliseconds of both ends."""

    handshake: float
    update: float
    exchange: float
    """A key exchange of the group alone."""
    primitives: float
    """Its primitives alone: the calls into OpenSSL."""


_CURVES: Final[dict[Group, ec.EllipticCurve]] = {
    SECP256R1MLKEM768: ec.SECP256R1(),
    SECP384R1MLKEM1024: ec.SECP384R1(),
}


def _classical(group: Group) -> None:
    """Two key pairs and two shared secrets of ECDH."""
    if group is X25519MLKEM768:
        keys = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        keys[0].exchange(keys[1].public_key())
        keys[1].exchange(keys[0].public_key())
    elif group in _CURVES:
        curve = _CURVES[group]
        one, other = ec.generate_private_key(curve), ec.generate_private_key(curve)
        one.exchange(ec.ECDH(), other.public_key())
        other.exchange(ec.ECDH(), one.public_key())


def _primitives(group: Group) -> None:
    _classical(group)
    if group in (SECP384R1MLKEM1024, MLKEM1024):
        large = mlkem.MLKEM1024PrivateKey.generate()
        large.decapsulate(large.public_key().encapsulate()[1])
    else:
        small = mlkem.MLKEM768PrivateKey.generate()
        small.decapsulate(small.public_key().encapsulate()[1])


def measure(group: Group, *, qkd: bool, rounds: int) -> Costs:
    """Measure a full handshake, a key update, and what is in both."""
    ca = DevCa.create()
    policy = Policy(
        post_quantum=Requirement.PREFER,
        fresh_keys=Requirement.REQUIRE,
        fresh_qkd=Requirement.REQUIRE if qkd else Requirement.OFF,
    )
    more: dict[str, Any] = {"groups": (group,), "policy": policy}
    if qkd:
        more |= {"psks": (_PSK,), "psk_source": _NoSource()}
    identities = (ca.issue("localhost"),)

    def answer(connection: Connection, event: Event) -> None:
        if hasattr(event, "identities"):
            connection.provide_psk(_PSK)
        elif hasattr(event, "identity"):
            connection.provide_update_key(_UPDATE if qkd else None)

    def exchange() -> None:
        started = group.exchange.start()
        started.finish(group.exchange.respond(started.share)[0])

    handshakes, updates, exchanges, primitives = [], [], [], []
    for _ in range(rounds):
        # A trust store of its own: a client that meets a server for the first time.
        client = ClientConfig(verifier=TrustStore((ca.certificate,)), **more)
        pair = Pair(client, ServerConfig(identities=identities, **more), answer=answer)

        def handshake(pair: Pair = pair) -> None:
            pair.client.start()
            if qkd:
                while pair.client.next_event() is not None:
                    pass
                pair.client.provide_psk(None)
            pair.carry()

        def update(pair: Pair = pair) -> None:
            pair.client.start_update(_UPDATE if qkd else None)
            pair.carry()

        handshakes.append(_timed(handshake))
        for _ in range(2):
            updates.append(_timed(update))
            pair.client.send_data(b"x")  # so that the updates are no storm of them
            pair.carry()
        assert pair.client.session.epoch == 2
        exchanges.append(_timed(exchange))
        primitives.append(_timed(lambda: _primitives(group)))
    return Costs(*map(_fastest, (handshakes, updates, exchanges, primitives)))


def _timed(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return 1000 * (time.process_time() - began)


def _fastest(times: list[float]) -> float:
    some = sorted(times)[: max(1, len(times) // 10)]
    return sum(some) / len(some)


def run(options: Options) -> Iterator[Row]:
    """Measure. An update is to cost less than half of a handshake."""
    for group in (X25519MLKEM768, SECP256R1MLKEM768, SECP384R1MLKEM1024, MLKEM1024):
        for qkd in (False, True):
            rounds = [
                measure(group, qkd=qkd, rounds=options.size(50, 1)) for _ in range(options.few())
            ]
            handshakes = [one.handshake for one in rounds]
            what = f"{group}, {'with a' if qkd else 'no'} QKD key"
            updates = {"key update": [one.update for one in rounds], "full handshake": handshakes}
            yield Row(f"key update, {what}", "ms", updates, goal=2.0)
            for part in ("exchange", "primitives"):
                alone = [getattr(one, part) for one in rounds]
                yield Row(f"its {part} alone", "ms", {part: alone, "full handshake": handshakes})
