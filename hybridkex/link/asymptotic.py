"""Key rates for infinitely long keys: Ma, Qi, Zhao, Lo, PRA 72, 012326 (2005).

Rates are secret bits per pulse. As the paper does, the gains neglect the coincidence of a signal
with a dark count: ``Q = Y0 + 1 - exp(-eta k)``. :meth:`Channel.gain` keeps it; the two differ by
less than 2e-6 of the gain at the parameters of the paper.
"""

import math
from dataclasses import dataclass
from typing import Final

from hybridkex.errors import ConfigError
from hybridkex.link.physics import Channel
from hybridkex.link.ranges import instance, within
from hybridkex.link.statistics import binary_entropy

HALF: Final = 0.5
"""e0, the error rate of a random bit, and q, the share of pulses with equal bases."""
MOST_PHOTONS: Final = 100.0
"""The highest mean photon number of a pulse."""


@dataclass(frozen=True, kw_only=True)
class SinglePhotons:
    """Yield and error rate of single-photon pulses, as the decoys show them."""

    yield_1: float
    error_1: float


def gain(channel: Channel, mean_photons: float) -> float:
    """Q_k, equation 10. Raises ``ConfigError`` for other values than intensities."""
    instance("channel", channel, Channel)
    within("mean_photons", mean_photons, 0.0, MOST_PHOTONS)
    return channel.background - math.expm1(-channel.eta * mean_photons)


def error_rate(channel: Channel, mean_photons: float) -> float:
    """E_k, the QBER of pulses of one intensity, equation 11.

    Raises ``ConfigError`` where nothing is detected.
    """
    instance("channel", channel, Channel)
    within("mean_photons", mean_photons, 0.0, MOST_PHOTONS)
    signal = -math.expm1(-channel.eta * mean_photons)
    wrong = HALF * channel.background + channel.misalignment * signal
    return _share(wrong, gain(channel, mean_photons))


def _share(wrong: float, seen: float) -> float:
    if seen <= 0.0:
        raise ConfigError("nothing is detected over this channel: there is no error rate")
    return wrong / seen


def infinite_decoy(channel: Channel) -> SinglePhotons:
    """The true yield and error rate of single photons, equations 7 and 9.

    Raises ``ConfigError`` where nothing is detected.
    """
    instance("channel", channel, Channel)
    yield_1 = channel.background + channel.eta - channel.background * channel.eta
    wrong = HALF * channel.background + channel.misalignment * channel.eta
    return SinglePhotons(yield_1=yield_1, error_1=_share(wrong, yield_1))


def decoy_bounds(
    channel: Channel, signal: float, decoy: float, second: float = 0.0
) -> SinglePhotons:
    """Bounds with two decoys, equations 18 (Y0), 21 (Y1) and 25 (e1); ``second`` may be vacuum.

    Raises ``ConfigError`` unless the signal is brighter than both decoys together, and the first
    decoy than the second.
    """
    for name, value in (("signal", signal), ("decoy", decoy), ("second", second)):
        within(name, value, 0.0, MOST_PHOTONS)
    if not (decoy > second and signal > decoy + second):
        raise ConfigError("the first decoy is brighter than the second, the signal than both")
    q_signal = gain(channel, signal) * math.exp(signal)
    q_decoy = gain(channel, decoy) * math.exp(decoy)
    q_second = gain(channel, second) * math.exp(second)
    wrong_decoy = error_rate(channel, decoy) * q_decoy
    wrong_second = error_rate(channel, second) * q_second if q_second else 0.0
    y0 = max((decoy * q_second - second * q_decoy) / (decoy - second), 0.0)
    scale = signal / (signal * (decoy - second) - decoy**2 + second**2)
    tail = (decoy**2 - second**2) / signal**2 * (q_signal - y0)
    yield_1 = scale * (q_decoy - q_second - tail)
    error_1 = (wrong_decoy - wrong_second) / ((decoy - second) * yield_1)
    return SinglePhotons(yield_1=yield_1, error_1=error_1)


def rate(
    channel: Channel, signal: float, single: SinglePhotons, *, f: float, q: float = HALF
) -> float:
    """The GLLP rate per pulse, equation 1; can be negative. ``f``: error correction over h(E)."""
    if single.yield_1 <= 0.0 or single.error_1 >= HALF:
        return -q * gain(channel, signal) * f * binary_entropy(error_rate(channel, signal))
    q1 = single.yield_1 * signal * math.exp(-signal)
    leak = gain(channel, signal) * f * binary_entropy(error_rate(channel, signal))
    return q * (q1 * (1.0 - binary_entropy(single.error_1)) - leak)


def vacuum_weak_rate(channel: Channel, signal: float, decoy: float, *, f: float) -> float:
    """The rate with a weak decoy and a vacuum, equations 34, 35 and 37."""
    return rate(channel, signal, decoy_bounds(channel, signal, decoy), f=f)


def infinite_decoy_rate(channel: Channel, signal: float, *, f: float) -> float:
    """The rate with infinitely many decoys."""
    return rate(channel, signal, infinite_decoy(channel), f=f)
