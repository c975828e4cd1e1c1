"""The best intensities, their probabilities and the basis bias for a link.

As in the papers, they are optimised for each distance, for the expected counts of a block with a
given number of key-basis detections.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError
from hybridkex.link.finite_key import (
    FINITE_KEY,
    FiniteKeyProof,
    SecretLength,
    Security,
    expected_counts,
    proof_for,
)
from hybridkex.link.physics import Channel, PairSource, Source, Transmitter
from hybridkex.link.presets import Preset
from hybridkex.link.ranges import instance, one_of, within
from hybridkex.link.statistics import binary_entropy

NEAR_VACUUM: Final = 2e-4
"""The dimmest intensity that a modulator reaches (Lim et al. 2014, section IV)."""

RELATIVE_SECRECY: Final = 1e-15
"""kappa: eps_sec for each bit of the key in Lim et al."""

DETECTIONS_PER_BIT: Final = 25.0
"""Most detections for one bit of the key basis: rarer key bases are not tried."""

RESTARTS: Final = 5
"""The most restarts of the best search from its result; it ends when one gives no better rate."""
ROUGH: Final = 1e-3
"""The tolerance of the searches from the starting points, of which the best one goes on."""
NO_KEY: Final = 100.0
"""The loss where there is no key, above that of every rate."""
BLOCK_BITS: Final = (1.0, 1e15)
"""The blocks for which closed forms are evaluated."""
EFFICIENCIES: Final = (0.0, 100.0)
"""Error correction over Shannon's bound; 0 leaves it out."""
ANCHOR_KM: Final = 40.0
CURVE_KM: Final = 2.0

STARTS: Final = {
    3: (
        (0.5, 0.2, 0.5, 0.6, 0.8),
        (0.5, 0.12, 0.3, 0.6, 0.95),
        (0.7, 0.3, 0.1, 0.5, 0.5),
        (0.5, 0.1, 0.03, 0.9, 0.25),
    ),
    2: (
        (0.5, 0.2, 0.6, 0.9),
        (0.5, 0.15, 0.3, 0.97),
        (0.5, 0.2, 0.4, 0.7),
        (0.2, 0.02, 0.03, 0.22),
    ),
    0: ((0.05, 0.9), (0.02, 0.6)),
}
"""Starting points for each number of intensities: the intensities, all of their probabilities but
the last, and the probability of the key basis. 0 stands for a source of pairs: its brightness.
The last ones are for small blocks."""
DEAD_STARTS: Final = {
    3: ((0.1, 0.04, 0.5, 0.6, 0.9), (0.2, 0.05, 0.3, 0.6, 0.95)),
    2: ((0.1, 0.04, 0.6, 0.9), (0.2, 0.05, 0.3, 0.95), (0.3, 0.1, 0.4, 0.9)),
}
"""Also tried where the dead time is longer than the wait for a click: fewer photons may be
better."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best settings found, and what they give."""

    transmitter: Source
    length: SecretLength
    pulses: float
    rate: float
    """Secret bits per pulse; 0 if there is no key."""


class NoKeyError(ConfigError):
    """No settings make a key over this channel."""


def expected_length(
    channel: Channel,
    transmitter: Source,
    *,
    key_detections: float,
    f: float,
    security: Security | None = None,
    proof: FiniteKeyProof | None = None,
) -> tuple[SecretLength, float]:
    """The secret length of an average block, and its number of pulses, dead time included.

    ``key_detections``: sifted bits of the key basis. ``f``: error correction over Shannon's bound.
    Without ``security``, eps_sec is in proportion to the length, as in Lim et al. 2014. Raises
    ``NoKeyError`` where nothing is detected, and ``ConfigError``.
    """
    within("key_detections", key_detections, *BLOCK_BITS)
    within("f", f, *EFFICIENCIES)
    instance("channel", channel, Channel)
    instance("transmitter", transmitter, Transmitter, PairSource)
    detections = key_detections / transmitter.key_basis_probability**2
    gain = transmitter.mean_gain(channel)
    if gain <= 0.0:
        raise NoKeyError("nothing is detected over this channel")
    alive = detections / gain
    if math.isinf(alive):
        raise NoKeyError("next to nothing is detected over this channel")
    counts = expected_counts(channel, transmitter, alive)
    pulses = alive + detections * channel.dead_pulses
    leak = f * key_detections * binary_entropy(counts.key_error_rate)
    proof = proof_for(transmitter) if proof is None else proof
    if security is not None:
        return proof.secret_length(transmitter, counts, security=security, leak=leak), pulses
    real = key_detections
    for _ in range(30):  # the length depends on its logarithm alone, so this settles at once
        goal = Security(secrecy=RELATIVE_SECRECY * max(real, 1.0), correctness=RELATIVE_SECRECY)
        length = proof.secret_length(transmitter, counts, security=goal, leak=leak)
        if abs(length.real - real) < 1e-9 * abs(real):
            break
        real = length.real
    return length, pulses


def _source(settings: NDArray[np.float64], like: PairSource | None) -> Transmitter | PairSource:
    """Valid settings from unbounded numbers."""
    free = [1.0 / (1.0 + math.exp(-min(max(one, -7.0), 7.0))) for one in settings.tolist()]
    if isinstance(like, PairSource):
        return replace(like, brightness=free[0], key_basis_probability=free[1])
    if len(free) == 5:
        mu_1, share, p_1, rest, q = free
        mu_2 = NEAR_VACUUM + share * (mu_1 - 2.0 * NEAR_VACUUM)
        probabilities: tuple[float, ...] = (p_1, (1.0 - p_1) * rest, (1.0 - p_1) * (1.0 - rest))
        intensities: tuple[float, ...] = (mu_1, mu_2, NEAR_VACUUM)
    else:
        mu_1, share, p_1, q = free
        intensities, probabilities = (mu_1, share * mu_1), (p_1, 1.0 - p_1)
    return Transmitter(
        intensities=intensities, probabilities=probabilities, key_basis_probability=q
    )


def _start(near: Source) -> tuple[float, ...]:
    """The reverse of :func:`_source`, in the form of :data:`STARTS`."""
    if isinstance(near, PairSource):
        return near.brightness, near.key_basis_probability
    assert isinstance(near, Transmitter)
    p = near.probabilities
    middle = (p[1] / (1.0 - p[0]),) if len(p) == 3 else ()
    return (*near.intensities[:2], p[0], *middle, near.key_basis_probability)


def _free(settings: tuple[float, ...], pairs: bool) -> NDArray[np.float64]:
    """Settings in the form of :data:`STARTS` as unbounded numbers."""
    free = np.array(settings)
    if not pairs:
        free[1] /= free[0]  # the second intensity is a share of the first
    numbers: NDArray[np.float64] = np.log(free / (1.0 - free))
    return numbers


def optimise(  # noqa: PLR0913  # keywords with defaults; one search
    channel: Channel,
    *,
    key_detections: float,
    f: float,
    intensities: int = 3,
    security: Security | None = None,
    near: Source | None = None,
    finite_key: str = FINITE_KEY[0],
    pairs: PairSource | None = None,
    tolerance: float = 1e-7,
) -> Optimum | None:
    """The settings with the highest rate, or ``None`` where no key can be made.

    ``intensities``: 3 for two decoys, 2 for one. ``pairs``: a source of pairs in place of a laser.
    ``near``: settings to start from, such as the best of a link that is a little
    shorter; without them the search has several starts.
    ``finite_key``: one of :data:`~hybridkex.link.finite_key.FINITE_KEY`. ``tolerance``: of the
    rate, relative. See :func:`expected_length` for the others, and for what it raises.
    """
    if pairs is None and intensities not in (2, 3):
        raise ConfigError(f"intensities must be 2 or 3, not {intensities!r}")
    one_of("finite_key", finite_key, FINITE_KEY)

    def expected(transmitter: Source, *, smooth: bool) -> tuple[SecretLength, float]:
        return expected_length(
            channel,
            transmitter,
            key_detections=key_detections,
            f=f,
            security=security,
            proof=proof_for(transmitter, finite_key, smooth=smooth),
        )

    def loss(settings: NDArray[np.float64]) -> float:
        try:
            transmitter = _source(settings, pairs)
        except ConfigError:
            return math.inf
        if transmitter.key_basis_probability**-2 > DETECTIONS_PER_BIT:
            return math.inf
        length, pulses = expected(transmitter, smooth=True)
        # Where there is no key, less of a debt is better, so that the search finds its way out.
        return -math.log(length.real / pulses) if length.real > 0 else NO_KEY - length.real / pulses

    def search(start: NDArray[np.float64], tolerance: float) -> tuple[float, NDArray[np.float64]]:
        from scipy.optimize import minimize  # noqa: PLC0415  # 0.3 s, and few processes search

        options = {"maxiter": 1500, "xatol": 0.3 * math.sqrt(tolerance), "fatol": tolerance}
        found = minimize(loss, start, method="Nelder-Mead", options=options)
        return float(found.fun), found.x

    def roughly(start: tuple[float, ...]) -> tuple[float, NDArray[np.float64]]:
        least, best = search(_free(start, pairs is not None), max(ROUGH, tolerance))
        # Where there is no key, it is nearly flat, so that a rough search ends at once.
        return search(best, tolerance) if least >= NO_KEY else (least, best)

    starts = STARTS[0 if pairs else intensities] if near is None else (_start(near),)
    if pairs is None and channel.gain(0.5) * channel.dead_pulses > 0.5:
        starts += DEAD_STARTS[intensities]
    least, best = min((roughly(start) for start in starts), key=lambda one: one[0])
    for _ in range(1 + RESTARTS):  # a simplex may shrink before it has arrived
        before, (least, best) = least, search(best, tolerance)
        if before - least < 100.0 * tolerance:
            break
    transmitter = _source(best, pairs)
    length, pulses = expected(transmitter, smooth=False)
    if length.real <= 0.0:
        return None
    return Optimum(transmitter=transmitter, length=length, pulses=pulses, rate=length.real / pulses)


def _best(preset: Preset, block_bits: float, **more: Any) -> Optimum | None:
    """:func:`optimise` for the channel and the kind of source of a preset."""
    source = preset.transmitter
    return optimise(
        preset.channel,
        key_detections=block_bits,
        f=preset.efficiency,
        intensities=len(source.probabilities),
        security=preset.security,
        pairs=source if isinstance(source, PairSource) else None,
        **more,
    )


def tuned(
    preset: Preset, block_bits: int, *, finite_key: str = FINITE_KEY[0], where: str | None = None
) -> Preset:
    """A preset with the best settings for its distance and blocks of ``block_bits``.

    ``where``: what the light passes through, in words, if it is not a fibre. Raises ``NoKeyError``
    where no key can be made at all, and ``ConfigError``.
    """
    within("block_bits", block_bits, *BLOCK_BITS)
    instance("preset", preset, Preset)
    best = _best(preset, block_bits, finite_key=finite_key)
    if best is None:
        remedy = "shorten the fibre" if where is None else "choose a higher pass"
        where = where or f"{preset.channel.distance_km:g} km"
        raise NoKeyError(
            f"{preset.name} makes no key over {where} in blocks of {block_bits} bits; {remedy} or "
            "make the blocks larger"
        )
    return replace(preset, transmitter=_rounded(best.transmitter))


def rates(
    preset: Preset, block_bits: float, *, finite_key: str = FINITE_KEY[0]
) -> list[tuple[float, float]]:
    """Distances in km and secret bits per pulse with good settings at each, until the key ends.

    The best settings are searched for every :data:`ANCHOR_KM` and near the end, and interpolated
    between them. The rate is the bound for these settings at each distance. Raises
    ``ConfigError``.
    """
    within("block_bits", block_bits, *BLOCK_BITS)
    source = instance("preset", preset, Preset).transmitter
    pairs = source if isinstance(source, PairSource) else None

    def rate(distance: float, settings: NDArray[np.float64]) -> float:
        chosen = _source(settings, pairs)
        length, pulses = expected_length(
            preset.channel.at(distance),
            chosen,
            key_detections=block_bits,
            f=preset.efficiency,
            security=preset.security,
            proof=proof_for(chosen, finite_key),
        )
        return length.real / pulses

    anchors: list[tuple[float, NDArray[np.float64]]] = []
    near: Source | None = None
    distance, step = 0.0, ANCHOR_KM
    while step >= ANCHOR_KM / 8.0:
        best = _best(
            preset.at(distance), block_bits, near=near, finite_key=finite_key, tolerance=3e-4
        )
        if best is not None:
            near = best.transmitter
            anchors.append((distance, _free(_start(near), pairs is not None)))
        elif not anchors:
            return []
        else:  # back to the last distance with a key, and on in smaller steps
            step /= 2.0
        distance = anchors[-1][0] + step
    places = np.array([place for place, _ in anchors])
    columns = np.array([settings for _, settings in anchors]).T
    found: list[tuple[float, float]] = []
    distance = 0.0
    while (
        one := rate(distance, np.array([np.interp(distance, places, c) for c in columns]))
    ) > 0.0:
        found.append((distance, one))
        distance += CURVE_KM
    return found


def _rounded(source: Source) -> Transmitter | PairSource:
    """Rounded to four places, so that both ends have the same settings."""
    q = round(source.key_basis_probability, 4)
    if isinstance(source, PairSource):
        return replace(source, brightness=round(source.brightness, 4), key_basis_probability=q)
    assert isinstance(source, Transmitter)
    p = [round(share, 4) for share in source.probabilities[:-1]]
    return Transmitter(
        intensities=tuple(round(mean, 4) for mean in source.intensities),
        probabilities=(*p, round(1.0 - sum(p), 4)),
        key_basis_probability=q,
    )
