"""The quantum channel: Alice's record, Bob's detections, and the simulated fibre between them.

After a long fibre about one weak pulse in a thousand is detected. Therefore detections are sampled,
not pulses: the number of pulses between two detections is geometric, and Bayes' rule gives the
properties of a detected pulse. This is exact, because the settings of pulses are independent of
each other.

:class:`OpticalLink` belongs to neither party: it knows both sides, as nature does. Alice has
only the settings of the sent pulses (:class:`PulseRecord`), and Bob only the :class:`Detections`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from hybridkex.errors import LinkError
from hybridkex.link.physics import Channel, Light, Source
from hybridkex.link.randomness import Randomness
from hybridkex.net.event_loop import in_thread

KEY: Final = 0
TEST: Final = 1
"""The two bases."""

PIECE: Final = 1 << 21
"""Detections that are sampled at a time, which bounds the memory."""
FADING_PIECE: Final = 1 << 14
"""Detections that are sampled at a time if the loss changes: it is constant within a piece."""

Fading = Callable[[float], float]

Bits = NDArray[np.uint8]
Pulses = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Alice's settings of some pulses, one row for each."""

    intensity: Bits
    basis: Bits
    bit: Bits = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Bob's detections, one row for each, in the order of time."""

    pulse: Pulses
    """The number of the pulse, from 0, over the life of the link; strictly increasing."""
    basis: Bits
    bit: Bits = field(repr=False)


class Detector(Protocol):
    """Bob's end of the quantum channel."""

    async def detect(self, count: int) -> Detections:
        """Wait for ``count`` detections."""


def sample(
    channel: Channel,
    transmitter: Source,
    light: Light,
    count: int,
    *,
    first: int,
    randomness: Randomness,
) -> tuple[Sent, Detections]:
    """The next ``count`` detections from pulse ``first``, and the settings of their pulses.

    Raises ``LinkError`` where the pulses cannot be counted: between two detections there are more
    than 2^32, or more than 2^62 in all.
    """
    response = transmitter.response(channel, light)
    errors = [wrong / gain if gain else 0.0 for gain, wrong in response]
    weights = np.array(transmitter.probabilities) * np.array([gain for gain, _ in response])
    # A dead time only moves what comes after it.
    steps = randomness.gaps(float(weights.sum()), count) + channel.dead_pulses
    steps[0] -= channel.dead_pulses if first == 0 else 0
    if first + steps.sum(dtype=np.float64) > 2.0**62:
        raise LinkError("more than 2^62 pulses have passed: the loss or the dead time is too high")
    pulse = first - 1 + np.cumsum(steps)
    intensity = randomness.choice(weights, count)
    test = 1.0 - transmitter.key_basis_probability
    sent_basis = randomness.happens(test, count).astype(np.uint8)
    seen_basis = randomness.happens(test, count).astype(np.uint8)
    bit = randomness.bits(count)
    flip = randomness.happens(np.array(errors)[intensity], count).astype(np.uint8)
    seen = np.where(sent_basis == seen_basis, bit ^ flip, randomness.bits(count))
    return (
        Sent(intensity=intensity, basis=sent_basis, bit=bit),
        Detections(pulse=pulse, basis=seen_basis, bit=seen.astype(np.uint8)),
    )


class PulseRecord:
    """Alice's record of the sent pulses."""

    def __init__(self, transmitter: Source, randomness: Randomness) -> None:
        self._transmitter = transmitter
        self._randomness = randomness
        self._pulse: Pulses = np.empty(0, dtype=np.int64)
        self._sent = Sent(intensity=_EMPTY, basis=_EMPTY, bit=_EMPTY)

    def keep(self, pulse: Pulses, sent: Sent) -> None:
        """Called by the optical link; replaces the earlier settings."""
        self._pulse, self._sent = pulse, sent

    def recall(self, pulse: Pulses) -> Sent:
        """The settings of these pulses.

        Settings of a pulse that was not detected are drawn now. No observer sees a difference.
        """
        count = len(pulse)
        place = np.searchsorted(self._pulse, pulse)
        there = np.zeros(count, dtype=bool)
        inside = place < len(self._pulse)
        there[inside] = self._pulse[place[inside]] == pulse[inside]
        if there.all():
            known = self._sent
            return Sent(
                intensity=known.intensity[place], basis=known.basis[place], bit=known.bit[place]
            )
        draw, place = self._randomness, place[there]
        test = 1.0 - self._transmitter.key_basis_probability
        intensity = draw.choice(np.array(self._transmitter.probabilities), count)
        basis, bit = draw.happens(test, count).astype(np.uint8), draw.bits(count)
        intensity[there] = self._sent.intensity[place]
        basis[there] = self._sent.basis[place]
        bit[there] = self._sent.bit[place]
        return Sent(intensity=intensity, basis=basis, bit=bit)

    def forget(self) -> None:
        """Erase the settings."""
        self._sent.bit.fill(0)
        self._pulse, self._sent = (
            np.empty(0, dtype=np.int64),
            Sent(intensity=_EMPTY, basis=_EMPTY, bit=_EMPTY),
        )


_EMPTY: Final = np.empty(0, dtype=np.uint8)


class OpticalLink:
    """A laser, a fibre (with or without Eve) and two detectors."""

    def __init__(
        self,
        channel: Channel,
        transmitter: Source,
        *,
        light: Light | None = None,
        fading: Fading | None = None,
        seed: int | None = None,
        real_time: bool = False,
    ) -> None:
        """``light``: an eavesdropper in the fibre's place.

        ``fading``: the loss in dB, beside the channel's own, at a time in seconds from the
        beginning; it does not go together with ``light``. ``seed`` makes what is drawn repeatable.
        ``real_time``: detections come no faster than the laser's clock lets them.
        """
        self._fading = fading
        self._real_time = real_time
        self._channel = channel
        self._transmitter = transmitter
        self._light: Light = channel if light is None else light
        self._randomness = Randomness.seeded(seed, "fibre")
        self._next = 0
        self.record: Final = PulseRecord(transmitter, Randomness.seeded(seed, "laser"))
        """Alice's end."""

    @property
    def seconds(self) -> float:
        """Seconds for which the light has been on, until the last detection of a block."""
        return self._next / self._channel.repetition_rate_hz

    async def detect(self, count: int) -> Detections:
        """Bob's end; see :class:`Detector`."""
        before = self.seconds
        started = trio.current_time()
        sent, detections = await in_thread(self._sample, count)
        if self._real_time:
            await trio.sleep_until(started + self.seconds - before)
        self.record.keep(detections.pulse, sent)
        return detections

    def _sample(self, count: int) -> tuple[Sent, Detections]:
        piece, first = PIECE if self._fading is None else FADING_PIECE, self._next
        try:
            parts = [self._piece(min(piece, count - at)) for at in range(0, count, piece)]
        except LinkError:
            self._next = first  # the end of the light is unknown
            raise
        return (
            Sent(
                intensity=np.concatenate([sent.intensity for sent, _ in parts]),
                basis=np.concatenate([sent.basis for sent, _ in parts]),
                bit=np.concatenate([sent.bit for sent, _ in parts]),
            ),
            Detections(
                pulse=np.concatenate([seen.pulse for _, seen in parts]),
                basis=np.concatenate([seen.basis for _, seen in parts]),
                bit=np.concatenate([seen.bit for _, seen in parts]),
            ),
        )

    def _piece(self, count: int) -> tuple[Sent, Detections]:
        channel, light = self._channel, self._light
        if self._fading is not None:
            channel = light = channel.with_loss(self._fading(self.seconds))
        sent, detections = sample(
            channel,
            self._transmitter,
            light,
            count,
            first=self._next,
            randomness=self._randomness,
        )
        self._next = int(detections.pulse[-1]) + 1
        if self._fading is not None:
            self._fading(self.seconds)  # the link may have ended meanwhile
        return sent, detections
