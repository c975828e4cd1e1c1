"""A third party's KEM, start to end, without a change to the engine."""

import hashlib
import os
from typing import Any

from tls_glue import Pair

import hybridkex as hk


class Toy:
    """Not secure: the secret is a hash of what crossed the wire. The shape is what counts."""

    name, properties, offer_length, answer_length = "toy", hk.Property.POST_QUANTUM, 20_000, 16
    parts: Any = property(lambda self: (self,))

    def start(self) -> "Toy":
        self.share = os.urandom(self.offer_length)
        return self

    def finish(self, peer_share: bytes) -> hk.Secret:
        return hk.Secret(hashlib.sha256(self.share + peer_share).digest())

    def respond(self, peer_share: bytes) -> tuple[bytes, hk.Secret]:
        share = os.urandom(self.answer_length)
        return share, hk.Secret(hashlib.sha256(peer_share + share).digest())


def test_it_works() -> None:
    exchange = hk.Concat(hk.X25519.exchange, Toy())
    group, ca = hk.Group(code=0xFEFE, name="X25519toy", exchange=exchange), hk.DevCa.create()
    client = hk.ClientConfig(verifier=hk.TrustStore((ca.certificate,)), groups=(group,))
    server = hk.ServerConfig(identities=(ca.issue("localhost"),), groups=(group,))
    assert Pair.make(client, server).connect().client.session.parts == ("X25519", "toy")
