"""Eve on the fibre: three attacks on the light.

Each is a :class:`~hybridkex.link.physics.Light`, so that detections can be sampled. What Eve does
on the classical channel is in :mod:`hybridkex.link.interference`.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError
from hybridkex.link.physics import PHOTONS, Channel, Source, Transmitter, photon_chances
from hybridkex.link.ranges import instance

Photons = NDArray[np.int64]


@dataclass(frozen=True)
class NoEve:
    """The fibre alone."""

    channel: Channel

    def yields(self, photons: Photons) -> NDArray[np.float64]:
        return np.asarray(1.0 - (1.0 - self.efficiency) ** photons, dtype=np.float64)

    @property
    def signal_error(self) -> float:
        return self.channel.misalignment

    @property
    def efficiency(self) -> float:
        """The probability that a photon makes a click after it has left Eve."""
        return self.channel.eta


@dataclass(frozen=True)
class InterceptResend(NoEve):
    """Eve measures a share of the pulses in a random basis and sends on the result.

    Eve keeps the number of photons, so that the gains do not change. Half of Eve's bases are wrong,
    and each wrong basis gives Bob a wrong bit half of the time: a QBER of 25 % for a share of 1.
    """

    share: float

    @property
    def signal_error(self) -> float:
        quiet = self.channel.misalignment
        return (1.0 - self.share) * quiet + self.share * (0.5 * quiet + 0.25)


@dataclass(frozen=True)
class BeamSplitting(NoEve):
    """Eve takes a share of the light out of the fibre, and Bob receives less."""

    share: float

    @property
    def efficiency(self) -> float:
        return self.channel.eta * (1.0 - self.share)


@dataclass(frozen=True)
class PhotonNumberSplitting(NoEve):
    """Eve keeps one photon of pulses with several, without changing the gain of the brightest
    intensity.

    G. Brassard, N. Lütkenhaus, T. Mor, B. Sanders, PRL 85, 1330 (2000). Eve's own line has no loss,
    and Bob's gain limits the attack:

    * Over a long fibre Eve blocks single photons, which disclose nothing, and replaces their
      detections by those of split pulses. The gains of the decoys reveal this.
    * Where blocking single photons would leave too few detections, Eve blocks none. If the fibre
      loses half of the light or more, Eve splits nearly every pulse with several photons and no
      gain changes by much. The decoys do not detect this. The key is still secret, because the
      bound counts no bit of such a pulse.
    * Over a shorter fibre the missing photon would be noticed, so Eve splits only a share of those
      pulses, and none over a fibre without loss.
    """

    brightest: float
    """The mean photon number whose gain stays the same."""

    def shares(self) -> tuple[float, float, float]:
        """Shares of single photons and of other pulses that pass, and of the latter's split."""
        eta = self.channel.receiver_efficiency
        several = np.arange(len(PHOTONS)) > 1
        chances = photon_chances(self.brightest)
        alone = float(chances[1])
        line = self.channel.yields(PHOTONS)
        usual = float(chances[several] @ line[several])
        wanted = usual + alone * float(line[1])
        whole, less = (
            float(chances[several] @ (1.0 - (1.0 - eta) ** (PHOTONS[several] - taken)))
            for taken in (0, 1)
        )
        if less >= wanted:
            return 0.0, wanted / less if less else 0.0, 1.0
        if less >= usual:
            return min(1.0, (wanted - less) / (alone * eta)), 1.0, 1.0
        return float(line[1]) / eta, 1.0, (whole - usual) / (whole - less)

    def yields(self, photons: Photons) -> NDArray[np.float64]:
        single, several, split = self.shares()
        dark = 1.0 - self.efficiency
        others = split * (1.0 - dark ** np.maximum(photons - 1, 0))
        others = several * (others + (1.0 - split) * (1.0 - dark**photons))
        return np.where(photons == 1, single * self.efficiency, np.where(photons > 1, others, 0.0))

    @property
    def efficiency(self) -> float:
        return self.channel.receiver_efficiency


EAVESDROPPERS: Final = ("intercept", "split", "pns")
"""Attacks on the light; ``intercept`` and ``split`` take a share of it."""


def eavesdropper(text: str, channel: Channel, transmitter: Source) -> NoEve:
    """Make the Eve of ``intercept:0.2``, ``split:0.5`` or ``pns``; the default share is 1.

    Raises ``ConfigError``.
    """
    if not isinstance(transmitter, Transmitter):
        raise ConfigError("the simulated eavesdroppers attack laser pulses, not pairs")
    instance("eve", text, str)
    if text == "pns":
        return PhotonNumberSplitting(channel, transmitter.intensities[0])
    name, colon, number = text.partition(":")
    try:
        make = {"intercept": InterceptResend, "split": BeamSplitting}[name]
        share = float(number) if colon else 1.0
    except (KeyError, ValueError):
        raise ConfigError(
            f"no eavesdropper {text!r} on the light: use intercept:SHARE, split:SHARE or pns"
        ) from None
    if not 0.0 < share <= 1.0:
        raise ConfigError(
            f"{text}: the share of the light that Eve takes must be above 0, and at most 1"
        )
    return make(channel, share)
