"""Eve on the fibre: three attacks on the light.

Each is a :class:`~hybridkex.link.physics.Light`, so that detections can be sampled, and does
the same to single pulses for :mod:`hybridkex.link.pulses`. What Eve does on the classical
channel is in :mod:`hybridkex.link.interference`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError
from hybridkex.link.physics import Channel, Light, Transmitter, gain_from_yields
from hybridkex.link.randomness import Randomness

__all__ = [
    "EAVESDROPPERS",
    "BeamSplitting",
    "Eavesdropper",
    "InterceptResend",
    "NoEve",
    "PhotonNumberSplitting",
    "eavesdropper",
]

Photons = NDArray[np.int64]
Bits = NDArray[np.uint8]


class Eavesdropper(Light, Protocol):
    """What she does to pulses, one by one."""

    @property
    def efficiency(self) -> float:
        """The probability that a photon makes a click after it has left Eve."""
        ...

    def touch(
        self, photons: Photons, basis: Bits, bit: Bits, randomness: Randomness
    ) -> tuple[Photons, Bits, Bits]:
        """What pulses are when they have left Eve: photons, basis and bit of their state."""
        ...


@dataclass(frozen=True)
class NoEve:
    """The fibre alone."""

    channel: Channel

    def yields(self, photons: Photons) -> NDArray[np.float64]:
        return self.channel.yields(photons)

    @property
    def signal_error(self) -> float:
        return self.channel.misalignment

    @property
    def efficiency(self) -> float:
        return self.channel.eta

    def touch(
        self, photons: Photons, basis: Bits, bit: Bits, randomness: Randomness
    ) -> tuple[Photons, Bits, Bits]:
        return photons, basis, bit


@dataclass(frozen=True)
class InterceptResend(NoEve):
    """Eve measures a share of the pulses in a random basis and sends on what she saw.

    She repeats the number of photons, so that the gains do not change. Half of the time her basis
    is wrong, and half of those times Bob's bit: 25 % of wrong bits for a share of 1.
    """

    share: float

    @property
    def signal_error(self) -> float:
        quiet = self.channel.misalignment
        return (1.0 - self.share) * quiet + self.share * (0.5 * quiet + 0.25)

    def touch(
        self, photons: Photons, basis: Bits, bit: Bits, randomness: Randomness
    ) -> tuple[Photons, Bits, Bits]:
        count = len(photons)
        caught = randomness.happens(self.share, count)
        hers = randomness.bits(count)
        seen = np.where(hers == basis, bit, randomness.bits(count))
        return photons, np.where(caught, hers, basis), np.where(caught, seen, bit)


@dataclass(frozen=True)
class BeamSplitting(NoEve):
    """Eve takes a share of the light out of the fibre; what she takes is missing at Bob's."""

    share: float

    def yields(self, photons: Photons) -> NDArray[np.float64]:
        return np.asarray(1.0 - (1.0 - self.efficiency) ** photons, dtype=np.float64)

    @property
    def efficiency(self) -> float:
        return self.channel.eta * (1.0 - self.share)


@dataclass(frozen=True)
class PhotonNumberSplitting(NoEve):
    """Eve keeps one photon of every pulse with several and blocks pulses with one.

    G. Brassard, N. Lütkenhaus, T. Mor, B. Sanders, PRL 85, 1330 (2000). Her own line has no loss,
    and she blocks just so many that the gain of the brightest intensity is what Bob expects; that
    of the decoys then is not.
    """

    brightest: float
    """The mean photon number at which she goes unnoticed."""

    def _passed(self) -> tuple[float, float]:
        """Shares of single-photon pulses and of others that she lets pass."""
        wanted = gain_from_yields(self.channel, self.brightest)
        several = gain_from_yields(_Split(self.channel, 0.0, 1.0), self.brightest)
        single = gain_from_yields(_Split(self.channel, 1.0, 0.0), self.brightest)
        if several >= wanted:
            return 0.0, wanted / several
        return min(1.0, (wanted - several) / single), 1.0

    def yields(self, photons: Photons) -> NDArray[np.float64]:
        return _Split(self.channel, *self._passed()).yields(photons)

    @property
    def efficiency(self) -> float:
        return self.channel.receiver_efficiency

    def touch(
        self, photons: Photons, basis: Bits, bit: Bits, randomness: Randomness
    ) -> tuple[Photons, Bits, Bits]:
        single, several = self._passed()
        kept = randomness.happens(np.where(photons == 1, single, several), len(photons))
        left = np.where(photons > 1, photons - 1, photons)
        return np.where(kept, left, 0), basis, bit


@dataclass(frozen=True)
class _Split:
    """Yields when a share of single photons and a share of the others passes Eve."""

    channel: Channel
    single: float
    several: float

    def yields(self, photons: Photons) -> NDArray[np.float64]:
        eta = self.channel.receiver_efficiency
        others = self.several * (1.0 - (1.0 - eta) ** np.maximum(photons - 1, 0))
        return np.where(photons == 1, self.single * eta, others)

    @property
    def signal_error(self) -> float:
        return self.channel.misalignment


EAVESDROPPERS: Final[Mapping[str, Callable[[Channel, Transmitter, float], Eavesdropper]]] = {
    "intercept": lambda channel, _, share: InterceptResend(channel, share),
    "split": lambda channel, _, share: BeamSplitting(channel, share),
    "pns": lambda channel, transmitter, _: PhotonNumberSplitting(
        channel, transmitter.intensities[0]
    ),
}


def eavesdropper(text: str, channel: Channel, transmitter: Transmitter) -> Eavesdropper:
    """From ``intercept:0.2``, ``split:0.5`` or ``pns``. Raises ``ConfigError``."""
    name, _, number = text.partition(":")
    try:
        make, share = EAVESDROPPERS[name], float(number or 1.0)
    except (KeyError, ValueError):
        raise ConfigError(
            f"no eavesdropper {text!r}: intercept:SHARE, split:SHARE or pns"
        ) from None
    if not 0.0 < share <= 1.0:
        raise ConfigError("an eavesdropper takes a share of the light, from 0 to 1")
    return make(channel, transmitter, share)
