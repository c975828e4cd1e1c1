"""Instruments that record private keys, for the oracles that model broken primitives.

A quantum computer would compute the private key from the public share in a recording. None exists,
so the private key is recorded under its public share when it is made; the adversary's oracle
answers to that share and to nothing else. The instrument wraps the library's key exchange and
changes nothing that it does or sends.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from hybridkex.auth import Identity
from hybridkex.crypto.kex import Concat, Group, KeyExchange, Property, Started
from hybridkex.files import make_private, open_private
from hybridkex.secret import Secret

ECDH: Final = "ecdh"
ML_KEM: Final = "ml-kem"
SIGNATURE: Final = "signature"
ORACLES: Final = (ECDH, ML_KEM, SIGNATURE)
"""The primitives that can be broken, each with its own file."""


class Escrow:
    """Writes pairs of public share and private key, a file for each primitive, into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for primitive in ORACLES:
            make_private(self.file(primitive))

    def file(self, primitive: str) -> Path:
        """The file of a primitive's pairs: one JSON object per line."""
        return self._folder / f"{primitive}.jsonl"

    def instrumented(self, group: Group) -> Group:
        """The same group, with its key pairs recorded."""
        parts = [_Watched(part, self.keep) for part in group.exchange.parts]
        return replace(group, exchange=parts[0] if len(parts) == 1 else Concat(*parts))

    def keep_identity(self, identity: Identity) -> Identity:
        """Record a certificate's key, as an attacker who breaks signatures would compute it."""
        self.keep(SIGNATURE, identity.private_key)
        return identity

    def keep(self, primitive: str, private_key: Any) -> None:
        line = {
            "public": public_share(private_key.public_key()).hex(),
            "private": private_key.private_bytes(
                Encoding.DER, PrivateFormat.PKCS8, NoEncryption()
            ).hex(),
        }
        append_line(self.file(primitive), line)


def append_line(path: Path, value: object) -> None:
    with open_private(path, append=True) as file:
        file.write(json.dumps(value).encode("ascii") + b"\n")


def public_share(public_key: Any) -> bytes:
    """A public key in the encoding of a key share."""
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    raw: bytes = public_key.public_bytes_raw()
    return raw


class _Watched:
    """A key exchange of one part that records every private key."""

    def __init__(self, inner: KeyExchange, keep: Callable[[str, Any], None]) -> None:
        self._inner = inner
        self._record = keep
        self.name = inner.name
        self.properties = inner.properties
        self.parts: tuple[KeyExchange, ...] = (self,)
        self.offer_length = inner.offer_length
        self.answer_length = inner.answer_length

    def start(self) -> Started:
        started = self._inner.start()
        primitive = ECDH if self.properties is Property.CLASSICAL else ML_KEM
        # The library's own exchanges have this attribute; plug-ins need not.
        self._record(primitive, started.private_key)  # type: ignore[attr-defined]
        return started

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        if self.properties is Property.POST_QUANTUM:
            # A KEM's response has no key pair: the client's key decapsulates it.
            return self._inner.respond(peer_share)
        # The key pair of a Diffie-Hellman response.
        started = self.start()
        return started.share, started.finish(peer_share)
