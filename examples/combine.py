"""Derive a key for your own record layer from ECDH, ML-KEM and QKD: ``python combine.py``.

Two parties run in one process, over a memory stream. ``exchange`` gives both the same key in one
round trip. They derive two AES-GCM keys from it, one for each direction, and send one message each.
"""

import trio
import trio.testing
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from hybridkex import Pins, RawIdentity, Secret
from hybridkex.combiner import ExchangeConfig, SignatureAuthentication, exchange
from hybridkex.qkd.in_process import in_process_pair

LABEL = b"example.org records v1"


class Records:
    """Encrypted messages of at most 64 KiB over a stream; the nonce is a message counter."""

    def __init__(self, stream: trio.abc.Stream, key: Secret, *, we_began: bool) -> None:
        self._stream = stream
        ours, theirs = (b"initiator", b"responder") if we_began else (b"responder", b"initiator")
        self._seal, self._open = (
            AESGCM(HKDFExpand(hashes.SHA256(), 32, label).derive(key.reveal()))
            for label in (ours, theirs)
        )
        self._sent = self._received = 0

    async def send(self, message: bytes) -> None:
        """Send one message."""
        sealed = self._seal.encrypt(self._sent.to_bytes(12, "big"), message, None)
        self._sent += 1
        await self._stream.send_all(len(sealed).to_bytes(4, "big") + sealed)

    async def receive(self) -> bytes:
        """Receive the next message. Raises ``InvalidTag`` if it was modified."""
        length = int.from_bytes(await self._exactly(4), "big")
        if length > 1 << 16:
            raise ValueError("a message is too long")
        nonce = self._received.to_bytes(12, "big")
        self._received += 1
        return self._open.decrypt(nonce, await self._exactly(length), None)

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await self._stream.receive_some(count - len(data))
            if not piece:
                raise EOFError("the stream ended")
            data += piece
        return data


async def main() -> None:
    """Run both parties: Alice sends a message, and Bob replies."""
    alice, bob = RawIdentity.generate(), RawIdentity.generate()
    ends = trio.testing.memory_stream_pair()
    keys = in_process_pair("alice", "bob")

    async def ask() -> None:
        config = ExchangeConfig(
            role="initiator",
            local="alice",
            peer="bob",
            authentication=SignatureAuthentication(alice, Pins(frozenset({bob.peer_view.pin}))),
            label=LABEL,
            key_source=keys[0],
        )
        result = await exchange(ends[0], config)
        records = Records(ends[0], result.key, we_began=True)
        await records.send(b"what time is it?")
        print("Bob says:", (await records.receive()).decode())
        print("the key is derived from X25519, ML-KEM-768 and the QKD key", *result.qkd_key_ids)

    async def answer() -> None:
        config = ExchangeConfig(
            role="responder",
            local="bob",
            peer="alice",
            authentication=SignatureAuthentication(bob, Pins(frozenset({alice.peer_view.pin}))),
            label=LABEL,
            key_source=keys[1],
        )
        result = await exchange(ends[1], config)
        records = Records(ends[1], result.key, we_began=False)
        print("Alice says:", (await records.receive()).decode())
        await records.send(b"time for new keys")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(answer)


if __name__ == "__main__":
    trio.run(main)
