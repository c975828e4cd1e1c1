"""Random bits and numbers: from the operating system, or from a seed when a run must be repeated.

Everything is made of uniform bytes, so that one source serves all. A seed is stretched by a stream
cipher, apart for each purpose.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from hybridkex.errors import LinkError
from hybridkex.link.ranges import whole

TOO_FEW_DETECTIONS: Final = "more than 2^32 pulses passed without a detection: the loss is too high"


class Randomness:
    """A source of random values; see :meth:`system` and :meth:`seeded`."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    @classmethod
    def system(cls) -> "Randomness":
        """Random values of the operating system."""
        return cls(os.urandom)

    @classmethod
    def seeded(cls, seed: int | None, purpose: str) -> "Randomness":
        """Values that are determined by seed and purpose; without a seed, :meth:`system`.

        A seeded link makes keys that anybody with the seed can make. Raises ``ConfigError``
        unless the seed is a whole number.
        """
        if seed is None:
            return cls.system()
        seed = whole("seed", seed)
        key = hashlib.sha256(f"hybridkex link {purpose} {seed}".encode()).digest()
        stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
        return cls(lambda count: stream.update(bytes(count)))

    def bytes(self, count: int) -> bytes:
        """Uniform bytes."""
        return self._read(count)

    def bits(self, count: int) -> NDArray[np.uint8]:
        """Uniform bits, one in each byte of the array."""
        packed = np.frombuffer(self._read(-(-count // 8)), dtype=np.uint8)
        return np.unpackbits(packed, count=count)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers in (0, 1], multiples of 2^-53."""
        words = np.frombuffer(self._read(8 * count), dtype="<u8")
        return ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53

    def happens(self, probability: float | NDArray[np.float64], count: int) -> NDArray[np.bool_]:
        """Events of the given probability."""
        return self.uniform(count) <= probability

    def choice(self, weights: NDArray[np.float64], count: int) -> NDArray[np.uint8]:
        """Indices, drawn in proportion to the weights."""
        bounds = np.cumsum(weights)
        found = np.searchsorted(bounds, self.uniform(count) * bounds[-1])
        chosen: NDArray[np.uint8] = np.minimum(found, len(weights) - 1).astype(np.uint8)
        return chosen

    def gaps(self, probability: float, count: int) -> NDArray[np.int64]:
        """Geometric numbers from 1: trials up to and including the first success.

        Raises ``LinkError`` if one is above 2^32.
        """
        if probability >= 1.0:
            return np.ones(count, dtype=np.int64)
        likely = max(probability, 2.0**-64)  # whose gaps are too long already
        failures = np.floor(np.log(self.uniform(count)) / np.log1p(-likely))
        if failures.max(initial=0.0) >= 1 << 32:
            raise LinkError(TOO_FEW_DETECTIONS)
        trials: NDArray[np.int64] = 1 + failures.astype(np.int64)
        return trials
