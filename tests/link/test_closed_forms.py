"""The formulas against figures that were computed from the papers apart from this code."""

import math

import pytest

from hybridkex.errors import ConfigError
from hybridkex.link import asymptotic
from hybridkex.link.finite_key import (
    Counts,
    OneDecoy,
    Published,
    SecretLength,
    Security,
    TwoDecoys,
    expected_counts,
)
from hybridkex.link.optimise import expected_length, optimise
from hybridkex.link.physics import Channel, Transmitter
from hybridkex.link.presets import PRESETS, preset

GYS = PRESETS["gys2005"].channel
LIM = PRESETS["lim2014"].channel
F_GYS = 1.22


def digits(value: float, printed: str) -> bool:
    """Whether a value agrees with a printed one in all of the digits printed.

    Zeros at the end of a long integer are places, not digits.
    """
    mantissa = printed.lower().partition("e")[0]
    mantissa = mantissa.replace(".", "").lstrip("0") if "." in mantissa else mantissa.rstrip("0")
    return float(f"{value:.{len(mantissa) - 1}e}") == pytest.approx(float(printed), rel=1e-12)


# -- Ma, Qi, Zhao, Lo 2005


def test_ma_at_no_distance() -> None:
    assert digits(asymptotic.gain(GYS, 0.48), "2.13701e-2")
    assert digits(asymptotic.error_rate(GYS, 0.48), "0.033037")
    assert digits(asymptotic.infinite_decoy_rate(GYS, 0.48, f=F_GYS), "2.5546e-3")


@pytest.mark.parametrize(
    ("distance", "rate"),
    [
        (20, "9.6245e-4"),
        (50, "2.22595e-4"),
        (100, "1.71844e-5"),
        (120, "4.8145e-6"),
        (140, "2.4645e-7"),
    ],
)
def test_ma_rates(distance: float, rate: str) -> None:
    assert digits(asymptotic.infinite_decoy_rate(GYS.at(distance), 0.48, f=F_GYS), rate)


@pytest.mark.parametrize(
    ("distance", "printed"),
    [
        (
            50,
            "1.924950e-3 .033412 2.022114e-4 .036926 3.954807e-3 .035398 2.096250e-4",
        ),
        (
            100,
            "1.732602e-4 .037582 1.957223e-5 .073563 3.539934e-4 .037492 1.602005e-5",
        ),
    ],
)
def test_ma_vacuum_and_weak(distance: float, printed: str) -> None:
    channel = GYS.at(distance)
    single = asymptotic.decoy_bounds(channel, 0.48, 0.05)
    found = (
        asymptotic.gain(channel, 0.48),
        asymptotic.error_rate(channel, 0.48),
        asymptotic.gain(channel, 0.05),
        asymptotic.error_rate(channel, 0.05),
        single.yield_1,
        single.error_1,
        asymptotic.vacuum_weak_rate(channel, 0.48, 0.05, f=F_GYS),
    )
    for value, text in zip(found, printed.split(), strict=True):
        assert digits(value, text), (value, text)


def last_positive(rate: "list[tuple[float, float]]") -> float:
    return max(distance for distance, value in rate if value > 0)


@pytest.mark.parametrize(
    ("decoy", "farthest"), [(None, 142.0), (0.05, 140.6), (0.1, 139.1), (0.01, 141.7)]
)
def test_ma_maximum_distances(decoy: float | None, farthest: float) -> None:
    def rate(distance: float) -> float:
        channel = GYS.at(distance)
        if decoy is None:
            return asymptotic.infinite_decoy_rate(channel, 0.48, f=F_GYS)
        return asymptotic.vacuum_weak_rate(channel, 0.48, decoy, f=F_GYS)

    steps = [(step / 100, rate(step / 100)) for step in range(13000, 14500)]
    assert abs(last_positive(steps) - farthest) <= 0.06


def test_ma_best_intensity_reaches_a_little_farther() -> None:
    best = [
        max(
            asymptotic.infinite_decoy_rate(GYS.at(step / 20), mu / 100, f=F_GYS)
            for mu in range(30, 70)
        )
        for step in range(2830, 2860)
    ]
    farthest = max(
        step / 20 for step, rate in zip(range(2830, 2860), best, strict=True) if rate > 0
    )
    assert abs(farthest - 142.2) <= 0.06


def test_two_real_decoys_are_below_vacuum_and_weak_and_near_it() -> None:
    channel = GYS.at(50)
    ideal = asymptotic.infinite_decoy(channel)
    vacuum = asymptotic.decoy_bounds(channel, 0.48, 0.05)
    two = asymptotic.decoy_bounds(channel, 0.48, 0.05, 0.01)
    assert two.yield_1 < vacuum.yield_1 < ideal.yield_1
    assert two.error_1 > vacuum.error_1 > ideal.error_1


def repeaterless_bound(transmittance: float) -> float:
    """PLOB: no repeaterless link makes more than ``-log2(1 - eta)`` bits per pulse.

    Pirandola, Laurenza, Ottaviani, Banchi, Nat. Commun. 8, 15043 (2017).
    """
    return math.inf if transmittance >= 1.0 else -math.log2(1.0 - transmittance)


def test_no_rate_exceeds_the_repeaterless_bound() -> None:
    for distance in range(0, 150, 10):
        channel = GYS.at(distance)
        rate = asymptotic.infinite_decoy_rate(channel, 0.48, f=1.0)
        assert rate < repeaterless_bound(channel.eta)
    assert repeaterless_bound(1.0) == math.inf


# What tno.quantum.communication.qkd_key_rate 2.0.4 gives (BB84FullyAsymptoticKeyRateEstimate, mean
# photon number 0.48), as printed by benchmarks/qkd_link.py: dB of fibre, secret bits per pulse. Its
# q and f are 1, and it counts vacuum events as secret, which at GYS is most of the difference.
TNO = {
    "gys2005": (
        (0, 0.006094648558042511),
        (2.5, 0.0034137256980422753),
        (5, 0.0019141977989754711),
        (7.5, 0.0010735233900291538),
        (10, 0.000601596290473488),
    ),
    "rusca2018": (
        (0, 0.04720377063756112),
        (2.5, 0.026459146998531233),
        (5, 0.014851182521880573),
        (7.5, 0.008342441369167578),
        (10, 0.004688408040357223),
    ),
}


@pytest.mark.parametrize("name", TNO)
def test_an_independent_package_agrees(name: str) -> None:
    channel = PRESETS[name].channel
    for loss, rate in TNO[name]:
        there = channel.at(loss / channel.attenuation_db_per_km)
        assert 2 * asymptotic.infinite_decoy_rate(there, 0.48, f=1.0) == pytest.approx(
            rate, rel=0.002
        )


# -- Lim et al. 2014


def lim(
    distance: float, detections: float, settings: tuple[float, ...], *, clamp: bool
) -> tuple[SecretLength, float, Counts]:
    mu_1, mu_2, p_1, p_2, q = settings
    transmitter = Transmitter(
        intensities=(mu_1, mu_2, 2e-4),
        probabilities=(p_1, p_2, 1 - p_1 - p_2),
        key_basis_probability=q,
    )
    channel = LIM.at(distance)
    length, pulses = expected_length(
        channel,
        transmitter,
        key_detections=detections,
        f=1.16,
        proof=TwoDecoys(Published(21, clamp=clamp)),
    )
    return length, pulses, expected_counts(channel, transmitter, pulses)


def test_lim_50_km() -> None:
    length, pulses, counts = lim(50, 1e7, (0.5, 0.2, 0.5, 0.35, 0.8), clamp=False)
    assert digits(pulses, "4703011500")
    assert digits(length.single, "5930309.0")
    assert digits(length.single_test, "333203.84")
    assert digits(length.single_test_errors, "16449.396")
    assert digits(length.phase_error, ".052720153")
    assert digits(counts.key_error_rate, ".024217257")
    assert digits(length.leak, "1908263.8")
    assert digits(length.real, "2255503.7")
    assert digits(length.real / pulses, "4.795871e-4")


def test_lim_50_km_clamped() -> None:
    length, _, _ = lim(50, 1e7, (0.5, 0.2, 0.5, 0.35, 0.8), clamp=True)
    assert digits(length.real, "2475861.8")
    assert digits(length.phase_error, ".044088657")


def test_lim_100_km() -> None:
    length, pulses, _ = lim(100, 1e9, (0.5, 0.15, 0.6, 0.28, 0.9), clamp=True)
    assert digits(length.vacuum, "1889635.2")
    assert digits(length.single, "603951240")
    assert digits(length.single_test, "7200723.0")
    assert digits(length.single_test_errors, "255151.55")
    assert digits(length.phase_error, ".035923262")
    assert digits(length.leak, "199939600")
    assert digits(length.real, "271052300")
    assert digits(length.real / pulses, "7.835193e-5")


def test_lim_0_km() -> None:
    length, pulses, _ = lim(0, 1e6, (0.55, 0.25, 0.3, 0.49, 0.7), clamp=False)
    assert digits(length.real, "197966.93")
    assert digits(length.real / pulses, "2.8406867e-3")


@pytest.mark.parametrize(
    ("distance", "detections", "rate"),
    [
        (0, 1e9, 9.93e-3),
        (0, 1e4, 2.65e-4),
        (50, 1e7, 5.74e-4),
        (100, 1e9, 8.80e-5),
        (100, 1e4, 1.07e-6),
        (150, 1e9, 5.86e-6),
    ],
)
def test_lim_optimised(distance: float, detections: float, rate: float) -> None:
    best = optimise(LIM.at(distance), key_detections=detections, f=1.16, finite_key="published")
    assert best is not None
    assert best.rate == pytest.approx(rate, rel=0.01)


def test_lim_ends_where_it_should() -> None:
    assert optimise(LIM.at(190), key_detections=1e9, f=1.16, finite_key="published") is None


# -- Rusca et al. 2018


def rusca(distance: float, pulses: float) -> tuple[SecretLength, Counts]:
    chosen = PRESETS["rusca2018"].at(distance)
    counts = expected_counts(chosen.channel, chosen.transmitter, pulses)
    h = -sum(p * math.log2(p) for p in (counts.key_error_rate, 1 - counts.key_error_rate))
    length = OneDecoy(Published(19)).secret_length(
        chosen.transmitter,
        counts,
        security=Security(secrecy=1e-9, correctness=1e-15),
        leak=1.16 * sum(counts.key) * h,
    )
    return length, counts


def test_rusca_50_km() -> None:
    length, counts = rusca(50, 1e10)
    assert digits(sum(counts.key), "6.611819e7")
    assert digits(length.single, "3.780912e7")
    assert digits(length.phase_error, ".03028542")
    assert digits(length.real, "2.420783e7")


@pytest.mark.parametrize(
    ("distance", "pulses", "bits"), [(100, 1e11, "2.408934e7"), (150, 1e12, "2.399921e7")]
)
def test_rusca_farther(distance: float, pulses: float, bits: str) -> None:
    assert digits(rusca(distance, pulses)[0].real, bits)


# -- what the bounds refuse


def test_a_proof_wants_its_own_number_of_intensities() -> None:
    two, three = PRESETS["rusca2018"].transmitter, PRESETS["lim2014"].transmitter
    for proof, own, other in ((TwoDecoys(), three, two), (OneDecoy(), two, three)):
        fitting, others = (
            Counts(key=zero, key_errors=zero, test=zero, test_errors=zero)
            for zero in ((0.0,) * len(source.intensities) for source in (own, other))
        )
        for transmitter, counts in ((other, others), (other, fitting), (own, others)):
            with pytest.raises(ConfigError, match="intensities"):
                proof.secret_length(transmitter, counts, security=Security(), leak=0)


def test_no_detections_no_key() -> None:
    for name, proof in (("lim2014", TwoDecoys()), ("rusca2018", OneDecoy())):
        transmitter = PRESETS[name].transmitter
        zero = (0.0,) * len(transmitter.intensities)
        counts = Counts(key=zero, key_errors=zero, test=zero, test_errors=zero)
        length = proof.secret_length(transmitter, counts, security=Security(), leak=0)
        assert length.bits == 0
        assert length.phase_error == 0.5


def test_a_test_basis_without_errors_is_not_believed_blindly() -> None:
    """No error seen among few bits does not mean a phase error rate of zero."""
    chosen = PRESETS["lim2014"].at(0)
    counts = expected_counts(chosen.channel, chosen.transmitter, 1e8)
    spotless = Counts(
        key=counts.key, key_errors=counts.key_errors, test=counts.test, test_errors=(0.0, 0.0, 0.0)
    )
    length = TwoDecoys().secret_length(chosen.transmitter, spotless, security=Security(), leak=0)
    assert 0.0 < length.phase_error < 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("receiver_efficiency", 1.5),
        ("misalignment", -0.1),
        ("distance_km", -1.0),
        ("distance_km", math.inf),
        ("repetition_rate_hz", 0.0),
    ],
)
def test_impossible_channels(name: str, value: float) -> None:
    settings = {"receiver_efficiency": 0.1, "dark_count_probability": 1e-6, "misalignment": 0.01}
    with pytest.raises(ConfigError):
        Channel(**{**settings, name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"intensities": (0.5,), "probabilities": (1.0,)},
        {"intensities": (0.2, 0.5), "probabilities": (0.5, 0.5)},
        {"intensities": (0.5, 0.2), "probabilities": (0.5, 0.4)},
        {"intensities": (0.5, 0.2), "probabilities": (0.5, 0.4, 0.1)},
        {"intensities": (0.5, 0.2), "probabilities": (1.0, 0.0)},
        {"intensities": (0.5, 0.3, 0.25), "probabilities": (0.4, 0.3, 0.3)},
        {"intensities": (2.0, 0.3), "probabilities": (0.4, 0.6)},
    ],
)
def test_impossible_transmitters(settings: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ConfigError):
        Transmitter(**settings, key_basis_probability=0.5)


def test_presets_have_names() -> None:
    assert preset("lim2014") is PRESETS["lim2014"]
    with pytest.raises(ConfigError, match="gys2005, lim2014, rusca2018, boaron2018"):
        preset("other")
    with pytest.raises(ConfigError):
        Security(secrecy=0.0)
