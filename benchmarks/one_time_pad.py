"""What a one-time pad costs: ``python benchmarks/one_time_pad.py``.

Messages between two engines, no network and no KME: the CPU time of both ends together, and the
bytes of key per byte of message, with the pad and with the session's keys alone. The two take
turns, and the fastest of five rounds counts.
"""

import argparse
import os
import time

from hybridkex import (
    ClientConfig,
    ClientConnection,
    DevCa,
    OneTimePad,
    Policy,
    QkdPskSource,
    Requirement,
    Secret,
    ServerConfig,
    ServerConnection,
    TrustStore,
)
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.tls.events import PadKeyWanted, SessionProposed

__all__ = ["measure"]

_KEY = 32


class _Pair:
    """Two engines after their handshake, and the bytes between them."""

    def __init__(self, *, pad: bool) -> None:
        authority = DevCa.create(algorithm="ed25519")
        alice, bob = in_process_pair("alice", "bob")
        policy, pads = Policy(psk=Requirement.OFF), OneTimePad() if pad else None
        self._client = ClientConnection(
            ClientConfig(
                verifier=TrustStore((authority.certificate,)),
                psk_source=QkdPskSource(alice),
                policy=policy,
                one_time_pad=pads,
            ),
            "localhost",
        )
        self._server = ServerConnection(
            ServerConfig(
                identities=(authority.issue("localhost"),),
                psk_source=QkdPskSource(bob),
                policy=policy,
                one_time_pad=pads,
            )
        )
        self._keys: dict[bytes, Secret] = {}
        self._client.start()
        self._pump()

    def _pump(self) -> None:
        moved = True
        while moved:
            moved = False
            for source, target in ((self._client, self._server), (self._server, self._client)):
                if source.has_data_to_send:
                    moved = True
                    target.receive_data(source.data_to_send())
                while (event := target.next_event()) is not None:
                    if isinstance(event, SessionProposed):
                        target.accept()
                    elif isinstance(event, PadKeyWanted):
                        target.provide_pad_key(self._keys.pop(event.identity))

    def say(self, message: bytes) -> None:
        """One message from the client to the server, with the keys that it takes."""
        while self._client.pad is not None and self._client.pad.message < len(message):
            name, key = os.urandom(40), Secret(os.urandom(_KEY))
            self._keys[name] = key
            self._client.extend_pad(name, key)
        self._client.send_data(message)
        self._pump()

    @property
    def spent(self) -> int:
        """Bytes of key so far."""
        return 0 if self._client.pad is None else self._client.pad.sent


def measure(size: int, seconds: float, *, pad: bool) -> tuple[float, float]:
    """Messages per second, and bytes of key per byte of message."""
    pair, message = _Pair(pad=pad), os.urandom(size)
    pair.say(message)
    before, said, best = pair.spent, 0, 0.0
    for _ in range(5):
        count, began = 0, time.process_time()
        while time.process_time() - began < seconds / 5:
            pair.say(message)
            count += 1
        said += count
        best = max(best, count / (time.process_time() - began))
    return best, (pair.spent - before) / (said * size)


def main() -> None:
    """Print a table for a few sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure (default: 2)")
    seconds = parser.parse_args().seconds
    print("| message | with the pad | without | key per byte of message |")
    print("|---|---|---|---|")
    for size in (20, 100, 1000, 8000):
        padded, spent = measure(size, seconds, pad=True)
        plain, _ = measure(size, seconds, pad=False)
        print(f"| {size:,} bytes | {padded:,.0f}/s | {plain:,.0f}/s | {spent:.3f} bytes |")


if __name__ == "__main__":
    main()
