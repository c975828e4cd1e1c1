"""Privacy amplification: a random Toeplitz matrix times the key, exactly.

The matrix is ``(1 | T)``: an identity beside a Toeplitz matrix, so ``m`` bits come out as
``head ⊕ T · tail`` with the first ``m`` bits of the key as ``head`` and the others as ``tail``. The
family is 2-universal (keys with different tails collide with probability ``2^-m``, keys that differ
in their heads alone never do), needs ``n - 1`` random bits instead of ``n + m - 1``, and a
convolution of length ``n`` instead of ``n + m``. M. Hayashi, T. Tsurumaru, IEEE Trans. Inf. Theory
62, 2213 (2016), arXiv:1311.5322, section V, call it the modified Toeplitz matrix.

``T · tail`` is part of the product of two polynomials with coefficients 0 and 1, modulo 2. Where
numba is installed (``hybridkex[fast]``), :mod:`.toeplitz_loops` computes it in integers. Otherwise
a floating-point Fourier transform does, whose results are rounded to integers.

*Rounding cannot flip a bit.* C. Percival, Math. Comp. 72, 387 (2002), theorem 5.1: a product ``z``
of ``x`` and ``y`` by transforms of ``2^t`` points, with machine precision ``e`` and twiddle factors
wrong by at most ``d``, is wrong in no coefficient by more than ``|x| |y| ((1 + e)^{3t}
(1 + e √5)^{3t + 1} (1 + d)^{3t} - 1)``. With coefficients 0 and 1 the Euclidean norms give
``|x| |y| <= n``. :func:`rounding_bound` evaluates this with ``t`` two larger than the size asks
for, which covers the extra factors below, and ``d = 8 e``: 8e-7 at 1e7 bits. A result is certain
below 1/2; :data:`MAX_INPUT` keeps it below 1e-3. The library's twiddle factors are wrong by at most
``2 e``. Each of our own three is the product of two exponentials of an angle below ``2 π``, and
wrong by at most ``32 e``; in all, ``3 · 32 e + 3 t · 2 e < 3 (t + 2) · 8 e``. Numpy's butterflies
of radix 3, 4, 5, ... do no more roundings than as many of radix 2, and its real transforms leave
out operations of the complex ones. In case any of these statements is
wrong, each product also checks that all coefficients that it returns are within 1/16 of an integer,
and raises :class:`RoundingError` otherwise.

The transform of ``N`` real numbers is done in two steps, columns and rows of a matrix of ``N``
numbers (the columns are real, so half of the rows of their spectrum are enough), a strip at a time:
the strips stay in the processor's cache.
"""

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError
from hybridkex.link.ranges import MOST_EVENTS, bit_array, whole, within

Bits = NDArray[np.uint8]
Real = NDArray[np.float64]
Complex = NDArray[np.complex128]

MAX_INPUT: Final = 1 << 30
"""The longest key, in bits."""
LEAST_COMPILED: Final = 1 << 17
"""Below this many bits the transform in numpy takes 5 ms at most; numba takes 500 to load."""
SLACK: Final = 1.0 / 16.0
ROUNDER: Final = 1.5 * 2.0**52
LOW: Final = 0 if sys.byteorder == "little" else 7
"""Index of the lowest byte of a number."""
STRIP: Final = 64
"""Columns of a strip: with at most as many rows as below, one megabyte of complex numbers."""
MAX_ROWS: Final = 1024


class RoundingError(ArithmeticError):
    """The Fourier transform was less exact than proven. The processor or a library is at fault."""


def rounding_bound(length: int) -> float:
    """The most that a coefficient can be wrong by, for a key of ``length`` bits; see above.

    Raises ``ConfigError``.
    """
    length = int(within("length", whole("length", length), 0, MOST_EVENTS))
    e = 2.0**-53
    t = math.ceil(math.log2(max(2, length))) + 2
    growth = 3 * t * math.log1p(e) + (3 * t + 1) * math.log1p(e * math.sqrt(5.0))
    return length * math.expm1(growth + 3 * t * math.log1p(8.0 * e))


def seed_length(length: int) -> int:
    """The number of random bits that a key of ``length`` bits takes: ``length - 1``.

    Raises ``ConfigError``.
    """
    return max(0, int(within("length", whole("length", length), 0, MOST_EVENTS)) - 1)


def compress(key: Bits, seed: Bits, length: int, *, compiled: bool | None = None) -> Bits:
    """Hash a key (``n`` bits, one in each byte) to ``length`` bits; ``seed`` has ``n - 1``.

    ``out[i] = key[i] ⊕ ⊕_j seed[i - j + n - m - 1] key[m + j]``. ``compiled``: use numba; ``None``:
    if it is installed and the key is neither short nor longer than it can take. The result is the
    same. Raises ``ConfigError`` for lengths that do not fit, ``ImportError`` without numba.
    """
    key, seed, length = bit_array("key", key), bit_array("seed", seed), whole("length", length)
    n = len(key)
    if not 0 <= length <= n or n > MAX_INPUT:
        raise ConfigError("the output of privacy amplification cannot be longer than its input")
    if len(seed) != seed_length(n):
        raise ConfigError(f"a key of {n} bits takes a seed of {seed_length(n)}")
    head, tail = key[:length], key[length:]
    if length == 0 or len(tail) == 0:
        return head.copy()
    product = _product(len(seed), compiled)
    return head ^ product(seed, tail)


def _product(length: int, compiled: bool | None) -> Callable[[Bits, Bits], Bits]:
    if compiled or (compiled is None and length >= LEAST_COMPILED):
        try:
            loops = importlib.import_module("hybridkex.link.toeplitz_loops")
        except ImportError:  # numba is an extra
            if compiled:
                raise
        else:
            if length <= loops.MAX_LENGTH:
                return cast(Callable[[Bits, Bits], Bits], loops.middle_product)
    return _middle_product


class _Plan:
    """A transform of at least ``length`` real numbers: its shape and its factors.

    Number ``j = row · columns + column`` of ``N``. Once the columns are transformed, the factor is
    ``exp(-2πi row column / N)``. The table ``first`` is that of the first strip; the others differ
    from it by a factor of the row.
    """

    def __init__(self, length: int) -> None:
        from scipy import fft  # noqa: PLC0415  # 0.1 s, and closed forms need no transform

        self.rows: Final = min(MAX_ROWS, 2 << max(0, round(math.log2(length) / 2.0) - 2))
        self.columns: Final = fft.next_fast_len(-(-length // self.rows))
        self.half: Final = self.rows // 2 + 1
        row = np.arange(self.half)
        self._first: Final = self._turn(row[:, None] * np.arange(STRIP))
        self._shift: Final = self._turn(np.arange(0, self.columns, STRIP)[:, None] * row)

    def _turn(self, steps: NDArray[np.int64]) -> Complex:
        total = self.rows * self.columns
        turned: Complex = np.exp(-2j * np.pi / total * (steps % total))
        return turned

    def strips(self) -> Iterator[tuple[slice, Complex, Real, Complex]]:
        """The columns of each strip, their factors, and room for them and for their spectrum."""
        factors = np.empty((self.half, STRIP), dtype=np.complex128)
        part, spectrum = np.empty((self.rows, STRIP)), np.empty_like(factors)
        for number, start in enumerate(range(0, self.columns, STRIP)):
            columns = slice(start, min(start + STRIP, self.columns))
            width = columns.stop - start
            np.multiply(self._shift[number][:, None], self._first, out=factors)
            yield columns, factors[:, :width], part[:, :width], spectrum[:, :width]

    def grid(self, bits: Bits) -> Bits:
        """The bits as a matrix, filled up with zeros."""
        padded = np.zeros(self.rows * self.columns, dtype=np.uint8)
        padded[: len(bits)] = bits
        return padded.reshape(self.rows, self.columns)


_plan = functools.lru_cache(maxsize=4)(_Plan)


def _middle_product(seed: Bits, tail: Bits) -> Bits:
    """Coefficients ``len(tail) - 1`` to ``len(seed) - 1`` of the product, modulo 2.

    A product modulo ``x^N - 1`` with ``N >= len(seed)`` wraps the other coefficients onto those
    below ``len(tail) - 1`` alone.
    """
    plan = _plan(len(seed))
    rows, columns, half = plan.rows, plan.columns, plan.half
    left, right = (np.empty((half, columns), dtype=np.complex128) for _ in range(2))
    sides = ((plan.grid(seed), left), (plan.grid(tail), right))
    for strip, factors, part, spectrum in plan.strips():
        for bits, target in sides:
            part[:] = bits[:, strip]
            np.fft.rfft(part, axis=0, out=spectrum)
            np.multiply(spectrum, factors, out=target[:, strip])
    del sides
    height = max(1, MAX_ROWS * STRIP // 2 // columns)
    for start in range(0, half, height):
        product, other = left[start : start + height], right[start : start + height]
        np.fft.fft(product, axis=1, out=product)
        np.fft.fft(other, axis=1, out=other)
        product *= other
        np.fft.ifft(product, axis=1, out=product)
    del right
    first = (len(tail) - 1) // columns  # the rows before it are not wanted
    out = np.empty((rows - first, columns), dtype=np.uint8)
    worst = 0.0
    fractions = np.empty((rows - first, STRIP))
    for strip, factors, part, spectrum in plan.strips():
        np.conjugate(factors, out=spectrum)
        np.multiply(spectrum, left[:, strip], out=spectrum)
        np.fft.irfft(spectrum, n=rows, axis=0, out=part)
        values, fraction = part[first:], fractions[:, : part.shape[1]]
        # Numbers so large have no room for a fraction: the addition rounds to an integer, the last
        # bit of the sum is its last bit.
        np.add(values, ROUNDER, out=fraction)
        np.bitwise_and(fraction.view(np.uint8)[:, LOW::8], 1, out=out[:, strip])
        fraction -= ROUNDER
        np.subtract(values, fraction, out=fraction)
        worst = max(worst, float(fraction.max()), -float(fraction.min()))
    if not worst < SLACK:
        raise RoundingError(f"a coefficient is {worst:.3g} from an integer")
    start = len(tail) - 1 - first * columns
    flat: Bits = out.reshape(-1)
    return flat[start : start + len(seed) - len(tail) + 1]
