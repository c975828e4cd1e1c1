"""liboqs compared with `cryptography`: ``python benchmarks/providers.py [--rounds N]``.

Two tables: the three operations of ML-KEM through each provider, and whole handshakes between two
engines in memory (X25519MLKEM768, Ed25519 raw public keys), no sockets. Providers take turns; the
median of the rounds is printed, in CPU time of this process.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from hybridkex import (
    MLKEM768,
    MLKEM1024,
    X25519MLKEM768,
    ClientConfig,
    ClientConnection,
    Group,
    Pins,
    RawIdentity,
    ServerConfig,
    ServerConnection,
)
from hybridkex.crypto.kex_oqs import via_oqs
from hybridkex.crypto.oqs import load
from hybridkex.tls.events import SessionProposed

PER_ROUND = 100


def timed(action: Callable[[], object], times: int = PER_ROUND) -> float:
    """Measure the CPU microseconds of one call."""
    start = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - start) / times * 1e6


def operations(group: Group) -> list[float]:
    """Measure key generation, encapsulation and decapsulation."""
    exchange = group.exchange
    started = exchange.start()
    answer, _ = exchange.respond(started.share)
    return [
        timed(exchange.start),
        timed(lambda: exchange.respond(started.share)),
        timed(lambda: started.finish(answer)),
    ]


def handshake(group: Group) -> Callable[[], None]:
    """Measure a whole handshake, both sides."""
    identity = RawIdentity.generate()
    client_config = ClientConfig(verifier=Pins(frozenset({identity.pin})), groups=(group,))
    server_config = ServerConfig(identities=(identity,), groups=(group,))

    def once() -> None:
        client, server = ClientConnection(client_config), ServerConnection(server_config)
        client.start()
        for source, target in ((client, server), (server, client), (client, server)):
            target.receive_data(source.data_to_send())
            while (event := target.next_event()) is not None:
                if isinstance(event, SessionProposed):
                    target.accept()
        if not (client.handshake_complete and server.handshake_complete):
            raise SystemExit("the handshake did not complete")

    return once


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"liboqs {load().oqs_version()}; microseconds of CPU time, median of {rounds} rounds")
    print(f"{'':<28}{'cryptography':>14}{'liboqs':>10}{'ratio':>8}")
    for group in (MLKEM768, MLKEM1024):
        pairs = [(operations(group), operations(via_oqs(group))) for _ in range(rounds)]
        for index, name in enumerate(("key pair", "encapsulate", "decapsulate")):
            ours, theirs = (
                statistics.median(pair[side][index] for pair in pairs) for side in (0, 1)
            )
            print(f"{group.name + ' ' + name:<28}{ours:>14.0f}{theirs:>10.0f}{ours / theirs:>8.2f}")
    both = handshake(X25519MLKEM768), handshake(via_oqs(X25519MLKEM768))
    results = [tuple(timed(one, 20) for one in both) for _ in range(rounds)]
    ours, theirs = (statistics.median(result[side] for result in results) for side in (0, 1))
    print(f"{'handshake, both sides':<28}{ours:>14.0f}{theirs:>10.0f}{ours / theirs:>8.2f}")


if __name__ == "__main__":
    main()
