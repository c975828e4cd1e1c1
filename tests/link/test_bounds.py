"""The bounds of finite keys: against independent computations, and against events that they bound.

The coverage tests use failure probabilities so large that a bound which fails too often is seen to.
"""

import functools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import scipy  # its modules are loaded when a test needs them: scipy.stats takes 0.3 s
from scipy.optimize import brentq
from scipy.special import rel_entr

from hybridkex.link.finite_key import (
    Counts,
    OneDecoy,
    Published,
    Security,
    Tight,
    TwoDecoys,
    expected_counts,
    proof_for,
)
from hybridkex.link.physics import Transmitter
from hybridkex.link.presets import PRESETS
from hybridkex.link.statistics import (
    binary_entropy,
    mean_lower,
    mean_upper,
    trials_upper,
    unseen_errors,
)

POINTS = 200


def divergence(x: float, p: float) -> float:
    return float(rel_entr(x, p) + rel_entr(1.0 - x, 1.0 - p))


def test_means_solve_their_equation() -> None:
    draw = np.random.default_rng(1)
    for _ in range(POINTS):
        total = 10 ** draw.uniform(2, 9)
        share = draw.random() ** draw.choice([1, 5, 20])
        failure = 10 ** -draw.uniform(1, 30)
        goal = math.log(1 / failure) / total
        upper = mean_upper(share * total, total, failure) / total
        lower = mean_lower(share * total, total, failure) / total
        top = 1.0 - 1e-15
        root = brentq(lambda p: divergence(share, p) - goal, share, top, xtol=1e-300, rtol=1e-14)  # noqa: B023
        assert upper == pytest.approx(root, rel=1e-9)
        if lower:
            log = brentq(lambda t: divergence(share, math.exp(t)) - goal, -690, math.log(share))  # noqa: B023
            assert lower == pytest.approx(math.exp(log), rel=1e-9)
        # Never worse than the square root that follows from it.
        square = math.sqrt(goal / 2)
        assert share - square <= lower * (1 + 1e-9) <= share <= upper * (1 + 1e-9)
        assert upper <= share + square + 1e-9


def test_rounding_of_means_is_on_the_safe_side() -> None:
    """In 40 digits: where totals are large, doubles lose most digits of a divergence's terms."""
    draw = np.random.default_rng(6)

    def exact(x: Decimal, p: Decimal) -> Decimal:
        return x * (x / p).ln() + (1 - x) * ((1 - x) / (1 - p)).ln()

    with localcontext() as context:
        context.prec = 40
        for _ in range(5 * POINTS):
            total = 10 ** draw.uniform(1, 12)
            seen = total * float(draw.random()) ** int(draw.choice([1, 5, 20]))
            failure = 10 ** -draw.uniform(0.1, 30)
            share = Decimal(seen) / Decimal(total)
            goal = -Decimal(failure).ln() / Decimal(total)
            for bound in (mean_lower(seen, total, failure), mean_upper(seen, total, failure)):
                if 0.0 < bound < total:
                    assert exact(share, Decimal(bound) / Decimal(total)) >= goal


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("total", [0.0, 1.0, 1e3])
def test_means_at_their_ends(share: float, total: float) -> None:
    lower, upper = mean_lower(share * total, total, 1e-9), mean_upper(share * total, total, 1e-9)
    assert 0.0 <= lower <= share * total <= upper <= total


@functools.cache
def factorial(n: int) -> int:
    return math.factorial(n)


def exact_tail(seen: int, sample: int, wrong: int, total: int) -> Fraction:
    """Pr[H <= seen] in integers."""
    ways = sum(
        math.comb(wrong, i) * math.comb(total - wrong, sample - i) for i in range(0, seen + 1)
    )
    return Fraction(ways, math.comb(total, sample))


def test_unseen_errors_in_exact_arithmetic() -> None:
    """The bound is the last number of errors that is possible, or (rounding up) the next."""
    draw = np.random.default_rng(2)
    exact = 0
    for _ in range(POINTS):
        unseen, sample = int(draw.integers(1, 300)), int(draw.integers(1, 300))
        seen = int(sample * draw.random() ** 2 * 0.7)
        failure = 10 ** -draw.uniform(1, 20)
        found = unseen_errors(unseen, sample, seen, failure)
        goal, total = Fraction(failure), unseen + sample
        possible = [
            errors
            for errors in range(max(0, found - 1), min(unseen, found + 2) + 1)
            if exact_tail(seen, sample, seen + errors, total) >= goal
        ]
        assert max(possible, default=0) <= found
        exact += max(possible, default=0) == found
    assert exact >= POINTS - 2


def test_unseen_errors_at_size_against_scipy() -> None:
    draw = np.random.default_rng(3)
    for _ in range(POINTS):
        unseen, sample = (int(10 ** draw.uniform(2, 6)) for _ in range(2))
        seen = int(sample * draw.random() ** 3 * 0.3)
        failure = 10 ** -draw.uniform(1, 20)
        found = unseen_errors(unseen, sample, seen, failure)
        if found < unseen:
            above = scipy.stats.hypergeom.cdf(seen, unseen + sample, seen + found + 1, sample)
            assert above < failure * (1 + 1e-6)
        below = scipy.stats.hypergeom.cdf(seen, unseen + sample, seen + max(0, found - 2), sample)
        assert below >= failure * 0.99 or found <= 2


def test_unseen_errors_grow_with_the_errors_seen() -> None:
    """What the monotonicity argument of the proof needs."""
    for unseen, sample in ((50, 30), (1000, 77), (77, 1000), (10**6, 10**4)):
        found = [unseen_errors(unseen, sample, seen, 1e-10) for seen in range(30)]
        assert found == sorted(found)


def test_fair_coins() -> None:
    for heads in (0, 1, 5, 40, 1000, 10**6):
        for failure in (0.1, 1e-5, 1e-11):
            most = math.ceil(trials_upper(heads, failure))
            assert scipy.stats.binom.cdf(heads, most, 0.5) <= failure * (1 + 1e-9)
            assert most >= 2 * heads


# -- coverage: events that happen, and bounds that must not fail more often than they say


def failures(events: int, blocks: int, failure: float) -> bool:
    """Whether so many failures are more than the probability explains (level 1e-6)."""
    return bool(scipy.stats.binom.sf(events - 1, blocks, failure) < 1e-6)


@pytest.mark.parametrize("errors", [1, 5, 25, 200])
@pytest.mark.parametrize(("unseen", "sample"), [(2000, 2000), (20_000, 2000), (500, 3000)])
def test_unseen_errors_cover(errors: int, unseen: int, sample: int) -> None:
    draw = np.random.default_rng(errors)
    failure, blocks = 0.02, 20_000
    seen = draw.hypergeometric(errors, unseen + sample - errors, sample, blocks)
    bounds = {value: unseen_errors(unseen, sample, value, failure) for value in set(seen.tolist())}
    missed = sum(errors - value > bounds[value] for value in seen.tolist())
    assert not failures(missed, blocks, failure)


def test_the_published_gap_does_not_cover() -> None:
    """Why it is not the default: with few errors it fails far more often than it was allotted."""
    security = Security(secrecy=1e-9)
    allotted = (security.secrecy / 21) ** 2
    sample = unseen = 10_000
    worst = 0.0
    for errors in range(1, 60):
        for seen in (0, 1):
            rate = Published(21).phase_error(seen, sample, unseen, security)
            if (errors - seen) / unseen > rate:
                worst = max(worst, scipy.stats.hypergeom.cdf(seen, unseen + sample, errors, sample))
    assert worst > 1e6 * allotted
    tight = Tight().phase_error(1, sample, unseen, security)
    least = math.floor(tight * unseen) + 2
    assert (
        scipy.stats.hypergeom.cdf(1, unseen + sample, least, sample) <= (security.secrecy / 15) ** 2
    )


@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
def test_expectations_cover(name: str) -> None:
    """Photon numbers are drawn, then intensities: what the theorem is about."""
    transmitter = PRESETS[name].transmitter
    security = Security(secrecy=15 * 0.02)
    draw = np.random.default_rng(4)
    kinds, blocks, detections = len(transmitter.intensities), 4000, 3000
    weights = np.array(
        [
            [
                p * math.exp(-k) * k**n / math.factorial(n)
                for k, p in zip(transmitter.intensities, transmitter.probabilities, strict=True)
            ]
            for n in (0, 1, 2)
        ]
    )
    given = weights / weights.sum(axis=1, keepdims=True)
    photons = (50, detections - 550, 500)
    counts = sum(draw.multinomial(n, row, blocks) for n, row in zip(photons, given, strict=True))
    truth = sum(n * row for n, row in zip(photons, given, strict=True))
    scales = [
        math.exp(k) / p
        for k, p in zip(transmitter.intensities, transmitter.probabilities, strict=True)
    ]
    missed = np.zeros((2, kinds))
    for row in counts:
        found = Tight().expectations(transmitter, row.tolist(), security)
        for i in range(kinds):
            missed[0, i] += found.lower(i) > scales[i] * truth[i]
            missed[1, i] += found.upper(i) < scales[i] * truth[i]
    assert not any(failures(int(one), blocks, 0.02) for one in missed.ravel())


# -- the length as a whole, written a second time


def second_opinion(transmitter: Transmitter, counts: Counts, leak: float, eps: float) -> float:
    """The tight length from scipy alone, in the notation of the papers."""
    share, mu, p = eps / 15, transmitter.intensities, transmitter.probabilities
    tau = [
        sum(b * math.exp(-a) * a**n / math.factorial(n) for a, b in zip(mu, p, strict=True))
        for n in (0, 1)
    ]

    def mean(n: float, total: float, sign: int) -> float:
        x, goal = n / total, math.log(1 / share) / total
        if sign > 0:
            return total * float(
                brentq(lambda q: divergence(x, q) - goal, x, 1 - 1e-15, xtol=1e-17)
            )
        if n == 0:
            return 0.0
        return total * math.exp(
            brentq(lambda t: divergence(x, math.exp(t)) - goal, -690, math.log(x), xtol=1e-15)
        )

    def scaled(n: tuple[float, ...], sign: int) -> list[float]:
        return [math.exp(a) / b * mean(c, sum(n), sign) for a, b, c in zip(mu, p, n, strict=True)]

    def single(n: tuple[float, ...], m: tuple[float, ...]) -> float:
        low, high = scaled(n, -1), scaled(n, +1)
        if len(mu) == 3:
            s0 = max(0.0, tau[0] * (mu[1] * low[2] - mu[2] * high[1]) / (mu[1] - mu[2]))
            inside = low[1] - high[2]
            inside -= (mu[1] ** 2 - mu[2] ** 2) / mu[0] ** 2 * (high[0] - s0 / tau[0])
            return tau[1] * mu[0] * inside / (mu[0] * (mu[1] - mu[2]) - mu[1] ** 2 + mu[2] ** 2)
        wrong = tau[0] * min(scaled(m, +1))
        most = brentq(
            lambda s: s * divergence(wrong / s, 0.5) - math.log(1 / share),
            2 * wrong,
            10 * wrong + 1000,
            xtol=1e-10,
        )
        inside = low[1] - (mu[1] / mu[0]) ** 2 * high[0]
        inside -= (mu[0] ** 2 - mu[1] ** 2) / mu[0] ** 2 * min(most, sum(n)) / tau[0]
        return tau[1] * mu[0] / (mu[1] * (mu[0] - mu[1])) * inside

    s1, z1 = single(counts.key, counts.key_errors), single(counts.test, counts.test_errors)
    high, low = scaled(counts.test_errors, +1), scaled(counts.test_errors, -1)
    pair = (1, 2) if len(mu) == 3 else (0, 1)
    v = tau[1] * (high[pair[0]] - low[pair[1]]) / (mu[pair[0]] - mu[pair[1]])
    rate = 0.5
    if s1 >= 1 and z1 >= 1:
        key, test, seen = math.floor(s1), math.floor(z1), math.floor(v)
        a, b = 0, key
        while b - a > 1:
            middle = (a + b) // 2
            tail = scipy.stats.hypergeom.cdf(seen, key + test, seen + middle, test)
            a, b = (middle, b) if tail >= share**2 else (a, middle)
        rate = min(0.5, a / key)
    secret = min(max(0.0, s1) * (1 - binary_entropy(rate)), sum(counts.key))
    price = 4 * math.log2(15 / (eps * 2**0.25)) + math.log2(2 / 1e-15)
    return secret - leak - price


@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
def test_the_tight_length_is_what_scipy_makes_of_it(name: str) -> None:
    draw = np.random.default_rng(5)
    chosen = PRESETS[name]
    positive = 0
    for _ in range(POINTS // 2):
        mu_1, low = draw.uniform(0.4, 0.7), draw.uniform(0.1, 0.25)
        kinds = len(chosen.transmitter.intensities)
        p = draw.uniform(0.2, 0.6), draw.uniform(0.1, 0.3)
        transmitter = Transmitter(
            intensities=(mu_1, low, 2e-4)[:kinds],
            probabilities=(*p, 1 - sum(p)) if kinds == 3 else (p[0], 1 - p[0]),
            key_basis_probability=draw.uniform(0.5, 0.9),
        )
        channel = chosen.channel.at(draw.uniform(0, 60))
        expected = expected_counts(channel, transmitter, 10 ** draw.uniform(8, 9.5))
        counts = Counts(
            **{
                one: tuple(float(value) for value in draw.poisson(getattr(expected, one)))
                for one in ("key", "key_errors", "test", "test_errors")
            }
        )
        leak = 1.1 * sum(counts.key) * binary_entropy(counts.key_error_rate)
        eps = 10 ** -draw.uniform(3, 12)
        found = proof_for(transmitter).secret_length(
            transmitter, counts, security=Security(secrecy=eps), leak=leak
        )
        assert found.real == pytest.approx(
            second_opinion(transmitter, counts, leak, eps),
            rel=1e-6,
            abs=10.0,  # one error more or less
        )
        positive += found.bits > 0
    assert positive > POINTS // 6


def test_tight_gives_more_key_where_counts_are_small_against_pulses() -> None:
    for name, distance, least in (("lim2014", 50, 1.3), ("rusca2018", 50, 1.2)):
        chosen = PRESETS[name].at(distance)
        counts = expected_counts(chosen.channel, chosen.transmitter, 4e8)
        leak = 1.1 * sum(counts.key) * binary_entropy(counts.key_error_rate)
        lengths = [
            proof_for(chosen.transmitter, kind)
            .secret_length(chosen.transmitter, counts, security=Security(), leak=leak)
            .real
            for kind in ("published", "tight")
        ]
        assert lengths[1] > least * lengths[0] > 0


def test_kinds_of_proofs() -> None:
    assert proof_for(PRESETS["lim2014"].transmitter) == TwoDecoys(Tight())
    assert proof_for(PRESETS["rusca2018"].transmitter, "published") == OneDecoy(Published(19))
    assert proof_for(PRESETS["lim2014"].transmitter, "published") == TwoDecoys(Published(21))


def test_errors_below_zero_are_none() -> None:
    """Counts that contradict each other bound the errors of single photons below zero."""
    for statistics in (Tight(), Tight(smooth=True), Published(terms=21), Published(terms=19)):
        rates = [
            statistics.phase_error(wrong, 1e4, 1e6, Security())
            for wrong in (-1e9, -1000.0, -1.0, -1e-9, 0.0)
        ]
        assert len(set(rates)) == 1
        assert rates[0] > 1e-4
