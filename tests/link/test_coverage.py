"""Tagged simulation: the photon number of each detection is known here, and so is the truth.

No bound may fail more often than its share of epsilon, and no key may be longer than what its
single photons are worth. Epsilon is large in these tests, so that failures can be seen.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy  # its modules are loaded when a test needs them: scipy.stats takes 0.3 s

from hybridkex.link.eavesdroppers import InterceptResend, NoEve, eavesdropper
from hybridkex.link.finite_key import Counts, SecretLength, Security, proof_for
from hybridkex.link.physics import Channel, photon_chances
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.statistics import binary_entropy

SHARE = 0.02
"""Of epsilon, for each bound."""
SECURITY = Security(secrecy=15 * SHARE, correctness=1e-9)
LINKS = (
    ("gys2005", 10.0, 20_000),
    ("lim2014", 10.0, 10_000),
    ("lim2014", 60.0, 50_000),
    ("rusca2018", 50.0, 20_000),
    ("boaron2018", 100.0, 50_000),
)
EVES = ("none", "intercept:0.1", "pns", "key-basis")
MOST = 6
"""Photon numbers that are told apart; the last stands for it and all above."""


@dataclass(frozen=True)
class OneBasis(NoEve):
    """Eve measures a share of the pulses in the key basis: errors are in the test basis alone."""

    share: float = 0.1


def cells(chosen: Preset, eve: NoEve, *, test: bool) -> "np.ndarray":
    """Probability of a detection by intensity, photon number, and whether the bit is wrong."""
    channel = chosen.channel
    yields = np.asarray(eve.yields(np.arange(41)))
    found = np.zeros((len(chosen.transmitter.intensities), MOST, 2))
    wrong_signal = eve.signal_error
    if isinstance(eve, OneBasis):
        half = channel.misalignment + 0.5 * (1 - 2 * channel.misalignment)
        mixed = (1 - eve.share) * channel.misalignment + eve.share * half
        wrong_signal = mixed if test else channel.misalignment
    for i, (k, p) in enumerate(
        zip(chosen.transmitter.intensities, chosen.transmitter.probabilities, strict=True)
    ):
        for n, chance in enumerate(photon_chances(k)):
            signal = float(yields[n])
            click = channel.click(signal)
            wrong = channel.dark_count_probability * (1 - signal) + wrong_signal * signal
            found[i, min(n, MOST - 1)] += p * chance * np.array([click - wrong, wrong])
    return found


def truth(channel: Channel, length: SecretLength, s_1: int, phase: int, leak: float) -> float:
    rate = min(0.5, phase / s_1) if s_1 else 0.5
    return s_1 * (1 - binary_entropy(rate)) - leak


def run(name: str, distance: float, detections: int, attack: str, blocks: int, seed: int) -> dict:
    """Counts of failures: one for each bound, and of keys that are too long."""
    chosen = PRESETS[name].at(distance)
    channel = chosen.channel
    if attack == "key-basis":
        eve: NoEve = OneBasis(channel)
    elif attack == "none":
        eve = NoEve(channel)
    else:
        eve = eavesdropper(attack, channel, chosen.transmitter)
    draw = np.random.default_rng(seed)
    q = chosen.transmitter.key_basis_probability
    tables = [cells(chosen, eve, test=test) for test in (False, True)]
    weights = [q**2, (1 - q) ** 2]
    flat = np.concatenate([w * t.ravel() for w, t in zip(weights, tables, strict=True)])
    drawn = draw.multinomial(detections, flat / flat.sum(), blocks).reshape(
        blocks, 2, *tables[0].shape
    )
    # A single photon has a phase error as often as one of the test basis has a wrong bit.
    single = tables[1][:, 1].sum(axis=0)
    proof = proof_for(chosen.transmitter)
    found = dict.fromkeys(("single", "test", "wrong", "phase", "long", "keys"), 0)
    for block in drawn:
        key, test = block
        counts = Counts(
            key=tuple(map(float, key.sum(axis=(1, 2)))),
            key_errors=tuple(map(float, key[..., 1].sum(axis=1))),
            test=tuple(map(float, test.sum(axis=(1, 2)))),
            test_errors=tuple(map(float, test[..., 1].sum(axis=1))),
        )
        leak = 1.05 * key.sum() * binary_entropy(counts.key_error_rate)
        length = proof.secret_length(chosen.transmitter, counts, security=SECURITY, leak=leak)
        s_1, z_1, v_1 = int(key[:, 1].sum()), int(test[:, 1].sum()), int(test[:, 1, 1].sum())
        phase = int(draw.binomial(s_1, single[1] / single.sum())) if s_1 else 0
        found["single"] += length.single > s_1
        found["test"] += length.single_test > z_1
        found["wrong"] += length.single_test_errors < v_1
        sound = length.single <= s_1 and length.single_test <= z_1
        sound = sound and length.single_test_errors >= v_1
        # The bound is on a random subset of the singles, of the size that is certain.
        size = math.floor(length.single)
        if sound and length.phase_error < 0.5:
            part = int(draw.hypergeometric(phase, s_1 - phase, size))
            found["phase"] += part > length.phase_error * size * (1 + 1e-9)
        found["keys"] += length.bits > 0
        found["long"] += length.bits > max(0.0, truth(channel, length, s_1, phase, leak))
    return found


def more_than(events: int, blocks: int, chance: float) -> bool:
    """Whether so many events are more than the probability explains (level 1e-6)."""
    return bool(scipy.stats.binom.sf(events - 1, blocks, chance) < 1e-6)


def check(blocks: int) -> dict[str, int]:
    total: dict[str, int] = {}
    for number, (name, distance, detections) in enumerate(LINKS):
        for attack in EVES:
            found = run(name, distance, detections, attack, blocks, number)
            # A lower bound on single photons rests on five expectations, on errors on two.
            assert not more_than(found["single"], blocks, 5 * SHARE), (name, attack, found)
            assert not more_than(found["test"], blocks, 5 * SHARE), (name, attack, found)
            assert not more_than(found["wrong"], blocks, 2 * SHARE), (name, attack, found)
            assert not more_than(found["phase"], blocks, SHARE**2), (name, attack, found)
            for what, count in found.items():
                total[what] = total.get(what, 0) + count
    return total


def test_no_bound_fails_more_often_than_it_may() -> None:
    total = check(25)
    assert total["keys"] > 100
    assert total["long"] == 0


@pytest.mark.slow
def test_ten_thousand_blocks() -> None:
    total = check(500)
    assert total["keys"] > 2000
    assert total["long"] == 0


def test_intercept_resend_is_a_kind_of_light() -> None:
    """The cells are those of the link's own sampling."""
    chosen = PRESETS["lim2014"].at(10)
    eve = InterceptResend(chosen.channel, 0.3)
    table = cells(chosen, eve, test=True).sum(axis=1)
    for i, (k, p) in enumerate(
        zip(chosen.transmitter.intensities, chosen.transmitter.probabilities, strict=True)
    ):
        gain = chosen.channel.gain(k) / (1 + chosen.channel.afterpulse_probability)
        assert table[i].sum() == pytest.approx(p * gain, rel=1e-9)
