"""Key updates with fresh keys beside full handshakes, both engines, no network.

The CPU time of both ends together. The handshake and the updates use the same group, and QKD keys
where they are asked for; the handshake has the server's certificate too. The two take turns, and
the fastest tenth of each counts.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

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


def measure(group: Group, *, qkd: bool, rounds: int) -> tuple[float, float]:
    """Measure the CPU milliseconds of both ends, for a full handshake and for a key update."""
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

    handshakes, updates = [], []
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
    return _fastest(handshakes), _fastest(updates)


def _timed(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return 1000 * (time.process_time() - began)


def _fastest(times: list[float]) -> float:
    some = sorted(times)[: max(1, len(times) // 10)]
    return sum(some) / len(some)


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    for group in (X25519MLKEM768, SECP256R1MLKEM768, SECP384R1MLKEM1024, MLKEM1024):
        for qkd in (False, True):
            figures: dict[str, list[float]] = {"key update": [], "full handshake": []}
            for _ in range(options.few()):
                whole, part = measure(group, qkd=qkd, rounds=options.size(50, 1))
                figures["key update"].append(part)
                figures["full handshake"].append(whole)
            yield Row(f"key update, {group}, {'with a' if qkd else 'no'} QKD key", "ms", figures)
