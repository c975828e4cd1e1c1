"""Messages under a one-time pad beside messages under the session's keys alone.

Two engines, no network and no KME: the CPU time of both ends together.
"""

import os
import time
from collections.abc import Iterator

from benchmarks.engines import Pair
from benchmarks.results import Options, Row, in_turns
from hybridkex import (
    ClientConfig,
    DevCa,
    OneTimePad,
    Policy,
    QkdPskSource,
    Requirement,
    Secret,
    ServerConfig,
    TrustStore,
)
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import Event, PadKeyWanted

__all__ = ["Talk", "run"]

_KEY = 32


class Talk:
    """Two engines after their handshake."""

    def __init__(self, *, pad: bool) -> None:
        authority = DevCa.create(algorithm="ed25519")
        alice, bob = map(QkdPskSource, in_process_pair("alice", "bob"))
        policy, pads = Policy(psk=Requirement.OFF), OneTimePad() if pad else None
        trust, identities = TrustStore((authority.certificate,)), (authority.issue("localhost"),)
        self._keys: dict[bytes, Secret] = {}
        self._pair = Pair(
            ClientConfig(verifier=trust, psk_source=alice, policy=policy, one_time_pad=pads),
            ServerConfig(identities=identities, psk_source=bob, policy=policy, one_time_pad=pads),
            answer=self._answer,
        ).handshake()
        self.said = 0
        """Bytes of messages so far."""

    def _answer(self, connection: Connection, event: Event) -> None:
        if isinstance(event, PadKeyWanted):
            connection.provide_pad_key(self._keys.pop(event.identity))

    def say(self, message: bytes) -> None:
        """One message from the client to the server, with the keys that it takes."""
        client = self._pair.client
        while client.pad is not None and client.pad.message < len(message):
            name, key = os.urandom(40), Secret(os.urandom(_KEY))
            self._keys[name] = key
            client.extend_pad(name, key)
        client.send_data(message)
        self._pair.carry()
        self.said += len(message)

    def rate(self, message: bytes, seconds: float) -> float:
        """Messages per second."""
        count, began = 0, time.process_time()
        while (took := time.process_time() - began) < seconds:
            self.say(message)
            count += 1
        return count / took

    @property
    def spent(self) -> int:
        """Bytes of key so far."""
        return 0 if self._pair.client.pad is None else self._pair.client.pad.sent


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    seconds = 0.01 if options.quick else 0.3
    for size in (20, 100, 1000, 8000):
        message, padded = os.urandom(size), Talk(pad=True)
        talks = {"with the pad": padded, "without": Talk(pad=False)}
        for talk in talks.values():
            talk.say(message)
        before = padded.spent, padded.said
        tools = {
            name: lambda talk=talk, message=message: talk.rate(message, seconds)
            for name, talk in talks.items()
        }
        figures = in_turns(options.few(5), tools)
        cost = (padded.spent - before[0]) / (padded.said - before[1])
        yield Row(f"messages of {size:,} B; {cost:.3f} B of key for each byte", "1/s", figures)
