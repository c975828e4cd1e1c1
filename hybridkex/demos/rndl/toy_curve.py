"""A TOY elliptic curve, small enough to compute discrete logarithms in seconds.

NEVER USE IT AS A GROUP: 36 bits resist about a quarter of a million additions, and this arithmetic
ignores side channels. It exists to go from a recording to its plaintext once without an oracle:
:func:`discrete_log` breaks it in seconds, and a quantum computer's attack on X25519 differs in the
algorithm, not in the result.

y^2 = x^3 - 3x + 33 over the field of 2^36 - 5 elements. The number of its points is a prime, so
that every point but the neutral one generates all others.
"""

import secrets
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Final, TypeAlias

from hybridkex.crypto.kex import Group, KeyExchange, Property, Started
from hybridkex.errors import IllegalParameter
from hybridkex.secret import Secret

PRIME: Final = 2**36 - 5
A: Final = PRIME - 3
B: Final = 33
ORDER: Final = 68_719_022_539

Point: TypeAlias = tuple[int, int] | None
"""Affine coordinates; ``None`` is the neutral element."""

GENERATOR: Final[Point] = (2, 51_741_851_039)

_WIDTH: Final = 5  # bytes of a coordinate
_LENGTH: Final = 1 + 2 * _WIDTH


def add(one: Point, other: Point) -> Point:
    if one is None:
        return other
    if other is None:
        return one
    (x1, y1), (x2, y2) = one, other
    if x1 == x2:
        if (y1 + y2) % PRIME == 0:
            return None
        slope = (3 * x1 * x1 + A) * pow(2 * y1, -1, PRIME) % PRIME
    else:
        slope = (y2 - y1) * pow(x2 - x1, -1, PRIME) % PRIME
    x3 = (slope * slope - x1 - x2) % PRIME
    return x3, (slope * (x1 - x3) - y1) % PRIME


def multiply(factor: int, point: Point) -> Point:
    """A multiple of a point, by doubling and adding."""
    result: Point = None
    for bit in bin(factor % ORDER)[2:]:
        result = add(result, result)
        if bit == "1":
            result = add(result, point)
    return result


def encode(point: Point) -> bytes:
    """The uncompressed form of a point other than the neutral one: ``04``, x, y."""
    assert point is not None
    return b"\x04" + b"".join(value.to_bytes(_WIDTH, "big") for value in point)


def decode(share: bytes) -> Point:
    """The point in a key share.

    Raises:
        IllegalParameter: it is not a point of the curve.
    """
    if len(share) != _LENGTH or share[0] != 4:
        raise IllegalParameter("toy curve: not an uncompressed point")
    x, y = (int.from_bytes(share[start : start + _WIDTH], "big") for start in (1, 1 + _WIDTH))
    if x >= PRIME or y >= PRIME or (y * y - x * x * x - A * x - B) % PRIME:
        raise IllegalParameter("toy curve: the point is not on the curve")
    return x, y


def shared_secret(private: int, peer: Point) -> bytes:
    """The x coordinate, as with the NIST curves (RFC 9846 section 7.4.2)."""
    point = multiply(private, peer)
    assert point is not None  # the order is prime and the private key is not 0
    return point[0].to_bytes(_WIDTH, "big")


class _ToyStarted:
    __slots__ = ("_private", "share")

    def __init__(self) -> None:
        self._private = 1 + secrets.randbelow(ORDER - 1)
        self.share = encode(multiply(self._private, GENERATOR))

    def finish(self, peer_share: bytes) -> Secret:
        return Secret(shared_secret(self._private, decode(peer_share)))


class _ToyExchange:
    """The toy curve as a plug-in of the engine."""

    name = "toy curve (36 bits)"
    properties = Property.CLASSICAL
    offer_length = answer_length = _LENGTH

    @property
    def parts(self) -> Sequence[KeyExchange]:
        return (self,)

    def start(self) -> Started:
        return _ToyStarted()

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        started = _ToyStarted()
        return started.share, started.finish(peer_share)


TOY_GROUP: Final = Group(code=0xFE24, name="toy36", exchange=_ToyExchange())
"""Under a code point for private use (RFC 9846 section 4.3.7: 0xFE00 to 0xFEFF)."""


def discrete_log(target: Point, progress: Callable[[str, int, int], None] | None = None) -> int:
    """The factor by which ``target`` is a multiple of the generator.

    Shanks's baby-step giant-step algorithm. A point and its negative share their x coordinate, so a
    table of i*G for i up to m finds every multiple within m of a giant step's position, and giant
    steps are 2m + 1 long: sqrt(n/2) entries and as many steps suffice for the group's n elements.

    Args:
        progress: called periodically with the phase, the steps done and the total.
    """
    reach = isqrt(ORDER // 2)
    strides = ORDER // (2 * reach + 1) + 1

    def report(what: str, done: int, total: int) -> None:
        if progress is not None and (done % (1 << 14) == 0 or done == total):
            progress(what, done, total)

    baby: dict[int, int] = {}
    point: Point = None
    for index in range(1, reach + 1):
        point = add(point, GENERATOR)
        assert point is not None
        baby[point[0]] = index
        report("baby steps", index, reach)
    stride = multiply(-(2 * reach + 1), GENERATOR)
    here = target
    for giant in range(strides + 1):
        base = giant * (2 * reach + 1)
        near = 0 if here is None else baby.get(here[0])
        if near is not None:
            for candidate in (base + near, base - near):
                if multiply(candidate, GENERATOR) == target:
                    report("giant steps", giant, giant)
                    return candidate % ORDER
        here = add(here, stride)
        report("giant steps", giant + 1, strides)
    raise AssertionError("every point of the curve is a multiple of the generator")
