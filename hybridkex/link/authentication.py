"""Who says so: tags on all that crosses the classical channel.

*Wegman and Carter*: a polynomial hash of the message under a secret point, encrypted by a one-time
pad. With Poly1305 (RFC 8439 section 2.5) this is ``poly_r(m) + s``: ``r`` is the point, ``s``, used
once, the pad. D. J. Bernstein, "The Poly1305-AES message-authentication code", FSE 2005, theorem
3.3: whoever knows neither forges a tag for a message of at most ``L`` bytes with a probability of
at most ``8 ⌈L/16⌉ / 2^106``, whatever he computes. Each block takes a new ``r`` and each tag a new
``s`` from the :class:`~hybridkex.link.ledger.Ledger`.

*Signatures* stand in until the first block has filled the ledger: they must be good only while it
is made (M. Mosca, D. Stebila, B. Ustaoğlu, PQCrypto 2013, arXiv:1206.6150).

Before the message a tag covers: protocol, session (both nonces, the settings), direction, number
of the block and of the tag. So nothing can be sent back, sent again or moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.poly1305 import Poly1305

from hybridkex.crypto.signatures import ALL_SCHEMES, SignatureScheme
from hybridkex.errors import ConfigError, LinkAuthenticationError, PeerError
from hybridkex.link.ledger import Direction, Ledger

__all__ = ["TAGS", "Authenticator", "Signatures", "WegmanCarter", "forgery_probability"]

TAG: Final = 16
POINT: Final = 16
TAGS: Final = {Direction.ALICE_TO_BOB: 2, Direction.BOB_TO_ALICE: 3}
"""Tags of a block."""


def forgery_probability(length: int) -> float:
    """Of one tag under a message of ``length`` bytes."""
    return 8.0 * -(-length // 16) / 2.0**106


class Authenticator(Protocol):
    """Makes and checks the tags of one block."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    def tag(self, direction: Direction, parts: Sequence[bytes]) -> bytes:
        """For what we said."""
        ...

    def check(self, direction: Direction, parts: Sequence[bytes], tag: bytes) -> None:
        """For what we heard. Raises :class:`~hybridkex.errors.LinkAuthenticationError`."""
        ...


class WegmanCarter:
    """Tags with key of the ledger."""

    name: Final = "wegman-carter"

    def __init__(self, ledger: Ledger, block: int) -> None:
        """Raises :class:`~hybridkex.errors.LedgerDry`."""
        self._ledger = ledger
        self._block = block
        self._points = {one: ledger.draw(block, one, POINT) for one in Direction}

    def _mac(self, direction: Direction, parts: Sequence[bytes]) -> Poly1305:
        pad = self._ledger.draw(self._block, direction, TAG)
        mac = Poly1305(self._points[direction] + pad)
        for part in parts:
            mac.update(part)
        return mac

    def tag(self, direction: Direction, parts: Sequence[bytes]) -> bytes:
        return self._mac(direction, parts).finalize()

    def check(self, direction: Direction, parts: Sequence[bytes], tag: bytes) -> None:
        try:
            self._mac(direction, parts).verify(tag)
        except InvalidSignature:
            raise LinkAuthenticationError("a tag does not verify") from None


@dataclass(frozen=True)
class Signatures:
    """Tags that are signatures (ML-DSA, ECDSA, Ed25519, RSA-PSS), for the first block."""

    own_private_key: Any
    peer_public_key: Any

    name: Final = "signatures"

    def __post_init__(self) -> None:
        self._scheme(self.own_private_key)
        self._scheme(self.peer_public_key)

    @staticmethod
    def _scheme(key: Any) -> SignatureScheme:
        for scheme in ALL_SCHEMES:
            if scheme.suits(key):
                return scheme
        raise ConfigError("this kind of key cannot authenticate a link")

    @staticmethod
    def _digest(parts: Sequence[bytes]) -> bytes:
        digest = hashes.Hash(hashes.SHA512())
        for part in parts:
            digest.update(part)
        return b"hybridkex QKD link, first block\0" + digest.finalize()

    def tag(self, direction: Direction, parts: Sequence[bytes]) -> bytes:
        content = self._digest(parts)
        return self._scheme(self.own_private_key).sign(self.own_private_key, content)

    def check(self, direction: Direction, parts: Sequence[bytes], tag: bytes) -> None:
        content = self._digest(parts)
        try:
            self._scheme(self.peer_public_key).verify(self.peer_public_key, tag, content)
        except PeerError:
            raise LinkAuthenticationError("a signature does not verify") from None

    def __repr__(self) -> str:
        return "Signatures(...)"
