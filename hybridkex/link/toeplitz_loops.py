"""The product behind privacy amplification in integers, compiled by numba.

:mod:`hybridkex.link.toeplitz` describes the product. Its coefficients count products of bits and
are smaller than the prime :data:`P`, so a number-theoretic transform modulo ``P`` gives them
exactly. Nothing is rounded.

A transform of ``N = rows · columns`` numbers is done in four steps (D. H. Bailey, J. Supercomputing
4, 23 (1990)): columns, factors, transposition, rows. Both kinds of transforms process :data:`WIDTH`
lanes side by side, so that the compiler uses vector instructions. The frequencies stay in the order
in which the steps leave them, because products are taken point by point.

Modular arithmetic is that of D. Harvey, J. Symb. Comp. 60, 113 (2014): numbers are kept below
``2 P``, factors that are known in advance have a precomputed quotient (:func:`_times`), and the
others are multiplied by Montgomery's method (:func:`_montgomery`), which divides by ``2^32``.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numba import uint32, uint64
from numpy.typing import NDArray

from hybridkex.link.compiled import compiled, inlined

Bits = NDArray[np.uint8]
Words = NDArray[np.uint32]

P: Final = 45 * 2**24 + 1
"""A prime below ``2^30``: sums of four numbers below ``P`` fit into 32 bits."""
GENERATOR: Final = 11
WIDTH: Final = 32
MOST_TWOS: Final = 24
"""``P - 1`` is divisible by this power of two."""
ODD: Final[dict[int, tuple[int, ...]]] = {1: (), 3: (3,), 5: (5,), 9: (3, 3), 15: (3, 5)}
"""Odd parts that ``N`` may have, and the radices of their layers."""
MAX_LENGTH: Final = 15 << MOST_TWOS

_P: Final = np.uint32(P)
_2P: Final = np.uint32(2 * P)
_P64: Final = np.uint64(P)
_32: Final = np.uint64(32)
_MINUS_INVERSE: Final = np.uint32(-pow(P, -1, 1 << 32) % (1 << 32))


@inlined
def _times(a: Any, factor: Any, quotient: Any) -> Any:
    """``a · factor`` below ``2 P`` for any ``a``; ``quotient`` is ``⌊2^32 factor / P⌋``."""
    multiple = uint32((uint64(a) * uint64(quotient)) >> _32)
    return uint32(uint32(a * factor) - uint32(multiple * _P))


@inlined
def _montgomery(product: Any) -> Any:
    """``product / 2^32`` below ``2 P``, for a product below ``2^32 P``."""
    multiple = uint32(uint32(product) * _MINUS_INVERSE)
    return uint32((product + uint64(multiple) * _P64) >> _32)


@inlined
def _less(a: Any) -> Any:
    """Reduce a number below ``4 P`` to one below ``2 P`` that is equal modulo ``P``."""
    return min(a, uint32(a - _2P))  # a difference below zero becomes a large number


@compiled
def _forward(x: Any, powers: Any, quotients: Any) -> None:
    """Transform the lanes of ``x``; a power of two of rows, which end in bit-reversed order."""
    rows = len(x)
    size, step = rows, 1
    turn, turn_quotient = powers[rows // 4], quotients[rows // 4]
    while size >= 4:
        quarter = size // 4
        for start in range(0, rows, size):
            for j in range(quarter):
                f1, g1 = powers[j * step], quotients[j * step]
                f2, g2 = powers[2 * j * step], quotients[2 * j * step]
                f3, g3 = powers[3 * j * step], quotients[3 * j * step]
                r0, r1 = x[start + j], x[start + j + quarter]
                r2, r3 = x[start + j + 2 * quarter], x[start + j + 3 * quarter]
                for lane in range(WIDTH):
                    a, b, c, d = r0[lane], r1[lane], r2[lane], r3[lane]
                    even, odd = _less(uint32(a + c)), _less(uint32(b + d))
                    left = _less(uint32(a - c + _2P))
                    right = _times(uint32(b - d + _2P), turn, turn_quotient)
                    r0[lane] = _less(uint32(even + odd))
                    r1[lane] = _times(uint32(even - odd + _2P), f2, g2)
                    r2[lane] = _times(uint32(left + right), f1, g1)
                    r3[lane] = _times(uint32(left - right + _2P), f3, g3)
        size = quarter
        step *= 4
    if size == 2:
        _pairs(x)


@compiled
def _pairs(x: Any) -> None:
    for start in range(0, len(x), 2):
        r0, r1 = x[start], x[start + 1]
        for lane in range(WIDTH):
            a, b = r0[lane], r1[lane]
            r0[lane] = _less(uint32(a + b))
            r1[lane] = _less(uint32(a - b + _2P))


@compiled
def _backward(x: Any, powers: Any, quotients: Any) -> None:
    """The reverse of :func:`_forward` with the powers of the inverse root, times the rows."""
    rows = len(x)
    turn, turn_quotient = powers[rows // 4], quotients[rows // 4]
    size = 4
    while size < rows:
        size *= 4
    if size > rows:  # an odd number of layers
        _pairs(x)
        size = 8
    else:
        size = 4
    while size <= rows:
        quarter, step = size // 4, rows // size
        for start in range(0, rows, size):
            for j in range(quarter):
                f1, g1 = powers[j * step], quotients[j * step]
                f2, g2 = powers[2 * j * step], quotients[2 * j * step]
                f3, g3 = powers[3 * j * step], quotients[3 * j * step]
                r0, r1 = x[start + j], x[start + j + quarter]
                r2, r3 = x[start + j + 2 * quarter], x[start + j + 3 * quarter]
                for lane in range(WIDTH):
                    a, b = r0[lane], _times(r1[lane], f2, g2)
                    c, d = _times(r2[lane], f1, g1), _times(r3[lane], f3, g3)
                    even, odd = _less(uint32(a + b)), _less(uint32(a - b + _2P))
                    left = _less(uint32(c + d))
                    right = _times(uint32(c - d + _2P), turn, turn_quotient)
                    r0[lane] = _less(uint32(even + left))
                    r2[lane] = _less(uint32(even - left + _2P))
                    r1[lane] = _less(uint32(odd + right))
                    r3[lane] = _less(uint32(odd - right + _2P))
        size *= 4


@compiled
def _threes(x: Any, cosines: Any, sines: Any) -> None:
    """Transforms of three numbers, a third of the rows apart.

    The tables have half the sum and half the difference of the powers of the root of unity and
    their inverses, times ``2^32``.
    """
    apart = len(x) // 3
    cosine, sine = uint64(cosines[0]), uint64(sines[0])
    for j in range(apart):
        r0, r1, r2 = x[j], x[j + apart], x[j + 2 * apart]
        for lane in range(WIDTH):
            a, b, c = r0[lane], r1[lane], r2[lane]
            both = _less(uint32(b + c))
            even = _less(uint32(a + _montgomery(uint64(both) * cosine)))
            odd = _montgomery(uint64(uint32(b - c + _2P)) * sine)
            r0[lane] = _less(uint32(a + both))
            r1[lane] = _less(uint32(even + odd))
            r2[lane] = _less(uint32(even - odd + _2P))


@compiled
def _fives(x: Any, cosines: Any, sines: Any) -> None:
    """Transform five numbers, a fifth of the rows apart."""
    apart = len(x) // 5
    cosine, twice = uint64(cosines[0]), uint64(cosines[1])
    sine, sine_twice = uint64(sines[0]), uint64(sines[1])
    minus = uint64(_P) - sine
    for j in range(apart):
        r0, r1, r2 = x[j], x[j + apart], x[j + 2 * apart]
        r3, r4 = x[j + 3 * apart], x[j + 4 * apart]
        for lane in range(WIDTH):
            a, b, c, d, e = r0[lane], r1[lane], r2[lane], r3[lane], r4[lane]
            be, cd = uint64(_less(uint32(b + e))), uint64(_less(uint32(c + d)))
            b_e, c_d = uint64(_less(uint32(b - e + _2P))), uint64(_less(uint32(c - d + _2P)))
            even_1 = _less(uint32(a + _montgomery(be * cosine + cd * twice)))
            even_2 = _less(uint32(a + _montgomery(be * twice + cd * cosine)))
            odd_1 = _montgomery(b_e * sine + c_d * sine_twice)
            odd_2 = _montgomery(b_e * sine_twice + c_d * minus)
            r0[lane] = _less(uint32(_less(uint32(a + uint32(be))) + uint32(cd)))
            r1[lane], r4[lane] = _less(uint32(even_1 + odd_1)), _less(uint32(even_1 - odd_1 + _2P))
            r2[lane], r3[lane] = _less(uint32(even_2 + odd_2)), _less(uint32(even_2 - odd_2 + _2P))


@compiled
def _scale(x: Any, factors: Any, quotients: Any) -> None:
    for row in range(len(x)):
        line, factor, quotient = x[row], factors[row], quotients[row]
        for lane in range(WIDTH):
            line[lane] = _times(line[lane], factor, quotient)


@compiled
def _load(bits: Any, start: int, columns: int, x: Any) -> None:
    """One strip of the matrix whose rows have ``columns`` bits; zeros after the last bit."""
    for row in range(len(x)):
        at = row * columns + start
        count = min(WIDTH, max(0, len(bits) - at))
        for lane in range(count):
            x[row, lane] = bits[at + lane]
        for lane in range(count, WIDTH):
            x[row, lane] = 0


@compiled
def _turn(x: Any, turns: Any) -> None:
    for row in range(len(x)):
        for lane in range(WIDTH):
            x[row, lane] = _montgomery(uint64(x[row, lane]) * uint64(turns[row, lane]))


@compiled
def _transpose(x: Any, start: int, target: Any) -> None:
    for group in range(len(target)):
        for row in range(WIDTH):
            for lane in range(WIDTH):
                target[group, start + lane, row] = x[group * WIDTH + row, lane]


@compiled
def _transpose_back(source: Any, start: int, x: Any) -> None:
    for group in range(len(source)):
        for row in range(WIDTH):
            for lane in range(WIDTH):
                x[group * WIDTH + row, lane] = source[group, start + lane, row]


@compiled
def _rows(left: Any, right: Any, table: Any) -> None:
    """Transform the rows of both factors, multiply, and transform the product back."""
    for group in range(len(left)):
        x, y = left[group], right[group]
        _forward(x, table[0], table[1])
        _forward(y, table[0], table[1])
        for row in range(len(x)):
            for lane in range(WIDTH):
                x[row, lane] = _montgomery(uint64(x[row, lane]) * uint64(y[row, lane]))
        _backward(x, table[2], table[3])


@compiled
def _parities(x: Any, first: int, start: int, out: Any) -> None:
    for row in range(first, len(x)):
        for lane in range(WIDTH):
            value = x[row, lane]
            out[row - first, start + lane] = min(value, uint32(value - _P)) & 1


def _powers(root: int, count: int, first: int = 1) -> NDArray[np.uint64]:
    """``first · root^i``, modulo ``P``."""
    found = np.full(count, first, dtype=np.uint64)
    known = 1
    while known < count:
        more = min(known, count - known)
        factor = np.uint64(pow(root, known, P))
        found[known : known + more] = found[:more] * factor % np.uint64(P)
        known *= 2
    return found


def _with_quotients(factors: NDArray[np.uint64]) -> tuple[Words, Words]:
    quotients = (factors << np.uint64(32)) // np.uint64(P)
    return factors.astype(np.uint32), quotients.astype(np.uint32)


def _table(count: int) -> tuple[Words, Words, Words, Words]:
    """Powers of a root of unity of this order, and of its inverse."""
    root = pow(GENERATOR, (P - 1) // count, P)
    back = pow(root, -1, P)
    return *_with_quotients(_powers(root, count)), *_with_quotients(_powers(back, count))


def _odd_tables(radix: int) -> tuple[Words, Words]:
    """Tables of :func:`_threes` and :func:`_fives`."""
    root = pow(GENERATOR, (P - 1) // radix, P)
    half = pow(2, -1, P) << 32
    powers = [(pow(root, k, P), pow(root, -k, P)) for k in range(1, radix // 2 + 1)]
    cosines = [(ahead + back) * half % P for ahead, back in powers]
    sines = [(ahead - back) * half % P for ahead, back in powers]
    return np.array(cosines, dtype=np.uint32), np.array(sines, dtype=np.uint32)


ODD_LAYERS: Final = {3: _threes, 5: _fives}


class _Plan:
    """The shape of a transform of at least ``length`` numbers, and its tables."""

    def __init__(self, length: int) -> None:
        def cost(odd: int) -> float:
            """An odd layer takes as long as about three layers of radix 2."""
            twos = self._twos(length, odd)
            return math.inf if twos > MOST_TWOS else (odd << twos) * (twos + 3 * len(ODD[odd]))

        self._odd: Final = min(ODD, key=cost)
        twos = self._twos(length, self._odd)
        size = self._odd << twos
        self.columns: Final = 1 << min(twos - 5, 12, round(math.log2(size) / 2.0))
        self.rows: Final = size // self.columns
        self._size: Final = size
        self.table: Final = _table(self.columns)
        self._inner: Final = self.rows // self._odd
        self._inner_table: Final = _table(self._inner)
        self._layers: Final = self._odd_layers()
        self._turns: Final = self._make_turns(1, 1 << 32)
        self._back: Final = self._make_turns(-1, pow(size, -1, P) << 64)

    @staticmethod
    def _twos(length: int, odd: int) -> int:
        """Factors of two in the size, so that rows and columns are whole groups of lanes."""
        return max(12, (-(-length // odd) - 1).bit_length())

    def _odd_layers(self) -> list[Any]:
        """Rows of a part, radix, tables and factors after the layer, for each odd layer."""
        layers, rows = [], self.rows
        for radix in ODD[self._odd]:
            root = pow(GENERATOR, (P - 1) // rows, P)
            exponents = np.outer(np.arange(radix), np.arange(rows // radix)).reshape(-1)
            table = _powers(root, rows)
            ahead = _with_quotients(table[exponents % rows])
            back = _with_quotients(table[-exponents % rows])
            layers.append((rows, radix, *_odd_tables(radix), ahead, back))
            rows //= radix
        return layers

    def _frequencies(self) -> NDArray[np.int64]:
        """The frequency of each row after the transform of the columns."""
        bits = self._inner.bit_length() - 1
        found = np.zeros(self._inner, dtype=np.int64)
        for bit in range(bits):
            found |= (np.arange(self._inner) >> bit & 1) << (bits - 1 - bit)
        for radix in reversed(ODD[self._odd]):
            found = (np.arange(radix)[:, None] + radix * found).reshape(-1)
        return found

    def _make_turns(self, sign: int, scale: int) -> tuple[Words, Words, Words]:
        """Factors of the first strip, and factors from one strip to the next."""
        root = pow(GENERATOR, sign * (P - 1) // self._size, P)
        frequencies = self._frequencies()
        lanes = [_powers(pow(root, lane, P), self.rows, scale % P) for lane in range(WIDTH)]
        step = _powers(pow(root, WIDTH, P), self.rows)[frequencies]
        first = np.stack(lanes, axis=1)[frequencies].astype(np.uint32)
        return first, *_with_quotients(step)

    def ahead(self, x: Words) -> None:
        """Transform the columns of a strip."""
        for rows, radix, cosines, sines, factors, _ in self._layers:
            for part in x.reshape(-1, rows, WIDTH):
                ODD_LAYERS[radix](part, cosines, sines)
                _scale(part, *factors)
        for part in x.reshape(-1, self._inner, WIDTH):
            _forward(part, *self._inner_table[:2])

    def back(self, x: Words) -> None:
        """The reverse of :meth:`ahead`, times the number of rows."""
        for part in x.reshape(-1, self._inner, WIDTH):
            _backward(part, *self._inner_table[2:])
        for rows, radix, cosines, sines, _, factors in reversed(self._layers):
            for part in x.reshape(-1, rows, WIDTH):
                _scale(part, *factors)
                # The inverse of the root changes the sign of the sines alone.
                ODD_LAYERS[radix](part, cosines, P - sines)

    def turns(self, *, back: bool) -> Iterator[tuple[int, Words]]:
        """The first column of each strip, and the factors of its numbers."""
        first, factors, quotients = self._back if back else self._turns
        turns = first.copy()
        for start in range(0, self.columns, WIDTH):
            yield start, turns
            _scale(turns, factors, quotients)


_plan = functools.lru_cache(maxsize=4)(_Plan)


def middle_product(seed: Bits, tail: Bits) -> Bits:
    """See :func:`hybridkex.link.toeplitz._middle_product`; at most :data:`MAX_LENGTH` bits."""
    plan = _plan(len(seed))
    rows, columns = plan.rows, plan.columns
    left, right = (np.empty((rows // WIDTH, columns, WIDTH), dtype=np.uint32) for _ in range(2))
    strip = np.empty((rows, WIDTH), dtype=np.uint32)
    for start, turns in plan.turns(back=False):
        for bits, target in ((seed, left), (tail, right)):
            _load(bits, start, columns, strip)
            plan.ahead(strip)
            _turn(strip, turns)
            _transpose(strip, start, target)
    _rows(left, right, plan.table)
    del right
    first = (len(tail) - 1) // columns  # the rows before it are not wanted
    out = np.empty((rows - first, columns), dtype=np.uint8)
    for start, turns in plan.turns(back=True):
        _transpose_back(left, start, strip)
        _turn(strip, turns)
        plan.back(strip)
        _parities(strip, first, start, out)
    begin = len(tail) - 1 - first * columns
    flat: Bits = out.reshape(-1)
    return flat[begin : begin + len(seed) - len(tail) + 1]
