"""Privacy amplification: a random Toeplitz matrix times the key, exactly.

The matrix is ``(1 | T)``: an identity beside a Toeplitz matrix, so ``m`` bits come out as
``head ⊕ T · tail`` with the first ``m`` bits of the key as ``head`` and the others as ``tail``. The
family is 2-universal (keys with different tails collide with probability ``2^-m``, keys that differ
in their heads alone never do), takes ``n - 1`` random bits instead of ``n + m - 1``, and a
convolution of length ``n`` instead of ``n + m``. M. Hayashi, T. Tsurumaru, IEEE Trans. Inf. Theory
62, 2213 (2016), arXiv:1311.5322, section V, call it the modified Toeplitz matrix.

``T · tail`` is a stretch of the product of two polynomials with coefficients 0 and 1, computed by a
floating-point Fourier transform whose results are rounded to integers; their last bits are wanted.

*No rounding can flip a bit.* C. Percival, Math. Comp. 72, 387 (2002), theorem 5.1: a product ``z``
of ``x`` and ``y`` by transforms of ``2^t`` points, with machine precision ``e`` and twiddle factors
wrong by at most ``d``, is wrong in no coefficient by more than ``|x| |y| ((1 + e)^{3t}
(1 + e √5)^{3t + 1} (1 + d)^{3t} - 1)``. With coefficients 0 and 1 the Euclidean norms give
``|x| |y| <= n``. :func:`rounding_bound` evaluates this with ``t`` two larger than the size asks
for, which covers the extra factors below, and ``d = 8 e``: 8e-7 at 1e7 bits. A result is certain
below 1/2; :data:`MAX_INPUT` keeps it below 1e-3. Scipy's butterflies of radix 3, 4, 5, ... do no
more roundings than as many of radix 2. Lest anything rest on that sentence, each product also
checks that *all* its coefficients are within 1/16 of an integer, and raises if not.

The transform is real-to-complex in disguise: numbers ``x_j`` and ``x_{j+N}`` become the parts of
one complex number and are turned by ``exp(iπj/2N)``, after which a cyclic product of ``N`` complex
numbers is one modulo ``x^{2N} + 1``, the *right-angle convolution* of R. Crandall, B. Fagin, Math.
Comp. 62, 305 (1994). It is done in two steps, columns and rows of a matrix of ``N`` numbers, a
strip at a time: the strips stay in the processor's cache and scipy transforms several at once.
"""

import functools
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft

__all__ = ["MAX_INPUT", "compress", "rounding_bound", "seed_length"]

Bits = NDArray[np.uint8]
Complex = NDArray[np.complex128]

MAX_INPUT: Final = 1 << 30
"""The longest key, in bits."""
SLACK: Final = 1.0 / 16.0
ROUNDER: Final = 1.5 * 2.0**52
STRIP: Final = 1 << 16
"""Complex numbers in a strip: one megabyte."""


class RoundingError(ArithmeticError):
    """The Fourier transform was less exact than proven: the processor or a library is at fault."""


def rounding_bound(length: int) -> float:
    """The most that a coefficient can be wrong by, for a key of so many bits; see above."""
    e = 2.0**-53
    t = math.ceil(math.log2(max(2, length))) + 2
    growth = 3 * t * math.log1p(e) + (3 * t + 1) * math.log1p(e * math.sqrt(5.0))
    return length * math.expm1(growth + 3 * t * math.log1p(8.0 * e))


def seed_length(length: int) -> int:
    """How many random bits a key of ``length`` bits takes: ``length - 1``."""
    return max(0, length - 1)


def compress(key: Bits, seed: Bits, length: int) -> Bits:
    """Hash a key (``n`` bits, one in each byte) to ``length`` bits; ``seed`` has ``n - 1``.

    ``out[i] = key[i] ⊕ ⊕_j seed[i - j + n - m - 1] key[m + j]``. Raises ``ValueError`` for lengths
    that do not fit.
    """
    n = len(key)
    if not 0 <= length <= n or n > MAX_INPUT:
        raise ValueError("the output of privacy amplification cannot be longer than its input")
    if len(seed) != seed_length(n):
        raise ValueError("the seed has the wrong length")
    head, tail = key[:length], key[length:]
    if length == 0 or len(tail) == 0:
        return head.copy()
    return head ^ _middle_product(seed, tail)[:length]


@functools.lru_cache(maxsize=4)
def _shape(length: int) -> tuple[int, int]:
    """Rows and columns whose product is at least ``length`` / 2, both good for a transform."""
    half = max(2, -(-length // 2))
    rows = fft.next_fast_len(math.isqrt(half))
    return rows, fft.next_fast_len(-(-half // rows))


class _Factors:
    """What the numbers are multiplied with, number ``j = row · columns + column`` of ``N``.

    Before the columns are transformed ``exp(iπj/2N)``, of which the part of the column is left for
    afterwards; after it, ``exp(-2πi row column/N)``. The tables are of one strip of columns; the
    others differ from it by a factor of the row.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.strip: Final = max(1, STRIP // rows)
        total = rows * columns
        row, column = np.arange(rows), np.arange(self.strip)
        self.before: Final[Complex] = np.exp(0.5j * np.pi / rows * row)[:, None]
        turns = (row[:, None] * column) % total
        self._first: Final = np.exp(np.pi / total * (0.5j * column - 2j * turns))
        self._row: Final = row
        self._total: Final = total

    def after(self, start: int, width: int) -> Complex:
        """For the columns from ``start``."""
        shift = np.pi / self._total * (0.5j * start - 2j * (self._row * start % self._total))
        factors: Complex = np.exp(shift)[:, None] * self._first[:, :width]
        return factors


@functools.lru_cache(maxsize=2)
def _factors(rows: int, columns: int) -> _Factors:
    return _Factors(rows, columns)


def _middle_product(seed: Bits, tail: Bits) -> Bits:
    """Coefficients ``len(tail) - 1`` to ``len(seed)`` of the product, modulo 2.

    A product modulo ``x^L + 1`` with ``L >= len(seed)`` has the others fold onto coefficients below
    ``len(tail) - 1`` alone.
    """
    rows, columns = _shape(len(seed))
    factors = _factors(rows, columns)
    left, right = (np.empty((rows, columns), dtype=np.complex128) for _ in range(2))
    sides = ((_grid(seed, rows, columns), left), (_grid(tail, rows, columns), right))
    strips = [
        slice(start, min(start + factors.strip, columns))
        for start in range(0, columns, factors.strip)
    ]
    for strip in strips:
        after = factors.after(strip.start, strip.stop - strip.start)
        for (real, imaginary), target in sides:
            part = np.empty(after.shape, dtype=np.complex128)
            part.real, part.imag = real[:, strip], imaginary[:, strip]
            part *= factors.before
            part = fft.fft(part, axis=0, overwrite_x=True)
            np.multiply(part, after, out=target[:, strip])
    height = max(1, STRIP // columns)
    for start in range(0, rows, height):
        some = slice(start, start + height)
        product = fft.fft(left[some], axis=1, overwrite_x=True)
        product *= fft.fft(right[some], axis=1, overwrite_x=True)
        left[some] = fft.ifft(product, axis=1, overwrite_x=True)
    del right, sides
    out = np.empty((2, rows, columns), dtype=np.uint8)
    worst = 0.0
    for strip in strips:
        after = factors.after(strip.start, strip.stop - strip.start)
        part = left[:, strip] * np.conj(after, out=after)
        part = fft.ifft(part, axis=0, overwrite_x=True)
        part *= factors.before.conj()
        values = part.view(np.float64)
        # Numbers so large have no room for a fraction: the addition rounds to an integer, the last
        # bit of the sum is its last bit.
        shifted = values + ROUNDER
        np.subtract(values, shifted - ROUNDER, out=values)
        worst = max(worst, float(values.max()), -float(values.min()))
        parity = shifted.view(np.int64).astype(np.uint8) & 1
        out[0, :, strip], out[1, :, strip] = parity[:, 0::2], parity[:, 1::2]
    if not worst < SLACK:
        raise RoundingError(f"a coefficient is {worst:.3g} from an integer")
    flat: Bits = out.reshape(-1)
    return flat[len(tail) - 1 : len(seed)]


def _grid(bits: Bits, rows: int, columns: int) -> Bits:
    padded = np.zeros(2 * rows * columns, dtype=np.uint8)
    padded[: len(bits)] = bits
    return padded.reshape(2, rows, columns)
