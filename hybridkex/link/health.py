"""Health tests of Alice's bits, which the bounds assume to be random.

The bounds for laser pulses assume that Alice's bits are uniform and independent, of each other and
of everything else that Alice chooses. No test can prove this; these tests only detect mistakes such
as a wrong column, an output that is not connected, or a test pattern:

* frequency: the number of ones for each basis and intensity (SP 800-22, section 2.1);
* autocorrelation: whether a bit differs from the one 1 to :data:`LAGS` places earlier (the first
  of them is the runs test of SP 800-22, section 2.3), and in the first :data:`FOLDED` detections
  from the one at any distance, which shows rows that repeat;
* the same for the last bit before it whose pulse has the same place in a pattern of
  :data:`PATTERNS` pulses, which shows patterns that Alice's modulator repeats;
* the Adaptive Proportion Test and the Repetition Count Test (NIST SP 800-90B, section 4.4), which
  detect a failure in a part of the block.

Differences of uniform independent bits at a fixed distance are uniform and independent themselves.
So each test but the last compares the number of heads of fair coins with Hoeffding's inequality
(:mod:`hybridkex.link.statistics`), and all of them together refuse good bits with a probability of
at most :data:`FALSE_ALARM`.

**Entangled pairs**: Alice measures bits that an untrusted source may have biased, and the
uncertainty relation covers that. But a measured bit, or its sum with other bits, anticommutes with
the phase error of its pair, so for a share ``phi`` of phase errors no share of ones may be further
from half than ``sqrt(phi (1 - phi))``. The tests allow that much.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import NotRandom
from hybridkex.link.statistics import divergence

FALSE_ALARM: Final = 2.0**-40
"""An upper bound on the probability that a block of good bits is refused."""
MOST_TESTS: Final = 1 << 7
SHARE: Final = FALSE_ALARM / (2 * MOST_TESTS)
"""The false-alarm probability of one test in one direction."""
KINDS: Final = 4
"""The maximum number of intensities."""
LAGS: Final = 32
WINDOW: Final = 1024
"""The window size in bits, as in SP 800-90B for a binary source."""
PATTERNS: Final = (55_440, 64_000, *(2**order - 1 for order in (7, 9, 11, 13, 15, 20, 23)))
"""Lengths in pulses; every divisor is tested with them (all up to 12; 2^9, 5^3 and 1,000). The
others are those of the binary test sequences that pattern generators have (ITU-T O.150, O.151)."""
FOLDED: Final = 1 << 18
"""The maximum number of detections that are searched for repetitions."""

Bits = NDArray[np.uint8]


def check_chosen(bit: Bits, basis: Bits, intensity: Bits, pulse: NDArray[np.int64]) -> None:
    """Test the bits that Alice chose for all detections of a block, in the order of time.

    One row of each array for each detection; ``basis`` 0 is the key basis. Raises ``NotRandom``.
    """
    _refuse(_chosen(bit, basis, intensity, pulse))


def check_measured(key: Bits, phase_error: float) -> None:
    """Test the bits that Alice measured in the key basis.

    ``phase_error``: an upper bound on their phase error rate. Raises ``NotRandom``.
    """
    phi = min(phase_error, 0.5)
    _refuse(_series(key, "bits of the key basis", math.sqrt(phi * (1.0 - phi))))


def _refuse(faults: Iterator[str]) -> None:
    for fault in faults:
        raise NotRandom(
            f"Alice's bits are not random: {fault}, and no key is made of them: check which bits "
            "Alice's end has recorded, Alice's random number generator, and whether Bob's two "
            "detectors are equally efficient"
        )


def _chosen(bit: Bits, basis: Bits, intensity: Bits, pulse: NDArray[np.int64]) -> Iterator[str]:
    kinds = 2 * intensity + basis
    for kind in range(2 * KINDS):
        this = kinds == kind
        name = f"the {('key', 'test')[kind % 2]} basis, intensity {kind // 2 + 1},"
        yield from _coins(this & bit, int(np.count_nonzero(this)), f"bits of {name} are ones")
    yield from _series(bit, "bits")
    yield from _series(bit[basis == 0], "bits of the key basis")
    for length in PATTERNS:
        place = (pulse[:FOLDED] % length).astype(np.uint16 if length < 1 << 16 else np.uint32)
        order = np.argsort(place, kind="stable")
        place, folded = place[order], bit[order]
        flips = (folded[1:] != folded[:-1])[place[1:] == place[:-1]]
        what = f"the last one with the same place in a pattern of {length:,} pulses"
        yield from _coins(flips, len(flips), f"bits differ from {what}")


def _series(bit: Bits, name: str, bias: float = 0.0) -> Iterator[str]:
    """Faults of bits in the order of time, whose share of ones may be within ``bias`` of half."""
    yield from _coins(bit, len(bit), f"{name} are ones", bias)
    for lag in range(1, min(LAGS, len(bit) - 1) + 1):
        flips = bit[lag:] != bit[:-lag]
        yield from _coins(flips, len(flips), f"{name} differ from the one {lag} before", bias)
    yield from _repeats(bit[:FOLDED], name, bias)
    windows = len(bit) // WINDOW
    if windows:
        ones = bit[: windows * WINDOW].reshape(windows, WINDOW).sum(axis=1)
        for extreme in (int(ones.min()), int(ones.max())):
            if _beyond(extreme, WINDOW, SHARE / windows, bias):
                yield f"{extreme:,} of {WINDOW:,} {name} in a row are ones"
    entropy = -math.log2(0.5 + bias)
    if len(bit) and entropy > 0.0:
        cutoff = 1 + math.ceil(math.log2(len(bit) / SHARE) / entropy)
        if _has_run(bit[1:] == bit[:-1], cutoff - 1):
            yield f"{cutoff:,} {name} in a row are the same"


def _repeats(bit: Bits, name: str, bias: float) -> Iterator[str]:
    """Faults at distances beyond :data:`LAGS`, of all distances at once (Wiener-Khinchin)."""
    size = 1 << (2 * len(bit)).bit_length()  # zero padding, so that nothing wraps around
    spectrum = np.fft.rfft(1.0 - 2.0 * bit, size)
    equal = np.fft.irfft(spectrum.real**2 + spectrum.imag**2, size)[: len(bit)].round()
    pairs = np.arange(len(bit), 0.0, -1.0)
    # Hoeffding 1963, theorem 2, with a share of SHARE for each distance.
    most = 2.0 * bias * pairs + np.sqrt(2.0 * pairs * math.log(max(len(bit), 2) / SHARE))
    beyond = np.flatnonzero((abs(equal) > most)[LAGS + 1 :])
    if len(beyond):
        lag = LAGS + 1 + int(beyond[0])
        differ = int(pairs[lag] - equal[lag]) // 2
        yield f"{differ:,} of {int(pairs[lag]):,} {name} differ from the one {lag:,} before"


def _coins(flips: NDArray[Any], total: int, what: str, bias: float = 0.0) -> Iterator[str]:
    """A fault if an improbable number of ``total`` coins show heads (nonzero in ``flips``)."""
    heads = int(np.count_nonzero(flips))
    if _beyond(heads, total, SHARE, bias):
        yield f"{heads:,} of {total:,} {what}"


def _beyond(heads: int, total: int, failure: float, bias: float) -> bool:
    """Return whether this is improbable for coins whose bias is at most ``bias``."""
    share = heads / total if total else 0.5
    if abs(share - 0.5) <= bias:
        return False
    nearest = 0.5 + math.copysign(bias, share - 0.5)
    return total * divergence(share, nearest) > -math.log(failure)


def _has_run(true: NDArray[np.bool_], length: int) -> bool:
    """Return whether ``length`` consecutive values are true."""
    done = 1
    while done < length and len(true):
        step = min(done, length - done)
        true, done = true[step:] & true[:-step], done + step
    return bool(true.any())
