"""The same link pulse by pulse: photons, Eve, detectors.

It is slow and does not use the formulas behind the sampling of detections, so that the two can be
compared.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hybridkex.link.eavesdroppers import InterceptResend, NoEve, PhotonNumberSplitting
from hybridkex.link.physics import PHOTONS, Channel, Transmitter
from hybridkex.link.quantum import Detections, Sent
from hybridkex.link.randomness import Randomness

Pulses = tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]
"""Number of photons, basis and bit of each pulse."""


def touched(eve: NoEve, pulses: Pulses, randomness: Randomness) -> Pulses:
    """The pulses that leave Eve."""
    photons, basis, bit = pulses
    count = len(photons)
    if isinstance(eve, InterceptResend):
        caught = randomness.happens(eve.share, count)
        hers = randomness.bits(count)
        seen = np.where(hers == basis, bit, randomness.bits(count))
        return photons, np.where(caught, hers, basis), np.where(caught, seen, bit)
    if isinstance(eve, PhotonNumberSplitting):
        single, several, split = eve.shares()
        kept = randomness.happens(np.where(photons == 1, single, several), count)
        taken = (photons > 1) & randomness.happens(split, count)
        return np.where(kept, photons - taken, 0), basis, bit
    return pulses


def send_pulses(
    channel: Channel,
    transmitter: Transmitter,
    eve: NoEve,
    pulses: int,
    *,
    randomness: Randomness,
    touch: Callable[[NoEve, Pulses, Randomness], Pulses] = touched,
) -> tuple[Sent, Detections]:
    """Send ``pulses`` pulses; the detections, and the settings of their pulses."""
    test = 1.0 - transmitter.key_basis_probability
    intensity = randomness.choice(np.array(transmitter.probabilities), pulses)
    basis = randomness.happens(test, pulses).astype(np.uint8)
    bit = randomness.bits(pulses)
    photons = _photon_numbers(transmitter, intensity, randomness)
    photons, state_basis, state = touch(eve, (photons, basis, bit), randomness)

    bob_basis = randomness.happens(test, pulses).astype(np.uint8)
    signal = randomness.happens(1.0 - np.float64(1.0 - eve.efficiency) ** photons, pulses)
    flip = randomness.happens(channel.misalignment, pulses).astype(np.uint8)
    shown = np.where(state_basis == bob_basis, state ^ flip, randomness.bits(pulses))
    # Two detectors, one for each bit; if both click, the bit is drawn.
    click = [
        (signal & (shown == value)) | randomness.happens(channel.dark_count_probability, pulses)
        for value in (0, 1)
    ]
    seen = np.where(click[0] & click[1], randomness.bits(pulses), click[1])
    detected = click[0] | click[1]
    # After-pulses are booked to the intensity that caused them, as the formulas do.
    share = np.bincount(intensity, detected, len(transmitter.intensities)) / np.maximum(
        1, np.bincount(intensity, minlength=len(transmitter.intensities))
    )
    chance = channel.afterpulse_probability * share / (1.0 - share)
    after = ~detected & randomness.happens(chance[intensity], pulses)
    seen = np.where(after, randomness.bits(pulses), seen)
    pulse = _alive(np.flatnonzero(detected | after), channel.dead_pulses)
    return (
        Sent(intensity=intensity[pulse], basis=basis[pulse], bit=bit[pulse]),
        Detections(pulse=pulse, basis=bob_basis[pulse], bit=seen[pulse].astype(np.uint8)),
    )


def _photon_numbers(
    transmitter: Transmitter, intensity: NDArray[np.uint8], randomness: Randomness
) -> NDArray[np.int64]:
    drawn = randomness.uniform(len(intensity))
    photons = np.empty(len(intensity), dtype=np.int64)
    for which, mean in enumerate(transmitter.intensities):
        chances = [math.exp(-mean) * mean ** int(n) / math.factorial(n) for n in PHOTONS]
        mine = intensity == which
        photons[mine] = np.searchsorted(np.cumsum(chances)[:-1], drawn[mine])
    return photons


def _alive(pulse: NDArray[np.int64], dead: int) -> NDArray[np.int64]:
    """The detections outside the dead time of an earlier one."""
    if dead == 0 or len(pulse) == 0:
        return pulse
    kept = [int(pulse[0])]
    for one in pulse[1:]:
        if one - kept[-1] > dead:
            kept.append(int(one))
    return np.array(kept, dtype=np.int64)
