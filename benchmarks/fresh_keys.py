"""The costs of a key update and of a full handshake: ``python benchmarks/fresh_keys.py``.

Both engines, no network: the CPU time of both ends together. The handshake and the updates use the
same group, and QKD keys where they are asked for; the handshake has the server's certificate too.
Runs of the two take turns, and the fastest tenth of each counts.
"""

import argparse
import time
from collections.abc import Callable

from hybridkex import (
    ALL_GROUPS,
    ClientConfig,
    ClientConnection,
    DevCa,
    ExternalPsk,
    Group,
    Policy,
    Requirement,
    Secret,
    ServerConfig,
    ServerConnection,
    TrustStore,
    UpdateKey,
)
from hybridkex.tls.events import SessionProposed

__all__ = ["measure"]

_PSK = ExternalPsk(identity=b"qkd", key=Secret(bytes(range(32))), context=b"")
_UPDATE = UpdateKey(psk=ExternalPsk(identity=b"qkd", key=Secret(bytes(range(32))), context=b"1"))


class _NoSource:
    """A placeholder for a source of QKD keys; the engine never calls it."""

    async def offer(self) -> ExternalPsk:
        raise NotImplementedError

    async def look_up(self, identities: tuple[bytes, ...]) -> ExternalPsk:
        raise NotImplementedError

    def authorize(self, session: object, missing: str | None) -> object:
        raise NotImplementedError

    async def draw_for_update(self, session: object, *, client: bool, epoch: int) -> UpdateKey:
        raise NotImplementedError

    async def look_up_for_update(
        self, identity: bytes, session: object, *, client: bool, epoch: int
    ) -> UpdateKey:
        raise NotImplementedError

    async def stock_for_updates(self, session: object) -> int | None:
        raise NotImplementedError


class _Pair:
    """Two engines and the bytes between them."""

    def __init__(self, client: ClientConfig, server: ServerConfig) -> None:
        self.client, self.server = ClientConnection(client, "localhost"), ServerConnection(server)

    def handshake(self) -> None:
        self.client.start()
        self.pump()

    def update(self, key: UpdateKey | None) -> None:
        self.client.start_update(key)
        self.pump(key)

    def pump(self, key: UpdateKey | None = None) -> None:
        """Carry bytes until neither engine has more to send."""
        moved = True
        while moved:
            moved = False
            for source, target in ((self.client, self.server), (self.server, self.client)):
                if source.has_data_to_send:
                    moved = True
                    target.receive_data(source.data_to_send())
                while (event := target.next_event()) is not None:
                    if isinstance(event, SessionProposed):
                        target.accept()
                        moved = True
                    elif hasattr(event, "identities"):
                        target.provide_psk(_PSK)
                    elif hasattr(event, "identity"):
                        target.provide_update_key(key)
                        moved = True


def measure(group: Group, *, qkd: bool, rounds: int) -> tuple[float, float]:
    """Measure the CPU milliseconds of both ends, for a full handshake and for a key update."""
    ca = DevCa.create()
    policy = Policy(
        post_quantum=Requirement.PREFER,
        fresh_keys=Requirement.REQUIRE,
        fresh_qkd=Requirement.REQUIRE if qkd else Requirement.OFF,
    )
    shared = {"groups": (group,), "policy": policy, "psks": (_PSK,) if qkd else ()}
    source = _NoSource()
    identities = (ca.issue("localhost"),)
    handshakes, updates = [], []
    for _ in range(rounds):
        # A trust store of its own: a client that meets a server for the first time.
        trust = TrustStore((ca.certificate,))
        more = {**shared, "psk_source": source} if qkd else shared
        client = ClientConfig(verifier=trust, **more)  # type: ignore[arg-type]
        server = ServerConfig(identities=identities, **more)  # type: ignore[arg-type]
        pair = _Pair(client, server)

        def handshake(pair: _Pair = pair) -> None:
            pair.client.start()
            if qkd:
                while pair.client.next_event() is not None:
                    pass
                pair.client.provide_psk(None)
            pair.pump()

        handshakes.append(_timed(handshake))
        for _ in range(2):
            updates.append(_timed(lambda pair=pair: pair.update(_UPDATE if qkd else None)))
            pair.client.send_data(b"x")  # so that the updates are no storm of them
            pair.pump()
        assert pair.client.session.epoch == 2
    return _fastest(handshakes), _fastest(updates)


def _timed(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return 1000 * (time.process_time() - began)


def _fastest(times: list[float]) -> float:
    some = sorted(times)[: max(1, len(times) // 10)]
    return sum(some) / len(some)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="A key update beside a full handshake.")
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    print(f"{'group':<22}{'QKD key':<9}{'handshake':>11}{'update':>9}{'ratio':>8}")
    for group in ALL_GROUPS:
        for qkd in (False, True):
            whole, part = measure(group, qkd=qkd, rounds=rounds)
            name = "yes" if qkd else "no"
            print(f"{group.name:<22}{name:<9}{whole:>8.2f} ms{part:>6.2f} ms{part / whole:>8.2f}")


if __name__ == "__main__":
    main()
