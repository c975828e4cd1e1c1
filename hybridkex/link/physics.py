"""A weak coherent pulse between Alice's laser and Bob's detectors.

The model is the usual one of decoy-state papers. A pulse of mean photon number ``k`` holds a
Poisson number of photons; each makes a click independently with probability ``eta``, so an
``n``-photon pulse gives a signal click with the *yield* ``1 - (1 - eta)^n``. Dark counts and
after-pulses come on top and show a random bit; signal clicks show the wrong bit with the
probability ``misalignment``.

The symbols and formulas are those of Lim et al., PRA 89, 022307 (2014), section IV, with one
choice of ours: the error probability ``e_k`` contains the transmittance of the whole system, not
of the fibre alone as the paper prints. A photon that the detector misses makes no error either.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError
from hybridkex.link.ranges import check_ranges, within

PROBABILITY_SUM_TOLERANCE: Final = 1e-9
MOST: Final = 1e6
"""The greatest distance in km and attenuation in dB/km."""
LEAST_RATE: Final = 1e-3
MOST_RATE: Final = 1e12
"""The lowest and the highest clock rate, in Hz."""
PHOTONS: Final = np.arange(41)
"""Photon numbers in sums; for k <= 1 the rest has a probability below 1e-49."""


class Light(Protocol):
    """The path of the light from Alice to a click at Bob: the fibre, or an eavesdropper on it."""

    def yields(self, photons: NDArray[np.int64]) -> NDArray[np.float64]:
        """For each photon number, the probability that the pulse makes a signal click."""

    @property
    def signal_error(self) -> float:
        """The probability that a signal click shows the wrong bit, when the bases agree."""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Fibre and receiver. Probabilities are per pulse (gate)."""

    distance_km: float = 0.0
    attenuation_db_per_km: float = 0.2
    receiver_efficiency: float
    """Efficiency of Bob's optics times that of Bob's detectors."""
    dark_count_probability: float
    """Probability for one detector; there are two."""
    misalignment: float
    afterpulse_probability: float = 0.0
    dead_time_s: float = 0.0
    """After a click nothing more is registered for this long (both detectors, non-paralysable)."""
    repetition_rate_hz: float = 1e9

    def __post_init__(self) -> None:
        check_ranges(
            self,
            receiver_efficiency=(0.0, 1.0),
            dark_count_probability=(0.0, 0.5),  # two detectors: both together at most 1
            misalignment=(0.0, 1.0),
            afterpulse_probability=(0.0, 1.0),
            distance_km=(0.0, MOST),
            attenuation_db_per_km=(0.0, MOST),
            dead_time_s=(0.0, 1.0),
            repetition_rate_hz=(LEAST_RATE, MOST_RATE),
        )

    def at(self, distance_km: float) -> "Channel":
        """A copy with another length of fibre."""
        return replace(self, distance_km=distance_km)

    def with_loss(self, decibels: float) -> "Channel":
        """A copy with more loss in front of the receiver. Raises ``ConfigError``."""
        within("decibels", decibels, -1e3, math.inf)
        return replace(
            self, receiver_efficiency=self.receiver_efficiency * 10.0 ** (-decibels / 10.0)
        )

    @property
    def transmittance(self) -> float:
        """Transmittance of the fibre alone."""
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

    def seen(self, signal: float, signal_error: float) -> tuple[float, float]:
        """The probabilities of a detection, R_k = D_k (1 + p_ap), and of one with a wrong bit, e_k.

        An after-pulse counts in the gate that caused it, as in the paper. ``signal_error``: see
        :class:`Light`.
        """
        click, after = self.click(signal), self.afterpulse_probability
        gain = min(1.0, click * (1.0 + after))
        wrong = self.dark_count_probability + signal_error * signal + after * click / 2.0
        return gain, min(gain, wrong)  # where nearly every bit is wrong, the sum counts some twice

    def gain(self, mean_photons: float) -> float:
        """R_k of a pulse over the fibre."""
        return self.seen(-math.expm1(-self.eta * mean_photons), self.misalignment)[0]

    def error(self, mean_photons: float) -> float:
        """e_k of a pulse over the fibre (not divided by R_k)."""
        return self.seen(-math.expm1(-self.eta * mean_photons), self.misalignment)[1]

    @property
    def dead_pulses(self) -> int:
        """The dead time in pulses."""
        return round(self.dead_time_s * self.repetition_rate_hz)


def photon_chances(mean_photons: float) -> NDArray[np.float64]:
    """Poisson probabilities of the numbers in :data:`PHOTONS`."""
    if mean_photons == 0.0:
        return np.asarray(PHOTONS == 0, dtype=np.float64)
    log_factorial = np.cumsum(np.log(np.maximum(PHOTONS, 1)))
    chances = np.exp(-mean_photons + PHOTONS * math.log(mean_photons) - log_factorial)
    return np.asarray(chances, dtype=np.float64)


def gain_from_yields(light: Light, mean_photons: float) -> float:
    """The probability of a signal click: the Poisson mixture of the yields."""
    return float(photon_chances(mean_photons) @ light.yields(PHOTONS))


class Source(Protocol):
    """A source of light, described by the probabilities of detections.

    Alice chooses the *kind* of each pulse with these probabilities. If the source is a laser with
    decoys, the kinds are its intensities.
    """

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Probabilities of the kinds."""

    @property
    def key_basis_probability(self) -> float:
        """Probability that a party, Alice or Bob, chooses the key basis."""

    def response(self, channel: Channel, light: Light | None = None) -> list[tuple[float, float]]:
        """For each kind, the probabilities of a detection and of one with a wrong bit.

        ``light``: an eavesdropper in the fibre's place.
        """

    def mean_gain(self, channel: Channel) -> float:
        """The probability that any one pulse is detected."""


@dataclass(frozen=True, kw_only=True)
class Transmitter:
    """A laser: mean photon numbers from bright to dim, their probabilities, and the basis bias.

    Bob's receiver uses the same basis bias.
    """

    intensities: tuple[float, ...]
    probabilities: tuple[float, ...]
    key_basis_probability: float

    def __post_init__(self) -> None:
        check_ranges(
            self,
            intensities=(0.0, 1.0),
            probabilities=(0.0, 1.0),
            key_basis_probability=(0.0, 1.0),
        )
        if len(self.intensities) not in {2, 3}:
            raise ConfigError("decoy-state BB84 here has two or three intensities")
        if len(self.probabilities) != len(self.intensities):
            raise ConfigError("each intensity needs one probability")
        if list(self.intensities) != sorted(set(self.intensities), reverse=True):
            raise ConfigError("intensities must be different, the brightest first")
        if len(self.intensities) == 3 and self.intensities[0] <= sum(self.intensities[1:]):
            # Lim et al. 2014, section II: needed for the bound on single photons.
            raise ConfigError("the first of three intensities must exceed the sum of the others")
        if min(self.probabilities) <= 0.0:
            raise ConfigError("each intensity must have a positive probability")
        if abs(sum(self.probabilities) - 1.0) > PROBABILITY_SUM_TOLERANCE:
            raise ConfigError("the probabilities of the intensities must add up to 1")
        if not 0.0 < self.key_basis_probability < 1.0:
            raise ConfigError("key_basis_probability must lie between 0 and 1")

    def response(self, channel: Channel, light: Light | None = None) -> list[tuple[float, float]]:
        """See :class:`Source`."""
        if light is None:  # the optimiser calls this most of all
            eta, wrong = channel.eta, channel.misalignment
            return [channel.seen(-math.expm1(-eta * k), wrong) for k in self.intensities]
        wrong = light.signal_error
        return [channel.seen(gain_from_yields(light, k), wrong) for k in self.intensities]

    def mean_gain(self, channel: Channel) -> float:
        """See :class:`Source`."""
        pairs = zip(self.response(channel), self.probabilities, strict=True)
        return sum(p * gain for (gain, _), p in pairs)


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Parametric down-conversion in Alice's laboratory: BBM92 with both parties measuring.

    C. H. Bennett, G. Brassard, N. D. Mermin, PRL 68, 557 (1992). Gain and error rate are equations
    9 and 10 of X. Ma, C.-H. F. Fung, H.-K. Lo, PRA 76, 012307 (2007): ``2 brightness`` pairs a
    pulse on average, with the statistics of a thermal source in two modes. Alice's detectors see
    their half of the pairs without the fibre; their dark counts are Bob's. A detection at only one
    of the two is not counted.
    """

    brightness: float
    """Half of the mean number of pairs, lambda in the paper."""
    alice_efficiency: float
    """Efficiency of Alice's optics times that of Alice's detectors."""
    key_basis_probability: float

    probabilities: ClassVar[tuple[float, ...]] = (1.0,)

    def __post_init__(self) -> None:
        check_ranges(
            self,
            brightness=(0.0, 1.0),
            alice_efficiency=(0.0, 1.0),
            key_basis_probability=(0.0, 1.0),
        )
        if not 0.0 < self.brightness <= 1.0 or not 0.0 < self.alice_efficiency <= 1.0:
            raise ConfigError("brightness and alice_efficiency lie between 0 and 1")
        if not 0.0 < self.key_basis_probability < 1.0:
            raise ConfigError("key_basis_probability must lie between 0 and 1")

    def response(self, channel: Channel, light: Light | None = None) -> list[tuple[float, float]]:
        """See :class:`Source`; eavesdroppers are for lasers. Raises ``ConfigError``."""
        if light is not None and light is not channel:
            raise ConfigError("the simulated eavesdroppers attack laser pulses, not pairs")
        a, b, k = self.alice_efficiency, channel.eta, self.brightness
        dark = 1.0 - channel.background
        both = 1.0 + (a + b - a * b) * k
        gain = 1.0 - dark / (1.0 + a * k) ** 2 - dark / (1.0 + b * k) ** 2 + (dark / both) ** 2
        right = 2.0 * (0.5 - channel.misalignment) * a * b * k * (1.0 + k)
        wrong = 0.5 * gain - right / ((1.0 + a * k) * (1.0 + b * k) * both)
        return [(gain, wrong)]

    def mean_gain(self, channel: Channel) -> float:
        """See :class:`Source`."""
        return self.response(channel)[0][0]
