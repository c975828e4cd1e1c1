"""Authentication of the classical channel: tags over all messages.

*Wegman and Carter*: a polynomial hash of the message under a secret point, encrypted by a one-time
pad. With Poly1305 (RFC 8439 section 2.5) this is ``poly_r(m) + s``: ``r`` is the point, ``s``, used
once, the pad. D. J. Bernstein, "The Poly1305-AES message-authentication code", FSE 2005, theorem
3.3: without knowing either, a forger succeeds for a message of at most ``L`` bytes with a
probability of at most ``8 ⌈L/16⌉ / 2^106``, whatever its computing power. Each block takes a new
``r`` and each tag a new ``s`` from the :class:`~hybridkex.link.ledger.Ledger`.

*Signatures* are used until the first block has filled the ledger. They need to be unforgeable only
while that block is made (M. Mosca, D. Stebila, B. Ustaoğlu, PQCrypto 2013, arXiv:1206.6150).

Besides the message, a tag covers the protocol, the session (both nonces, the settings), the
direction, and the numbers of the block and of the tag. So no message can be reflected, replayed or
moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.poly1305 import Poly1305

from hybridkex.crypto.private_keys import load_private_key
from hybridkex.crypto.signatures import ALL_SCHEMES, SignatureScheme
from hybridkex.crypto.x509_failure import parse_failure
from hybridkex.crypto.x509_parsing import UNREADABLE, certificates_from_pem
from hybridkex.errors import ConfigError, LinkAuthenticationError, PeerError
from hybridkex.files import read_file
from hybridkex.link.ledger import Direction, Ledger, Position
from hybridkex.link.wire import SignatureRefused

TAG: Final = 16
POINT: Final = 16
TAGS: Final = {Direction.ALICE_TO_BOB: 2, Direction.BOB_TO_ALICE: 3}
"""Tags of a block."""


def tag_bytes(lane: Direction) -> int:
    """Bytes of a lane that the tags of one block take."""
    return POINT + TAG * TAGS[lane]


def suffices(stock: Mapping[Direction, Position]) -> bool:
    """Whether each lane has enough for the tags of a block; otherwise none can fill it again."""
    return all(one.end - one.start >= tag_bytes(lane) for lane, one in stock.items())


LEAST_SECRET: Final = len(Direction) * max(map(tag_bytes, Direction))
"""The fewest bytes that can begin a ledger: each lane gets half of them, enough for one block."""


def collision_probability(length: int) -> float:
    """The probability that the polynomials of two messages of ``length`` bytes differ by a given
    number, and that a forged tag under a message of this length verifies."""
    return 8.0 * -(-length // 16) / 2.0**106


class Authenticator(Protocol):
    """Makes and checks the tags of one block."""

    @property
    def name(self) -> str:
        """The name of the authentication in reports."""

    def tag(self, direction: Direction, parts: Sequence[bytes]) -> bytes:
        """The tag over what this party sent. Raises :class:`~hybridkex.errors.LedgerDry`."""

    def check(self, direction: Direction, parts: Sequence[bytes], tag: bytes) -> None:
        """Check the tag over what this party received.

        Raises :class:`~hybridkex.errors.LinkAuthenticationError`.
        """


class WegmanCarter:
    """Tags with key of the ledger.

    The key of an own tag is used up before the tag is made. That of a received tag is used up only
    after the tag has verified, so that nobody without the key can use it up.
    """

    name: Final = "wegman-carter"

    def __init__(self, ledger: Ledger, block: int, *, starts: Mapping[Direction, int]) -> None:
        """``starts``: for each lane, the number of the byte to go on from."""
        self._ledger = ledger
        self._block = block
        self._points: dict[Direction, bytes] = {}
        self._starts = dict(starts)

    def tag(self, direction: Direction, parts: Sequence[bytes]) -> bytes:
        if direction not in self._points:
            self._points[direction] = self._ledger.draw(self._block, direction, POINT)
        pad = self._ledger.draw(self._block, direction, TAG)
        return _mac(self._points[direction] + pad, parts).finalize()

    def check(self, direction: Direction, parts: Sequence[bytes], tag: bytes) -> None:
        start = self._starts[direction]
        point = self._points.get(direction)
        count = TAG if point is not None else POINT + TAG
        key = (point or b"") + self._ledger.read(direction, start, count)
        try:
            _mac(key, parts).verify(tag)
        except InvalidSignature:
            raise LinkAuthenticationError(
                "an authentication tag of the other party is invalid"
            ) from None
        self._points[direction] = key[:POINT]
        self._starts[direction] = start + count
        self._ledger.advance(self._block, direction, start + count)


def _mac(key: bytes, parts: Sequence[bytes]) -> Poly1305:
    mac = Poly1305(key)
    for part in parts:
        mac.update(part)
    return mac


KINDS: Final = {"mldsa": "ml-dsa", "ed": "ed25519"}


@dataclass(frozen=True)
class Signatures:
    """Tags that are signatures (ML-DSA, ECDSA, Ed25519, RSA-PSS), for the first block."""

    own_private_key: Any
    peer_public_key: Any
    certificate: Path | None = None
    """The source of the peer's key."""

    name: Final = "signatures"

    def __post_init__(self) -> None:
        self._scheme(self.own_private_key)
        self._scheme(self.peer_public_key)

    @classmethod
    def from_files(cls, key: Path, certificate: Path) -> "Signatures":
        """Our own private key and the peer's certificate, from PEM files.

        Raises:
            ConfigError: one of them cannot be used; it is named.
        """
        own = load_private_key(read_file(key), None, str(key))
        content = read_file(certificate)
        try:
            [peer, *_] = certificates_from_pem(content)
            public = peer.public_key()
        except UNREADABLE as error:
            raise ConfigError(
                f"{certificate} is not a certificate in PEM form: {parse_failure(error)}"
            ) from None
        try:
            return cls(own, public, certificate)
        except ConfigError as error:
            raise ConfigError(f"{key} or {certificate}: {error}") from None

    @staticmethod
    def _scheme(key: Any) -> SignatureScheme:
        for scheme in ALL_SCHEMES:
            if scheme.suits(key):
                return scheme
        raise ConfigError(
            "this kind of key cannot authenticate a link: use ML-DSA, ECDSA, Ed25519 or RSA"
        )

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
            known = f" with the certificate last read from {self.certificate}"
            raise SignatureRefused(
                "a signature of the other party does not verify"
                + ("" if self.certificate is None else f"{known}: is it the other party's own?")
            ) from None

    @property
    def kinds(self) -> tuple[str, str]:
        """The signature methods of both ends, such as ``ml-dsa``."""
        schemes = (self._scheme(key).name for key in (self.own_private_key, self.peer_public_key))
        own, peer = (one.partition("_")[0].rstrip("0123456789") for one in schemes)
        return KINDS.get(own, own), KINDS.get(peer, peer)

    def __repr__(self) -> str:
        return "Signatures(...)"
