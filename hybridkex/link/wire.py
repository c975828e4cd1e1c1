"""The messages of the classical channel, and their bytes.

A message is a type (1 byte), a length (4 bytes, big-endian) and a body; numbers are big-endian,
bits are packed from the highest, the unused bits of a last byte are zero. Decoding is strict:
each body has one encoding, no bytes may follow it, and every size is checked before memory is
allocated.

=========  ===========  ============================================================================
type       sender       body
=========  ===========  ============================================================================
HELLO      both         version, role, nonce, digest of the settings, positions in the ledger
REPORT     Bob          detections: distance from pulse to pulse, bases, the bits of the test basis
SIFT       Alice        which detections are kept, their intensities, Alice's bits of the test basis
ASK, TELL  Bob, Alice   error correction: a request and its answer, in the method's format
CORRECTED  Bob          bits that error correction disclosed; the number of wrong bits of each
                        intensity, if the proof uses it
FINISH     Alice        the numbers that decide the length of the keys; hash of the key, seeds of
                        hash and privacy amplification, name of the block
VERDICT    Bob          whether hash and numbers agree
TAG        both         authenticates all that this side has sent since its last tag
END        both         why this side ends the session; no tag covers it, and it has no words
=========  ===========  ============================================================================
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import LinkAuthenticationError, LinkError, NotRandom
from hybridkex.link.ledger import Direction, Position
from hybridkex.link.randomness import TOO_FEW_DETECTIONS

VERSION: Final = 5
HEADER: Final = struct.Struct(">BI")
CHUNK: Final = 1 << 20
"""Detections in one REPORT, at most."""

Bits = NDArray[np.uint8]


class Type(IntEnum):
    """Types of messages."""

    HELLO = 1
    REPORT = 2
    SIFT = 3
    ASK = 4
    TELL = 5
    CORRECTED = 6
    FINISH = 7
    VERDICT = 8
    TAG = 9
    END = 10


LIMITS: Final = {
    Type.HELLO: 128,
    Type.REPORT: 16 + 4 * CHUNK + 2 * (CHUNK // 8 + 1),
    Type.SIFT: 2 * (CHUNK // 8 + 1) + CHUNK // 4 + 1,
    Type.ASK: 1 << 27,
    Type.TELL: 1 << 24,
    Type.CORRECTED: 64,
    Type.FINISH: 1 << 27,
    Type.VERDICT: 1,
    Type.TAG: 16_384,
    Type.END: 1,
}
"""The longest body of each type."""


def pack_bits(bits: Bits) -> bytes:
    """Eight bits in a byte, the first highest."""
    return np.packbits(bits).tobytes()


def unpack_bits(data: bytes, count: int) -> Bits:
    """Reverse :func:`pack_bits`. Raises ``LinkError`` for another length or padding."""
    packed = np.frombuffer(data, dtype=np.uint8)
    if len(packed) != -(-count // 8) or (count % 8 and packed[-1] & (0xFF >> count % 8)):
        raise LinkError("a message has the wrong length")
    return np.unpackbits(packed, count=count)


class _Reader:
    """Splits a body into parts."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._body) - self._at:
            raise LinkError("a message ends too early")
        self._at += count
        return self._body[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def bits(self, count: int) -> Bits:
        return unpack_bits(self.take(-(-count // 8)), count)

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def end(self) -> None:
        if self._at != len(self._body):
            raise LinkError("a message is too long")


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The beginning."""

    type: ClassVar[Type] = Type.HELLO
    role: int
    """0: Alice, 1: Bob."""
    nonce: bytes
    settings: bytes
    """SHA-256 of the settings that must be the same at both ends."""
    positions: dict[Direction, Position] | None
    """The bytes of its ledger that this party has in stock; ``None`` if it never had any."""

    def encode(self) -> bytes:
        numbers = b""
        for lane in Direction if self.positions is not None else ():
            assert self.positions is not None
            position = self.positions[lane]
            numbers += position.start.to_bytes(8) + position.end.to_bytes(8)
        return bytes([VERSION, self.role]) + self.nonce + self.settings + numbers

    @classmethod
    def decode(cls, body: bytes) -> Self:
        reader = _Reader(body)
        if reader.number(1) != VERSION:
            raise LinkError("the other party speaks another version of the link's protocol")
        role, nonce, settings = reader.number(1), reader.take(32), reader.take(32)
        positions = None
        if reader.left:
            positions = {lane: Position(reader.number(8), reader.number(8)) for lane in Direction}
            if any(one.end < one.start for one in positions.values()):
                raise LinkError("malformed positions in the ledger")
        reader.end()
        return cls(role=role, nonce=nonce, settings=settings, positions=positions)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Detections. ``bit`` has those of the test basis alone."""

    type: ClassVar[Type] = Type.REPORT
    pulse: NDArray[np.int64]
    basis: Bits
    bit: Bits

    def encode(self) -> bytes:
        gaps = np.diff(self.pulse)
        if len(gaps) and int(gaps.max()) >= 1 << 32:
            raise LinkError(TOO_FEW_DETECTIONS)
        return (
            struct.pack(">IQ", len(self.pulse), int(self.pulse[0]))
            + gaps.astype(">u4").tobytes()
            + pack_bits(self.basis)
            + pack_bits(self.bit)
        )

    @classmethod
    def decode(cls, body: bytes) -> Self:
        reader = _Reader(body)
        count, first = reader.number(4), reader.number(8)
        if not 0 < count <= CHUNK or first >= 1 << 62:
            raise LinkError("a report with an impossible number of detections")
        gaps = np.frombuffer(reader.take(4 * (count - 1)), dtype=">u4").astype(np.int64)
        if len(gaps) and int(gaps.min()) == 0:
            raise LinkError("a pulse is reported twice")
        pulse = first + np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(gaps)])
        basis = reader.bits(count)
        found = cls(pulse=pulse, basis=basis, bit=reader.bits(int(basis.sum())))
        reader.end()
        return found


@dataclass(frozen=True, kw_only=True)
class Sift:
    """Alice's answer to a report; ``intensity`` and ``bit`` are of the detections kept."""

    type: ClassVar[Type] = Type.SIFT
    kept: Bits
    intensity: Bits
    bit: Bits
    """Bits of the test basis alone."""

    def encode(self) -> bytes:
        pairs = np.stack([self.intensity >> 1, self.intensity & 1], axis=1).reshape(-1)
        return pack_bits(self.kept) + pack_bits(pairs) + pack_bits(self.bit)

    @classmethod
    def decode(cls, body: bytes, *, basis: Bits, intensities: int) -> Self:
        """``basis``: Bob's bases of the report that this answers."""
        reader = _Reader(body)
        kept = reader.bits(len(basis))
        pairs = reader.bits(2 * int(kept.sum())).reshape(-1, 2)
        intensity = pairs[:, 0] * np.uint8(2) + pairs[:, 1]
        if len(intensity) and int(intensity.max()) >= intensities:
            raise LinkError("an unknown intensity index")
        found = cls(kept=kept, intensity=intensity, bit=reader.bits(int((kept & basis).sum())))
        reader.end()
        return found


@dataclass(frozen=True)
class Request:
    """Error correction: a request, in the format of the method."""

    type: ClassVar[Type] = Type.ASK
    body: bytes

    def encode(self) -> bytes:
        return self.body


@dataclass(frozen=True)
class Answer:
    """Error correction: Alice's answer, in the format of the method."""

    type: ClassVar[Type] = Type.TELL
    body: bytes

    def encode(self) -> bytes:
        return self.body


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """Error correction has ended."""

    type: ClassVar[Type] = Type.CORRECTED
    disclosed: int
    announced: int
    """Bits about Alice's and about Bob's key that it disclosed, as Bob counts them."""
    errors: tuple[int, ...]
    """Wrong bits of each intensity that were corrected; none unless the proof uses them."""

    def encode(self) -> bytes:
        numbers = (self.disclosed, self.announced, *self.errors)
        return b"".join(count.to_bytes(8) for count in numbers)

    @classmethod
    def decode(cls, body: bytes, *, most: tuple[int, ...]) -> Self:
        """``most``: the greatest possible counts; empty if none are announced."""
        reader = _Reader(body)
        disclosed, announced = reader.number(8), reader.number(8)
        errors = tuple(reader.number(8) for _ in most)
        reader.end()
        if any(count > bound for count, bound in zip(errors, most, strict=True)):
            raise LinkError("more wrong bits than bits were reported")
        return cls(disclosed=disclosed, announced=announced, errors=errors)


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Verification, privacy amplification, and the name from which key IDs are made."""

    type: ClassVar[Type] = Type.FINISH
    numbers: tuple[int, ...]
    """What Alice computes with: bits that error correction disclosed about Alice's and about Bob's
    key, as Alice counts them; secret bits; bytes that Alice's ledger wants."""
    hash_seed: bytes
    hash: Bits
    name: bytes
    seed: Bits

    HASH_SEED: ClassVar[int] = 32
    NAME: ClassVar[int] = 16

    def encode(self) -> bytes:
        numbers = b"".join(number.to_bytes(8) for number in self.numbers)
        return numbers + self.hash_seed + pack_bits(self.hash) + self.name + pack_bits(self.seed)

    @classmethod
    def decode(cls, body: bytes, *, hash_bits: int, seed_bits: int) -> Self:
        reader = _Reader(body)
        found = cls(
            numbers=tuple(reader.number(8) for _ in range(4)),
            hash_seed=reader.take(cls.HASH_SEED),
            hash=reader.bits(hash_bits),
            name=reader.take(cls.NAME),
            seed=reader.bits(seed_bits),
        )
        reader.end()
        return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the keys and the numbers agree."""

    type: ClassVar[Type] = Type.VERDICT
    agree: bool

    def encode(self) -> bytes:
        return bytes([self.agree])

    @classmethod
    def decode(cls, body: bytes) -> Self:
        if body not in (b"\0", b"\1"):
            raise LinkError("a malformed verdict")
        return cls(agree=body == b"\1")


class SessionEnded(LinkError):
    """The other party ended the session."""


class SignatureRefused(LinkAuthenticationError):
    """A signature of the other party does not verify."""


class OtherDetections(LinkError):
    """The other party reports detections that this one does not have."""


@dataclass(frozen=True, kw_only=True)
class End:
    """The last message of a party that ends the session: a number in :data:`REASONS`."""

    type: ClassVar[Type] = Type.END
    reason: int

    def encode(self) -> bytes:
        return bytes([self.reason])

    @classmethod
    def because_of(cls, error: LinkError) -> Self:
        """The END message for this error."""
        kinds = [kind for kind, _ in REASONS]
        return cls(reason=next(n for n, kind in enumerate(kinds) if isinstance(error, kind)))

    @classmethod
    def decode(cls, body: bytes) -> Self:
        if len(body) != 1 or body[0] >= len(REASONS):
            raise LinkError("the other party ended the session for an unknown reason")
        return cls(reason=body[0])

    @property
    def words(self) -> str:
        """The text for the log of the party that receives it."""
        return f"the other party ended the session: {REASONS[self.reason][1]}"


NOT_OURS: Final = (
    "it does not accept our signature: check that the certificate of ours that it reads "
    "(peer_credential of a KME, --peer of a command) is the present one, and that it has read it"
)
REASONS: Final[tuple[tuple[type[LinkError], str], ...]] = (
    (SignatureRefused, NOT_OURS),
    (LinkAuthenticationError, "what it received from us is not authentic: see its log"),
    (OtherDetections, "it has other detections: the two files are not of the same ones"),
    (NotRandom, "Alice's bits are not random: see its log"),
    (LinkError, "see its log"),
)
"""Errors that end a session, each with the text for the other party; the first match is used."""


Message = Hello | Report | Sift | Request | Answer | Corrected | Finish | Verdict | End
