"""What a weak coherent pulse does between Alice's laser and Bob's detectors.

The model is the usual one of decoy-state papers. A pulse of mean photon number ``k`` holds a
Poisson number of photons; each reaches a click on its own with probability ``eta``, so an
``n``-photon pulse gives a signal click with the *yield* ``1 - (1 - eta)^n``. Dark counts and
after-pulses come on top and show a random bit; signal clicks show the wrong bit with the
probability ``misalignment``.

The symbols and formulas are those of Lim et al., PRA 89, 022307 (2014), section IV, with one
choice of ours: the error probability ``e_k`` contains the transmittance of the whole system, not
of the fibre alone as the paper prints. A photon that the detector misses makes no error either.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError

__all__ = ["Channel", "Light", "Transmitter", "gain_from_yields"]

PROBABILITY_SUM_TOLERANCE: Final = 1e-9
PHOTONS: Final = np.arange(41)
"""Photon numbers that are summed over; for k <= 1 the rest weighs less than 1e-49."""


class Light(Protocol):
    """How light passes from Alice to a click at Bob: the plain fibre, or an eavesdropper on it."""

    def yields(self, photons: NDArray[np.int64]) -> NDArray[np.float64]:
        """For each photon number, the probability that the pulse makes a signal click."""
        ...

    @property
    def signal_error(self) -> float:
        """The probability that a signal click shows the wrong bit, when the bases agree."""
        ...


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Fibre and receiver. Probabilities are per pulse (gate)."""

    distance_km: float = 0.0
    attenuation_db_per_km: float = 0.2
    receiver_efficiency: float
    """Bob's optics times his detectors."""
    dark_count_probability: float
    """Of one detector; there are two."""
    misalignment: float
    afterpulse_probability: float = 0.0
    dead_time_s: float = 0.0
    """After a click nothing more is registered for this long (both detectors, non-paralysable)."""
    repetition_rate_hz: float = 1e9

    def __post_init__(self) -> None:
        for name in (
            "receiver_efficiency",
            "dark_count_probability",
            "misalignment",
            "afterpulse_probability",
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is a probability, from 0 to 1")
        for name in ("distance_km", "attenuation_db_per_km", "dead_time_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"{name} cannot be negative or infinite")
        if not (math.isfinite(self.repetition_rate_hz) and self.repetition_rate_hz > 0.0):
            raise ConfigError("repetition_rate_hz must be positive")

    def at(self, distance_km: float) -> "Channel":
        """The same equipment with another length of fibre."""
        return replace(self, distance_km=distance_km)

    @property
    def transmittance(self) -> float:
        """Of the fibre alone."""
        return float(10.0 ** (-self.attenuation_db_per_km * self.distance_km / 10.0))

    @property
    def eta(self) -> float:
        """The probability that one photon makes a click."""
        return self.transmittance * self.receiver_efficiency

    @property
    def background(self) -> float:
        """Y0: the probability of a dark count in either detector."""
        return 2.0 * self.dark_count_probability

    def yields(self, photons: NDArray[np.int64]) -> NDArray[np.float64]:
        """``1 - (1 - eta)^n``: see :class:`Light`."""
        return np.asarray(1.0 - (1.0 - self.eta) ** photons, dtype=np.float64)

    @property
    def signal_error(self) -> float:
        """The misalignment: see :class:`Light`."""
        return self.misalignment

    def click(self, signal: float) -> float:
        """D_k: a signal or a dark count, for a signal probability such as ``1 - exp(-eta k)``."""
        return 1.0 - (1.0 - self.background) * (1.0 - signal)

    def gain(self, mean_photons: float) -> float:
        """R_k = D_k (1 + p_ap): the probability of a detection.

        An after-pulse is booked to the gate that caused it, as in the paper.
        """
        signal = -math.expm1(-self.eta * mean_photons)
        return min(1.0, self.click(signal) * (1.0 + self.afterpulse_probability))

    def error(self, mean_photons: float) -> float:
        """e_k: the probability of a detection that shows the wrong bit (not divided by R_k)."""
        signal = -math.expm1(-self.eta * mean_photons)
        return (
            self.dark_count_probability
            + self.misalignment * signal
            + self.afterpulse_probability * self.click(signal) / 2.0
        )

    @property
    def dead_pulses(self) -> int:
        """The dead time in pulses."""
        return round(self.dead_time_s * self.repetition_rate_hz)


def gain_from_yields(light: Light, mean_photons: float) -> float:
    """The probability of a signal click: the Poisson mixture of the yields."""
    log_factorial = np.cumsum(np.log(np.maximum(PHOTONS, 1)))
    if mean_photons == 0.0:
        return float(light.yields(PHOTONS[:1])[0])
    weights = np.exp(-mean_photons + PHOTONS * math.log(mean_photons) - log_factorial)
    return float(weights @ light.yields(PHOTONS))


@dataclass(frozen=True, kw_only=True)
class Transmitter:
    """How Alice chooses: mean photon numbers from bright to dim, and the biased basis choice.

    Bob's receiver uses the same basis bias.
    """

    intensities: tuple[float, ...]
    probabilities: tuple[float, ...]
    key_basis_probability: float

    def __post_init__(self) -> None:
        if len(self.intensities) not in {2, 3}:
            raise ConfigError("decoy-state BB84 here has two or three intensities")
        if len(self.probabilities) != len(self.intensities):
            raise ConfigError("each intensity needs one probability")
        if list(self.intensities) != sorted(set(self.intensities), reverse=True):
            raise ConfigError("intensities must be different, the brightest first")
        if self.intensities[-1] < 0.0 or self.intensities[0] > 1.0:
            raise ConfigError("intensities must lie between 0 and 1")
        if len(self.intensities) == 3 and self.intensities[0] <= sum(self.intensities[1:]):
            # Lim et al. 2014, section II: needed for the bound on single photons.
            raise ConfigError("the first of three intensities must exceed the sum of the others")
        if min(self.probabilities) <= 0.0:
            raise ConfigError("each intensity must have a positive probability")
        if abs(sum(self.probabilities) - 1.0) > PROBABILITY_SUM_TOLERANCE:
            raise ConfigError("the probabilities of the intensities must add up to 1")
        if not 0.0 < self.key_basis_probability < 1.0:
            raise ConfigError("key_basis_probability must lie between 0 and 1")

    def mean_gain(self, channel: Channel) -> float:
        """The probability that any one pulse is detected."""
        pairs = zip(self.intensities, self.probabilities, strict=True)
        return sum(p * channel.gain(k) for k, p in pairs)
